"""Matmul in bf16 on Hopper's tensor cores (compute capability 9.0): which kernel of wgmma_product.py, and its schedule.

The schedule follows from the shape. A product is computed in rounds, one tile for each block. Where the last round is
not full, its tiles can be split along K among all blocks: see wgmma_tiles.py. Above all the gradients of weights need
that, which have few tiles and a long K. The costs below are in steps of DEPTH along K, 0.6 microseconds on an H200.
"""

import functools
from typing import NamedTuple

from numba import cuda

from llm_numba.cuda import memory
from llm_numba.cuda.jit import SIMULATED, blocks_for, compute_capability, uint16, with_shared
from llm_numba.cuda.tensor_maps import BOX_COLUMNS, address_of, tensor_map
from llm_numba.cuda.wgmma_ends import BIAS, GELU, GELU_BACKWARD, GRADIENT, GRADIENT_WITH_BIAS, PLAIN
from llm_numba.cuda.wgmma_product import BLOCK, product_kernel
from llm_numba.cuda.wgmma_tiles import DEPTH, TILE_M

WIDTHS = {192: 1.0, 128: 0.7}  # TILE_N of the kernels -> the time of a tile, relative to that of the first
GROUP, WIDE = 16, 32  # rows of tiles in a group if there are more than WIDE columns of tiles, else 1
# steps that an owner waits after the helpers have multiplied, and that adding each of their parts takes
HANDOVER, ADDITION = 7, 4
MOST_MULTIPROCESSORS = 1024  # of any GPU

product_kernel = functools.cache(product_kernel)


def supports(dtype, R: int, C: int, OC: int) -> str:
    """Why the kernels cannot multiply these operands, or ""."""
    if dtype != uint16:
        return "needs bf16"
    if not SIMULATED and compute_capability()[0] != 9:
        return "needs compute capability 9"
    return "rows must be multiples of 8 elements" if C % 8 or OC % 8 else ""


def forward(out, inp, weight, bias, scratch, pre=None):
    """out (R, OC) = inp (R, C) @ weight (OC, C).T + bias (OC,) or None.

    With pre (R, OC): pre = that, out = GELU(pre).
    """
    OC, C = weight.shape
    end, vector = (BIAS if pre is None else GELU), (0 if bias is None else address_of(bias))
    operands = tensor_map(inp, TILE_M), tensor_map(weight, tile_width(OC))
    launch((0, 0, end), outputs(out, pre), operands, vector, scratch, (*out.shape, C))


def input_gradient(dinp, dout, weight, scratch, pre=None):
    """dinp (R, C) = dout (R, OC) @ weight (OC, C). With pre (R, C), times GELU'(pre)."""
    end, operands = (PLAIN if pre is None else GELU_BACKWARD), (tensor_map(dout, TILE_M), tensor_map(weight, DEPTH))
    launch((0, 1, end), outputs(dinp, pre), operands, 0, scratch, (*dinp.shape, dout.shape[1]))


def weight_gradient(dweight, dbias, dout, inp, scratch, accumulate):
    """dweight (OC, C) = (+= if accumulate) dout (R, OC).T @ inp (R, C); dbias (OC,), if not None, likewise the sums of
    dout's rows. Both are float32.
    """
    end, vector = (GRADIENT, 0) if dbias is None else (GRADIENT_WITH_BIAS, address_of(dbias))
    operands, addresses = (tensor_map(dout, DEPTH), tensor_map(inp, DEPTH)), (address_of(dweight), 0)
    launch((1, 1, end), addresses, operands, vector, scratch, (*dweight.shape, dout.shape[0]), accumulate)


def outputs(out, pre):
    """Tensor maps of bf16 results."""
    return tensor_map(out, BOX_COLUMNS), 0 if pre is None else tensor_map(pre, BOX_COLUMNS)


def launch(kind, results, operands, vector, scratch, sizes, accumulate=False):
    """Launch the kernel of this kind: (a_transposed, b_transposed, end). sizes: M, N, K of the product."""
    kernel, plan = product_kernel(*kind, tile_width(sizes[1])), schedule(*sizes, multiprocessors())
    parts = (address_of(scratch), address_of(flags())) if plan.helpers else (0, 0)
    group = GROUP if blocks_for(sizes[1], tile_width(sizes[1])) > WIDE else 1
    start = with_shared(kernel, plan.blocks, BLOCK, kernel.shared_bytes)
    start(*results, *operands, vector, *parts, *sizes, group, *plan[1:], int(accumulate))


def tile_width(N: int) -> int:
    """TILE_N of the kernel for a result with N columns."""
    return min(WIDTHS, key=lambda width: blocks_for(N, width) * WIDTHS[width])


class Schedule(NamedTuple):
    """Which block computes what: see wgmma_tiles.py."""

    blocks: int
    whole: int
    splits: int = 0
    helpers: int = 0
    owned: int = 0


@functools.cache
def schedule(M: int, N: int, K: int, blocks: int) -> Schedule:
    """The fastest of: every tile by one block; the tiles of the last round split.

    Every split tile has the same number of helpers if there are enough: blocks that read the same rows then do so at
    the same time, and find them in L2.
    """
    tiles, steps = blocks_for(M, TILE_M) * blocks_for(N, tile_width(N)), blocks_for(K, DEPTH)
    rounds, splits = divmod(tiles, blocks)
    whole = Schedule(min(tiles, blocks), tiles)
    if not splits:
        return whole

    def split(helpers):
        # helpers finish when their owner still has something to do
        owned = min(steps - 1, blocks_for(splits * steps + HANDOVER * helpers, splits + helpers))
        return Schedule(blocks, rounds * blocks, splits, min(helpers, splits * (steps - owned)), owned)

    def cost(plan):
        parts = blocks_for(plan.helpers, splits) + (plan.helpers % splits > 0)  # of a tile
        return plan.owned + ADDITION * parts if plan.helpers else steps

    most = blocks - splits
    choices = range(splits, most + 1, splits) if most >= splits else [most]
    return min([whole, *map(split, choices if steps > 1 else [])], key=cost)


@functools.cache
def multiprocessors() -> int:
    return 2 if SIMULATED else cuda.get_current_device().MULTIPROCESSOR_COUNT


@functools.cache
def flags():
    """A word for each part, 0 between launches; there are fewer parts than multiprocessors."""
    return memory.allocate(4 * MOST_MULTIPROCESSORS)


def scratch_size(kind, M: int, N: int, K: int) -> int:
    """Floats of scratch for the parts of a product."""
    plan = schedule(M, N, K, multiprocessors())
    return (plan.helpers + plan.splits - 1) * product_kernel(*kind, tile_width(N)).part_floats if plan.helpers else 0


def forward_scratch(R: int, C: int, OC: int) -> int:
    """Floats of scratch that `forward` needs."""
    return scratch_size((0, 0, BIAS), R, OC, C)


def backward_scratch(R: int, C: int, OC: int, with_bias: bool) -> int:
    """Floats of scratch that `input_gradient` and `weight_gradient` need."""
    end = GRADIENT_WITH_BIAS if with_bias else GRADIENT
    return max(scratch_size((0, 1, PLAIN), R, C, OC), scratch_size((1, 1, end), OC, C, R))
