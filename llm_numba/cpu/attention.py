"""Causal flash attention: the T x T matrix of weights is never stored, only the log-sum-exp of each query's scores.

With q, k, v (T, HS) of one head:  weights = softmax(q kT / sqrt(HS)) over the keys s <= t,  out = weights v.
The forward takes MR queries at a time; their scores stay in the cache. The backward recomputes the weights from lse in
blocks of QUERIES x KEYS. All products run on the register tile. Causality saves half of the work: a block of queries
ends at the key of its last query.

There may be fewer kv heads than query heads (grouped-query attention): query head h uses kv head h // (NH // NKV).
Source: Dao 2023, FlashAttention-2, arXiv:2307.08691; Ainslie et al. 2023, GQA, arXiv:2305.13245
"""

import math

import numpy as np
from numba import config, get_thread_id, njit, prange
from numba.extending import register_jitable

from llm_numba.cpu.jit import ONE, PARALLEL, TASK, ZERO, dot, exp, largest, sum_of
from llm_numba.cpu.tile import MR, NR, add_tile, multiply, new_tile, pack_columns, pack_rows, panels_of

QUERIES, KEYS = 96, 384  # both multiples of MR; KEYS is a multiple of NR too


@register_jitable
def forward_floats(T, HS):
    """Floats that one thread needs: k and v in panels, and the scores of MR queries."""
    return (panels_of(T) * HS + panels_of(HS) * T + MR * panels_of(T)) * NR


@register_jitable
def backward_floats(T, HS):
    """Floats that one thread needs: kT and vT in panels; q, k and dy in panels; a block of p and one of ds."""
    return (2 * panels_of(T) * HS + 3 * panels_of(HS) * T) * NR + 2 * QUERIES * KEYS


