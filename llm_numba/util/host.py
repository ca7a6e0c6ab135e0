"""The cores and the memory that this process may use, also in a container."""

import os
from pathlib import Path

import psutil

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CPUS = Path("/sys/devices/system/cpu")


def usable_cpus() -> set[int]:
    """The ids of the logical cores that this process may run on."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def usable_cores() -> list[set[int]]:
    """For each physical core that this process may run on, its logical cores; empty if the system does not say."""
    cores = {}
    try:
        for n in sorted(usable_cpus()):
            cores.setdefault((CPUS / f"cpu{n}/topology/thread_siblings_list").read_text(), set()).add(n)
    except OSError:
        return []
    return list(cores.values())


def sensible_threads() -> int:
    """One thread per usable physical core, since hyperthreads share their arithmetic units; not more than the CPU quota
    of the cgroup, since the threads of an op wait for one another."""
    logical = len(usable_cpus())
    count = len(usable_cores()) or min(logical, psutil.cpu_count(logical=False) or logical)
    quota = cgroup_limit("cpu.max")
    return max(1, min(count, int(quota))) if quota else count


def available_memory() -> int:
    """Bytes that can be allocated without swapping, or exceeding the memory limit of the container."""
    limit, available = cgroup_limit("memory.max"), psutil.virtual_memory().available
    return available if limit is None else max(0, min(available, int(limit) - psutil.Process().memory_info().rss))


def cgroup_limit(file: str) -> float | None:
    """The lowest limit of cpu.max (in cores) or memory.max (in bytes) of this process's cgroup and its parents."""
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
