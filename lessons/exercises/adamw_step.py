"""# Exercise: an AdamW step

For every parameter `i` with gradient `g = grads[i]`, compute in this order:

    m[i] = BETA1 * m[i] + (1 - BETA1) * g
    v[i] = BETA2 * v[i] + (1 - BETA2) * g**2
    mhat = m[i] / (1 - BETA1**step)
    vhat = v[i] / (1 - BETA2**step)
    params[i] -= rate * (mhat / (sqrt(vhat) + EPS) + decay * params[i])

RUN consecutive parameters form a run: parameter `i` belongs to run `i // RUN`. `decay` is WEIGHT_DECAY if `decays` of
that run is 1, and 0 if it is 0. `rate` and `step` are scalars. `prange` distributes the parameters over the cores.
`math.sqrt` is available.
"""

import math  # noqa: F401  for your code

import numpy as np
from numba import njit, prange

from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, normal

RUN = 4
BETA1, BETA2, EPS, WEIGHT_DECAY = 0.9, 0.95, 1e-8, 0.1


@njit(parallel=True)
def adamw(params, grads, m, v, decays, rate, step):
    for i in prange(params.shape[0]):
        raise NotImplementedError  # replace this line with your code


def expected(params, grads, m, v, decays, rate, step):
    m[...] = BETA1 * m + (1 - BETA1) * grads
    v[...] = BETA2 * v + (1 - BETA2) * grads**2
    mhat, vhat = m / (1 - BETA1**step), v / (1 - BETA2**step)
    params -= rate * (mhat / (np.sqrt(vhat) + EPS) + WEIGHT_DECAY * np.repeat(decays, RUN) * params)


def inputs(rng, runs, step):
    n = RUN * runs
    return dict(
        params=normal(rng, n), grads=normal(rng, n), m=normal(rng, n) if step > 1 else np.zeros(n, np.float32),
        v=normal(rng, n) ** 2 if step > 1 else np.zeros(n, np.float32),
        decays=(np.arange(runs) % 2).astype(np.uint8), rate=0.1, step=step,
    )  # fmt: skip


EXERCISE = Exercise(
    "adamw",
    Problem(
        expected, inputs, ("params", "m", "v"), (dict(runs=1, step=1), dict(runs=3, step=1), dict(runs=97, step=5))
    ),
    example=dict(runs=2, step=1),
)