def attention_forward_scratch(out, lse, qkv, num_heads, num_kv_heads):
    return config.NUMBA_NUM_THREADS * forward_floats(out.shape[1], out.shape[2] // num_heads)


def attention_backward_scratch(dqkv, dout, out, lse, qkv, num_heads, num_kv_heads):
    return config.NUMBA_NUM_THREADS * backward_floats(out.shape[1], out.shape[2] // num_heads)


@njit(**PARALLEL)
def attention_forward(out, lse, qkv, num_heads, num_kv_heads, scratch):
    """Every token attends to itself and to the tokens before it.

    out (B, T, NH*HS), lse (B, NH, T) <- qkv (B, T, (NH + 2*NKV)*HS), each row q of all query heads, then k and v of all
        kv heads
    Writes:   out =, lse = log(sum(e**score)) of each query's scores
    Scratch:  attention_forward_scratch(...)
    Parallel: over the B*NH query heads; each thread packs into its own part of scratch
    Flops:    2*B*NH*T*T*HS
    """
    B, T, C = out.shape
    HS = C // num_heads
    group, KV = num_heads // num_kv_heads, num_kv_heads * HS
    size = forward_floats(T, HS)
    for n in prange(B * num_heads):
        b, h, w = n // num_heads, n % num_heads, get_thread_id()
        head, kv_head = slice(h * HS, h * HS + HS), slice(h // group * HS, h // group * HS + HS)
        q, k, v = qkv[b, :, :C][:, head], qkv[b, :, C : C + KV][:, kv_head], qkv[b, :, C + KV :][:, kv_head]
        forward_head(out[b, :, head], lse[b, h], q, k, v, scratch[w * size : (w + 1) * size])


@njit(**TASK)
def forward_head(out, lse, q, k, v, scratch):
    """out (T, HS) =, lse (T,) = <- q, k, v (T, HS)."""
    T, HS = q.shape
    JT, JH = panels_of(T), panels_of(HS)
    k_panels = scratch[: JT * HS * NR].reshape(JT, HS, NR)
    v_panels = scratch[JT * HS * NR :][: JH * T * NR].reshape(JH, T, NR)
    scores = scratch[(JT * HS + JH * T) * NR :][: MR * JT * NR].reshape(MR, JT * NR)
    scale = ONE / np.float32(math.sqrt(HS))
    tile = new_tile()
    pack_columns(k_panels, k)
    pack_rows(v_panels, 0, v)
    for t0 in range(0, T, MR):
        t1 = min(t0 + MR, T)
        for j in range((t1 + NR - 1) // NR):
            multiply(tile, q[t0:t1], k_panels[j])
            add_tile(scores[:, j * NR : j * NR + NR], tile, False)
        for t in range(t0, t1):
            row = scores[t - t0, : t + 1]
            top = largest(row) * scale
            for s in range(row.shape[0]):
                row[s] = exp(row[s] * scale - top)
            total = sum_of(row)
            inverse = ONE / total
            for s in range(row.shape[0]):
                row[s] *= inverse
            scores[t - t0, t + 1 : t1] = ZERO
            lse[t] = top + np.log(total)
        for j in range(JH):
            multiply(tile, scores[: t1 - t0, :t1], v_panels[j, :t1])
            add_tile(out[t0:t1, j * NR : j * NR + NR], tile, False)


@njit(**PARALLEL)
def attention_backward(dqkv, dout, out, lse, qkv, num_heads, num_kv_heads, scratch):
    """The gradient of attention with respect to q, k and v. The weights are recomputed: p = e**(score - lse).

    dqkv (B, T, (NH + 2*NKV)*HS) <- dout, out (B, T, NH*HS), lse (B, NH, T), qkv as in attention_forward
    Writes:   dqkv =; dk and dv are sums over the query heads of a group
    Scratch:  attention_backward_scratch(...)
    Parallel: over the B*NKV kv heads; each thread packs into its own part of scratch. One thread adds up a group's
              query heads in order, so the result does not depend on the number of threads
    Flops:    5*B*NH*T*T*HS
    Source:   a softmax's gradient is p * (dp - sum(p * dp)) with dp = dout vT, and sum(p * dp) = sum(dout * out)
              (Dao et al. 2022, arXiv:2205.14135, appendix B)
    """
    B, T, C = out.shape
    HS = C // num_heads
    group, KV = num_heads // num_kv_heads, num_kv_heads * HS
    size = backward_floats(T, HS)
    for n in prange(B * num_kv_heads):
        b, g, w = n // num_kv_heads, n % num_kv_heads, get_thread_id()
        kv_head = slice(g * HS, g * HS + HS)
        k, v = qkv[b, :, C : C + KV][:, kv_head], qkv[b, :, C + KV :][:, kv_head]
        dk, dv = dqkv[b, :, C : C + KV][:, kv_head], dqkv[b, :, C + KV :][:, kv_head]
        for h in range(g * group, (g + 1) * group):
            head = slice(h * HS, h * HS + HS)
            q, dq, dy, y = qkv[b, :, :C][:, head], dqkv[b, :, :C][:, head], dout[b, :, head], out[b, :, head]
            accumulate = h > g * group
            backward_head(dq, dk, dv, dy, y, lse[b, h], q, k, v, scratch[w * size : (w + 1) * size], accumulate)


@njit(**TASK)
def backward_head(dq, dk, dv, dy, y, lse, q, k, v, scratch, accumulate):
    """dq (T, HS) =, dk, dv (T, HS) = (+= if accumulate) <- dy, y (T, HS), lse (T,), q, k, v (T, HS).

    With ds = p * (dy vT - sum(dy * y)) * scale, a block adds dq += ds k, dk += dsT q and dv += pT dy.
    """
    T, HS = q.shape
    JT, JH = panels_of(T), panels_of(HS)
    columns = scratch[: 2 * JT * HS * NR].reshape(2, JT, HS, NR)
    panels = scratch[2 * JT * HS * NR :][: 3 * JH * T * NR].reshape(3, JH, T, NR)
    blocks = scratch[(2 * JT * HS + 3 * JH * T) * NR :][: 2 * QUERIES * KEYS].reshape(2, QUERIES, KEYS)
    q_panels, k_panels, dy_panels = panels[0], panels[1], panels[2]
    p, ds = blocks[0], blocks[1]
    pack_columns(columns[0], k)
    pack_columns(columns[1], v)
    pack_rows(q_panels, 0, q)
    pack_rows(k_panels, 0, k)
    pack_rows(dy_panels, 0, dy)
    tile = new_tile()
    for s0 in range(0, T, KEYS):
        s1 = min(s0 + KEYS, T)
        for t0 in range(s0 // QUERIES * QUERIES, T, QUERIES):
            t1 = min(t0 + QUERIES, T)
            for r0 in range(t0, t1, MR):
                r1 = min(r0 + MR, t1)
                last = min(r1, s1)  # these queries see no key from here on
                rows = slice(r0 - t0, r0 - t0 + MR)
                weigh(p[rows], ds[rows], q[r0:r1], dy[r0:r1], y[r0:r1], lse[r0:r1], columns, r0, s0, last)
                for j in range(JH):
                    multiply(tile, ds[r0 - t0 : r1 - t0, : last - s0], k_panels[j, s0:last])
                    add_tile(dq[r0:r1, j * NR : j * NR + NR], tile, s0 > 0)
            for r0 in range(s0, min(s1, t1), MR):
                r1, first = min(r0 + MR, s1), max(t0, r0)
                block = slice(first - t0, t1 - t0)
                adding = accumulate or t0 > r0
                for j in range(JH):
                    multiply(tile, ds[block, r0 - s0 : r1 - s0].T, q_panels[j, first:t1])
                    add_tile(dk[r0:r1, j * NR : j * NR + NR], tile, adding)
                    multiply(tile, p[block, r0 - s0 : r1 - s0].T, dy_panels[j, first:t1])
                    add_tile(dv[r0:r1, j * NR : j * NR + NR], tile, adding)


@njit(**TASK)
def weigh(p, ds, q, dy, y, lse, columns, first, s0, last):
    """p, ds (at most MR queries, KEYS) = for the keys s0 to last and the queries first, first + 1, ..."""
    scale = ONE / np.float32(math.sqrt(q.shape[1]))
    tile = new_tile()
    for j in range(s0 // NR, (last + NR - 1) // NR):
        multiply(tile, q, columns[0, j])
        add_tile(p[:, j * NR - s0 : j * NR - s0 + NR], tile, False)
        multiply(tile, dy, columns[1, j])
        add_tile(ds[:, j * NR - s0 : j * NR - s0 + NR], tile, False)
    for r in range(q.shape[0]):
        total = dot(dy[r], y[r])
        stop = min(first + r + 1, last) - s0
        p_row, ds_row, known = p[r, :stop], ds[r, :stop], lse[r]
        for s in range(stop):
            e = exp(p_row[s] * scale - known)
            p_row[s] = e
            ds_row[s] = e * (ds_row[s] - total) * scale
        p[r, stop : last - s0] = ZERO
        ds[r, stop : last - s0] = ZERO


@njit(**PARALLEL)
def attention_cached_forward(out, cache, qkv, position, num_heads, num_kv_heads):
    """Attention for sampling: T new tokens at position, position + 1, ... of their sequence.

    Their keys and values are stored in the cache; each query then attends to the cache up to its own token. The softmax
    takes one pass: when a larger score appears, the sums so far are rescaled.

    out (B, T, NH*HS), cache (B, maxT, 2, NKV*HS) <- qkv (B, T, (NH + 2*NKV)*HS), position (1,) int32, the index of the
        first new token
    Writes:   out =; cache = at rows position to position + T - 1
    Parallel: over the B*NKV kv heads, which share nothing
    Moves:    2*B*(position + T)*NKV*HS floats for each of the T tokens
    Source:   Milakov and Gimelshein 2018, arXiv:1805.02867
    """
    B, T, C = out.shape
    HS, KV, group = C // num_heads, cache.shape[3], num_heads // num_kv_heads
    scale, start = ONE / np.float32(math.sqrt(HS)), int(position[0])
    for n in prange(B * num_kv_heads):
        b, g = n // num_kv_heads, n % num_kv_heads
        c0, c1 = g * HS, g * HS + HS
        for t in range(T):
            for part in range(2):
                row, new = cache[b, start + t, part, c0:c1], qkv[b, t, C + part * KV + c0 : C + part * KV + c1]
                for c in range(HS):
                    row[c] = new[c]
            for h in range(g * group, (g + 1) * group):
                q, y = qkv[b, t, h * HS : h * HS + HS], out[b, t, h * HS : h * HS + HS]
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


@njit(**PARALLEL)
def attention_weights(weights, lse, qkv, num_heads, num_kv_heads):
    """The weights that attention_forward used and did not store. For debugging; training never calls it.

    weights (B, NH, T, T) <- lse (B, NH, T), qkv (B, T, (NH + 2*NKV)*HS)
    Writes:   weights[b, h, t, s] = e**(score - lse), and 0 where s > t
    Parallel: over the B*NH query heads; each has its own weights, so nothing races
    Flops:    B*NH*T*T*HS
    """
    B, T, channels = qkv.shape
    HS, group = channels // (num_heads + 2 * num_kv_heads), num_heads // num_kv_heads
    scale = ONE / np.float32(math.sqrt(HS))
    for n in prange(B * num_heads):
        b, h = n // num_heads, n % num_heads
        k0 = (num_heads + h // group) * HS
        for t in range(T):
            q, row = qkv[b, t, h * HS : h * HS + HS], weights[b, h, t]
            for s in range(t + 1):
                row[s] = exp(dot(q, qkv[b, s, k0 : k0 + HS]) * scale - lse[b, h, t])
            for s in range(t + 1, T):
                row[s] = ZERO
