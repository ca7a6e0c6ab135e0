"""# Exercise: stochastic rounding

A bfloat16 is the upper half of a float32's 32 bits. Round each element of `inp` to one of the two nearest bfloat16
values, the one below or the one above, and write it to `out` as a float32 whose lower half is 0. 16 random bits,
`random[i]` from 0 to 65535, decide which:

1. Reinterpret the element as an unsigned integer: `inp[i].view(uint32)`.
2. Add `random[i]`. If the sum of the lower half and the random bits exceeds 16 bits, it carries into the upper half,
   and the element is rounded away from zero.
3. Set the lower half to 0: `& uint32(0xFFFF0000)`.
4. Reinterpret the bits as a float: `uint32(bits).view(float32)`.

If an element lies a quarter of the way from one bfloat16 to the next, its lower half is a quarter of 65536, and a
quarter of all random values make it carry. So the result is unbiased. A NaN (`math.isnan`) must stay NaN: a carry could
turn it into an ordinary value and hide the error. Thread `cuda.grid(1)` owns one element; the last block has more
threads than elements.
"""

import math

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import float32, uint32  # noqa: F401  for your code
from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal

THREADS = 32


@cuda.jit
def round_to_bf16(out, inp, random):
    i = cuda.grid(1)
    raise NotImplementedError  # replace this line with your code


def expected(out, inp, random):
    finite = np.where(np.isnan(inp), 0, inp).astype(np.float32)
    carried = (finite.view(np.uint32) + random) & np.uint32(0xFFFF0000)
    out[...] = np.where(np.isnan(inp), np.nan, carried.view(np.float32))


def inputs(rng, n):
    inp = normal(rng, n)
    if n > 4:
        inp[:4] = math.inf, -math.inf, 0, -1.5
        inp[4] = np.uint32(0x7FFFFFFF).view(np.float32)  # one of many NaN bit patterns
    return dict(out=garbage(n), inp=inp, random=rng.integers(0, 1 << 16, n, np.uint32))


EXERCISE = Exercise(
    "round_to_bf16",
    Problem(expected, inputs, ("out",), (dict(n=1), dict(n=3), dict(n=97), dict(n=257)), device="cuda", tolerance=1e-9),
    example=dict(n=3),
    launch=lambda kernel, out, inp, random: kernel[-(-inp.size // THREADS), THREADS](out, inp, random),
    array="inp",
)
