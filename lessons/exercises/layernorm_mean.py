"""# Exercise: the mean of each row, with one block per row

`inp` has R rows of C elements. Write the mean of each row to `mean` (R,). Block r of the grid owns row r and has
THREADS threads.

1. Each thread sums every THREADS-th element of the row, starting at its own index: thread 3 takes elements 3,
   3 + THREADS, ... At each step the threads of a warp then read consecutive elements.
2. It writes its sum to `shared`, which all threads of its block can read.
3. When all threads have done so, one thread sums the elements of `shared` and writes the mean.

C need not be a multiple of THREADS, and may be less than THREADS.
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
    raise NotImplementedError  # replace this line with your code


def expected(mean, inp):
    mean[...] = inp.mean(axis=1)


EXERCISE = Exercise(
    "row_mean",
    Problem(
        expected,
        lambda rng, R, C: dict(mean=garbage(R), inp=normal(rng, R, C)),
        ("mean",),
        (dict(R=1, C=1), dict(R=3, C=97), dict(R=2, C=257), dict(R=1, C=3)),
        device="cuda",
    ),
    example=dict(R=2, C=64),
    launch=lambda kernel, mean, inp: kernel[mean.size, THREADS](mean, inp),
    array="inp",
)
