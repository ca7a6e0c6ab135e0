"""# Exercise: the gradient of GELU

R rows of C numbers. For each number `x` of `inp`, with

    u = SCALE * (x + CUBIC * x**3)
    t = tanh(u)
    slope = SCALE * (1 + 3 * CUBIC * x**2)          the derivative of u by x

write (`=`, not `+=`)

    dinp = dout * (0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope)

Rows are shared out among the cores; write the loop over the numbers of a row. `math.tanh` is there, and the constants
in float32. Read each number of `inp` and of `dout` once, and write each of `dinp` once.
"""

import math

import numpy as np
from numba import njit, prange

from llm_numba import oracle
from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal

HALF, ONE, THREE = np.float32(0.5), np.float32(1), np.float32(3)
SCALE, CUBIC = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)


@njit(parallel=True)
def gelu_backward(dinp, inp, dout):
    R, C = inp.shape
    for row in prange(R):
        raise NotImplementedError  # your code in the place of this line


def inputs(rng, R, C):
    return dict(dinp=garbage(R, C), inp=2 * normal(rng, R, C), dout=normal(rng, R, C))


EXERCISE = Exercise(
    "gelu_backward",
    Problem(
        oracle.gelu_backward,
        inputs,
        ("dinp",),
        (dict(R=1, C=1), dict(R=3, C=5), dict(R=2, C=257), dict(R=97, C=3)),
    ),
    example=dict(R=2, C=4),
)
