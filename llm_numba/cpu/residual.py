"""The residual stream: what a block computes is added to what came in."""

from numba import njit, prange

from llm_numba.cpu.jit import PARALLEL


@njit(**PARALLEL)
def residual_forward(out, inp1, inp2):
    """Add two activations.

    out (B, T, C) <- inp1 (B, T, C), inp2 (B, T, C)
    Writes:   out = inp1 + inp2
    Parallel: over the B*T rows; each thread owns its rows, so nothing races
    Moves:    3*B*T*C floats
    Source:   He et al. 2015, arXiv:1512.03385
    """
    B, T, C = out.shape
    rows, rows1, rows2 = out.reshape(B * T, C), inp1.reshape(B * T, C), inp2.reshape(B * T, C)
    for i in prange(B * T):
        row, row1, row2 = rows[i], rows1[i], rows2[i]
        for c in range(C):
            row[c] = row1[c] + row2[c]


@njit(**PARALLEL)
def residual_backward(dinp, dout):
    """A sum hands its gradient on unchanged, to both of its inputs: dout itself already is one's, dinp is the other's.

    dinp (B, T, C) <- dout (B, T, C); where they are the same memory there is nothing to do
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
