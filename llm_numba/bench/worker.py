"""PyTorch in processes of its own: one as installed, one in which Intel's MKL takes its AVX-512 path on AMD."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

AVX512_SHIM = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


class WorkerFailed(Exception):
    """PyTorch could not do what it was asked to; the message is one line."""


class Build(NamedTuple):
    """A way to run PyTorch: on which device (cpu or cuda), in which precision (one of torch_side's), and with which
    library loaded before its own."""

    device: str = "cpu"
    precision: str = "fp32"
    preload: Path | None = None


@contextlib.contextmanager
def torch_worker(build: Build = Build()) -> Iterator[Callable]:  # noqa: B008
    """A function ask(name, **arguments) that calls a function of torch_side in a new process, which ends with this."""
    environment = dict(os.environ)
    environment.pop("OMP_WAIT_POLICY", None)  # llm_numba's choice, not PyTorch's
    if build.device == "cpu":
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no helper processes beside the one timed
    if build.preload:
        environment["LD_PRELOAD"] = " ".join([str(build.preload), *environment.get("LD_PRELOAD", "").split()])
    with tempfile.TemporaryFile("w+", errors="replace") as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", "llm_numba.bench.torch_side"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True, env=environment,
            start_new_session=True,  # Ctrl-C is for us; we end it
        )  # fmt: skip

        def ask(name: str, **arguments):
            try:
                print(json.dumps([name, arguments]), file=process.stdin, flush=True)
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                raise WorkerFailed(f"the process ended with status {process.wait()}: {last_line(messages)}")
            answer = json.loads(answer)
            if "failed" in answer:
                raise WorkerFailed(answer["failed"])
            return answer["value"]

        try:
            yield ask
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """Kill it, and the compiler that it may be waiting for."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()
    process.communicate()


def last_line(file) -> str:
    file.seek(0)
    return (file.read().strip().splitlines() or ["it said nothing"])[-1]


def build_shim(folder: Path, cpu: str, features: dict[str, bool]) -> tuple[Path | None, str]:
    """(a library that makes MKL take its AVX-512 path, ""), or (None, why there is none).

    MKL asks its own `mkl_serv_intel_cpu_true` whether the processor is Intel's, and takes an AVX2 path where it is not.
    cpu, features: LLVM's name of the processor, and what it has.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not cpu.startswith("znver"):
        return None, "not needed: only on AMD processors does MKL leave AVX-512 aside"
    if not features.get("avx512f"):
        return None, "this processor has no AVX-512"
    if not sys.platform.startswith("linux"):
        return None, f"a library can be preloaded on Linux only, this is {sys.platform}"
    if not compiler:
        return None, "no C compiler for the one-function library that it takes: install gcc or clang"
    source, library = folder / "intel_cpu_true.c", folder / "intel_cpu_true.so"
    source.write_text(AVX512_SHIM)
    done = subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True)
    if done.returncode:
        return None, f"{compiler} failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}"
    return library, ""
