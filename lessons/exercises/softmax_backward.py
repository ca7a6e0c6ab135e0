"""# Exercise: softmax backward

Each row of `p` (R, C) is the softmax of a row of scores. `dp` (R, C) is the gradient of the loss with respect to `p`.
Write the gradient with respect to the scores to `dscores` (R, C). For each row

    dscores = p * (dp - sum(p * dp))

where the sum is over the row. `prange` distributes the rows over the cores: each iteration may only write elements that
no other iteration accesses. Do not change `p` and `dp`.
"""

import numpy as np
from numba import njit, prange

from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal

ZERO = np.float32(0)


@njit(parallel=True)
def softmax_backward(dscores, dp, p):
    R, C = p.shape
    for r in prange(R):
        raise NotImplementedError  # replace this line with your code


def expected(dscores, dp, p):
    dscores[...] = p * (dp - (p * dp).sum(axis=1, keepdims=True))


def inputs(rng, R, C):
    e = np.exp(2 * normal(rng, R, C))
    return dict(dscores=garbage(R, C), dp=normal(rng, R, C) + 1, p=e / e.sum(axis=1, keepdims=True))


EXERCISE = Exercise(
    "softmax_backward",
    Problem(expected, inputs, ("dscores",), (dict(R=3, C=5), dict(R=2, C=97), dict(R=1, C=257), dict(R=3, C=1))),
    example=dict(R=2, C=4),
)
