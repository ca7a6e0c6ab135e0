"""What this machine can do at most, measured: the 100% of a step's "share of peak"."""

import time

import numpy as np
from numba import config, get_num_threads, njit, prange

from llm_numba.cpu.jit import PARALLEL
from llm_numba.cpu.tile import MR, NR, add_tile, multiply, new_tile

K = 256  # the tile's operands then stay in the L1 cache


@njit(**PARALLEL)
def run_tiles(out, a, b, repeats):
    """out (threads, MR, NR) += repeats times a (MR, K) b (K, NR), on each thread by itself."""
    for i in prange(out.shape[0]):
        tile = new_tile()
        for _ in range(repeats):
            multiply(tile, a, b)
            add_tile(out[i], tile, True)


def peak_flops() -> float | None:
    """The float32 multiply-adds of all threads together, two flops each, in flops per second; about 0.1 s.

    The best of several tries, as other processes can only slow one down. None where nothing is compiled.
    """
    if config.DISABLE_JIT:
        return None
    threads, repeats = get_num_threads(), 2000
    a, b, out = np.ones((MR, K), np.float32), np.ones((K, NR), np.float32), np.zeros((threads, MR, NR), np.float32)
    run_tiles(out, a, b, 1)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run_tiles(out, a, b, repeats)
        seconds.append(time.perf_counter() - start)
    return 2.0 * threads * repeats * MR * NR * K / min(seconds)
