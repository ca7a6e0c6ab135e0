"""# Exercise: a product in tiles, edges and all

`out` (R, O) shall be `a` (R, K) times `b` (K, O): `out[r, o]` is the sum over k of `a[r, k] * b[k, o]`.

1. The cores share out the strips of MR rows: iteration `strip` of `prange` owns the MR rows from `strip * MR` on, and
   nobody else writes there.
2. A strip is done in tiles of MR rows and NR columns. `tile` holds a tile's sums until they are whole; only then are
   they written to `out`.
3. For each k a number of `a` serves all of the tile's columns, and a number of `b` all of its rows.

Neither need R be a multiple of MR, nor O one of NR: at the lower and the right edge there is less than a whole tile,
and `a`, `b` and `out` end there.
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
            raise NotImplementedError  # your code in the place of this line


def oracle(out, a, b):
    out[...] = a @ b


EXERCISE = Exercise(
    "matmul_tiled",
    Problem(
        oracle,
        lambda rng, R, K, O: dict(out=garbage(R, O), a=normal(rng, R, K), b=normal(rng, K, O)),
        ("out",),
        (dict(R=3, K=17, O=7), dict(R=1, K=1, O=1), dict(R=5, K=97, O=3), dict(R=4, K=3, O=97), dict(R=1, K=257, O=1)),
    ),
    example=dict(R=3, K=2, O=5),
)
