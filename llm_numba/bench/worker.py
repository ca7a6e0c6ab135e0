"""Run PyTorch in separate processes: as installed, or with MKL's AVX-512 path enabled on AMD CPUs."""

import contextlib
import importlib.util
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

from llm_numba.util.cli import UserError

AVX512_SHIM = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


class WorkerFailed(Exception):
    """PyTorch failed; the message is one line."""


class Build(NamedTuple):
    """How to run PyTorch: device (cpu or cuda), precision (a key of torch_side.DTYPES), library to preload, and the
    only attention to use ("cudnn"; "": PyTorch chooses)."""

    device: str = "cpu"
    precision: str = "fp32"
    preload: Path | None = None
    attention: str = ""
    modes: tuple[str, ...] = ()  # of `tables.MODES`; (): all


def require_torch(what: str) -> None:
    """Errors: UserError if PyTorch is not installed; `what` is the flag or command that needs it."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{what}: PyTorch is not installed; run: pip install torch")


@contextlib.contextmanager
def torch_worker(build: Build = Build()) -> Iterator[Callable]:  # noqa: B008
    """Start a process and yield ask(name, **arguments), which calls a function of torch_side in it.

    Errors: ask raises WorkerFailed if the function fails or the process ends.
    """
    environment = dict(os.environ)
    environment.pop("OMP_WAIT_POLICY", None)  # set by llm_numba; PyTorch keeps its default
    if build.device == "cpu":
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no compiler processes during the timing
    if build.preload:
        environment["LD_PRELOAD"] = " ".join([str(build.preload), *environment.get("LD_PRELOAD", "").split()])
    with tempfile.TemporaryFile("w+", errors="replace") as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", "llm_numba.bench.torch_side"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True, env=environment,
            start_new_session=True,  # Ctrl-C reaches only this process, which then ends the worker
        )  # fmt: skip

        def ask(name: str, **arguments):
            try:
                print(json.dumps([name, arguments]), file=process.stdin, flush=True)
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                status = process.wait()
                messages.seek(0)
                raise WorkerFailed(f"the process ended with status {status}: {last_line(messages.read())}")
            answer = json.loads(answer)
            if "failed" in answer:
                raise WorkerFailed(answer["failed"])
            return answer["value"]

        try:
            yield ask
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """Kill the process and its children, such as a compiler."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()
    process.communicate()


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def build_shim(folder: Path, cpu: str, features: dict[str, bool]) -> tuple[Path | None, str]:
    """(a library that enables MKL's AVX-512 path, ""), or (None, the reason why there is none).

    MKL calls its own `mkl_serv_intel_cpu_true` and uses AVX2 on CPUs that are not Intel's. The library replaces that
    function. cpu, features: the CPU's name and features as LLVM reports them.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not cpu.startswith("znver"):
        return None, "not needed: MKL avoids AVX-512 only on AMD CPUs"
    if not features.get("avx512f"):
        return None, "this CPU has no AVX-512"
    if not sys.platform.startswith("linux"):
        return None, f"preloading a library works only on Linux, not on {sys.platform}"
    if not compiler:
        return None, "no C compiler found: install gcc or clang"
    source, library = folder / "intel_cpu_true.c", folder / "intel_cpu_true.so"
    source.write_text(AVX512_SHIM)
    done = subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True)
    if done.returncode:
        return None, f"{compiler} failed: {last_line(done.stderr)}"
    return library, ""
