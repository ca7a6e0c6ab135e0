"""Compile kernels without a GPU, and read the assembler's report."""

import re
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

TOOLS = {"ptxas": "nvidia-cuda-nvcc", "nvdisasm": "nvidia-cuda-nvdisasm"}  # program -> package
HOPPER = (9, 0, "a")  # with the instructions that only compute capability 9.0 has
SERIALISED = r"\(C75(?:08|1\d)\)"  # ptxas ignored setmaxnreg, or waits for every wgmma
WIDE = r"\b(?:D(?:ADD|MUL|FMA|SETP|MNMX|MMA)\b|MUFU\.\w+64H|(?:[FI]2[FI]|FRND)\S*\.F64)"  # 64-bit floating point


def missing_packages() -> list[str]:
    """The packages that are needed to assemble a kernel and not installed."""
    if find_spec("numba_cuda") is None:
        return ["numba-cuda[cu13]"]
    from cuda.pathfinder import find_nvidia_binary_utility

    return [package for program, package in TOOLS.items() if find_nvidia_binary_utility(program) is None]


def array(code: str):
    """The type of a tensor: "h3" is bf16, 3-dimensional; f float32, h bf16, i int32, d float64, b uint8."""
    from numba.cuda import types

    dtypes = {"f": types.float32, "h": types.uint16, "i": types.int32, "d": types.float64, "b": types.uint8}
    return types.Array(dtypes[code[0]], int(code[1]), "C")


def assemble(kernel, signature: tuple, capability: tuple) -> SimpleNamespace:
    """Compile a kernel for Numba types and assemble it.

    Returns registers, stack (bytes per thread), spills (bytes stored and loaded), shared (static bytes), wide (count of
    64-bit floating-point instructions), warnings (of ptxas about wgmma and setmaxnreg), ptx and sass (text).
    """
    from cuda.pathfinder import find_nvidia_binary_utility
    from numba.cuda import dispatcher
    from numba.cuda.compiler import compile as compile_kernel

    # Numba asks the driver for the GPU when a kernel calls a device function
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability[:2], id=0)
    bounds = kernel.targetoptions.get("launch_bounds")
    ptx, _ = compile_kernel(kernel.py_func, signature, cc=capability, device=False, abi="numba", launch_bounds=bounds)
    ptxas, nvdisasm = map(find_nvidia_binary_utility, TOOLS)
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [ptxas, f"-arch=sm_{''.join(map(str, capability))}", "-v", source, "-o", cubin]
        report = subprocess.run(command, capture_output=True, text=True, check=False)
        assert report.returncode == 0, report.stderr
        sass = subprocess.run([nvdisasm, "-ndf", cubin], capture_output=True, text=True, check=True).stdout

    def value(pattern):
        found = re.search(pattern, report.stderr)
        return int(found[1]) if found else 0

    return SimpleNamespace(
        registers=value(r"Used (\d+) registers"),
        stack=value(r"(\d+) bytes stack frame"),
        spills=value(r"(\d+) bytes spill stores") + value(r"(\d+) bytes spill loads"),
        shared=value(r"(\d+) bytes smem"),
        warnings=[line for line in report.stderr.splitlines() if re.search(SERIALISED, line)],
        wide=len(re.findall(WIDE, sass)),
        ptx=ptx,
        sass=sass,
    )
