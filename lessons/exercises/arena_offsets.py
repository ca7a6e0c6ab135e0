"""# Exercise: where each tensor begins

`sizes` (n,) says how many numbers each of n tensors has. They are to stand one after the other in one array, in this
order. Write into `offsets` (n,) the index at which each one begins, and into `total[0]` how long the array must be.

A tensor begins at a multiple of RUN = 64 numbers, and the whole array is a multiple of it too: where a tensor ends
between two multiples, the numbers up to the next one stay empty. A tensor of exactly 64 numbers leaves nothing empty.

It is plain Python: no Numba yet.
"""

import numpy as np

from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem

RUN = 64


def lay_out(offsets, total, sizes):
    end = 0  # where the next tensor begins
    raise NotImplementedError  # your code in the place of this line
    total[0] = end


def oracle(offsets, total, sizes):
    runs = np.ceil(sizes / RUN).astype(np.int64)
    offsets[...] = RUN * (np.cumsum(runs) - runs)
    total[0] = RUN * runs.sum()


def inputs(rng, n):
    sizes = rng.integers(1, 200, n)
    sizes[::3] = RUN * rng.integers(1, 4, sizes[::3].size)
    return dict(offsets=np.full(n, -1), total=np.full(1, -1), sizes=sizes)


EXERCISE = Exercise(
    "lay_out",
    Problem(
        oracle,
        inputs,
        ("offsets", "total"),
        (dict(n=1), dict(n=3), dict(n=97), dict(n=257)),
        tolerance=0,
    ),
    example=dict(n=5),
)
