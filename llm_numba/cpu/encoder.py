"""The encoder: token embedding plus position embedding."""

import numpy as np
from numba import njit, prange

from llm_numba.cpu.jit import PARALLEL

BLOCK = 64  # channels per task of the backward


@njit(**PARALLEL)
def encoder_forward(out, tokens, wte, wpe):
    """Look up the embedding of each token and add the embedding of its position.

    out (B, T, C) <- tokens (B, T) int32, wte (Vp, C), wpe (at least T, C)
    Writes:   out[b, t] = wte[tokens[b, t]] + wpe[t]
    Parallel: over the T positions; each thread owns the rows of its positions, so nothing races
    Moves:    2*B*T*C + T*C floats
    Expects:  0 <= tokens < Vp, unchecked
    Source:   Radford et al. 2019, GPT-2
    """
    B, T, C = out.shape
    for t in prange(T):
        position = wpe[t]
        for b in range(B):
            row, token = out[b, t], wte[tokens[b, t]]
            for c in range(C):
                row[c] = token[c] + position[c]


@njit(cache=True)
def encoder_forward_at(out, tokens, wte, wpe, position):
    """The same for tokens in the middle of a sequence.

    out (B, T, C) <- tokens (B, T) int32, wte (Vp, C), wpe (at least position + T, C), position (1,) int32
    Writes:   out[b, t] = wte[tokens[b, t]] + wpe[position + t]; a token below 0 counts as 0
    Expects:  tokens < Vp, unchecked
    """
    encoder_forward(out, np.maximum(tokens, 0), wte, wpe[position[0] :])


@njit(**PARALLEL)
def encoder_backward(dwte, dwpe, dout, tokens, scratch):
    """Add each row of dout to the gradients of its token's and its position's embedding.

    dwte (Vp, C), dwpe (at least T, C) <- dout (B, T, C), tokens (B, T) int32
    Writes:   dwte[tokens[b, t]] += dout[b, t], dwpe[t] += dout[b, t]
    Parallel: over blocks of BLOCK channels. A token may occur many times, but one thread owns a block of channels and
              adds in the order of (b, t), so nothing races and the order of each sum is fixed
    Moves:    5*B*T*C floats
    Scratch:  none
    Expects:  0 <= tokens < Vp, unchecked
    """
    B, T, C = dout.shape
    for block in prange((C + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, (block + 1) * BLOCK
        for b in range(B):
            for t in range(T):
                row = dout[b, t, first:last]
                token, position = dwte[tokens[b, t], first:last], dwpe[t, first:last]
                for c in range(row.shape[0]):
                    token[c] += row[c]
                    position[c] += row[c]


def encoder_backward_scratch(dwte, dwpe, dout, tokens):
    """Floats of scratch that `encoder_backward` needs; on a GPU it sorts there."""
    return 0
