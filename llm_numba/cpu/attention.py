"""Causal multi-head attention, each (batch, head) by one thread, its products on the register tile.

With q, k, v (T, HS) the three parts of one head:  att = softmax(q kT / sqrt(HS)) over the keys s <= t,  out = att v.
A query at t needs no key beyond t: work is done in blocks of MR queries, and a block ends at its own last key.

What the forward keeps for the backward is up to the arena's plan: all of att here, or one number a query in flash.py.
"""

import math

import numpy as np
from numba import config, get_thread_id, njit, prange

from llm_numba.cpu.flash import flash_backward, flash_forward, flash_scratch_size
from llm_numba.cpu.jit import ONE, PARALLEL, TASK, ZERO, dot, exp, largest, sum_of
from llm_numba.cpu.matmul import panels_of
from llm_numba.cpu.tile import MR, NR, add_tile, multiply, new_tile, pack_columns, pack_rows


def attention_scratch_size(B, T, C, num_heads):
    """Floats of scratch that attention over T tokens needs, for every thread together."""
    HS = C // num_heads
    return max(full_scratch_size(T, HS), flash_scratch_size(T, HS))


def full_scratch_size(T, HS):
    return config.NUMBA_NUM_THREADS * (panels_of(T) * HS * NR + 3 * panels_of(HS) * T * NR + T * T)


def attention_forward(out, att, qkv, num_heads, scratch):
    """Every token looks at itself and at those before it.

    out (B, T, C), att (B, NH, T, T) or (B, NH, T) <- qkv (B, T, 3*C), each row q, k, v of all heads
    Writes:   out =, att = the weights (zero above the diagonal), or the log-sum-exp of each query's scores
    Scratch:  attention_scratch_size(B, T, C, num_heads)
    Parallel: over the B*NH heads; each thread packs into its own part of scratch
    Flops:    2*B*T*T*C
    Source:   Vaswani et al. 2017, arXiv:1706.03762
    """
    forward = full_forward if att.ndim == 4 else flash_forward
    forward(out, att, qkv, num_heads, scratch)


def attention_backward(dqkv, dout, out, att, qkv, num_heads, scratch):
    """The gradient of attention with respect to q, k and v.

    dqkv (B, T, 3*C) <- dout (B, T, C), out (B, T, C), att as the forward wrote it, qkv (B, T, 3*C)
    Writes:   dqkv =
    Scratch:  attention_scratch_size(B, T, C, num_heads)
    Parallel: over the B*NH heads; each thread packs into its own part of scratch
    Flops:    4*B*T*T*C, and 1*B*T*T*C more where the weights are made again
    Source:   with p a row of att and dp that of dout vT, a softmax's gradient is p * (dp - sum(p * dp)),
              and sum(p * dp) = sum(dout * out) (Dao et al. 2022, arXiv:2205.14135, appendix B)
    """
    backward = full_backward if att.ndim == 4 else flash_backward
    backward(dqkv, dout, out, att, qkv, num_heads, scratch)


@njit(**PARALLEL)
def full_forward(out, att, qkv, num_heads, scratch):
    """attention_forward with all of att (B, NH, T, T)."""
    B, T, C = out.shape
    HS = C // num_heads
    JT, JH = (T + NR - 1) // NR, (HS + NR - 1) // NR
    W = scratch.shape[0] // (JT * HS * NR + JH * T * NR)
    k_panels = scratch[: W * JT * HS * NR].reshape(W, JT, HS, NR)
    v_panels = scratch[W * JT * HS * NR :][: W * JH * T * NR].reshape(W, JH, T, NR)
    for n in prange(B * num_heads):
        b, h = n // num_heads, n % num_heads
        w, head = get_thread_id(), slice(h * HS, h * HS + HS)
        q, k, v = qkv[b, :, :C][:, head], qkv[b, :, C : 2 * C][:, head], qkv[b, :, 2 * C :][:, head]
        forward_head(out[b, :, head], att[b, h], q, k, v, k_panels[w], v_panels[w])


