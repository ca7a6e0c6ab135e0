"""What this process may use of the machine: cores and memory, also in a container."""

import os
from pathlib import Path

import psutil

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CPUS = Path("/sys/devices/system/cpu")


def usable_cpus() -> set[int]:
    """The numbers of the logical cores that this process may run on."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count()))


def usable_cores() -> list[set[int]]:
    """The logical cores of each physical one that this process may run on; none where the machine does not say."""
    cores = {}
    try:
        for n in sorted(usable_cpus()):
            cores.setdefault((CPUS / f"cpu{n}/topology/thread_siblings_list").read_text(), set()).add(n)
    except OSError:
        return []
    return list(cores.values())


def sensible_threads() -> int:
    """A thread for each physical core among the usable ones, where its twin would only share its arithmetic; and no
    more than a cgroup gives processor time for, as the threads of an op wait for one another."""
    logical = len(usable_cpus())
    count = len(usable_cores()) or min(logical, psutil.cpu_count(logical=False) or logical)
    quota = cgroup_limit("cpu.max")
    return max(1, min(count, int(quota))) if quota else count


def available_memory() -> int:
    """Bytes that can be allocated without pushing others out of memory, or this process out of its container."""
    limit, available = cgroup_limit("memory.max"), psutil.virtual_memory().available
    return available if limit is None else max(0, min(available, int(limit) - psutil.Process().memory_info().rss))


def cgroup_limit(file: str) -> float | None:
    """The least that cpu.max (cores) or memory.max (bytes) allows in this process's cgroup and those above it."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
        own = CGROUPS / next(line[3:].strip("/") for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    limits = []
    for folder in (own, *own.parents):
        try:
            limit, *period = (folder / file).read_text().split()
        except OSError:
            continue
        if limit != "max":
            limits.append(int(limit) / int(*period or (1,)))
    return min(limits, default=None)
