"""Matmul: a linear layer, its input's gradient and its parameters' gradient, each a product of two matrices.

The products differ in which way their operands lie in memory; `multiply` takes them all. Where the results make too
few tiles for a card, the inner dimension is split in parts, whose sums meet in scratch and are added in order. How it
is split depends on the sizes alone, so the bits of a result depend on nothing else.
"""

import functools

from numba import cuda

from llm_numba.cuda import matmul_simt
from llm_numba.cuda.jit import (
    SIMULATED,
    THREADS,
    blocks_for,
    float32,
    kernel,
    sized,
    stream,
    to_float,
    to_storage,
    uint16,
    uint32,
    with_shared,
)

MOST_PARTS = 8
MOST_IN_PARTS = sized(1 << 24, 1 << 8)  # numbers in all parts together
COLUMNS, LANES = sized(32, 4), sized(8, 2)  # a block of column_sums
PART_COST, KERNEL_COST = 4, sized(200, 2)
ROWS = sized(65535, 2)  # as many blocks as CUDA allows in this direction
PIECES = sized(32, 2)  # of rows, whose column sums are added at the end


def matmul_scratch_size(R, C, OC):
    """Floats of scratch that a matmul over R rows, from C channels to OC, needs."""
    return max(min(MOST_PARTS * max(R * OC, R * C, OC * C), MOST_IN_PARTS), PIECES * OC)


@kernel
def add_parts(out, parts, bias, with_bias, accumulate):
    """out[m, n] = (+= where accumulate) parts[0, m, n] + parts[1, m, n] + ..., + bias[n] where with_bias.

    Grid: (blocks of THREADS columns, at most ROWS); block: THREADS; a thread owns every ROWS-th number of a column.
    Moves: parts, and out once or twice
    """
    n = uint32(cuda.grid(1))
    if n < out.shape[1]:
        for m in range(uint32(cuda.blockIdx.y), out.shape[0], cuda.gridDim.y):
            total = float32(0)
            for p in range(parts.shape[0]):
                total += parts[p, m, n]
            if with_bias:
                total += to_float(bias[n])
            if accumulate:
                total += to_float(out[m, n])
            out[m, n] = to_storage(total, out)


@kernel
def column_sums(out, x, rows):
    """out[p, c] = the sum of x[r, c] over the pth piece of `rows` rows. out (pieces, C) float32, x (R, C).

    Grid: (blocks of COLUMNS columns, pieces); block: (COLUMNS, LANES); a thread owns every LANES-th row of a column.
    Moves: x once
    """
    sums = cuda.shared.array((LANES, COLUMNS), float32)
    column, lane = cuda.threadIdx.x, cuda.threadIdx.y
    c, piece = cuda.blockIdx.x * COLUMNS + column, cuda.blockIdx.y
    total = float32(0)
    if c < x.shape[1]:
        for r in range(piece * rows + lane, min(piece * rows + rows, x.shape[0]), LANES):
            total += to_float(x[r, c])
    sums[lane, column] = total
    cuda.syncthreads()
    if lane == 0 and c < x.shape[1]:
        for other in range(1, LANES):
            total += sums[other, column]
        out[piece, c] = total


def matmul_forward(out, inp, weight, bias, scratch):
    """A linear layer: every row of inp times every row of weight.

    out (B, T, OC) <- inp (B, T, C), weight (OC, C), bias (OC,) or None
    Writes:   out =
    Scratch:  matmul_scratch_size(B*T, C, OC)
    Parallel: over tiles of out; see `multiply`
    Flops:    2*B*T*C*OC
    """
    OC, C = weight.shape
    multiply(out.reshape(-1, OC), inp.reshape(-1, C), weight, scratch, bias=bias)


def matmul_backward(dinp, dweight, dbias, dout, inp, weight, scratch, accumulate):
    """The gradients of a linear layer.

    dinp (B, T, C), dweight (OC, C), dbias (OC,) or None <- dout (B, T, OC), inp (B, T, C), weight (OC, C)
    Writes:   dinp =; dweight, dbias += where accumulate, else =; they are float32 whatever the others are
    Scratch:  matmul_scratch_size(B*T, C, OC)
    Parallel: over tiles of dinp, then of dweight; see `multiply`
    Flops:    4*B*T*C*OC
    """
    OC, C = weight.shape
    dinp, dout, inp = dinp.reshape(-1, C), dout.reshape(-1, OC), inp.reshape(-1, C)
    multiply(dinp, dout, weight, scratch, b_by_columns=True)
    multiply(dweight, dout, inp, scratch, a_by_columns=True, b_by_columns=True, accumulate=accumulate)
    if dbias is not None:
        add_column_sums(dbias, dout, scratch, accumulate)


