"""# Exercise: backwards through a softmax

A softmax made each row of `p` (R, C) from a row of scores. From behind comes `dp` (R, C), the gradient of the loss with
respect to `p`. Write the gradient with respect to the scores into `dscores` (R, C): for each row

    dscores = p * (dp - sum(p * dp))

where the sum goes over the row. The rows are shared out among the cores by `prange`: each iteration may write only what
no other touches. `p` and `dp` are read, and stay as they are.
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
        raise NotImplementedError  # your code in the place of this line


def oracle(dscores, dp, p):
    dscores[...] = p * (dp - (p * dp).sum(axis=1, keepdims=True))


def inputs(rng, R, C):
    e = np.exp(2 * normal(rng, R, C))
    return dict(dscores=garbage(R, C), dp=normal(rng, R, C) + 1, p=e / e.sum(axis=1, keepdims=True))


EXERCISE = Exercise(
    "softmax_backward",
    Problem(oracle, inputs, ("dscores",), (dict(R=3, C=5), dict(R=2, C=97), dict(R=1, C=257), dict(R=3, C=1))),
    example=dict(R=2, C=4),
)
