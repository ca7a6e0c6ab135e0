"""# Exercise: the embedding gradient, with one owner per element

Row i of `dout` (n, C) is the gradient of the embedding row that token i looked up. Add it to that row:
`dwte[tokens[i], c] += dout[i, c]` for all i and c. `dwte` is (V, C). `tokens` (n,) holds values from 0 to V - 1; some
appear many times, others never. `dwte` accumulates: add to the values that it already holds.

Distribute the work over the cores with `prange`, so that each element of `dwte` is written by only one iteration, and
its terms are added in the order of i.

The lesson's v2 does this channel by channel, and fetches a cache line for each element. Do better: let an iteration own
BLOCK consecutive channels. C need not be a multiple of BLOCK.
"""

import numpy as np
from numba import njit, prange

from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, normal

BLOCK = 4


@njit(parallel=True)
def embedding_gradient(dwte, dout, tokens):
    n, C = dout.shape
    for block in prange((C + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, min(block * BLOCK + BLOCK, C)
        raise NotImplementedError  # replace this line with your code


def expected(dwte, dout, tokens):
    np.add.at(dwte, tokens, dout)


EXERCISE = Exercise(
    "embedding_gradient",
    Problem(
        expected,
        lambda rng, n, C, V: dict(
            dwte=normal(rng, V, C), dout=normal(rng, n, C), tokens=rng.integers(0, V, n).astype(np.int32)
        ),
        ("dwte",),
        (dict(n=7, C=10, V=3), dict(n=1, C=1, V=1), dict(n=97, C=3, V=4), dict(n=3, C=97, V=2), dict(n=257, C=1, V=9)),
    ),
    example=dict(n=4, C=3, V=2),
)
