"""The global norm of all gradients, and clipping by it."""

import numpy as np
from numba import njit, prange

from llm_numba.cpu.jit import PARALLEL, REDUCTION

BLOCK = 16384  # elements per task


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
    """The sum of the squares of all gradients.

    out (1,) float64 <- grads (n,), scratch (8-byte aligned)
    Writes:   out = sum of grads**2
    Parallel: over blocks of BLOCK elements. Their sums go to scratch and are then added in order, so nothing races and
              the result does not depend on the number of threads
    Moves:    n floats
    Scratch:  global_norm_squared_scratch(...)

    The sums are float64, in which the square of a float32 is exact and cannot overflow. The op is limited by memory
    bandwidth, so this costs no time.
    """
    n = grads.shape[0]
    blocks = (n + BLOCK - 1) // BLOCK
    sums = scratch[: 2 * blocks].view(np.float64)
    for block in prange(blocks):
        sums[block] = sum_of_squares(grads[block * BLOCK : (block + 1) * BLOCK])
    total = 0.0
    for block in range(blocks):
        total += sums[block]
    out[0] = total


@njit(cache=True)
def clip(grad_scale, loss, grad_norm_squared, limits, highest):
    """The factor for all gradients that keeps their norm at `highest` or below.

    grad_scale (1,) <- loss (1,) float64, grad_norm_squared (1,) float64, limits (2,) float64, highest (0: no clipping)
    Writes:   grad_scale = min(1, highest / norm); or -1, which skips the update, if the loss or the norm is not finite
              or above its limit (limits[0] for the loss, limits[1] for the norm)
    Source:   Pascanu et al. 2012, arXiv:1211.5063
    """
    norm = np.sqrt(grad_norm_squared[0])
    if not (np.isfinite(loss[0]) and np.isfinite(norm) and loss[0] <= limits[0] and norm <= limits[1]):
        grad_scale[0] = -1.0
    elif 0.0 < highest < norm:
        grad_scale[0] = highest / norm
    else:
        grad_scale[0] = 1.0
