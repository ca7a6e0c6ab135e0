"""Measure the time and memory of a function. llm_numba and PyTorch are both measured by this code."""

import time
from collections.abc import Callable
from pathlib import Path

MAX_RUNS = 50


def wall_time(run: Callable) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(run: Callable, seconds: float, timed: Callable = wall_time) -> list[float]:
    """Seconds of each run, measured by `timed`, repeated until they add up to `seconds` (at least one run).

    The first of several runs is dropped: its caches hold another program's data.
    """
    times: list[float] = []
    while sum(times) < seconds and len(times) < MAX_RUNS:
        times.append(timed(run))
    return times[1:] or times


def resident_memory(line: str = "VmRSS") -> int | None:
    """Bytes of resident memory of this process, current ("VmRSS") or peak ("VmHWM"); None except on Linux."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith(line + ":")), None)


def peak_memory(run: Callable, before: int | None) -> int | None:
    """Peak resident bytes above `before` while `run` runs; None if that cannot be measured."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        before = None
    run()
    return None if before is None else resident_memory("VmHWM") - before
