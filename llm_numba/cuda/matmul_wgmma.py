"""Matmul in bf16 on Hopper's tensor cores (compute capability 9.0): which kernel of wgmma_product.py, and its schedule.

The schedule follows from the shape. Blocks compute tiles of TILE_M x TILE_N in rounds, one tile for each block. A
gradient of a weight has few tiles and a long K, so the tiles of a last round that is not full are split along K among
all blocks. The costs are in steps of DEPTH along K, about 0.55 microseconds on an H200.
"""

import functools
from typing import NamedTuple

from numba import cuda

from llm_numba.cuda import memory
from llm_numba.cuda.jit import SIMULATED, blocks_for, compute_capability, sized, uint16, with_shared
from llm_numba.cuda.tensor_maps import address_of, tensor_map
from llm_numba.cuda.wgmma_product import (
    BLOCK,
    DEPTH,
    GELU,
    GELU_BACKWARD,
    PLAIN,
    TILE_M,
    WITH_BIAS,
    activation_kernel,
    gradient_kernel,
)

TILE_N = 192
GROUP, WIDE = 16, 32  # rows of tiles in a group, if there are more than WIDE columns of tiles; else 1
PART_COST = sized(4, 0)  # steps: of a helper to store its part of a tile, and of an owner to add one


def supports(dtype, R, C, OC) -> str:
    """Why the kernels cannot multiply these operands, or ""."""
    if dtype != uint16:
        return "needs bf16"
    if not SIMULATED and compute_capability()[0] != 9:
        return "needs compute capability 9"
    return "C and OC must be multiples of 8" if C % 8 or OC % 8 else ""


@functools.cache
def multiprocessors() -> int:
    return 3 if SIMULATED else cuda.get_current_device().MULTIPROCESSOR_COUNT


activation_kernel, gradient_kernel = functools.cache(activation_kernel), functools.cache(gradient_kernel)


def forward(out, inp, weight, bias, scratch, pre=None):
    """out (R, OC) = inp (R, C) @ weight.T + bias; with pre (R, OC), pre = that and out = GELU(pre).

    weight (OC, C); bias (OC,) or None
    """
    OC, C = weight.shape
    bias = 0 if bias is None else address_of(bias)
    b = tensor_map(weight, TILE_N)
    multiply(WITH_BIAS if pre is None else GELU, False, out, pre, inp, b, bias, OC, C)


def input_gradient(dinp, dout, weight, scratch, pre=None):
    """dinp (R, C) = dout (R, OC) @ weight (OC, C); with pre (R, C), times GELU'(pre)."""
    OC, C = weight.shape
    multiply(PLAIN if pre is None else GELU_BACKWARD, True, dinp, pre, dout, tensor_map(weight, DEPTH), 0, C, OC)


def multiply(end, b_transposed, out, pre, a, b, bias, N, K):
    """Launch the kernel of this end; b is a tensor map."""
    M, kernel = out.shape[0], activation_kernel(b_transposed, end, TILE_N)
    rows, columns = blocks_for(M, TILE_M), blocks_for(N, TILE_N)
    launch = with_shared(kernel, min(rows * columns, multiprocessors()), BLOCK, kernel.shared_bytes)
    maps = tensor_map(out, 64), 0 if pre is None else tensor_map(pre, 64), tensor_map(a, TILE_M), b
    launch(*maps, bias, M, N, K, GROUP if columns > WIDE else 1)


def weight_gradient(dweight, dbias, dout, inp, scratch, accumulate):
    """dweight (OC, C) float32 = (+= if accumulate) dout.T @ inp; dbias (OC,) float32, or None, the column sums of dout.

    dout (R, OC), inp (R, C)
    """
    (OC, C), R = dweight.shape, dout.shape[0]
    kernel, plan = gradient_kernel(dbias is not None, TILE_N), split(OC, C, R, multiprocessors())
    launch = with_shared(kernel, plan.blocks, BLOCK, kernel.shared_bytes)
    launch(
        address_of(dweight), 0 if dbias is None else address_of(dbias), tensor_map(dout, DEPTH), tensor_map(inp, DEPTH),
        address_of(scratch) if plan.helpers else 0, address_of(flags()) if plan.helpers else 0, OC, C, R,
        plan.whole, plan.splits, plan.helpers, plan.first, accumulate,
    )  # fmt: skip


class Split(NamedTuple):
    """How the tiles of a gradient are dealt to blocks: see gradient_kernel."""

    blocks: int
    whole: int
    splits: int = 0
    helpers: int = 0
    first: int = 0

    @property
    def parts(self) -> int:
        return self.helpers + self.splits - 1 if self.helpers else 0


@functools.cache
def split(M: int, N: int, K: int, blocks: int) -> Split:
    """The faster of: every tile by one block; the tiles of the last, unfilled round split among all blocks."""
    tiles, steps = blocks_for(M, TILE_M) * blocks_for(N, TILE_N), blocks_for(K, DEPTH)
    rounds, splits = divmod(tiles, blocks)
    if splits:
        helpers = blocks - splits
        # owner and helpers finish at the same time
        first = min(steps, blocks_for(splits * steps + PART_COST * helpers, blocks))
        helpers = min(helpers, splits * (steps - first))
        added = blocks_for(helpers, splits) + 1  # parts of a tile, about
        if helpers and first + PART_COST * added < steps:
            return Split(blocks, rounds * blocks, splits, helpers, first)
    return Split(min(tiles, blocks), tiles)


@functools.cache
def flags():
    """A word for each part, 0 between launches."""
    return memory.allocate(4 * multiprocessors())


def forward_scratch(R: int, C: int, OC: int) -> int:
    """Floats of scratch that `forward` needs."""
    return 0


def backward_scratch(R: int, C: int, OC: int, with_bias: bool) -> int:
    """Floats of scratch that `input_gradient` and `weight_gradient` need."""
    return split(OC, C, R, multiprocessors()).parts * gradient_kernel(with_bias, TILE_N).part_floats
