"""# Exercise: merge the softmax sums of a block's threads

`inp` has R rows of C elements. Write the log-sum-exp of each row, log(sum(e**x)), to `lse` (R,). Block r of the grid
owns row r and has THREADS threads. Some elements are in the hundreds, so e**x itself must not be computed.

The first part is given: each thread has gone over its elements with the online softmax, and has `top`, the largest of
them, and `total`, the sum of e**(x - top). Write the tree reduction that merges these pairs:

1. Each thread writes its pair to `tops` and `totals`, in shared memory.
2. In rounds with half = THREADS // 2, THREADS // 4, ..., 1, thread i < half merges the pair of thread i + half into its
   own. The two sums have different tops: multiply each by e**(its own top - the larger top) before you add them. A
   barrier, which all threads reach, ends each round.
3. After the last round, pair 0 is that of the whole row, and one thread writes lse = top + log(total).

If a row has fewer elements than the block has threads, some threads have top = -inf and total = 0. Note that
-inf - -inf is NaN.
"""

import math

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import float32
from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal

THREADS = 32
NEG_INF = float32(-np.inf)


@cuda.jit
def log_sum_exp(lse, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(THREADS, float32)
    totals = cuda.shared.array(THREADS, float32)
    top, total = NEG_INF, float32(0)
    for c in range(thread, inp.shape[1], THREADS):
        before = top
        top = max(top, inp[row, c])
        total = total * math.exp(before - top) + math.exp(inp[row, c] - top)
    raise NotImplementedError  # replace this line with your code


def expected(lse, inp):
    top = inp.max(axis=1)
    lse[...] = top + np.log(np.exp(inp - top[:, None]).sum(axis=1))


EXERCISE = Exercise(
    "log_sum_exp",
    Problem(
        expected,
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
