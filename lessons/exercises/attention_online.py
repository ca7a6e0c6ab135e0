"""# Exercise: attention in one pass over the keys

One head: `q`, `k`, `v` are (T, HS). Each query attends to its own position and the ones before it. Write to `out`
(T, HS)

    out[t] = sum over s <= t of softmax(scores)[s] * v[s],   scores[s] = sum(q[t] * k[s]) / sqrt(HS)

without storing a row of scores: compute each score, use it, and discard it. While query t goes over the keys, it keeps
`top`, the largest score so far, `total`, the sum of e**(score - top), and in out[t] the sum of e**(score - top) * v. A
new score updates all three. If it is larger than `top`, rescale the sums so far. After the last key, divide out[t] by
`total`.

`prange` distributes the queries over the cores: query t may only write out[t]. Scores are in the hundreds.
"""

import math

import numpy as np
from numba import njit, prange

from llm_numba import oracle
from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal

ZERO, ONE, LOWEST = np.float32(0), np.float32(1), np.float32(-np.inf)


@njit(parallel=True, error_model="numpy")
def attend(out, q, k, v):
    T, HS = q.shape
    scale = ONE / np.float32(math.sqrt(HS))
    for t in prange(T):
        top, total = LOWEST, ZERO
        for i in range(HS):
            out[t, i] = ZERO
        raise NotImplementedError  # replace this line with your code


def expected(out, q, k, v):
    out[...] = oracle.softmax(oracle.scores(q, k))[0] @ v


def inputs(rng, T, HS):
    q, k, v = normal(rng, T, HS), normal(rng, T, HS), normal(rng, T, HS) + 1
    q[:, 0] = 20
    k[:, 0] += 20
    return dict(out=garbage(T, HS), q=q, k=k / 2, v=v)


EXERCISE = Exercise(
    "attend",
    Problem(
        expected,
        inputs,
        ("out",),
        (dict(T=3, HS=4), dict(T=1, HS=1), dict(T=17, HS=3), dict(T=5, HS=97)),
        tolerance=2e-4,  # a score in the hundreds is itself rounded, and e**score magnifies that
    ),
    example=dict(T=3, HS=4),
)