def multiply(out, a, b, scratch, bias=None, a_by_columns=False, b_by_columns=False, accumulate=False):
    """out[m, n] = (+= where accumulate) sum_k a[m, k] b[n, k], + bias[n].

    out (M, N) <- a (M, K), or (K, M) by columns, b (N, K), or (K, N) by columns, bias (N,) or None
    """
    M, N = out.shape
    K = a.shape[0 if a_by_columns else 1]
    way = best_way(out, a, b)
    parts, K_part = split(M, N, K, way)
    result = scratch[: parts * M * N].reshape(parts, M, N) if parts > 1 else out.reshape(1, M, N)
    bias, with_bias = (b.reshape(-1), False) if bias is None else (bias, True)  # b only stands where an array must
    tiles_m, tiles_n = blocks_for(M, way.TILE_M), blocks_for(N, way.TILE_N)
    grid = matmul_simt.NEIGHBOURS * tiles_n, blocks_for(tiles_m, matmul_simt.NEIGHBOURS), parts
    product = with_shared(way.KERNELS[a_by_columns, b_by_columns], grid, way.BLOCK, way.SHARED_BYTES)
    product(result, a, b, bias, with_bias and parts == 1, accumulate and parts == 1, K_part)
    if parts > 1:
        add_parts[(blocks_for(N), min(M, ROWS)), THREADS, stream()](out, result, bias, with_bias, accumulate)


def add_column_sums(out, x, scratch, accumulate):
    """out[c] = (+= where accumulate) sum_r x[r, c]. out (C,) float32 <- x (R, C)"""
    R, C = x.shape
    rows = blocks_for(R, PIECES)
    pieces = blocks_for(R, rows)
    sums = scratch[: pieces * C].reshape(pieces, C)
    column_sums[(blocks_for(C, COLUMNS), pieces), (COLUMNS, LANES), stream()](sums, x, rows)
    sums, total = sums.reshape(pieces, 1, C), out.reshape(1, C)
    add_parts[(blocks_for(C), 1), THREADS, stream()](total, sums, out, False, accumulate)


def best_way(*matrices):
    """The module whose kernels multiply these matrices, (out, a, b): tensor cores take bf16 in rows of whole 16 bytes.

    Tensors of the arena, and layers of them, then start at a multiple of 16 bytes too.
    """
    is_bf16 = matrices[1].dtype == uint16
    if is_bf16 and has_tensor_cores() and all(matrix.shape[1] % 8 == 0 for matrix in matrices):
        from llm_numba.cuda import matmul_mma  # not in the simulator, which has none of its instructions

        return matmul_mma
    return matmul_simt


@functools.cache
def has_tensor_cores() -> bool:
    """Whether the card multiplies bf16 matrices by itself."""
    return not SIMULATED and cuda.get_current_device().compute_capability >= (8, 0)


@functools.cache
def split(M, N, K, way):
    """How many parts to split K terms in, and how many terms a part has.

    The card works on way.SLOTS tiles at once. Per tile of a part, to write it to scratch and to read it again takes the
    whole card about as long as PART_COST terms of a tile take one place of it; one more kernel, KERNEL_COST terms.
    """
    tiles = blocks_for(M, way.TILE_M) * blocks_for(N, way.TILE_N)
    steps = blocks_for(K, way.TILE_K)

    def cost(parts):
        terms = blocks_for(tiles * parts, way.SLOTS) * blocks_for(steps, parts) * way.TILE_K
        return terms + (PART_COST * tiles * parts + KERNEL_COST if parts > 1 else 0)

    most = max(1, min(MOST_PARTS, steps, MOST_IN_PARTS // (M * N)))
    K_part = blocks_for(steps, min(range(1, most + 1), key=cost)) * way.TILE_K
    return blocks_for(K, K_part), K_part
