"""The rungs of lesson 07 on a CPU: the norm of the gradients, and the embedding's gradient."""

import numpy as np
from numba import njit, prange

from llm_numba import oracle
from llm_numba.cpu.encoder import encoder_backward
from llm_numba.cpu.global_norm import global_norm_squared, global_norm_squared_scratch
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

BLOCK = 16384  # elements per task


@njit
def global_norm_squared_v1(out, grads, scratch):
    """One sum, one core."""
    total = 0.0
    for i in range(grads.shape[0]):
        total += np.float64(grads[i]) * np.float64(grads[i])
    out[0] = total


@njit(parallel=True)
def global_norm_squared_racing(out, grads, scratch):
    """Not a rung but a mistake: all cores read and write out[0]."""
    out[0] = 0.0
    for i in prange(grads.shape[0]):
        out[0] += np.float64(grads[i]) * np.float64(grads[i])


@njit(parallel=True)
def global_norm_squared_v2(out, grads, scratch):
    """One sum per thread: Numba does that for a variable that a parallel loop only adds to."""
    total = 0.0
    for i in prange(grads.shape[0]):
        total += np.float64(grads[i]) * np.float64(grads[i])
    out[0] = total


@njit(parallel=True)
def global_norm_squared_v3(out, grads, scratch):
    """One sum per block of BLOCK elements, whichever thread computes it; then the blocks' sums in order."""
    n = grads.shape[0]
    blocks = (n + BLOCK - 1) // BLOCK
    sums = scratch[: 2 * blocks].view(np.float64)
    for block in prange(blocks):
        total = 0.0
        for i in range(block * BLOCK, min(block * BLOCK + BLOCK, n)):
            total += np.float64(grads[i]) * np.float64(grads[i])
        sums[block] = total
    total = 0.0
    for block in range(blocks):
        total += sums[block]
    out[0] = total


@njit
def encoder_backward_v1(dwte, dwpe, dout, tokens, scratch):
    """Row by row."""
    B, T, C = dout.shape
    for b in range(B):
        for t in range(T):
            for c in range(C):
                dwte[tokens[b, t], c] += dout[b, t, c]
                dwpe[t, c] += dout[b, t, c]


@njit(parallel=True)
def encoder_backward_racing(dwte, dwpe, dout, tokens, scratch):
    """Not a rung but a mistake: the loop over positions is parallel, but a token can occur at several."""
    B, T, C = dout.shape
    for t in prange(T):
        for b in range(B):
            for c in range(C):
                dwte[tokens[b, t], c] += dout[b, t, c]
                dwpe[t, c] += dout[b, t, c]


@njit(parallel=True)
def encoder_backward_v2(dwte, dwpe, dout, tokens, scratch):
    """Each channel of all tokens and positions has one owner, which processes the rows in order."""
    B, T, C = dout.shape
    for c in prange(C):
        for b in range(B):
            for t in range(T):
                dwte[tokens[b, t], c] += dout[b, t, c]
                dwpe[t, c] += dout[b, t, c]


def norm_inputs(rng, n):
    arguments = dict(out=np.full(1, np.nan), grads=normal(rng, n))
    return arguments | dict(scratch=garbage(global_norm_squared_scratch(**arguments)))


def encoder_inputs(rng, B, T, C, Vp):
    """Low token ids are frequent, as in a tokenizer's vocabulary."""
    return dict(
        dwte=normal(rng, Vp, C), dwpe=normal(rng, T, C), dout=normal(rng, B, T, C),
        tokens=(Vp * rng.random((B, T)) ** 3).astype(np.int32), scratch=garbage(0),
    )  # fmt: skip


NORM = Ladder(
    "global_norm_squared",
    Problem(oracle.global_norm_squared, norm_inputs, ("out",), tuple(dict(n=n) for n in (1, 3, 97, 257, 40000))),
    (global_norm_squared_v1, global_norm_squared_v2, global_norm_squared_v3, global_norm_squared),
    timed=dict(n=1 << 25),
    quick=dict(n=1 << 17),
    nbytes=lambda n: 4 * n,
    pattern="read",
    torch="global_norm_squared",
)
ENCODER = Ladder(
    "encoder_backward",
    Problem(
        oracle.encoder_backward,
        encoder_inputs,
        ("dwte", "dwpe"),
        (
            dict(B=1, T=1, C=1, Vp=1),
            dict(B=3, T=97, C=3, Vp=5),
            dict(B=1, T=257, C=97, Vp=300),
            dict(B=2, T=3, C=257, Vp=2),
        ),
    ),
    (encoder_backward_v1, encoder_backward_v2, encoder_backward),
    timed=dict(B=16, T=1024, C=768, Vp=50304),
    quick=dict(B=2, T=64, C=96, Vp=512),
    nbytes=lambda B, T, C, Vp: 5 * 4 * B * T * C,
    pattern="update",
    torch="encoder_backward",
)
