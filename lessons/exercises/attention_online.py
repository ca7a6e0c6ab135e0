"""# Exercise: attention in one pass over the keys

One head: `q`, `k`, `v` are (T, HS). Write into `out` (T, HS) what each query makes of the values of the keys that it
may see, its own and those before it:

    out[t] = sum over s <= t of softmax(scores)[s] * v[s],   scores[s] = sum(q[t] * k[s]) / sqrt(HS)

without a row of scores: each score is made, used, and forgotten. While query t goes over the keys, it has `top`, the
largest score so far, `total`, the sum of e**(score - top), and in out[t] the values weighed by e**(score - top). A new
score updates all three; when it is larger than `top`, what was summed before shrinks. After the last key, out[t] is
divided by `total`.

The queries are shared out among the cores: query t may write to out[t] only. The scores are in the hundreds.
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
        raise NotImplementedError  # your code in the place of this line


def exact(out, q, k, v):
    out[...] = oracle.softmax(oracle.scores(q, k))[0] @ v


def inputs(rng, T, HS):
    q, k, v = normal(rng, T, HS), normal(rng, T, HS), normal(rng, T, HS) + 1
    q[:, 0] = 20
    k[:, 0] += 20
    return dict(out=garbage(T, HS), q=q, k=k / 2, v=v)


EXERCISE = Exercise(
    "attend",
    Problem(
        oracle,
        inputs,
        ("out",),
        (dict(T=3, HS=4), dict(T=1, HS=1), dict(T=17, HS=3), dict(T=5, HS=97)),
        tolerance=2e-4,  # a score in the hundreds is itself rounded, and e**score magnifies that
    ),
    example=dict(T=3, HS=4),
)
