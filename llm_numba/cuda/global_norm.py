"""The global norm of the gradients, and clipping by it.

Sums are in float64, where the square of a float32 is exact and cannot overflow. It costs nothing: memory is the limit.
"""

import math

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import THREADS, block_sum, blocks_for, kernel, sized, stream

float64 = np.float64
EACH = sized(64, 16)  # elements per thread
BLOCK = EACH * THREADS
FINAL = sized(1024, 8)  # threads of the block that adds up the sums


@kernel
def sums_of_squares_kernel(sums, grads):
    """sums[block] = the sum of grads**2 over the elements of the block.

    Grid: n / BLOCK; block: THREADS; a thread owns EACH elements, THREADS apart.
    Moves: BLOCK floats.
    """
    first = cuda.blockIdx.x * BLOCK + cuda.threadIdx.x
    total = float64(0)
    for i in range(first, min(first + BLOCK, grads.shape[0]), THREADS):
        x = float64(grads[i])
        total += x * x
    total = block_sum(total, cuda.shared.array(THREADS, float64))
    if cuda.threadIdx.x == 0:
        sums[cuda.blockIdx.x] = total


@kernel
def sum_kernel(out, sums):
    """out[0] = the sum of sums (n,). Grid: one block; block: FINAL; a thread owns every FINAL-th element."""
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
    # comparisons with NaN are false
    if not (loss[0] <= limits[0] and norm <= limits[1] and math.isfinite(loss[0]) and math.isfinite(norm)):
        grad_scale[0] = -1
    elif 0 < highest < norm:
        grad_scale[0] = highest / norm
    else:
        grad_scale[0] = 1


def global_norm_squared(out, grads, scratch):
    """The sum of the squares of all gradients.

    out (1,) float64 <- grads (n,)
    Writes:   out = sum of grads**2
    Parallel: over blocks of BLOCK elements; one block then adds their sums in a fixed order
    Moves:    n floats
    Scratch:  global_norm_squared_scratch, 8-byte aligned
    """
    sums = scratch[: global_norm_squared_scratch(out, grads)].view(float64)
    sums_of_squares_kernel[sums.shape[0], THREADS, stream()](sums, grads)
    sum_kernel[1, FINAL, stream()](out, sums)


def clip(grad_scale, loss, grad_norm_squared, limits, highest):
    """The factor for every gradient that limits their norm to `highest`.

    grad_scale (1,) <- loss (1,) float64, grad_norm_squared (1,) float64, limits (2,) float64 of the loss and of the
        norm, highest (0: no clipping)
    Writes:   grad_scale = min(1, highest / norm), or -1, which skips the update, if the loss or the norm is not finite
              or above its limit
    Source:   Pascanu et al. 2012, arXiv:1211.5063
    """
    clip_kernel[1, 1, stream()](grad_scale, loss, grad_norm_squared, limits, float64(highest))


def global_norm_squared_scratch(out, grads) -> int:
    """Floats of scratch that `global_norm_squared` needs: a float64 per block."""
    return 2 * blocks_for(grads.shape[0], BLOCK)
