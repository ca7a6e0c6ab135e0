"""# Exercise: bias and GELU in one pass

`inp` has R rows of C elements, and `bias` has C elements. Compute

    out[row, c] = gelu(inp[row, c] + bias[c])

The function `gelu` below is given; your task is to distribute the work over the threads. The kernel receives flat
arrays: element `i` of `inp` and `out` is in row `i // C` and column `i % C`. The grid always has BLOCKS blocks of
THREADS threads, however many elements there are, so a thread must process several of them. Write a grid-stride loop:

1. Thread `cuda.grid(1)` starts at the element with that index.
2. It advances by the number of threads in the grid, `cuda.gridsize(1)`, until no elements are left.

At each step the threads of a warp then access consecutive elements. The sum of input and bias is never written to
memory: that is what the fusion saves.
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
    raise NotImplementedError  # replace this line with your code


def expected(out, inp, bias):
    oracle.gelu_forward(out, inp + bias)


EXERCISE = Exercise(
    "bias_gelu",
    Problem(
        expected,
        lambda rng, R, C: dict(out=garbage(R, C), inp=normal(rng, R, C), bias=normal(rng, C)),
        ("out",),
        (dict(R=1, C=1), dict(R=97, C=3), dict(R=3, C=97), dict(R=1, C=257)),
        device="cuda",
    ),
    example=dict(R=2, C=96),
    launch=lambda kernel, out, inp, bias: kernel[BLOCKS, THREADS](out.reshape(-1), inp.reshape(-1), bias),
    array="inp",
)
