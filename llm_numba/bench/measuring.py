"""Time and memory of one piece of work: both sides of the benchmark are measured by these same lines."""

import time
from collections.abc import Callable
from pathlib import Path

MOST_RUNS = 50


def by_the_clock(run: Callable) -> float:
    """The seconds that `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(run: Callable, seconds: float, timed: Callable = by_the_clock) -> list[float]:
    """The seconds of each run, as `timed` tells them, for as many runs as fit into `seconds`, at least one.

    Where there are several the first is left out: it finds the caches as the others' work left them.
    """
    times: list[float] = []
    while sum(times) < seconds and len(times) < MOST_RUNS:
        times.append(timed(run))
    return times[1:] or times


def resident(line: str = "VmRSS") -> int | None:
    """The bytes of memory that this process has now ("VmRSS") or had at most ("VmHWM"); None where not on Linux."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith(line + ":")), None)


def peak_memory(run: Callable, before: int | None) -> int | None:
    """How many bytes above `before` the process has at most while `run` runs; None where that cannot be measured."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    except OSError:
        before = None
    run()
    return None if before is None else resident("VmHWM") - before
