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


def global_norm_squared_scratch(out, grads):
    """A float64 for each block."""
    return 2 * ((grads.shape[0] + BLOCK - 1) // BLOCK)


@njit(**PARALLEL)
def global_norm_squared(out, grads, scratch):
    """Add up the squares of all gradients.

    out (1,) float64 <- grads (n,), scratch (8-byte aligned)
    Writes:   out = sum of grads**2
    Parallel: over blocks of BLOCK numbers, whose sums go to scratch and are then added in order: nothing races, and the
              number of threads does not matter
    Moves:    n floats
    Scratch:  global_norm_squared_scratch(...)

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


@njit(cache=True)
def clip(grad_scale, loss, grad_norm_squared, limits, highest):
    """What every gradient is to be multiplied by, so that their norm is at most `highest`.

    grad_scale (1,) <- loss (1,) float64, grad_norm_squared (1,) float64, limits (2,) float64, highest (0: no clipping)
    Writes:   grad_scale = min(1, highest / norm); or -1, which leaves the update out, where the loss or the norm is not
              finite, or is above its limit (limits[0] the loss's, limits[1] the norm's)
    Source:   Pascanu et al. 2012, arXiv:1211.5063
    """
    norm = np.sqrt(grad_norm_squared[0])
    if not (np.isfinite(loss[0]) and np.isfinite(norm) and loss[0] <= limits[0] and norm <= limits[1]):
        grad_scale[0] = -1.0
    elif 0.0 < highest < norm:
        grad_scale[0] = highest / norm
    else:
        grad_scale[0] = 1.0
