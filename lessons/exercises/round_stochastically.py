"""# Exercise: rounding up or down at random

A bfloat16 is the upper half of a float32's 32 bits. Round each number of `inp` to one of the two bfloat16 between which
it lies, and write it to `out` as a float32 whose lower half is 0. Which of the two it becomes, the 16 random bits
decide that stand in `random[i]`, a number from 0 to 65535:

1. Take the bits of the number as an unsigned integer: `inp[i].view(uint32)`.
2. Add `random[i]`. If the sum of the lower half and the random bits does not fit into 16 bits, one is carried into the
   upper half: the number is then rounded away from zero.
3. Set the lower half to 0: `& uint32(0xFFFF0000)`.
4. Take the bits as a number again: `uint32(bits).view(float32)`.

If a number lies a quarter of the way from the lower to the upper one, its lower half is a quarter of 65536, and a
quarter of all random numbers make it carry. A NaN, which is not a number (`math.isnan`), stays as it is: a carry could
make a number of it, and nobody would notice that something had gone wrong. Thread `cuda.grid(1)` owns one number; the
last block has threads to spare.
"""

import math

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import float32, uint32  # noqa: F401  for you
from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal

THREADS = 32


@cuda.jit
def round_to_bf16(out, inp, random):
    i = cuda.grid(1)
    raise NotImplementedError  # your code in the place of this line


def oracle(out, inp, random):
    number = np.where(np.isnan(inp), 0, inp).astype(np.float32)
    carried = (number.view(np.uint32) + random) & np.uint32(0xFFFF0000)
    out[...] = np.where(np.isnan(inp), np.nan, carried.view(np.float32))


def inputs(rng, n):
    inp = normal(rng, n)
    if n > 4:
        inp[:4] = math.inf, -math.inf, 0, -1.5
        inp[4] = np.uint32(0x7FFFFFFF).view(np.float32)  # one of the many NaN
    return dict(out=garbage(n), inp=inp, random=rng.integers(0, 1 << 16, n, np.uint32))


EXERCISE = Exercise(
    "round_to_bf16",
    Problem(oracle, inputs, ("out",), (dict(n=1), dict(n=3), dict(n=97), dict(n=257)), device="cuda", tolerance=1e-9),
    example=dict(n=3),
    launch=lambda kernel, out, inp, random: kernel[-(-inp.size // THREADS), THREADS](out, inp, random),
    array="inp",
)
