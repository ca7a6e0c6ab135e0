"""The norm of all gradients together, by which they are clipped. In float64, in which a float32's square is exact and
cannot overflow; reading memory takes longer."""

import math

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import THREADS, block_sum, blocks_for, kernel, sized, stream

float64 = np.float64
EACH = sized(64, 16)  # numbers that a thread sums
BLOCK = EACH * THREADS
FINAL = sized(1024, 8)  # threads of the block that adds the sums


@kernel
def sums_of_squares_kernel(sums, grads):
    """sums[block] = the sum of the block's grads**2.

    Grid: a block for BLOCK numbers; block: THREADS; a thread owns EACH numbers, THREADS apart.
    Moves: BLOCK floats.
    """
    first = cuda.blockIdx.x * BLOCK + cuda.threadIdx.x
    total = float64(0)
    for i in range(first, min(first + BLOCK, grads.shape[0]), THREADS):
        number = float64(grads[i])
        total += number * number
    total = block_sum(total, cuda.shared.array(THREADS, float64))
    if cuda.threadIdx.x == 0:
        sums[cuda.blockIdx.x] = total


@kernel
def sum_kernel(out, sums):
    """out[0] = the sum of sums (n,). Grid: one block; block: FINAL; a thread owns every FINAL-th number."""
    total = float64(0)
    for i in range(cuda.threadIdx.x, sums.shape[0], FINAL):
        total += sums[i]
    total = block_sum(total, cuda.shared.array(FINAL, float64))
    if cuda.threadIdx.x == 0:
        out[0] = total


@kernel
def clip_kernel(grad_scale, loss, grad_norm_squared, limits, highest):
    """One thread; see `clip`."""
    norm = math.sqrt(grad_norm_squared[0])
    # a comparison with NaN is false
    if not (loss[0] <= limits[0] and norm <= limits[1] and math.isfinite(loss[0]) and math.isfinite(norm)):
        grad_scale[0] = -1
    elif 0 < highest < norm:
        grad_scale[0] = highest / norm
    else:
        grad_scale[0] = 1


def global_norm_squared(out, grads, scratch):
    """Add up the squares of all gradients.

    out (1,) float64 <- grads (n,), scratch (8-byte aligned)
    Writes:   out = sum of grads**2
    Parallel: over blocks of BLOCK numbers, whose sums go to scratch and are then added in a fixed order by one block
    Moves:    n floats
    Scratch:  global_norm_scratch_size(n) floats
    """
    n = grads.shape[0]
    sums = scratch[: global_norm_scratch_size(n)].view(float64)
    sums_of_squares_kernel[sums.shape[0], THREADS, stream()](sums, grads)
    sum_kernel[1, FINAL, stream()](out, sums)


def clip(grad_scale, loss, grad_norm_squared, limits, highest):
    """What every gradient is to be multiplied by, so that their norm is at most `highest`.

    grad_scale (1,) <- loss (1,) float64, grad_norm_squared (1,) float64, limits (2,) float64, highest (0: no clipping)
    Writes:   grad_scale = min(1, highest / norm); or -1, which leaves the update out, where the loss or the norm is not
              finite, or is above its limit (limits[0] the loss's, limits[1] the norm's)
    Source:   Pascanu et al. 2012, arXiv:1211.5063
    """
    clip_kernel[1, 1, stream()](grad_scale, loss, grad_norm_squared, limits, float64(highest))


def global_norm_scratch_size(n: int) -> int:
    """How many floats `global_norm_squared` needs for n gradients."""
    return 2 * blocks_for(n, BLOCK)
