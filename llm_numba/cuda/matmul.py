"""Matmul: a linear layer, the gradient of its input and those of its parameters. Each is one matrix product.

The products differ in how their operands lie in memory. variants.py chooses the kernels: matmul_mma.py (bf16 on tensor
cores) or matmul_simt.py (any GPU, any operands).
"""

import math

from numba import cuda

from llm_numba.cuda.jit import blocks_for, float32, kernel, sized, stream, to_float
from llm_numba.cuda.tiling import add_splits
from llm_numba.cuda.variants import choose

COLUMNS, LANES = sized(32, 4), sized(8, 2)  # a block of column_sums_kernel
SLICES = sized(32, 2)  # of the rows; their column sums are added at the end


@kernel
def column_sums_kernel(out, x, rows):
    """out[s, c] = the sum of x[r, c] over slice s, which has `rows` rows. out (slices, C) float32, x (R, C).

    Grid: (blocks of COLUMNS columns, slices); block: (COLUMNS, LANES); a thread owns every LANES-th row of a column.
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
    """A linear layer: out = inp @ weight.T + bias.

    out (B, T, OC) <- inp (B, T, C), weight (OC, C), bias (OC,) or None
    Writes:   out =
    Scratch:  matmul_forward_scratch
    Parallel: over tiles of out
    Flops:    2*B*T*C*OC
    """
    OC, C = weight.shape
    multiply(out.reshape(-1, OC), inp.reshape(-1, C), weight, scratch, bias=bias)


def matmul_forward_scratch(out, inp, weight, bias):
    """Floats of scratch that `matmul_forward` needs."""
    OC, C = weight.shape
    return multiply_scratch(weight.dtype, math.prod(out.shape[:-1]), OC, C, (OC, C, C))


def matmul_backward(dinp, dweight, dbias, dout, inp, weight, scratch, accumulate):
    """The gradients of a linear layer.

    dinp (B, T, C), dweight (OC, C), dbias (OC,) or None <- dout (B, T, OC), inp (B, T, C), weight (OC, C)
    Writes:   dinp =; dweight, dbias += if accumulate, else =; both are float32 in every precision
    Scratch:  matmul_backward_scratch
    Parallel: over tiles of dinp, then over tiles of dweight, then over columns of dout
    Flops:    4*B*T*C*OC
    """
    OC, C = weight.shape
    dinp, dout, inp = dinp.reshape(-1, C), dout.reshape(-1, OC), inp.reshape(-1, C)
    multiply(dinp, dout, weight, scratch, b_transposed=True)
    multiply(dweight, dout, inp, scratch, a_transposed=True, b_transposed=True, accumulate=accumulate)
    if dbias is not None:
        add_column_sums(dbias, dout, scratch, accumulate)


def matmul_backward_scratch(dinp, dweight, dbias, dout, inp, weight, accumulate):
    """Floats of scratch that `matmul_backward` needs: its three steps use the same memory."""
    OC, C = weight.shape
    R = math.prod(dout.shape[:-1])
    return max(
        multiply_scratch(weight.dtype, R, C, OC, (C, OC, C)),
        multiply_scratch(weight.dtype, OC, C, R, (C, OC, C)),
        0 if dbias is None else slices_of(R)[0] * OC,
    )


def multiply(out, a, b, scratch, bias=None, a_transposed=False, b_transposed=False, accumulate=False):
    """out[m, n] = (+= if accumulate) sum_k a[m, k] b[n, k], + bias[n].

    out (M, N) <- a (M, K), or (K, M) if a_transposed, b (N, K), or (K, N) if b_transposed, bias (N,) or None
    Errors: UserError if a variant is forced that does not support these operands.
    """
    variant = choose("matmul", a.dtype, out.shape[1], a.shape[1], b.shape[1])
    variant.multiply(out, a, b, scratch, bias, a_transposed, b_transposed, accumulate)


def multiply_scratch(dtype, M, N, K, row_lengths):
    """Floats of scratch that `multiply` needs; row_lengths: those of out, a and b, as they lie in memory."""
    return choose("matmul", dtype, *row_lengths).scratch_size(M, N, K)


def add_column_sums(out, x, scratch, accumulate):
    """out[c] = (+= if accumulate) sum_r x[r, c]. out (C,) float32 <- x (R, C)"""
    R, C = x.shape
    slices, rows = slices_of(R)
    sums = scratch[: slices * C].reshape(slices, C)
    column_sums_kernel[(blocks_for(C, COLUMNS), slices), (COLUMNS, LANES), stream()](sums, x, rows)
    add_splits(out.reshape(1, C), sums.reshape(slices, 1, C), accumulate=accumulate)


def slices_of(R):
    """(slices, rows of a slice) that the column sums over R rows are taken in."""
    rows = blocks_for(R, SLICES)
    return blocks_for(R, rows), rows
