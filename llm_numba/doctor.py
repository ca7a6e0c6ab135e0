"""What is installed and which devices work: llm-numba doctor

Prints versions, the CPU, the GPUs, how to install what is missing, and which --device can be used.
"""

import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import psutil

from llm_numba import __version__
from llm_numba.cuda import gpu, variants
from llm_numba.util.cli import EXTRAS, Parser, UserError, exit_with, install
from llm_numba.util.files import format_bytes
from llm_numba.util.host import cgroup_limit, sensible_threads, usable_cpus

PACKAGES = ("numba", "llvmlite", "numpy", "ml_dtypes", "safetensors", "tiktoken")
VECTORS = {"avx512f": "AVX-512, 512 bits", "avx2": "AVX2, 256 bits", "neon": "NEON, 128 bits"}  # widest first


def report(name: str, say: Callable[..., str], *arguments) -> bool:
    """Print a row: what say(*arguments) returns, or its error. Returns whether there was none."""
    try:
        text, works = say(*arguments), True
    except Exception as error:
        text, works = explain(error), False
    print(f"  {name:<14} {text}")
    return works


def explain(error: Exception) -> str:
    if isinstance(error, PackageNotFoundError):
        return f"not installed: {install()}"
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"fails: {type(error).__name__}: {text}"


def processor() -> str:
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    width = next((words for feature, words in VECTORS.items() if features.get(feature)), "vector width unknown")
    return f"{llvm.get_host_cpu_name()}, {width}"


def cores() -> str:
    quota, usable = cgroup_limit("cpu.max"), len(usable_cpus())
    limit = f"; its cgroup may use {quota:.3g}" if quota else ""
    return f"{psutil.cpu_count()} logical, {usable} for this process{limit}: {sensible_threads()} threads by default"


def memory() -> str:
    limit, now = cgroup_limit("memory.max"), psutil.virtual_memory()
    allowed = f"; this cgroup may use {format_bytes(limit)}" if limit else ""
    return f"{format_bytes(now.total)}, {format_bytes(now.available)} available{allowed}"


def run_op(device: str) -> str:
    """The result of try_an_op in a subprocess, so that a crash of a library does not end the doctor."""
    program = f"from llm_numba.doctor import try_an_op; print(try_an_op({device!r}))"
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1" if device == "cudasim" else "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        raise UserError(f"an op fails: {lines[-1]}")
    return done.stdout.strip()


def try_an_op(device: str) -> str:
    """Compile an op, run it and check its result."""
    from llm_numba.ops import get_ops

    ops = get_ops(device)
    out, inp = (ops.view(ops.allocate(4 * 32), 0, (1, 2, 16), "float32") for _ in range(2))
    ops.to_device(inp, 1.0)
    ops.gelu_forward(out, inp)
    if not (abs(ops.to_host(out) - 0.841192) < 1e-6).all():
        raise ArithmeticError("gelu(1) is not 0.841192")
    if device != "cpu":
        return "an op runs and its result is right"
    import numba

    threads = numba.get_num_threads()
    layer = numba.threading_layer()  # pyright: ignore[reportPrivateImportUsage]  (public, but not in __all__)
    return f"an op runs and its result is right, on {threads} threads, thread layer {layer}"


def toolkit() -> str:
    major, missing = gpu.load_driver().CUDA_VERSION // 1000, gpu.missing_parts()
    if missing:
        raise UserError(f"CUDA {major}, {', '.join(missing)} not found: {gpu.INSTALL}")
    return f"CUDA {major}: {', '.join((*gpu.LIBRARIES, 'libdevice'))}"


def describe(index: int, found: gpu.Gpu) -> str:
    supported = "fp32 and bf16" if found.has_bf16 else "fp32, no bf16"
    precision = "too old" if found.capability < gpu.OLDEST else supported
    return f"{found}, {precision}, {format_bytes(found.memory)}, {format_bytes(gpu.free_memory(index))} free"


def optional(extra: str) -> str:
    """The modules of an extra. Errors: UserError that names the missing ones."""
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: {install(extra)}")
    return f"{', '.join(EXTRAS[extra])} installed"


def main(argv: list[str] | None = None) -> int:
    """0 if the CPU's ops run, else 1."""
    description = "Print what is installed on this machine, what is missing, and which devices work."
    Parser(prog="llm-numba doctor", description=description).parse_args(argv)

    print("versions")
    report("llm_numba", lambda: __version__)
    report("Python", lambda: f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        report(name, version, name)

    print("CPU")
    report("processor", processor)
    report("cores", cores)
    report("memory", memory)
    runs = {"--device cpu": report("ops", run_op, "cpu")}

    print("CUDA")
    installed = report("numba-cuda", lambda: gpu.load_driver() and version("numba-cuda"))
    loads = installed and report("numba.cuda", lambda: importlib.import_module("numba.cuda") and "loads")
    if installed:
        report("toolkit", toolkit)
    if installed and report("driver", lambda: f"for CUDA {gpu.driver_version()}"):
        if report("GPUs", lambda: str(len(gpu.gpus()))):
            for index, found in enumerate(gpu.gpus()):
                report(f"GPU {index}", describe, index, found)
    try:
        reason = gpu.obstacle() or ("" if loads else "numba.cuda does not load")
    except Exception as error:
        reason = explain(error)
    if not reason:
        dtype = "bf16" if gpu.gpus()[0].has_bf16 else "fp32"
        runs[f"--device cuda --dtype {dtype}"] = report("ops", run_op, "cuda")
        report("variants", lambda: "".join("\n    {:<10} {} {:>5}: {}".format(*row) for row in variants.explain()))
    runs["--device cudasim"] = report("simulator", run_op, "cudasim")

    print("optional packages")
    for extra in EXTRAS:
        if extra not in ("", "cuda"):
            report(extra, optional, extra)

    print(f"\nworks here: {', '.join(flags for flags, works in runs.items() if works) or 'nothing'}")
    if reason:
        print(f"does not:   --device cuda: {reason}")
    return 0 if runs["--device cpu"] else 1


if __name__ == "__main__":
    exit_with(main)
