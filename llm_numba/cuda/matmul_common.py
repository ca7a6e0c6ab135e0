"""What the matmul variants share: the gradient of the bias, and GELU after kernels that only multiply."""

from numba import cuda

from llm_numba.cuda.gelu import gelu_backward, gelu_forward
from llm_numba.cuda.jit import blocks_for, float32, kernel, sized, stream, to_float
from llm_numba.cuda.tiling import add_splits

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


def add_column_sums(out, x, scratch, accumulate):
    """out[c] = (+= if accumulate) sum_r x[r, c]. out (C,) float32 <- x (R, C)"""
    R, C = x.shape
    slices, rows = slices_of(R)
    sums = scratch[: slices * C].reshape(slices, C)
    column_sums_kernel[(blocks_for(C, COLUMNS), slices), (COLUMNS, LANES), stream()](sums, x, rows)
    add_splits(out.reshape(1, C), sums.reshape(slices, 1, C), accumulate=accumulate)


def column_sums_scratch(R: int, C: int) -> int:
    """Floats of scratch that `add_column_sums` needs."""
    return slices_of(R)[0] * C


def slices_of(R: int) -> tuple[int, int]:
    """(slices, rows of a slice) that the column sums over R rows are taken in."""
    rows = blocks_for(R, SLICES)
    return blocks_for(R, rows), rows


def unfused(multiply, scratch_size):
    """forward, input_gradient, weight_gradient, forward_scratch and backward_scratch (see matmul.py) of a variant whose
    kernels only multiply. GELU and the gradient of the bias are kernels of their own.

    multiply(out, a, b, scratch, bias=None, a_transposed=False, b_transposed=False, accumulate=False):
        out[m, n] = (+= if accumulate) sum_k a[m, k] b[n, k], + bias[n].
        out (M, N) <- a (M, K), or (K, M) if a_transposed, b (N, K), or (K, N) if b_transposed, bias (N,) or None
    scratch_size(M, N, K): the floats of scratch that it needs
    """

    def forward(out, inp, weight, bias, scratch, pre=None):
        multiply(out if pre is None else pre, inp, weight, scratch, bias)
        if pre is not None:
            gelu_forward(out, pre)

    def input_gradient(dinp, dout, weight, scratch, pre=None):
        multiply(dinp, dout, weight, scratch, b_transposed=True)
        if pre is not None:
            gelu_backward(dinp, pre, dinp)

    def weight_gradient(dweight, dbias, dout, inp, scratch, accumulate):
        multiply(dweight, dout, inp, scratch, a_transposed=True, b_transposed=True, accumulate=accumulate)
        if dbias is not None:
            add_column_sums(dbias, dout, scratch, accumulate)

    def forward_scratch(R, C, OC):
        return scratch_size(R, OC, C)

    def backward_scratch(R, C, OC, with_bias):
        sums = column_sums_scratch(R, OC) if with_bias else 0
        return max(scratch_size(R, C, OC), scratch_size(OC, C, R), sums)

    return forward, input_gradient, weight_gradient, forward_scratch, backward_scratch
