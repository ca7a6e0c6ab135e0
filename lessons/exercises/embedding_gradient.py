"""# Exercise: the embedding's gradient, each number with an owner

Row i of `dout` (n, C) is the gradient of what stood in row `tokens[i]` of the embedding. Add it there:
`dwte[tokens[i], c] += dout[i, c]` for all i and c. `dwte` is (V, C), `tokens` (n,) has numbers from 0 to V - 1, some of
them many times, others never. What stands in `dwte` already is added to.

Share the work out among the cores with `prange`, so that each number of `dwte` is written by one iteration only, and
its terms are added in the order of i.

The lesson's v2 does this channel by channel, and fetches a line of memory for each number. Do better: an iteration owns
BLOCK channels that lie side by side. C need not be a multiple of BLOCK.
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
        raise NotImplementedError  # your code in the place of this line


def oracle(dwte, dout, tokens):
    np.add.at(dwte, tokens, dout)


EXERCISE = Exercise(
    "embedding_gradient",
    Problem(
        oracle,
        lambda rng, n, C, V: dict(
            dwte=normal(rng, V, C), dout=normal(rng, n, C), tokens=rng.integers(0, V, n).astype(np.int32)
        ),
        ("dwte",),
        (dict(n=7, C=10, V=3), dict(n=1, C=1, V=1), dict(n=97, C=3, V=4), dict(n=3, C=97, V=2), dict(n=257, C=1, V=9)),
    ),
    example=dict(n=4, C=3, V=2),
)
