"""Causal multi-head attention, each (batch, head) by one thread, its products on the register tile.

With q, k, v (T, HS) the three parts of one head:  att = softmax(q kT / sqrt(HS)) over the keys s <= t,  out = att v.
A query at t needs no key beyond t: work is done in blocks of MR queries, and a block ends at its own last key.
"""

import math

import numpy as np
from numba import config, get_thread_id, njit, prange

from llm_numba.cpu.jit import ONE, PARALLEL, exp
from llm_numba.cpu.matmul import panels_of
from llm_numba.cpu.tile import MR, NR, add_tile, multiply, new_tile, pack_columns, pack_rows

ZERO = np.float32(0)


def attention_scratch_size(T, HS):
    """Floats of scratch that attention over T tokens with heads of HS channels needs, for every thread together."""
    return config.NUMBA_NUM_THREADS * (panels_of(T) * HS * NR + 3 * panels_of(HS) * T * NR + T * T)


@njit(**PARALLEL)
def attention_forward(out, att, qkv, num_heads, scratch):
    """Every token looks at itself and at those before it.

    out (B, T, C), att (B, NH, T, T) <- qkv (B, T, 3*C), each row q, k, v of all heads
    Writes:   out =, att = (zero above the diagonal)
    Scratch:  attention_scratch_size(T, C // NH)
    Parallel: over the B*NH heads; each thread packs into its own part of scratch
    Flops:    2*B*T*T*C
    Source:   Vaswani et al. 2017, arXiv:1706.03762
    """
    B, T, C = out.shape
    HS = C // num_heads
    scale = ONE / np.float32(math.sqrt(HS))
    JT, JH = (T + NR - 1) // NR, (HS + NR - 1) // NR
    W = scratch.shape[0] // (JT * HS * NR + JH * T * NR)
    all_k = scratch[: W * JT * HS * NR].reshape(W, JT, HS, NR)
    all_v = scratch[W * JT * HS * NR :][: W * JH * T * NR].reshape(W, JH, T, NR)
    for n in prange(B * num_heads):
        b, h = n // num_heads, n % num_heads
        tile = new_tile()
        worker = get_thread_id()
        k, v = all_k[worker], all_v[worker]
        q = qkv[b, :, h * HS : h * HS + HS]
        pack_columns(k, qkv[b, :, C + h * HS : C + h * HS + HS])
        pack_rows(v, qkv[b, :, 2 * C + h * HS : 2 * C + h * HS + HS])
        for t0 in range(0, T, MR):
            t1 = min(t0 + MR, T)
            scores = att[b, h, t0:t1]
            for j in range((t1 + NR - 1) // NR):
                multiply(tile, q[t0:t1], k[j])
                add_tile(scores[:, j * NR : min(j * NR + NR, t1)], tile, False)
            for r in range(t1 - t0):
                softmax(scores[r, : t0 + r + 1], scale)
                for s in range(t0 + r + 1, T):
                    scores[r, s] = ZERO
            for j in range(JH):
                multiply(tile, scores[:, :t1], v[j, :t1])
                add_tile(out[b, t0:t1, h * HS + j * NR : h * HS + min(j * NR + NR, HS)], tile, False)


@njit(inline="always")
def softmax(row, scale):
    """row = softmax(scale * row), in place."""
    largest = row[0]
    for s in range(row.shape[0]):
        largest = max(largest, row[s])
    total = ZERO
    for s in range(row.shape[0]):
        e = exp((row[s] - largest) * scale)
        row[s] = e
        total += e
    inverse = ONE / total
    for s in range(row.shape[0]):
        row[s] *= inverse


@njit(**PARALLEL)
def attention_backward(dqkv, dout, out, att, qkv, num_heads, scratch):
    """The gradient of attention with respect to q, k and v.

    dqkv (B, T, 3*C) <- dout (B, T, C), out (B, T, C), att (B, NH, T, T), qkv (B, T, 3*C)
    Writes:   dqkv =
    Scratch:  attention_scratch_size(T, C // NH)
    Parallel: over the B*NH heads; each thread packs into its own part of scratch
    Flops:    4*B*T*T*C
    Source:   with p a row of att and dp that of dout vT, a softmax's gradient is p * (dp - sum(p * dp)),
              and sum(p * dp) = sum(dout * out) (Dao et al. 2022, arXiv:2205.14135, appendix B)
    """
    B, T, C = out.shape
    HS = C // num_heads
    scale = ONE / np.float32(math.sqrt(HS))
    JT, JH = (T + NR - 1) // NR, (HS + NR - 1) // NR
    W = scratch.shape[0] // (JT * HS * NR + 3 * JH * T * NR + T * T)
    all_v = scratch[: W * JT * HS * NR].reshape(W, JT, HS, NR)
    all_panels = scratch[W * JT * HS * NR :][: W * 3 * JH * T * NR].reshape(W, 3, JH, T, NR)
    all_dscores = scratch[W * (JT * HS * NR + 3 * JH * T * NR) :][: W * T * T].reshape(W, T, T)
    for n in prange(B * num_heads):
        b, h = n // num_heads, n % num_heads
        tile = new_tile()
        worker = get_thread_id()
        v, dscores = all_v[worker], all_dscores[worker]
        q, k, dy = all_panels[worker, 0], all_panels[worker, 1], all_panels[worker, 2]
        p = att[b, h]
        y, dy_rows = out[b, :, h * HS : h * HS + HS], dout[b, :, h * HS : h * HS + HS]
        pack_rows(q, qkv[b, :, h * HS : h * HS + HS])
        pack_rows(k, qkv[b, :, C + h * HS : C + h * HS + HS])
        pack_columns(v, qkv[b, :, 2 * C + h * HS : 2 * C + h * HS + HS])
        pack_rows(dy, dy_rows)
        # by queries: dscores = p * (dy vT - sum(dy * y)) * scale, then dq = dscores k
        for t0 in range(0, T, MR):
            t1 = min(t0 + MR, T)
            for j in range((t1 + NR - 1) // NR):
                multiply(tile, dy_rows[t0:t1], v[j])
                add_tile(dscores[t0:t1, j * NR : min(j * NR + NR, t1)], tile, False)
            for t in range(t0, t1):
                total = ZERO
                for c in range(HS):
                    total += dy_rows[t, c] * y[t, c]
                p_row, row = p[t, :t1], dscores[t, :t1]
                for s in range(t1):
                    row[s] = p_row[s] * (row[s] - total) * scale
            for j in range(JH):
                multiply(tile, dscores[t0:t1, :t1], k[j, :t1])
                add_tile(dqkv[b, t0:t1, h * HS + j * NR : h * HS + min(j * NR + NR, HS)], tile, False)
        # by keys: dk = dscoresT q, dv = pT dy; a key at s is seen by the queries t >= s
        for s0 in range(0, T, MR):
            s1 = min(s0 + MR, T)
            for j in range(JH):
                c0, c1 = h * HS + j * NR, h * HS + min(j * NR + NR, HS)
                multiply(tile, dscores[s0:, s0:s1].T, q[j, s0:])
                add_tile(dqkv[b, s0:s1, C + c0 : C + c1], tile, False)
                multiply(tile, p[s0:, s0:s1].T, dy[j, s0:])
                add_tile(dqkv[b, s0:s1, 2 * C + c0 : 2 * C + c1], tile, False)


@njit(**PARALLEL)
def attention_cached_forward(out, cache, qkv, position, num_heads):
    """Attention for sampling: T new tokens, which stand at position, position + 1, ... of their sequence.

    Their keys and values go into the cache, and their queries look at everything the cache then holds up to
    themselves. The softmax is taken in one pass: when a larger score appears, what was summed so far shrinks.

    out (B, T, C), cache (B, maxT, 2, C) <- qkv (B, T, 3*C), position (index of the first new token)
    Writes:   out =, cache = at rows position to position + T - 1
    Parallel: over the B*NH heads, which share nothing
    Moves:    2*B*(position + T)*C*itemsize bytes for each of the T tokens
    Source:   Milakov and Gimelshein 2018, arXiv:1805.02867
    """
    B, T, C = out.shape
    HS = C // num_heads
    scale = ONE / np.float32(math.sqrt(HS))
    for n in prange(B * num_heads):
        b, c0, c1 = n // num_heads, n % num_heads * HS, n % num_heads * HS + HS
        for t in range(T):
            for part in range(2):
                row, new = cache[b, position + t, part, c0:c1], qkv[b, t, (part + 1) * C + c0 : (part + 1) * C + c1]
                for c in range(HS):
                    row[c] = new[c]
            q, y = qkv[b, t, c0:c1], out[b, t, c0:c1]
            for c in range(HS):
                y[c] = ZERO
            largest, total = np.float32(-np.inf), ZERO
            for s in range(position + t + 1):
                k, v = cache[b, s, 0, c0:c1], cache[b, s, 1, c0:c1]
                score = ZERO
                for c in range(HS):
                    score += q[c] * k[c]
                score *= scale
                before, largest = largest, max(largest, score)
                shrink, weight = exp(before - largest), exp(score - largest)
                total = total * shrink + weight
                for c in range(HS):
                    y[c] = y[c] * shrink + weight * v[c]
            inverse = ONE / total
            for c in range(HS):
                y[c] *= inverse
