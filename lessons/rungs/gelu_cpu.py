"""The rungs of lesson 06 on a CPU: GELU, forward."""

import math

import numpy as np
from numba import njit

from llm_numba import oracle
from llm_numba.cpu.gelu import gelu_forward
from llm_numba.cpu.jit import exp
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

HALF, ONE, SCALE, CUBIC = np.float32(0.5), np.float32(1), np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)
MINUS_TWO = np.float32(-2)
PIECE = 4096  # elements: 16 KiB, so that a piece and its temporaries fit in the cache of a core


def gelu_forward_v1(out, inp):
    """NumPy: each operator reads whole arrays and writes another."""
    u = SCALE * (inp + CUBIC * inp * inp * inp)
    np.multiply(HALF * inp, ONE + np.tanh(u), out=out)


def gelu_forward_v2(out, inp):
    """The same operators, one piece at a time: each operator finds its input in the cache."""
    x, y = inp.reshape(-1), out.reshape(-1)
    for first in range(0, x.size, PIECE):
        piece = x[first : first + PIECE]
        u = SCALE * (piece + CUBIC * piece * piece * piece)
        np.multiply(HALF * piece, ONE + np.tanh(u), out=y[first : first + PIECE])


@njit
def gelu_forward_v3(out, inp):
    """One loop: intermediate results stay in registers. tanh is a function call for each element."""
    x, y = inp.reshape(-1), out.reshape(-1)
    for i in range(x.shape[0]):
        u = SCALE * (x[i] + CUBIC * x[i] * x[i] * x[i])
        y[i] = HALF * x[i] * (ONE + math.tanh(u))


@njit(fastmath={"contract"}, error_model="numpy")
def gelu_forward_v4(out, inp):
    """No function call: exp is plain arithmetic, so a vector instruction processes 8 or 16 elements."""
    x, y = inp.reshape(-1), out.reshape(-1)
    for i in range(x.shape[0]):
        u = SCALE * (x[i] + CUBIC * x[i] * x[i] * x[i])
        y[i] = x[i] / (ONE + exp(MINUS_TWO * u))


def inputs(rng, B, T, C):
    return dict(out=garbage(B, T, C), inp=3 * normal(rng, B, T, C))


FORWARD = Ladder(
    "gelu_forward",
    Problem(
        oracle.gelu_forward,
        inputs,
        ("out",),
        (dict(B=1, T=1, C=1), dict(B=1, T=3, C=97), dict(B=3, T=1, C=3), dict(B=2, T=97, C=257)),
    ),
    (gelu_forward_v1, gelu_forward_v2, gelu_forward_v3, gelu_forward_v4, gelu_forward),
    timed=dict(B=4, T=1024, C=3072),
    quick=dict(B=1, T=64, C=96),
    nbytes=lambda B, T, C: 2 * 4 * B * T * C,
    pattern="copy",
    torch="gelu_forward",
)