@njit(**TASK)
def forward_head(out, att, q, k, v, k_panels, v_panels):
    """out (T, HS) =, att (T, T) = <- q, k, v (T, HS)."""
    T, HS = q.shape
    scale = ONE / np.float32(math.sqrt(HS))
    tile = new_tile()
    pack_columns(k_panels, k)
    pack_rows(v_panels, 0, v)
    for t0 in range(0, T, MR):
        t1 = min(t0 + MR, T)
        scores = att[t0:t1]
        for j in range((t1 + NR - 1) // NR):
            multiply(tile, q[t0:t1], k_panels[j])
            add_tile(scores[:, j * NR : min(j * NR + NR, t1)], tile, False)
        for t in range(t0, t1):
            softmax(att[t, : t + 1], scale)
            for s in range(t + 1, T):
                att[t, s] = ZERO
        for j in range(v_panels.shape[0]):
            multiply(tile, scores[:, :t1], v_panels[j, :t1])
            add_tile(out[t0:t1, j * NR : j * NR + NR], tile, False)


@njit(**TASK)
def softmax(row, scale):
    """row = softmax(scale * row), in place."""
    top = largest(row)
    for s in range(row.shape[0]):
        row[s] = exp((row[s] - top) * scale)
    inverse = ONE / sum_of(row)
    for s in range(row.shape[0]):
        row[s] *= inverse


@njit(**PARALLEL)
def full_backward(dqkv, dout, out, att, qkv, num_heads, scratch):
    """attention_backward with all of att (B, NH, T, T)."""
    B, T, C = out.shape
    HS = C // num_heads
    JT, JH = (T + NR - 1) // NR, (HS + NR - 1) // NR
    W = scratch.shape[0] // (JT * HS * NR + 3 * JH * T * NR + T * T)
    v_panels = scratch[: W * JT * HS * NR].reshape(W, JT, HS, NR)
    panels = scratch[W * JT * HS * NR :][: W * 3 * JH * T * NR].reshape(W, 3, JH, T, NR)
    dscores = scratch[W * (JT * HS * NR + 3 * JH * T * NR) :][: W * T * T].reshape(W, T, T)
    for n in prange(B * num_heads):
        b, h = n // num_heads, n % num_heads
        w, head = get_thread_id(), slice(h * HS, h * HS + HS)
        q, k, v = qkv[b, :, :C][:, head], qkv[b, :, C : 2 * C][:, head], qkv[b, :, 2 * C :][:, head]
        dq, dk, dv = dqkv[b, :, :C][:, head], dqkv[b, :, C : 2 * C][:, head], dqkv[b, :, 2 * C :][:, head]
        dy, y = dout[b, :, head], out[b, :, head]
        backward_head(dq, dk, dv, dy, y, att[b, h], q, k, v, v_panels[w], panels[w], dscores[w])


@njit(**TASK)
def backward_head(dq, dk, dv, dy, y, p, q, k, v, v_panels, panels, dscores):
    """dq, dk, dv (T, HS) = <- dy, y (T, HS), p (T, T), q, k, v (T, HS)."""
    T, HS = q.shape
    scale = ONE / np.float32(math.sqrt(HS))
    tile = new_tile()
    q_panels, k_panels, dy_panels = panels[0], panels[1], panels[2]
    pack_rows(q_panels, 0, q)
    pack_rows(k_panels, 0, k)
    pack_columns(v_panels, v)
    pack_rows(dy_panels, 0, dy)
    # by queries: dscores = p * (dy vT - sum(dy * y)) * scale, then dq = dscores k
    for t0 in range(0, T, MR):
        t1 = min(t0 + MR, T)
        for j in range((t1 + NR - 1) // NR):
            multiply(tile, dy[t0:t1], v_panels[j])
            add_tile(dscores[t0:t1, j * NR : min(j * NR + NR, t1)], tile, False)
        for t in range(t0, t1):
            total = dot(dy[t], y[t])
            p_row, row = p[t, :t1], dscores[t, :t1]
            for s in range(t1):
                row[s] = p_row[s] * (row[s] - total) * scale
        for j in range(k_panels.shape[0]):
            multiply(tile, dscores[t0:t1, :t1], k_panels[j, :t1])
            add_tile(dq[t0:t1, j * NR : j * NR + NR], tile, False)
    # by keys: dk = dscoresT q, dv = pT dy; a key at s is seen by the queries t >= s
    for s0 in range(0, T, MR):
        s1 = min(s0 + MR, T)
        for j in range(q_panels.shape[0]):
            multiply(tile, dscores[s0:, s0:s1].T, q_panels[j, s0:])
            add_tile(dk[s0:s1, j * NR : j * NR + NR], tile, False)
            multiply(tile, p[s0:, s0:s1].T, dy_panels[j, s0:])
            add_tile(dv[s0:s1, j * NR : j * NR + NR], tile, False)


@njit(**PARALLEL)
def attention_cached_forward(out, cache, qkv, position, num_heads):
    """Attention for sampling: T new tokens, which stand at position, position + 1, ... of their sequence.

    Their keys and values go into the cache, and their queries look at everything the cache then holds up to
    themselves. The softmax is taken in one pass: when a larger score appears, what was summed so far shrinks.

    out (B, T, C), cache (B, maxT, 2, C) <- qkv (B, T, 3*C), position (1,) int32 (index of the first new token)
    Writes:   out =, cache = at rows position to position + T - 1
    Parallel: over the B*NH heads, which share nothing
    Moves:    2*B*(position + T)*C*itemsize bytes for each of the T tokens
    Source:   Milakov and Gimelshein 2018, arXiv:1805.02867
    """
    B, T, C = out.shape
    HS = C // num_heads
    scale, start = ONE / np.float32(math.sqrt(HS)), int(position[0])
    for n in prange(B * num_heads):
        b, c0, c1 = n // num_heads, n % num_heads * HS, n % num_heads * HS + HS
        for t in range(T):
            for part in range(2):
                row, new = cache[b, start + t, part, c0:c1], qkv[b, t, (part + 1) * C + c0 : (part + 1) * C + c1]
                for c in range(HS):
                    row[c] = new[c]
            q, y = qkv[b, t, c0:c1], out[b, t, c0:c1]
            for c in range(HS):
                y[c] = ZERO
            top, total = np.float32(-np.inf), ZERO
            for s in range(start + t + 1):
                k, v = cache[b, s, 0, c0:c1], cache[b, s, 1, c0:c1]
                score = dot(q, k) * scale
                before, top = top, max(top, score)
                shrink, weight = exp(before - top), exp(score - top)
                total = total * shrink + weight
                for c in range(HS):
                    y[c] = y[c] * shrink + weight * v[c]
            inverse = ONE / total
            for c in range(HS):
                y[c] *= inverse
