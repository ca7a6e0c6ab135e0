"""# Exercise: the sums of the columns, by a block of rows and columns of threads

A bias gets the same gradient from every row: `dbias[c]` is the sum over r of `dout[r, c]`, of R rows and C channels.
It *accumulates*: what stands in `dbias` already is to be added to.

A block has SLICES x COLUMNS threads and owns COLUMNS channels. `x` is the thread's place in a row of them, which lies
side by side in memory and is a warp; `y`, from 0 to SLICES - 1, is its slice.

1. Thread (x, y) adds up its channel of every SLICES-th row, from row y on: of 4 slices, slice 1 takes rows 1, 5, 9, ...
2. It puts its sum into `shared[y, x]`.
3. When all have done that, the threads of slice 0 add up their channel's slices, and add the total to `dbias`.

C need not be a multiple of COLUMNS, nor R one of SLICES. The threads beyond the last channel have no work, but every
thread of a block must come to every barrier.
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
    raise NotImplementedError  # your code in the place of this line


def oracle(dbias, dout):
    dbias += dout.sum(axis=0)


EXERCISE = Exercise(
    "column_sums",
    Problem(
        oracle,
        lambda rng, R, C: dict(dbias=normal(rng, C), dout=normal(rng, R, C)),
        ("dbias",),
        (dict(R=1, C=1), dict(R=7, C=97), dict(R=97, C=3), dict(R=3, C=257)),
        device="cuda",
    ),
    example=dict(R=9, C=33),
    launch=lambda kernel, dbias, dout: kernel[(dbias.size + COLUMNS - 1) // COLUMNS, (COLUMNS, SLICES)](dbias, dout),
    array="dout",
)
