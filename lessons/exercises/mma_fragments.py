"""# Exercise: which thread holds which element

A tensor core multiplies tiles of 16 x 16 elements. A tile lies in the registers of a warp; the eight elements that one
thread holds are its fragment. With `g = lane // 4` (0 to 7) and `q = lane % 4` (0 to 3), the fragment of thread `lane`
is, in this order,

| elements of the fragment | position in the tile |
|---|---|
| 0 and 1 | row g, columns 2q and 2q + 1 |
| 2 and 3 | row g + 8, columns 2q and 2q + 1 |
| 4 and 5 | row g, columns 2q + 8 and 2q + 9 |
| 6 and 7 | row g + 8, columns 2q + 8 and 2q + 9 |

Matrix `a` (M, K) is divided into such tiles; elements of a tile outside `a` are zero. Block (i, j), of 32 threads, owns
the tile that starts at row 16 i and column 16 j. Write element s of thread `lane`'s fragment to
`fragments[i, j, lane, s]`.
"""

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import blocks_for, float32
from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal


@cuda.jit
def mma_fragments(fragments, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    zero = float32(0)
    raise NotImplementedError  # replace this line with your code


def expected(fragments, a):
    rows, columns = fragments.shape[:2]
    padded = np.zeros((16 * rows, 16 * columns))
    padded[: a.shape[0], : a.shape[1]] = a
    # row = 16 i + 8 down + g, column = 16 j + 8 right + 2 q + one
    tiles = padded.reshape(rows, 2, 8, columns, 2, 4, 2)
    fragments[...] = tiles.transpose(0, 3, 2, 5, 4, 1, 6).reshape(fragments.shape)


def inputs(rng, M, K):
    return dict(fragments=garbage(blocks_for(M, 16), blocks_for(K, 16), 32, 8), a=normal(rng, M, K))


EXERCISE = Exercise(
    "mma_fragments",
    Problem(
        expected,
        inputs,
        ("fragments",),
        (dict(M=16, K=16), dict(M=1, K=1), dict(M=3, K=97), dict(M=33, K=17), dict(M=257, K=3)),
        device="cuda",
    ),
    example=dict(M=16, K=16),
    launch=lambda kernel, fragments, a: kernel[fragments.shape[:2], 32](fragments, a),
    array="a",
)
