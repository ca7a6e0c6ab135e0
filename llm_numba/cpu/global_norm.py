"""The norm of all gradients together, by which they are clipped."""

import numpy as np
from numba import njit, prange

from llm_numba.cpu.jit import PARALLEL, REDUCTION

BLOCK = 16384  # numbers that one task sums


@njit(**REDUCTION)
def sum_of_squares(x):
    total = 0.0
    for i in range(x.shape[0]):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@njit(**PARALLEL)
def global_norm_squared(out, grads, scratch):
    """Add up the squares of all gradients.

    out (1,) float64 <- grads (n,), scratch (8-byte aligned)
    Writes:   out = sum of grads**2
    Parallel: over blocks of BLOCK numbers, whose sums go to scratch and are then added in order: nothing races, and the
              number of threads does not matter
    Moves:    n floats
    Scratch:  global_norm_scratch_size(n) floats

    The sums are float64, in which a float32's square is exact and cannot overflow; reading memory takes longer.
    """
    n = grads.shape[0]
    blocks = (n + BLOCK - 1) // BLOCK
    sums = scratch[: 2 * blocks].view(np.float64)
    for block in prange(blocks):
        numbers = grads[block * BLOCK : (block + 1) * BLOCK]
        sums[block] = sum_of_squares(numbers)
    total = 0.0
    for block in range(blocks):
        total += sums[block]
    out[0] = total


def global_norm_scratch_size(n: int) -> int:
    """How many floats `global_norm_squared` needs for n gradients."""
    return 2 * ((n + BLOCK - 1) // BLOCK)
