"""# Exercise: the mean of each row, by a block of threads

`inp` has R rows of C numbers each. Write the mean of each row into `mean` (R,). Block r of the grid owns row r, and has
THREADS threads.

1. A thread adds up every THREADS-th number of the row, from its own on: thread 3 those at 3, 3 + THREADS, ... What the
   threads of a warp read at a time then lies side by side.
2. It puts its sum into `shared`, which all threads of its block see.
3. When all have done that, one thread adds up what is in `shared`, and writes the mean.

How many numbers a row has need not be a multiple of THREADS, and may be less.
"""

from numba import cuda

from llm_numba.cuda.jit import float32
from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal

THREADS = 32


@cuda.jit
def row_mean(mean, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    C = inp.shape[1]
    shared = cuda.shared.array(THREADS, float32)
    total = float32(0)
    raise NotImplementedError  # your code in the place of this line


def oracle(mean, inp):
    mean[...] = inp.mean(axis=1)


EXERCISE = Exercise(
    "row_mean",
    Problem(
        oracle,
        lambda rng, R, C: dict(mean=garbage(R), inp=normal(rng, R, C)),
        ("mean",),
        (dict(R=1, C=1), dict(R=3, C=97), dict(R=2, C=257), dict(R=1, C=3)),
        device="cuda",
    ),
    example=dict(R=2, C=64),
    launch=lambda kernel, mean, inp: kernel[mean.size, THREADS](mean, inp),
    array="inp",
)
