"""# Exercise: the LayerNorm gradient with respect to its input

There are R rows of C channels. `mean` and `rstd` hold one element per row. With

    norm[c] = (inp[row, c] - mean[row]) * rstd[row]
    dnorm[c] = weight[c] * dout[row, c]

add to `dinp` (`+=`)

    rstd[row] * (dnorm[c] - average(dnorm) - norm[c] * average(dnorm * norm))

where both averages are over the C channels of the row. `prange` distributes the rows over the cores; write the body of
the loop. `ZERO` is 0 in float32. Write to no array but `dinp`.
"""

import numpy as np
from numba import njit, prange

from llm_numba import oracle
from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal

ZERO = np.float32(0)


@njit(parallel=True)
def add_dinp(dinp, dout, inp, weight, mean, rstd):
    R, C = inp.shape
    for row in prange(R):
        raise NotImplementedError  # replace this line with your code


def expected(dinp, dout, inp, weight, mean, rstd):
    dx, dy, x, means, rstds = dinp[None], dout[None], inp[None], mean[None], rstd[None]  # a batch of one
    dweight, dbias = np.zeros_like(weight), np.zeros_like(weight)
    oracle.layernorm_backward(dx, dweight, dbias, dy, x, weight, means, rstds, None, True)


def inputs(rng, R, C):
    inp, mean, rstd = normal(rng, R, C) + 1, garbage(R), garbage(R)
    oracle.layernorm_forward(garbage(R, C), mean, rstd, inp, 1, 0)
    return dict(dinp=normal(rng, R, C), dout=normal(rng, R, C), inp=inp, weight=normal(rng, C), mean=mean, rstd=rstd)


EXERCISE = Exercise(
    "add_dinp",
    Problem(expected, inputs, ("dinp",), (dict(R=1, C=1), dict(R=3, C=5), dict(R=2, C=257), dict(R=97, C=3))),
    example=dict(R=2, C=4),
)
