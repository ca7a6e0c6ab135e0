"""# Exercise: which thread holds what

A tensor core multiplies a piece of 16 x 16 numbers that lies in the registers of a warp: every thread holds eight of
them. With `g = lane // 4` (0 to 7) and `q = lane % 4` (0 to 3), thread `lane` holds, in this order,

| | numbers of its share |
|---|---|
| 0 and 1 | row g, columns 2q and 2q + 1 |
| 2 and 3 | row g + 8, columns 2q and 2q + 1 |
| 4 and 5 | row g, columns 2q + 8 and 2q + 9 |
| 6 and 7 | row g + 8, columns 2q + 8 and 2q + 9 |

Matrix `a` (M, K) is cut in such pieces; what they have outside of `a` is zero. Block (i, j), 32 threads, owns the
piece that begins at row 16 i and column 16 j: write to `shares[i, j, lane, s]` number s of what thread `lane` holds.
"""

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import blocks_for, float32
from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal


@cuda.jit
def mma_shares(shares, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    zero = float32(0)
    raise NotImplementedError  # your code in the place of this line


def oracle(shares, a):
    rows, columns = shares.shape[:2]
    whole = np.zeros((16 * rows, 16 * columns))
    whole[: a.shape[0], : a.shape[1]] = a
    # row = 16 i + 8 down + g, column = 16 j + 8 right + 2 q + one
    parts = whole.reshape(rows, 2, 8, columns, 2, 4, 2)
    shares[...] = parts.transpose(0, 3, 2, 5, 4, 1, 6).reshape(shares.shape)


def inputs(rng, M, K):
    return dict(shares=garbage(blocks_for(M, 16), blocks_for(K, 16), 32, 8), a=normal(rng, M, K))


EXERCISE = Exercise(
    "mma_shares",
    Problem(
        oracle,
        inputs,
        ("shares",),
        (dict(M=16, K=16), dict(M=1, K=1), dict(M=3, K=97), dict(M=33, K=17), dict(M=257, K=3)),
        device="cuda",
    ),
    example=dict(M=16, K=16),
    launch=lambda kernel, shares, a: kernel[shares.shape[:2], 32](shares, a),
    array="a",
)
