"""The residual stream: add the output of a block to its input, and normalise the sum for the next block."""

from numba import njit, prange

from llm_numba.cpu.jit import PARALLEL
from llm_numba.cpu.layernorm import normalise


@njit(**PARALLEL)
def residual_layernorm_forward(residual, out, mean, rstd, inp1, inp2, weight, bias):
    """Add two activations and normalise the sum, while each row is still in the cache.

    residual (B, T, C), out (B, T, C), mean (B, T), rstd (B, T)
        <- inp1 (B, T, C), inp2 (B, T, C), weight (C,), bias (C,)
    Writes:   residual = inp1 + inp2; out =, mean =, rstd = as `layernorm_forward` computes them from residual
    Parallel: over the B*T rows; each thread owns its rows, so nothing races
    Moves:    4*B*T*C floats; two separate ops would move 5*B*T*C
    Source:   He et al. 2015, arXiv:1512.03385; Ba et al. 2016, arXiv:1607.06450
    """
    B, T, C = residual.shape
    rows, y_rows = residual.reshape(B * T, C), out.reshape(B * T, C)
    rows1, rows2 = inp1.reshape(B * T, C), inp2.reshape(B * T, C)
    means, rstds = mean.reshape(B * T), rstd.reshape(B * T)
    for i in prange(B * T):
        row, row1, row2 = rows[i], rows1[i], rows2[i]
        for c in range(C):
            row[c] = row1[c] + row2[c]
        means[i], rstds[i] = normalise(y_rows[i], row, weight, bias)


@njit(**PARALLEL)
def residual_backward(dinp, dout):
    """The gradient of a sum is passed on to both inputs unchanged: dout is already that of one, dinp is the other's.

    dinp (B, T, C) <- dout (B, T, C), which may be the same memory; then nothing is copied
    Writes:   dinp = dout
    Parallel: over the B*T rows; each thread owns its rows, so nothing races
    Moves:    2*B*T*C floats, or none
    """
    B, T, C = dout.shape
    if dinp.ctypes.data != dout.ctypes.data:
        dx_rows, dy_rows = dinp.reshape(B * T, C), dout.reshape(B * T, C)
        for i in prange(B * T):
            dx, dy = dx_rows[i], dy_rows[i]
            for c in range(C):
                dx[c] = dy[c]
