"""The measured peak of this machine: what 100% means in "share of peak"."""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numba import config, get_num_threads, njit, prange

from llm_numba.cpu.jit import PARALLEL, sum_of
from llm_numba.cpu.memory import allocate, view
from llm_numba.cpu.tile import MR, NR, add_tile, multiply, new_tile

K = 256  # small enough that the operands of the tile stay in the L1 cache
STREAM_FLOATS = 1 << 26  # 256 MiB per array: larger than the caches of all but the largest servers
BLOCK = 16384  # floats per task


@njit(**PARALLEL)
def run_tiles(out, a, b, repeats):
    """out (threads, MR, NR) += repeats times a (MR, K) b (K, NR), each thread on its own tile."""
    for i in prange(out.shape[0]):
        tile = new_tile()
        for _ in range(repeats):
            multiply(tile, a, b)
            add_tile(out[i], tile, True)


def peak_flops(dtype: str = "float32") -> float | None:
    """The float32 flops per second of all threads together; a multiply-add counts as two. Takes about 0.1 s.

    The best of several tries, because other processes can only slow one down. None if nothing is compiled.
    """
    if config.DISABLE_JIT:
        return None
    threads, repeats = get_num_threads(), 2000
    a, b, out = np.ones((MR, K), np.float32), np.ones((K, NR), np.float32), np.zeros((threads, MR, NR), np.float32)
    run_tiles(out, a, b, 1)
    seconds = min(timed(lambda: run_tiles(out, a, b, repeats)) for _ in range(5))
    return 2.0 * threads * repeats * MR * NR * K / seconds


@njit(**PARALLEL)
def stream_read(x, y, z):
    """z[block] = the sum of each block of x."""
    for block in prange(x.shape[0] // BLOCK):
        z[block] = sum_of(x[block * BLOCK : (block + 1) * BLOCK])


@njit(**PARALLEL)
def stream_copy(x, y, z):
    """z = x."""
    for block in prange(x.shape[0] // BLOCK):
        first, last = block * BLOCK, (block + 1) * BLOCK
        a, c = x[first:last], z[first:last]
        for i in range(BLOCK):
            c[i] = a[i] + np.float32(1)  # LLVM would replace a plain copy by a call of memcpy


@njit(**PARALLEL)
def stream_add(x, y, z):
    """z = x + y."""
    for block in prange(x.shape[0] // BLOCK):
        first, last = block * BLOCK, (block + 1) * BLOCK
        a, b, c = x[first:last], y[first:last], z[first:last]
        for i in range(BLOCK):
            c[i] = a[i] + b[i]


@njit(**PARALLEL)
def stream_update(x, y, z):
    """x += 1, in place."""
    for block in prange(x.shape[0] // BLOCK):
        a = x[block * BLOCK : (block + 1) * BLOCK]
        for i in range(BLOCK):
            a[i] += np.float32(1)


STREAMS = {"read": (stream_read, 1), "copy": (stream_copy, 2), "add": (stream_add, 3), "update": (stream_update, 2)}


def peak_bandwidth(floats: int = STREAM_FLOATS) -> dict[str, float]:
    """Bytes per second that all threads together move between memory and the cores, by pattern. Takes about 1 s.

    "read": x; "copy": z = x; "add": z = x + y; "update": x in place. Each byte that the program reads or writes counts
    once, as in STREAM. Bandwidth depends on the mix of reads and writes, and a write to memory that was not read first
    costs a hidden read, so compare an op with the pattern that matches it. The best of several interleaved tries.
    Source: McCalpin 1995, "Memory Bandwidth and Machine Balance in Current High Performance Computers"
    """
    x, y, z = (view(allocate(4 * floats), 0, (floats,), "float32") for _ in range(3))
    for array in (x, y, z):
        array.fill(1)  # the first write to a page allocates it
    best = dict.fromkeys(STREAMS, float("inf"))
    for stream, _ in STREAMS.values():
        stream(x[:BLOCK], y[:BLOCK], z[:BLOCK])
    for _ in range(5):
        for name, (stream, _) in STREAMS.items():
            best[name] = min(best[name], timed(partial(stream, x, y, z)))
    return {name: 4 * floats * arrays / best[name] for name, (_, arrays) in STREAMS.items()}


def timed(run: Callable) -> float:
    """The time that `run` takes, in seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
