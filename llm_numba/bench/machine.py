"""Describe the machine and the installed versions, in one line each."""

import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import llvmlite.binding as llvm

QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"  # see nvidia-smi --help-query-gpu
DESCRIPTION = "{}, driver {}, SM clock {} (max {}), memory clock {}, power limit {}"


def describe_machine(device: str, threads: int, ops) -> str:
    """The CPU, or the GPU with its current clocks: call it right after the GPU has been busy."""
    if device == "cpu":
        features = llvm.get_host_cpu_features()
        widths = {"avx512f": 512, "avx2": 256, "sse2": 128, "neon": 128}
        bits = next((bits for feature, bits in widths.items() if features.get(feature)), 0)
        return f"{cpu_model()} ({llvm.get_host_cpu_name()}), {threads} threads, {bits}-bit vectors"
    return (describe_gpu() if device == "cuda" else None) or ops.describe_device()


def describe_versions(device: str) -> str:
    packages = ["numba"] if device == "cpu" else ["numba", "numba-cuda"]
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


def cpu_model() -> str:
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def describe_gpu() -> str | None:
    """The GPU's name, driver and clocks from nvidia-smi; None if it gives no usable answer."""
    from numba import cuda

    command = ["nvidia-smi", f"--id={cuda.get_current_device().uuid}", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    fields = [field.strip() for field in done.stdout.strip().split(",")]
    return DESCRIPTION.format(*fields) if done.returncode == 0 and len(fields) == len(QUERY.split(",")) else None
