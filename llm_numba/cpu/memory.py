"""The CPU's side of the arena: memory, views of it, and what the CPU's ops need beside their results."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import config, get_num_threads, njit, prange, set_num_threads

from llm_numba.arena import ALIGNMENT
from llm_numba.cpu.jit import PARALLEL
from llm_numba.util.cli import UserError
from llm_numba.util.host import available_memory, sensible_threads, usable_cores  # noqa: F401  the first is the backend's

BOUND_ALREADY = {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"}  # by whoever set one of these


def allocate(nbytes: int) -> np.ndarray:
    """nbytes of zeros (uint8), starting at a multiple of ALIGNMENT."""
    block = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    return block[start : start + nbytes]


def view(memory: np.ndarray, offset: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The bytes of memory from offset on as an array of this shape and dtype."""
    count = int(np.prod(shape))
    return memory[offset : offset + count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)


def storage_dtype(dtype: str) -> np.dtype:
    """The dtype of the arrays that hold tensors of this dtype."""
    return np.dtype(dtype)


def set_threads(threads: int) -> None:
    """Run the ops on this many threads; 0: NUMBA_NUM_THREADS where it is set, else one for each physical core."""
    most = config.NUMBA_NUM_THREADS
    if threads > most:
        raise UserError(f"--threads {threads}: Numba may use {most} here; see NUMBA_NUM_THREADS")
    set_num_threads(threads or (most if "NUMBA_NUM_THREADS" in os.environ else min(most, sensible_threads())))
    cores = usable_cores()
    if len(cores) == get_num_threads() > 1 and not BOUND_ALREADY & os.environ.keys():
        bind_workers(cores)


@njit(**PARALLEL)
def start_threads(out):
    """out[i] = i, each by a thread of its own."""
    for i in prange(out.shape[0]):
        out[i] = i


def bind_workers(cores: list[set[int]]) -> None:
    """Give each thread that works for this one a core of its own, where the threads take all cores there are.

    The scheduler sometimes wakes two on one core, where they then take turns for seconds, while another core is idle.
    This thread stays free, and so do the processes that it starts. It has to be the first work that the threads do: it
    is how they are told from others. Elsewhere than on Linux nothing is done.
    """
    tasks = Path("/proc/self/task")
    if not (hasattr(os, "sched_setaffinity") and tasks.exists()):
        return
    before = set(os.listdir(tasks))
    start_threads(np.empty(len(cores), np.int64))
    workers = sorted(set(os.listdir(tasks)) - before, key=int)
    for worker, core in zip(workers, cores[1:], strict=False):
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.sched_setaffinity(int(worker), core)


def describe_device() -> str:
    """What computes, in words, for the log."""
    return f"on the CPU, {get_num_threads()} threads"


def zero(tensor: np.ndarray) -> None:
    """tensor = 0."""
    tensor.fill(0)


def copy(out: np.ndarray, inp: np.ndarray) -> None:
    """out = inp, of one shape and dtype."""
    out[...] = inp


def to_device(tensor: np.ndarray, host: np.ndarray) -> None:
    """tensor = host, an array or a number."""
    tensor[...] = host


def to_host(tensor: np.ndarray) -> np.ndarray:
    """tensor as a NumPy array; on the CPU it is one already, and is not copied."""
    return tensor


def capture(function: Callable[[], None]) -> Callable[[], None]:
    """A function that does what `function` does, each time with the same arrays; on the CPU it is that function."""
    return function
