"""# Exercise: a bias and GELU, in one pass

`inp` has R rows of C numbers, `bias` C numbers. Write

    out[row, c] = gelu(inp[row, c] + bias[c])

The function `gelu` below is there; you write how the threads share out the work. The kernel gets both arrays flat:
number `i` of `inp` and `out` is that of row `i // C` and column `i % C`. However many numbers there are, the grid has
only BLOCKS blocks of THREADS threads, so that a thread has to go on to another number when it is done with one:

1. Thread `cuda.grid(1)` begins at the number of its own place in the grid.
2. It goes on by as many as there are threads in the grid, `cuda.gridsize(1)`, as long as there are numbers left.

At each step the threads of a warp then have neighbours. The sum of input and bias is never written to memory: this is
what fusing the two saves.
"""

import math

from numba import cuda

from llm_numba import oracle
from llm_numba.cuda.jit import float32
from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal

BLOCKS, THREADS = 2, 32
ONE, SCALE, CUBIC = float32(1), float32(-2 * math.sqrt(2 / math.pi)), float32(0.044715)


@cuda.jit(device=True)
def gelu(x):
    return x / (ONE + math.exp(SCALE * (x + CUBIC * x * x * x)))


@cuda.jit
def bias_gelu(out, inp, bias):
    n, C = inp.shape[0], bias.shape[0]
    raise NotImplementedError  # your code in the place of this line


def exact(out, inp, bias):
    oracle.gelu_forward(out, inp + bias)


EXERCISE = Exercise(
    "bias_gelu",
    Problem(
        oracle,
        lambda rng, R, C: dict(out=garbage(R, C), inp=normal(rng, R, C), bias=normal(rng, C)),
        ("out",),
        (dict(R=1, C=1), dict(R=97, C=3), dict(R=3, C=97), dict(R=1, C=257)),
        device="cuda",
    ),
    example=dict(R=2, C=96),
    launch=lambda kernel, out, inp, bias: kernel[BLOCKS, THREADS](out.reshape(-1), inp.reshape(-1), bias),
    array="inp",
)
