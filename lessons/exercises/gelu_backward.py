"""# Exercise: the GELU gradient

The arrays have R rows of C elements. For each element `x` of `inp`, with

    u = SCALE * (x + CUBIC * x**3)
    t = tanh(u)
    slope = SCALE * (1 + 3 * CUBIC * x**2)          the derivative du/dx

write (`=`, not `+=`)

    dinp = dout * (0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope)

`prange` distributes the rows over the cores; write the loop over the elements of a row. `math.tanh` is available, and
the constants are defined in float32. Read each element of `inp` and `dout` once, and write each element of `dinp` once.
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
        raise NotImplementedError  # replace this line with your code


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
