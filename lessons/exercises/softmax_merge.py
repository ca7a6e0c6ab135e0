"""# Exercise: merge the softmaxes of a block's threads

`inp` has R rows of C numbers each. Write the log-sum-exp of each row, log(sum(e**x)), into `lse` (R,). Block r of the
grid owns row r, and has THREADS threads. Some numbers are in the hundreds, so e**x itself must not be computed.

The first part is written: each thread has gone over its own numbers with the online softmax, and knows `top`, the
largest of them, and `total`, the sum of e**(x - top). What is missing is the tree that merges these pairs:

1. Each thread puts its pair into `tops` and `totals`, in shared memory.
2. In rounds with half = THREADS // 2, then a quarter, ..., 1: thread i < half merges the pair of thread i + half into
   its own. The sums belong to different tops: each must shrink by e**(its own top - the larger top) before they are
   added. A barrier, to which all threads come, ends each round.
3. When the rounds are over, the pair at 0 is that of the row, and one thread writes lse = top + log(total).

Where a row has fewer numbers than the block has threads, some threads have top = -inf and total = 0. Mind what
-inf - -inf is.
"""

import math

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import float32
from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal

THREADS = 32
NOTHING = float32(-np.inf)


@cuda.jit
def log_sum_exp(lse, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(THREADS, float32)
    totals = cuda.shared.array(THREADS, float32)
    top, total = NOTHING, float32(0)
    for c in range(thread, inp.shape[1], THREADS):
        before = top
        top = max(top, inp[row, c])
        total = total * math.exp(before - top) + math.exp(inp[row, c] - top)
    raise NotImplementedError  # your code in the place of this line


def oracle(lse, inp):
    top = inp.max(axis=1)
    lse[...] = top + np.log(np.exp(inp - top[:, None]).sum(axis=1))


EXERCISE = Exercise(
    "log_sum_exp",
    Problem(
        oracle,
        lambda rng, R, C: dict(lse=garbage(R), inp=300 + normal(rng, R, C)),
        ("lse",),
        (dict(R=2, C=257), dict(R=3, C=97), dict(R=1, C=1), dict(R=2, C=3)),
        device="cuda",
        tolerance=1e-6,
    ),
    example=dict(R=2, C=64),
    launch=lambda kernel, lse, inp: kernel[lse.size, THREADS](lse, inp),
    array="tops",
)
