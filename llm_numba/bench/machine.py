"""What the benchmark ran on, in one line."""

import platform
import re
import subprocess
from pathlib import Path

import llvmlite.binding as llvm

ASKED = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"  # of nvidia-smi --help-query-gpu
SAID = "{}, driver {}, multiprocessors at {} of at most {}, memory at {}, power limit {}"


def describe_machine(device: str, threads: int, ops) -> str:
    """The processor, or the card as it is now: to be asked when it has just worked."""
    if device == "cpu":
        features = llvm.get_host_cpu_features()
        widths = {"avx512f": 512, "avx2": 256, "sse2": 128, "neon": 128}
        bits = next((bits for feature, bits in widths.items() if features.get(feature)), 0)
        return f"{cpu_model()} ({llvm.get_host_cpu_name()}), {threads} threads, {bits}-bit vectors"
    return (card_now() if device == "cuda" else None) or ops.describe_device()


def cpu_model() -> str:
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def card_now() -> str | None:
    """The card's name, driver and clocks, by nvidia-smi; None where that has no answer."""
    from numba import cuda

    command = ["nvidia-smi", f"--id={cuda.get_current_device().uuid}", f"--query-gpu={ASKED}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    fields = [field.strip() for field in done.stdout.strip().split(",")]
    return SAID.format(*fields) if done.returncode == 0 and len(fields) == len(ASKED.split(",")) else None
