"""The rungs of lesson 00: the first op of the model, a lookup of embeddings."""

import numpy as np
from numba import njit, prange

from llm_numba import oracle
from llm_numba.cpu.encoder import encoder_forward
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal


@njit
def encoder_forward_v1(out, tokens, wte, wpe):
    """Channel by channel: consecutive accesses are at least C elements apart in memory."""
    B, T, C = out.shape
    for c in range(C):
        for b in range(B):
            for t in range(T):
                out[b, t, c] = wte[tokens[b, t], c] + wpe[t, c]


@njit
def encoder_forward_v2(out, tokens, wte, wpe):
    """The loops are swapped: the elements of a row are accessed in memory order."""
    B, T, C = out.shape
    for b in range(B):
        for t in range(T):
            for c in range(C):
                out[b, t, c] = wte[tokens[b, t], c] + wpe[t, c]


@njit(parallel=True)
def encoder_forward_v3(out, tokens, wte, wpe):
    """The rows are distributed over the cores: each row of out has one owner."""
    B, T, C = out.shape
    for row in prange(B * T):
        b, t = row // T, row % T
        for c in range(C):
            out[b, t, c] = wte[tokens[b, t], c] + wpe[t, c]


def numpy_encoder_forward(out, tokens, wte, wpe):
    """The NumPy version; wte[tokens] first copies all the rows."""
    np.add(wte[tokens], wpe[: tokens.shape[1]], out=out)


def inputs(rng, B, T, C, Vp):
    tokens = rng.integers(0, Vp, (B, T), np.int32)
    return dict(out=garbage(B, T, C), tokens=tokens, wte=normal(rng, Vp, C), wpe=normal(rng, T, C))


FORWARD = Ladder(
    "encoder_forward",
    Problem(
        oracle.encoder_forward,
        inputs,
        ("out",),
        (
            dict(B=1, T=1, C=1, Vp=1),
            dict(B=3, T=1, C=97, Vp=3),
            dict(B=1, T=257, C=3, Vp=97),
            dict(B=3, T=97, C=257, Vp=257),
        ),
    ),
    (encoder_forward_v1, encoder_forward_v2, encoder_forward_v3, encoder_forward),
    timed=dict(B=16, T=1024, C=768, Vp=8192),
    quick=dict(B=2, T=64, C=96, Vp=257),
    nbytes=lambda B, T, C, Vp: 4 * (2 * B * T * C + T * C),
    pattern="copy",
    vendors=(numpy_encoder_forward,),
    torch="encoder_forward",
)
