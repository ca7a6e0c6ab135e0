"""# Exercise: the lookup, by indices of one flat array

`memory` is all there is: a flat array of numbers, in which the table `wte` (Vp, C) begins at the index `wte_at`, and
the table `wpe` (T, C) at `wpe_at`. Both lie row after row, a row being C numbers that stand side by side. `tokens`
(B, T) says which row of `wte` each place of the text has. Write

    out[b, t, c] = wte[tokens[b, t], c] + wpe[t, c]

for all b, t and c, and use no other array: no views, no reshape. You have to find the two indices into `memory`.
"""

import numpy as np
from numba import njit

from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal


@njit
def look_up(out, tokens, memory, wte_at, wpe_at):
    B, T, C = out.shape
    raise NotImplementedError  # your code in the place of this line


def oracle(out, tokens, memory, wte_at, wpe_at):
    T, C = out.shape[1:]
    wte = memory[wte_at:wpe_at].reshape(-1, C)
    out[...] = wte[tokens] + memory[wpe_at:].reshape(T, C)


def inputs(rng, B, T, C, Vp):
    wte_at = 5  # whatever stands before it
    wpe_at = wte_at + Vp * C
    tokens = rng.integers(0, Vp, (B, T), np.int32)
    tokens[-1, -1] = Vp - 1
    return dict(
        out=garbage(B, T, C), tokens=tokens, memory=normal(rng, wpe_at + T * C), wte_at=wte_at, wpe_at=wpe_at
    )  # fmt: skip


EXERCISE = Exercise(
    "look_up",
    Problem(
        oracle,
        inputs,
        ("out",),
        (
            dict(B=1, T=1, C=1, Vp=1),
            dict(B=3, T=2, C=4, Vp=9),
            dict(B=2, T=97, C=3, Vp=5),
            dict(B=1, T=3, C=257, Vp=3),
        ),
    ),
    example=dict(B=1, T=2, C=3, Vp=4),
)
