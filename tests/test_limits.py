"""Usable cores and memory, read from the files of a made-up machine."""

import os
import subprocess
import sys

import psutil
import pytest

from llm_numba.util import host

MIB = 2**20


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function (logical core -> the list of its physical core, cpu.max) that makes a machine."""

    def make(twins, quota="max 100000"):
        for cpu, siblings in twins.items():
            folder = tmp_path / "cpus" / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(siblings)
        (tmp_path / "cpu.max").write_text(quota)
        (tmp_path / "cgroup").write_text("0::/")
        monkeypatch.setattr(host, "CPUS", tmp_path / "cpus")
        monkeypatch.setattr(host, "usable_cpus", lambda: set(twins))

    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    monkeypatch.setattr(host, "OWN_CGROUP", tmp_path / "cgroup")
    return make


def test_the_lowest_limit_of_a_cgroup_and_its_parents_counts(machine, tmp_path, monkeypatch):
    own = tmp_path / "a" / "b"
    own.mkdir(parents=True)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    (own / "cpu.max").write_text("400000 100000\n")
    (own / "memory.max").write_text("1048576\n")
    (tmp_path / "a" / "memory.max").write_text("max\n")
    (tmp_path / "cgroup").write_text("4:memory:/elsewhere\n0::/a/b\n")
    assert host.cgroup_limit("cpu.max") == 1.5 and host.cgroup_limit("memory.max") == MIB
    assert host.cgroup_limit("pids.max") is None
    monkeypatch.setattr(host, "OWN_CGROUP", tmp_path / "no such file")
    assert host.cgroup_limit("cpu.max") is None


THREADS = """
import os
from pathlib import Path
from llm_numba.ops import get_ops
before = os.sched_getaffinity(0)
ops = get_ops("cpu")
ops.set_threads({threads})
import numpy as np
ops.gelu_forward(np.ones((9, 9), np.float32), np.ones((9, 9), np.float32))
assert os.sched_getaffinity(0) == before, "the main thread lost cores"
others = [os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task") if int(t) != os.getpid()]
print(*(",".join(map(str, sorted(cpus))) for cpus in others if cpus != before))
"""


@pytest.mark.compiled
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux binds threads to cores")
def test_worker_threads_are_bound_to_cores_and_the_main_thread_is_not():
    """If the threads take all cores; not with fewer threads, nor if OMP_PROC_BIND is set, nor on a single core."""
    cores = {",".join(map(str, sorted(core))) for core in host.usable_cores()}

    def bound(threads=0, **changes):
        env = {k: v for k, v in os.environ.items() if k != "NUMBA_NUM_THREADS"} | changes
        command = [sys.executable, "-c", THREADS.format(threads=threads)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()

    found = bound()
    wanted = len(cores) - 1 if host.sensible_threads() == len(cores) else 0
    assert len(found) == len(set(found)) == wanted and set(found) <= cores
    assert bound(1) == [] and bound(OMP_PROC_BIND="false") == []


FOUR_CORES = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}


@pytest.mark.parametrize(
    "twins, quota, threads",
    [
        (FOUR_CORES, "max 100000", 4),  # eight logical cores
        ({0: "0,4", 4: "0,4", 1: "1,5"}, "max 100000", 2),  # this process may use three
        ({0: "0", 1: "1"}, "max 100000", 2),
        (FOUR_CORES, "250000 100000", 2),
        (FOUR_CORES, "50000 100000", 1),  # half a core
        (FOUR_CORES, "900000 100000", 4),
    ],
)
def test_one_thread_per_physical_core(machine, twins, quota, threads):
    machine(twins, quota)
    assert host.sensible_threads() == threads


def test_threads_if_the_system_does_not_report_cores(machine, monkeypatch):
    machine({})
    monkeypatch.setattr(host, "usable_cpus", lambda: {0, 1, 2})
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    assert host.sensible_threads() == 3
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 2)
    assert host.sensible_threads() == 2
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    assert host.sensible_threads() == 3


def test_the_memory_of_a_container(machine, tmp_path):
    machine({0: "0"})
    free = host.available_memory()
    assert 0 < free <= psutil.virtual_memory().total
    taken = psutil.Process().memory_info().rss
    (tmp_path / "memory.max").write_text(str(taken + 100 * MIB))
    assert host.available_memory() == pytest.approx(100 * MIB, abs=10 * MIB)
    (tmp_path / "memory.max").write_text("4096")
    assert host.available_memory() == 0


def test_the_cpus_that_this_process_may_use():
    assert host.usable_cpus() <= set(range(os.cpu_count()))
    assert 1 <= host.sensible_threads() <= len(host.usable_cpus())
