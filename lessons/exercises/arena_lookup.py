"""# Exercise: the embedding lookup, with indices into one flat array

All data is in `memory`, a flat array of floats. The table `wte` (Vp, C) starts at index `wte_at`, and the table `wpe`
(T, C) at `wpe_at`. Both are stored row by row, and each row is C contiguous elements. `tokens` (B, T) selects the row
of `wte` for each position. Compute

    out[b, t, c] = wte[tokens[b, t], c] + wpe[t, c]

for all b, t and c. Do not create other arrays: no views, no reshape. Your task is to find the two indices into
`memory`.
"""

import numpy as np
from numba import njit

from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal


@njit
def look_up(out, tokens, memory, wte_at, wpe_at):
    B, T, C = out.shape
    raise NotImplementedError  # replace this line with your code


def expected(out, tokens, memory, wte_at, wpe_at):
    T, C = out.shape[1:]
    wte = memory[wte_at:wpe_at].reshape(-1, C)
    out[...] = wte[tokens] + memory[wpe_at:].reshape(T, C)


def inputs(rng, B, T, C, Vp):
    wte_at = 5  # other tensors come first
    wpe_at = wte_at + Vp * C
    tokens = rng.integers(0, Vp, (B, T), np.int32)
    tokens[-1, -1] = Vp - 1
    return dict(
        out=garbage(B, T, C), tokens=tokens, memory=normal(rng, wpe_at + T * C), wte_at=wte_at, wpe_at=wpe_at
    )  # fmt: skip


EXERCISE = Exercise(
    "look_up",
    Problem(
        expected,
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
