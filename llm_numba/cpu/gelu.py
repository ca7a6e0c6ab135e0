"""GELU in its tanh form, as in GPT-2."""

import math

import numpy as np
from numba import njit, prange

from llm_numba.cpu.jit import ONE, PARALLEL, exp

# 0.5 x (1 + tanh u) = x / (1 + e^(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), so with -2u = x (LINEAR + CUBIC x^2)
LINEAR = np.float32(-2 * math.sqrt(2 / math.pi))
CUBIC = np.float32(-2 * math.sqrt(2 / math.pi) * 0.044715)
THREE = np.float32(3)


@njit(**PARALLEL)
def gelu_forward(out, inp):
    """Scale each element by (about) the probability that a standard normal variable is below it.

    out (..., C) <- inp (..., C)
    Writes:   out = 0.5 * inp * (1 + tanh(sqrt(2 / pi) * (inp + 0.044715 * inp**3)))
    Parallel: over the rows; each thread owns its rows, so nothing races
    Moves:    2 floats per element
    Source:   Hendrycks and Gimpel 2016, arXiv:1606.08415
    """
    C = inp.shape[-1]
    x_rows, y_rows = inp.reshape(-1, C), out.reshape(-1, C)
    for i in prange(x_rows.shape[0]):
        x, y = x_rows[i], y_rows[i]
        for c in range(C):
            y[c] = x[c] / (ONE + exp(x[c] * (LINEAR + CUBIC * x[c] * x[c])))


@njit(**PARALLEL)
def gelu_backward(dinp, inp, dout):
    """The gradient of `gelu_forward`.

    dinp (..., C) <- inp (..., C), dout (..., C)
    With s = 1 / (1 + e^(-2u)), u as in the forward:
    Writes:   dinp = dout * (s + inp * s * (1 - s) * d(2u)/dinp)
    Parallel: over the rows; each thread owns its rows, so nothing races
    Moves:    3 floats per element
    """
    C = inp.shape[-1]
    dx_rows, x_rows, dy_rows = dinp.reshape(-1, C), inp.reshape(-1, C), dout.reshape(-1, C)
    for i in prange(x_rows.shape[0]):
        dx, x, dy = dx_rows[i], x_rows[i], dy_rows[i]
        for c in range(C):
            square = x[c] * x[c]
            s = ONE / (ONE + exp(x[c] * (LINEAR + CUBIC * square)))
            dx[c] = dy[c] * (s - x[c] * s * (ONE - s) * (LINEAR + THREE * CUBIC * square))
