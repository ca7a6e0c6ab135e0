"""# Exercise: a tiled matrix product, edges included

`out` (R, O) is `a` (R, K) times `b` (K, O): `out[r, o]` is the sum over k of `a[r, k] * b[k, o]`.

1. `prange` distributes strips of MR rows over the cores: iteration `strip` owns the MR rows from `strip * MR`, and no
   other iteration writes there.
2. A strip is computed in tiles of MR rows and NR columns. `tile` holds the sums of one tile until they are complete;
   only then are they written to `out`.
3. For each k, an element of `a` is used for all columns of the tile, and an element of `b` for all rows.

R need not be a multiple of MR, nor O of NR. At the bottom and right edges there is less than a whole tile: do not
access `a`, `b` or `out` out of bounds.
"""

import numpy as np
from numba import njit, prange

from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal

MR, NR = 2, 4


@njit(parallel=True)
def matmul_tiled(out, a, b):
    R, K = a.shape
    O = b.shape[1]
    for strip in prange((R + MR - 1) // MR):
        tile = np.empty((MR, NR), np.float32)
        for first in range(0, O, NR):
            top, left = strip * MR, first  # the first row and the first column of the tile
            raise NotImplementedError  # replace this line with your code


def expected(out, a, b):
    out[...] = a @ b


EXERCISE = Exercise(
    "matmul_tiled",
    Problem(
        expected,
        lambda rng, R, K, O: dict(out=garbage(R, O), a=normal(rng, R, K), b=normal(rng, K, O)),
        ("out",),
        (dict(R=3, K=17, O=7), dict(R=1, K=1, O=1), dict(R=5, K=97, O=3), dict(R=4, K=3, O=97), dict(R=1, K=257, O=1)),
    ),
    example=dict(R=3, K=2, O=5),
)
