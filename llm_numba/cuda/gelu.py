"""GELU, in GPT-2's tanh form.

An op of its own: as the last thing that the matmul before it did, it took no less time.
"""

import math

from numba import cuda

from llm_numba.cuda.jit import THREADS, blocks_for, device, float32, kernel, sized, stream, to_float, to_storage, uint32

EACH = sized(8, 2)  # numbers of a thread: it takes several loads on their way at once to keep the memory busy

# 0.5 x (1 + tanh u) = x / (1 + e^(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), so with -2u = x (LINEAR + CUBIC x^2)
LINEAR = float32(-2 * math.sqrt(2 / math.pi))
CUBIC = float32(-2 * math.sqrt(2 / math.pi) * 0.044715)
ONE, THREE = float32(1), float32(3)
HIGHEST = float32(88)  # e**88 is near the largest float32


@device
def sigmoid_of_2u(x):
    """1 / (1 + e^(-2u)), by which GELU weighs x."""
    return ONE / (ONE + math.exp(min(x * (LINEAR + CUBIC * x * x), HIGHEST)))


@kernel
def gelu_forward_kernel(out, inp):
    """out (n,) = GELU of inp (n,).

    Grid: a block for THREADS * EACH numbers; block: THREADS; a thread owns EACH numbers, THREADS apart, so that a
    warp's are side by side. Moves: 2 numbers an element.
    """
    first = uint32(cuda.blockIdx.x) * THREADS * EACH + uint32(cuda.threadIdx.x)  # not signed, so never below 0
    x = cuda.local.array(EACH, float32)
    # load them all before one is stored: no load starts before a store that the program puts first
    for k in range(EACH):
        i = first + k * THREADS
        if i < out.shape[0]:
            x[k] = to_float(inp[i])
    for k in range(EACH):
        i = first + k * THREADS
        if i < out.shape[0]:
            out[i] = to_storage(x[k] * sigmoid_of_2u(x[k]), out)


@kernel
def gelu_backward_kernel(dinp, inp, dout):
    """dinp (n,) <- inp (n,), dout (n,).

    Grid, block and thread: as in the forward. Moves: 3 numbers an element.
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
            s = sigmoid_of_2u(x[k])
            dinp[i] = to_storage(dy[k] * (s - x[k] * s * (ONE - s) * (LINEAR + THREE * CUBIC * x[k] * x[k])), dinp)


def gelu_forward(out, inp):
    """Weigh each number by (about) the probability that a standard normal one is below it.

    out (..., C) <- inp (..., C)
    Writes:   out = 0.5 * inp * (1 + tanh(sqrt(2 / pi) * (inp + 0.044715 * inp**3)))
    Parallel: over all numbers; nothing races
    Moves:    2 numbers an element
    Source:   Hendrycks and Gimpel 2016, arXiv:1606.08415
    """
    blocks = blocks_for(out.size, THREADS * EACH)
    gelu_forward_kernel[blocks, THREADS, stream()](out.reshape(-1), inp.reshape(-1))


def gelu_backward(dinp, inp, dout):
    """The gradient of `gelu_forward`.

    dinp (..., C) <- inp (..., C), dout (..., C)
    With s = 1 / (1 + e^(-2u)), u as in the forward:
    Writes:   dinp = dout * (s + inp * s * (1 - s) * d(2u)/dinp)
    Parallel: over all numbers; nothing races
    Moves:    3 numbers an element
    """
    blocks = blocks_for(dinp.size, THREADS * EACH)
    gelu_backward_kernel[blocks, THREADS, stream()](dinp.reshape(-1), inp.reshape(-1), dout.reshape(-1))
