"""# Exercise: tensor offsets

`sizes` (n,) holds the number of elements of n tensors. Place them one after the other in one array, in this order.
Write the index where each tensor starts to `offsets` (n,), and the length of the array to `total[0]`.

Every tensor starts at a multiple of RUN = 64 elements, and the total length is a multiple of RUN too. If a tensor ends
between two multiples, the elements up to the next multiple are padding. A tensor of exactly 64 elements needs none.

This is plain Python, without Numba.
"""

import numpy as np

from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem

RUN = 64


def lay_out(offsets, total, sizes):
    end = 0  # where the next tensor starts
    raise NotImplementedError  # replace this line with your code
    total[0] = end


def expected(offsets, total, sizes):
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
        expected,
        inputs,
        ("offsets", "total"),
        (dict(n=1), dict(n=3), dict(n=97), dict(n=257)),
        tolerance=0,
    ),
    example=dict(n=5),
)
