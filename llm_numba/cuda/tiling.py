"""How a matrix product is cut into output tiles, and along K.

Grouped tiles: consecutive blocks compute `group` tiles one below the other, so that blocks which run at the same time
find the same tile of b in L2.

Split-K: a product with too few tiles to fill the GPU is split along K into partial products, which go to scratch and
are added in a fixed order. The number of splits depends on the sizes alone, so the same sizes always give the same
bits.
"""

import functools
from typing import NamedTuple

from numba import cuda

from llm_numba.cuda.jit import (
    THREADS,
    blocks_for,
    device,
    float32,
    kernel,
    sized,
    stream,
    to_float,
    to_storage,
    uint32,
    with_shared,
)

MAX_SPLITS = 8
MAX_SPLIT_ELEMENTS = sized(1 << 24, 1 << 8)  # of all partial products together
MAX_GRID_Y = sized(65535, 2)  # CUDA's limit
LAUNCH_COST = sized(200, 2)


class Tile(NamedTuple):
    """The output tile of a block is M x N; K is the depth of a step."""

    M: int
    N: int
    K: int
    group: int  # tiles in a group
    resident_blocks: int  # that an H100 runs at once
    split_cost: int = 4  # of writing a tile of partial products to scratch and reading it back, see `split`


@device
def grouped_tile(group):
    """(row, column) of this block's tile, in a grid made by `grid`."""
    x, y = uint32(cuda.blockIdx.x), uint32(cuda.blockIdx.y)
    return uint32(x % group + y * group), uint32(x // group)


def grid(M: int, N: int, tile: Tile, splits: int) -> tuple[int, int, int]:
    """The grid that gives every output tile of every split to one block; the last group may have blocks without one."""
    return tile.group * blocks_for(N, tile.N), blocks_for(blocks_for(M, tile.M), tile.group), splits


@functools.cache
def split(M: int, N: int, K: int, tile: Tile) -> tuple[int, int]:
    """(number of splits, their length along K).

    The cost of a choice is measured in steps of 1 along K of one resident block. A tile of partial products costs
    tile.split_cost on the whole GPU, the additional kernel LAUNCH_COST.
    """
    tiles = blocks_for(M, tile.M) * blocks_for(N, tile.N)
    steps = blocks_for(K, tile.K)

    def cost(splits):
        depth = blocks_for(tiles * splits, tile.resident_blocks) * blocks_for(steps, splits) * tile.K
        return depth + (tile.split_cost * tiles * splits + LAUNCH_COST if splits > 1 else 0)

    most = max(1, min(MAX_SPLITS, steps, MAX_SPLIT_ELEMENTS // (M * N)))
    K_split = blocks_for(steps, min(range(1, most + 1), key=cost)) * tile.K
    return blocks_for(K, K_split), K_split


def split_scratch(M: int, N: int, K: int, tile: Tile) -> int:
    """Floats of scratch for the partial products; 0 without a split."""
    splits, _ = split(M, N, K, tile)
    return splits * M * N if splits > 1 else 0


def partial_products(out, scratch, splits: int):
    """Where the kernel writes, (splits, M, N): scratch, or out itself without a split."""
    M, N = out.shape
    return scratch[: splits * M * N].reshape(splits, M, N) if splits > 1 else out.reshape(1, M, N)


@kernel
def add_splits_kernel(out, partial, bias, with_bias, accumulate):
    """out[m, n] = partial[0, m, n] + partial[1, m, n] + ..., + bias[n] if with_bias, + out[m, n] if accumulate.

    Grid: (blocks of THREADS columns, at most MAX_GRID_Y); block: THREADS; a thread owns every gridDim.y-th element of a
    column.
    Moves: partial, and out once or twice
    """
    n = uint32(cuda.grid(1))
    if n < out.shape[1]:
        for m in range(uint32(cuda.blockIdx.y), out.shape[0], cuda.gridDim.y):
            total = float32(0)
            for s in range(partial.shape[0]):
                total += partial[s, m, n]
            if with_bias:
                total += to_float(bias[n])
            if accumulate:
                total += to_float(out[m, n])
            out[m, n] = to_storage(total, out)


def add_splits(out, partial, bias=None, accumulate=False):
    """out (M, N) = (+= if accumulate) the sum of partial (splits, M, N) over the splits, + bias (N,) or None."""
    M, N = out.shape
    with_bias = bias is not None
    bias = bias if with_bias else out.reshape(-1)  # never read without a bias, but the kernel needs an array
    add_splits_kernel[(blocks_for(N), min(M, MAX_GRID_Y)), THREADS, stream()](out, partial, bias, with_bias, accumulate)


def split_product(kernel, tile: Tile, block, shared_bytes: int, out, a, b, scratch, bias, a_transposed, accumulate):
    """Launch a variant's product kernel on as many splits of K as `split` chooses, then add them.

    out, a, b, scratch, bias: see `multiply` in matmul_common.unfused; shared_bytes: a block's dynamic shared memory.
    """
    M, N = out.shape
    splits, K_split = split(M, N, a.shape[0 if a_transposed else 1], tile)
    partial, whole = partial_products(out, scratch, splits), splits == 1
    bias_array = b.reshape(-1) if bias is None else bias  # never read without a bias, but the kernel needs an array
    launch = with_shared(kernel, grid(M, N, tile, splits), block, shared_bytes)
    launch(partial, a, b, bias_array, whole and bias is not None, whole and accumulate, K_split)
    if not whole:
        add_splits(out, partial, bias, accumulate)
