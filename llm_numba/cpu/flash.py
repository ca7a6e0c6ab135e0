"""Attention that never holds the (T, T) matrix: of each query it keeps one number, the log-sum-exp of its scores.

The forward works on MR queries at a time, whose scores are as long as the context, and stay in the cache. The backward
makes the scores anew, in blocks of QUERIES x KEYS. Source: Dao 2023, FlashAttention-2, arXiv:2307.08691.
"""

import math

import numpy as np
from numba import config, get_thread_id, njit, prange

from llm_numba.cpu.jit import ONE, PARALLEL, TASK, ZERO, dot, exp, largest, sum_of
from llm_numba.cpu.tile import MR, NR, add_tile, multiply, new_tile, pack_columns, pack_rows

QUERIES, KEYS = 96, 384  # multiples of MR; KEYS of NR too


def flash_scratch_size(T, HS):
    """Floats of scratch for T tokens with heads of HS channels, for every thread together."""
    JT, JH = -(-T // NR), -(-HS // NR)
    return config.NUMBA_NUM_THREADS * (2 * JT * HS * NR + 3 * JH * T * NR + 2 * QUERIES * KEYS)


@njit(**PARALLEL)
def flash_forward(out, lse, qkv, num_heads, scratch):
    """attention_forward, of whose weights only lse (B, NH, T) = log(sum(e**score)) of each query stays.

    Writes:   out =, lse =
    Scratch:  flash_scratch_size(T, C // NH)
    Parallel: over the B*NH heads; each thread packs into its own part of scratch
    Flops:    2*B*T*T*C
    """
    B, T, C = out.shape
    HS = C // num_heads
    JT, JH = (T + NR - 1) // NR, (HS + NR - 1) // NR
    W = scratch.shape[0] // (JT * HS * NR + JH * T * NR + MR * JT * NR)
    k_panels = scratch[: W * JT * HS * NR].reshape(W, JT, HS, NR)
    v_panels = scratch[W * JT * HS * NR :][: W * JH * T * NR].reshape(W, JH, T, NR)
    scores = scratch[W * (JT * HS * NR + JH * T * NR) :][: W * MR * JT * NR].reshape(W, MR, JT * NR)
    for n in prange(B * num_heads):
        b, h = n // num_heads, n % num_heads
        w, head = get_thread_id(), slice(h * HS, h * HS + HS)
        q, k, v = qkv[b, :, :C][:, head], qkv[b, :, C : 2 * C][:, head], qkv[b, :, 2 * C :][:, head]
        forward_head(out[b, :, head], lse[b, h], q, k, v, k_panels[w], v_panels[w], scores[w])


@njit(**TASK)
def forward_head(out, lse, q, k, v, k_panels, v_panels, scores):
    """out (T, HS) =, lse (T,) = <- q, k, v (T, HS); scores (MR, at least T) is overwritten."""
    T, HS = q.shape
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
        for j in range(v_panels.shape[0]):
            multiply(tile, scores[: t1 - t0, :t1], v_panels[j, :t1])
            add_tile(out[t0:t1, j * NR : j * NR + NR], tile, False)


@njit(**PARALLEL)
def flash_backward(dqkv, dout, out, lse, qkv, num_heads, scratch):
    """attention_backward from lse: every block of scores is made again, p = e**(score - lse), and used at once.

    Writes:   dqkv =
    Scratch:  flash_scratch_size(T, C // NH)
    Parallel: over the B*NH heads; each thread packs into its own part of scratch
    Flops:    5*B*T*T*C
    """
    B, T, C = out.shape
    HS = C // num_heads
    JT, JH = (T + NR - 1) // NR, (HS + NR - 1) // NR
    W = scratch.shape[0] // (2 * JT * HS * NR + 3 * JH * T * NR + 2 * QUERIES * KEYS)
    columns = scratch[: W * 2 * JT * HS * NR].reshape(W, 2, JT, HS, NR)
    panels = scratch[W * 2 * JT * HS * NR :][: W * 3 * JH * T * NR].reshape(W, 3, JH, T, NR)
    blocks = scratch[W * (2 * JT * HS * NR + 3 * JH * T * NR) :][: W * 2 * QUERIES * KEYS].reshape(W, 2, QUERIES, KEYS)
    for n in prange(B * num_heads):
        b, h = n // num_heads, n % num_heads
        w, head = get_thread_id(), slice(h * HS, h * HS + HS)
        q, k, v = qkv[b, :, :C][:, head], qkv[b, :, C : 2 * C][:, head], qkv[b, :, 2 * C :][:, head]
        dq, dk, dv = dqkv[b, :, :C][:, head], dqkv[b, :, C : 2 * C][:, head], dqkv[b, :, 2 * C :][:, head]
        dy, y = dout[b, :, head], out[b, :, head]
        backward_head(dq, dk, dv, dy, y, lse[b, h], q, k, v, columns[w], panels[w], blocks[w])


@njit(**TASK)
def backward_head(dq, dk, dv, dy, y, lse, q, k, v, columns, panels, blocks):
    """dq, dk, dv (T, HS) = <- dy, y (T, HS), lse (T,), q, k, v (T, HS).

    With ds = p * (dy vT - sum(dy * y)) * scale, a block's shares are dq = ds k, dk = dsT q and dv = pT dy.
    """
    T = q.shape[0]
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
                last = min(r1, s1)  # no query of these needs a key from here on
                rows = slice(r0 - t0, r0 - t0 + MR)
                weigh(p[rows], ds[rows], q[r0:r1], dy[r0:r1], y[r0:r1], lse[r0:r1], columns, r0, s0, last)
                for j in range(k_panels.shape[0]):
                    multiply(tile, ds[r0 - t0 : r1 - t0, : last - s0], k_panels[j, s0:last])
                    add_tile(dq[r0:r1, j * NR : j * NR + NR], tile, s0 > 0)
            for r0 in range(s0, min(s1, t1), MR):
                r1, first = min(r0 + MR, s1), max(t0, r0)
                block = slice(first - t0, t1 - t0)
                for j in range(q_panels.shape[0]):
                    multiply(tile, ds[block, r0 - s0 : r1 - s0].T, q_panels[j, first:t1])
                    add_tile(dk[r0:r1, j * NR : j * NR + NR], tile, t0 > r0)
                    multiply(tile, p[block, r0 - s0 : r1 - s0].T, dy_panels[j, first:t1])
                    add_tile(dv[r0:r1, j * NR : j * NR + NR], tile, t0 > r0)


@njit(**TASK)
def weigh(p, ds, q, dy, y, lse, columns, first, s0, last):
    """p, ds (at most MR queries, KEYS) = for the keys s0 to last; the queries stand at first, first + 1, ..."""
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
