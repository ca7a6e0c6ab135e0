"""CPU memory for the arena: allocation, views, copies, and the threads that run the ops."""

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

BINDING = {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"}  # the user binds the threads


def allocate(nbytes: int) -> np.ndarray:
    """nbytes of zeros (uint8), starting at a multiple of ALIGNMENT."""
    block = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    return block[start : start + nbytes]


def view(memory: np.ndarray, offset: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The memory from byte `offset` on, as an array of this shape and dtype."""
    count = int(np.prod(shape))
    return memory[offset : offset + count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)


def storage_dtype(dtype: str) -> np.dtype:
    """The dtype of the arrays that hold tensors of this dtype."""
    return np.dtype(dtype)


def set_threads(threads: int) -> None:
    """Run the ops on this many threads; 0 means NUMBA_NUM_THREADS if it is set, else one per physical core."""
    most = config.NUMBA_NUM_THREADS
    if threads > most:
        raise UserError(f"--threads {threads}: Numba can use at most {most} threads here; see NUMBA_NUM_THREADS")
    set_num_threads(threads or (most if "NUMBA_NUM_THREADS" in os.environ else min(most, sensible_threads())))
    cores = usable_cores()
    if len(cores) == get_num_threads() > 1 and not BINDING & os.environ.keys():
        bind_workers(cores)


@njit(**PARALLEL)
def start_threads(out):
    """out[i] = i, each on another thread."""
    for i in prange(out.shape[0]):
        out[i] = i


def bind_workers(cores: list[set[int]]) -> None:
    """Bind each worker thread to one core, if there are as many threads as cores. Linux only.

    The scheduler sometimes runs two workers on one core for seconds while another core is idle. This thread and the
    processes that it starts stay unbound. Call it before any other parallel work: the workers are found as the threads
    that appear.
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
    """The device in words, for the log."""
    return f"on the CPU, {get_num_threads()} threads"


def zero(tensor: np.ndarray) -> None:
    """tensor = 0."""
    tensor.fill(0)


def copy(out: np.ndarray, inp: np.ndarray) -> None:
    """out = inp, of one shape and dtype."""
    out[...] = inp


def to_device(tensor: np.ndarray, host: np.ndarray) -> None:
    """tensor = host, an array or a scalar."""
    tensor[...] = host


def to_host(tensor: np.ndarray) -> np.ndarray:
    """tensor as a NumPy array; on the CPU it already is one and is not copied."""
    return tensor


def reader(tensor: np.ndarray) -> Callable[[], Callable[[], np.ndarray]]:
    """A function that starts to copy tensor to the host, and returns a function that waits for the copy and returns it.
    On the CPU it copies at once."""

    def start():
        values = tensor.copy()
        return lambda: values

    return start


def capture(function: Callable[[], None]) -> Callable[[], None]:
    """A replayable version of `function`, which must use the same arrays each time; on the CPU, `function` itself."""
    return function
