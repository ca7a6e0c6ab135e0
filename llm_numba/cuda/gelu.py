"""GELU, in GPT-2's tanh form."""

import math

from numba import cuda

from llm_numba.cuda.jit import (
    THREADS,
    blocks_for,
    exp2,
    float32,
    inlined,
    kernel,
    reciprocal,
    sized,
    stream,
    to_float,
    to_storage,
    uint32,
)

EACH = sized(8, 2)  # elements per thread: several loads in flight keep the memory busy

# 0.5 x (1 + tanh u) = x / (1 + e^(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), so with -2u = x (LINEAR + CUBIC x^2)
LINEAR, CUBIC = (-2 * math.sqrt(2 / math.pi) * factor for factor in (1, 0.044715))
LINEAR_LOG2, CUBIC_LOG2 = float32(LINEAR / math.log(2)), float32(CUBIC / math.log(2))  # of the same power of 2
LINEAR, THREE_CUBIC, ONE = float32(LINEAR), float32(3 * CUBIC), float32(1)


@inlined
def gate(x):
    """GELU(x) / x: 1 / (1 + e^(-2u))."""
    return reciprocal(ONE + exp2(x * (LINEAR_LOG2 + CUBIC_LOG2 * x * x)))


@inlined
def slope(x):
    """The derivative of GELU."""
    s = gate(x)
    return s - x * s * (ONE - s) * (LINEAR + THREE_CUBIC * x * x)


@kernel
def gelu_forward_kernel(out, inp):
    """out (n,) = GELU of inp (n,).

    Grid: n / (THREADS * EACH); block: THREADS; a thread owns EACH elements, THREADS apart, so accesses are coalesced.
    Moves: 2*n elements.
    """
    # unsigned: no check for negative indices
    first = uint32(cuda.blockIdx.x) * THREADS * EACH + uint32(cuda.threadIdx.x)
    x = cuda.local.array(EACH, float32)
    # load everything before the first store: the compiler does not move a load before an earlier store
    for k in range(EACH):
        i = first + k * THREADS
        if i < out.shape[0]:
            x[k] = to_float(inp[i])
    for k in range(EACH):
        i = first + k * THREADS
        if i < out.shape[0]:
            out[i] = to_storage(x[k] * gate(x[k]), out)


@kernel
def gelu_backward_kernel(dinp, inp, dout):
    """dinp (n,) <- inp (n,), dout (n,).

    Grid, block and thread as in the forward. Moves: 3*n elements.
    """
    first = uint32(cuda.blockIdx.x) * THREADS * EACH + uint32(cuda.threadIdx.x)
    x, dy = cuda.local.array(EACH, float32), cuda.local.array(EACH, float32)
    for k in range(EACH):
        i = first + k * THREADS
        if i < dinp.shape[0]:
            x[k], dy[k] = to_float(inp[i]), to_float(dout[i])
    for k in range(EACH):
        i = first + k * THREADS
        if i < dinp.shape[0]:
            dinp[i] = to_storage(dy[k] * slope(x[k]), dinp)


def gelu_forward(out, inp):
    """Multiply each element by (about) the probability that a standard normal variable is below it.

    out (..., C) <- inp (..., C)
    Writes:   out = 0.5 * inp * (1 + tanh(sqrt(2 / pi) * (inp + 0.044715 * inp**3)))
    Parallel: over the elements; nothing races
    Moves:    2 elements per element of out
    Source:   Hendrycks and Gimpel 2016, arXiv:1606.08415
    """
    blocks = blocks_for(out.size, THREADS * EACH)
    gelu_forward_kernel[blocks, THREADS, stream()](out.reshape(-1), inp.reshape(-1))


def gelu_backward(dinp, inp, dout):
    """The gradient of `gelu_forward`.

    dinp (..., C) <- inp (..., C), dout (..., C)
    With s = 1 / (1 + e^(-2u)), u as in the forward:
    Writes:   dinp = dout * (s + inp * s * (1 - s) * d(2u)/dinp)
    Parallel: over the elements; nothing races
    Moves:    3 elements per element of dinp
    """
    blocks = blocks_for(dinp.size, THREADS * EACH)
    gelu_backward_kernel[blocks, THREADS, stream()](dinp.reshape(-1), inp.reshape(-1), dout.reshape(-1))
