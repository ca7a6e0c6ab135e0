"""The rungs of lesson 06 on a GPU: GELU, forward."""

import math

from numba import cuda

from llm_numba import oracle
from llm_numba.cuda.gelu import gelu_forward
from llm_numba.cuda.jit import blocks_for, float32, sized, stream
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

THREADS = sized(256, 32)  # per block: on a GPU, in the simulator
EACH = 8  # elements per thread in v1 and v3
ONE, SCALE, CUBIC = float32(1), float32(math.sqrt(2 / math.pi)), float32(0.044715)
MINUS_TWO, HIGHEST = float32(-2), float32(88)  # e**88 is close to the largest float32


@cuda.jit(device=True)
def gelu(x):
    u = SCALE * (x + CUBIC * x * x * x)
    return x / (ONE + math.exp(min(MINUS_TWO * u, HIGHEST)))


@cuda.jit
def kernel_v1(out, inp):
    """A thread owns EACH consecutive elements, which would suit a CPU core."""
    first = cuda.grid(1) * EACH
    for i in range(first, min(first + EACH, inp.shape[0])):
        out[i] = gelu(inp[i])


def gelu_forward_v1(out, inp):
    kernel_v1[blocks_for(inp.size, THREADS * EACH), THREADS, stream()](out.reshape(-1), inp.reshape(-1))


@cuda.jit
def kernel_v2(out, inp):
    """A thread owns one element: a warp accesses consecutive elements."""
    i = cuda.grid(1)
    if i < inp.shape[0]:
        out[i] = gelu(inp[i])


def gelu_forward_v2(out, inp):
    kernel_v2[blocks_for(inp.size, THREADS), THREADS, stream()](out.reshape(-1), inp.reshape(-1))


@cuda.jit
def kernel_v3(out, inp):
    """A thread owns EACH elements, THREADS apart, and issues all loads before it uses the first."""
    first = cuda.blockIdx.x * THREADS * EACH + cuda.threadIdx.x
    x = cuda.local.array(EACH, float32)
    for k in range(EACH):
        i = first + k * THREADS
        if i < inp.shape[0]:
            x[k] = inp[i]
    for k in range(EACH):
        i = first + k * THREADS
        if i < inp.shape[0]:
            out[i] = gelu(x[k])


def gelu_forward_v3(out, inp):
    kernel_v3[blocks_for(inp.size, THREADS * EACH), THREADS, stream()](out.reshape(-1), inp.reshape(-1))


def inputs(rng, B, T, C):
    return dict(out=garbage(B, T, C), inp=3 * normal(rng, B, T, C))


FORWARD = Ladder(
    "gelu_forward",
    Problem(
        oracle.gelu_forward,
        inputs,
        ("out",),
        (dict(B=1, T=1, C=1), dict(B=1, T=3, C=97), dict(B=3, T=1, C=3), dict(B=1, T=2, C=257)),
        device="cuda",
    ),
    (gelu_forward_v1, gelu_forward_v2, gelu_forward_v3, gelu_forward),
    timed=dict(B=16, T=1024, C=3072),
    quick=dict(B=1, T=2, C=32),
    counted=dict(B=1, T=2, C=256),
    nbytes=lambda B, T, C: 2 * 4 * B * T * C,
    pattern="copy",
    torch="gelu_forward",
)
