"""# Exercise: column sums, with a two-dimensional block

Every row contributes to a bias gradient: `dbias[c]` is the sum over r of `dout[r, c]`, for R rows and C channels.
`dbias` *accumulates*: add to the values that it already holds.

A block has SLICES x COLUMNS threads and owns COLUMNS channels. `x` is the thread's column; the threads with the same
`y` form a warp and access consecutive elements. `y`, from 0 to SLICES - 1, is the thread's slice.

1. Thread (x, y) sums its channel over every SLICES-th row, starting at row y: with 4 slices, slice 1 takes rows 1, 5,
   9, ...
2. It writes its sum to `shared[y, x]`.
3. When all threads have done so, the threads of slice 0 sum their channel over the slices and add the total to `dbias`.

C need not be a multiple of COLUMNS, nor R of SLICES. Threads beyond the last channel have no work, but every thread of
a block must reach every barrier.
"""

from numba import cuda

from llm_numba.cuda.jit import float32
from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, normal

COLUMNS, SLICES = 32, 4


@cuda.jit
def column_sums(dbias, dout):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    c = cuda.blockIdx.x * COLUMNS + x
    R, C = dout.shape
    shared = cuda.shared.array((SLICES, COLUMNS), float32)
    total = float32(0)
    raise NotImplementedError  # replace this line with your code


def expected(dbias, dout):
    dbias += dout.sum(axis=0)


EXERCISE = Exercise(
    "column_sums",
    Problem(
        expected,
        lambda rng, R, C: dict(dbias=normal(rng, C), dout=normal(rng, R, C)),
        ("dbias",),
        (dict(R=1, C=1), dict(R=7, C=97), dict(R=97, C=3), dict(R=3, C=257)),
        device="cuda",
    ),
    example=dict(R=9, C=33),
    launch=lambda kernel, dbias, dout: kernel[(dbias.size + COLUMNS - 1) // COLUMNS, (COLUMNS, SLICES)](dbias, dout),
    array="dout",
)
