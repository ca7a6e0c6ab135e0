"""The rungs of lesson 05 on a CPU: attention, forward and backward."""

import math

import numpy as np
from numba import njit, prange

from llm_numba import lessons, oracle
from llm_numba.cpu.attention import attention_backward, attention_forward, attention_scratch_size
from llm_numba.cpu.jit import dot, exp, largest, sum_of
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

ZERO, ONE, LOWEST = np.float32(0), np.float32(1), np.float32(-np.inf)
CONTRACT = {"contract"}  # allows fused multiply-add
SHARED_OUT = dict(parallel=not lessons.FAST)  # serial under LESSONS_FAST, which compiles faster
KEYS = 128  # keys per rescaling of the online softmax


@njit
def head_of(rows, part, C, n, num_heads):
    """View (T, HS) of head n in part 0, 1, ... of the rows (B, T, parts * C)."""
    b, h, HS = n // num_heads, n % num_heads, C // num_heads
    return rows[b, :, part * C + h * HS : part * C + h * HS + HS]


@njit
def queries_keys_values(qkv, n, num_heads):
    """Views q, k, v (T, HS) of head n in qkv (B, T, 3*C), or in its gradient."""
    C = qkv.shape[2] // 3
    return (
        head_of(qkv, 0, C, n, num_heads),
        head_of(qkv, 1, C, n, num_heads),
        head_of(qkv, 2, C, n, num_heads),
    )


@njit
def matrix_of(scratch, n, T):
    """The n-th (T, T) matrix in scratch."""
    return scratch[n * T * T : (n + 1) * T * T].reshape(T, T)


@njit(fastmath=CONTRACT, error_model="numpy")
def forward_head_v1(n, out, att, qkv, num_heads, scratch):
    """Head n: y (T, HS) =, lse (T,) =, weights (T, T) = <- q, k, v (T, HS)."""
    q, k, v = queries_keys_values(qkv, n, num_heads)
    y, lse = head_of(out, 0, out.shape[2], n, num_heads), att[n // num_heads, n % num_heads]
    T, HS = q.shape
    weights = matrix_of(scratch, n, T)
    scale = ONE / np.float32(math.sqrt(HS))
    for t in range(T):
        for s in range(t + 1):
            score = ZERO
            for i in range(HS):
                score += q[t, i] * k[s, i]
            weights[t, s] = score * scale
    for t in range(T):
        top = LOWEST
        for s in range(t + 1):
            top = max(top, weights[t, s])
        total = ZERO
        for s in range(t + 1):
            weights[t, s] = math.exp(weights[t, s] - top)
            total += weights[t, s]
        for s in range(t + 1):
            weights[t, s] /= total
        lse[t] = top + math.log(total)
    for t in range(T):
        for i in range(HS):
            total = ZERO
            for s in range(t + 1):
                total += weights[t, s] * v[s, i]
            y[t, i] = total


@njit(**SHARED_OUT)
def attention_forward_v1(out, att, qkv, num_heads, scratch):
    """The formula: all scores, all weights, all outputs. Scratch: B*NH*T*T."""
    for n in prange(out.shape[0] * num_heads):
        forward_head_v1(n, out, att, qkv, num_heads, scratch)


@njit
def row_of(rows, part, C, n, num_heads, t):
    """The HS elements of token t for head n. Unlike with `head_of`, Numba knows that they are contiguous."""
    first = part * C + n % num_heads * (C // num_heads)
    return rows[n // num_heads, t, first : first + C // num_heads]


@njit
def add_scaled(sums, x, numbers):
    """sums (HS,) += x * numbers (HS,)."""
    for i in range(sums.shape[0]):
        sums[i] += x * numbers[i]


@njit(fastmath=CONTRACT, error_model="numpy")
def forward_head_v2(n, out, att, qkv, num_heads, scratch):
    """The innermost loops walk along rows in memory, and their sums may be reordered."""
    B, T, C = out.shape
    lse, weights = att[n // num_heads, n % num_heads], matrix_of(scratch, n, T)
    scale = ONE / np.float32(math.sqrt(C // num_heads))
    for t in range(T):
        q = row_of(qkv, 0, C, n, num_heads, t)
        for s in range(t + 1):
            weights[t, s] = dot(q, row_of(qkv, 1, C, n, num_heads, s)) * scale
    for t in range(T):
        row = weights[t, : t + 1]
        top = largest(row)
        for s in range(t + 1):
            row[s] = exp(row[s] - top)
        total = sum_of(row)
        for s in range(t + 1):
            row[s] /= total
        lse[t] = top + np.log(total)
    for t in range(T):
        y = row_of(out, 0, C, n, num_heads, t)
        y[:] = ZERO
        for s in range(t + 1):
            add_scaled(y, weights[t, s], row_of(qkv, 2, C, n, num_heads, s))


@njit(**SHARED_OUT)
def attention_forward_v2(out, att, qkv, num_heads, scratch):
    """Vectorised: the innermost loops walk along rows in memory. Scratch: B*NH*T*T."""
    for n in prange(out.shape[0] * num_heads):
        forward_head_v2(n, out, att, qkv, num_heads, scratch)


@njit(fastmath=CONTRACT, error_model="numpy")
def forward_head_v3(n, out, att, qkv, num_heads, scratch):
    """Without a matrix: a query processes KEYS keys at a time and keeps the largest score, the sum of the weights and
    the weighted sum of the values. The sums are rescaled when a larger score appears."""
    B, T, C = out.shape
    lse = att[n // num_heads, n % num_heads]
    scale = ONE / np.float32(math.sqrt(C // num_heads))
    weights = np.empty(KEYS, np.float32)
    for t in range(T):
        q, y = row_of(qkv, 0, C, n, num_heads, t), row_of(out, 0, C, n, num_heads, t)
        y[:] = ZERO
        top, total = LOWEST, ZERO
        for s0 in range(0, t + 1, KEYS):
            row = weights[: min(KEYS, t + 1 - s0)]
            for s in range(row.shape[0]):
                row[s] = dot(q, row_of(qkv, 1, C, n, num_heads, s0 + s)) * scale
            before, top = top, max(top, largest(row))
            shrink = np.exp(before - top)
            for s in range(row.shape[0]):
                row[s] = exp(row[s] - top)
            total = total * shrink + sum_of(row)
            for i in range(y.shape[0]):
                y[i] *= shrink
            for s in range(row.shape[0]):
                add_scaled(y, row[s], row_of(qkv, 2, C, n, num_heads, s0 + s))
        for i in range(y.shape[0]):
            y[i] /= total
        lse[t] = top + np.log(total)


@njit(**SHARED_OUT)
def attention_forward_v3(out, att, qkv, num_heads, scratch):
    """The online softmax: only KEYS of a head's T*T weights exist at a time. Scratch: none."""
    for n in prange(out.shape[0] * num_heads):
        forward_head_v3(n, out, att, qkv, num_heads, scratch)


@njit
def clear(dqkv, n, num_heads):
    """dqkv = 0 for head n."""
    B, T, C = dqkv.shape
    for t in range(T):
        for part in range(3):
            row_of(dqkv, part, C // 3, n, num_heads, t)[:] = ZERO


@njit(fastmath=CONTRACT, error_model="numpy")
def backward_head_v1(n, dqkv, dout, out, att, qkv, num_heads, scratch):
    """All weights p (T, T) from lse, all score gradients, then the three products."""
    B, T, C = out.shape
    lse, p, dscores = att[n // num_heads, n % num_heads], matrix_of(scratch, 2 * n, T), matrix_of(scratch, 2 * n + 1, T)
    scale = ONE / np.float32(math.sqrt(C // num_heads))
    for t in range(T):
        q, dy = row_of(qkv, 0, C, n, num_heads, t), row_of(dout, 0, C, n, num_heads, t)
        delta = dot(dy, row_of(out, 0, C, n, num_heads, t))
        for s in range(t + 1):
            p[t, s] = dot(q, row_of(qkv, 1, C, n, num_heads, s)) * scale - lse[t]
            dscores[t, s] = (dot(dy, row_of(qkv, 2, C, n, num_heads, s)) - delta) * scale
        for s in range(t + 1):
            p[t, s] = exp(p[t, s])
            dscores[t, s] *= p[t, s]
    clear(dqkv, n, num_heads)
    for t in range(T):
        q, dy = row_of(qkv, 0, C, n, num_heads, t), row_of(dout, 0, C, n, num_heads, t)
        dq = row_of(dqkv, 0, C, n, num_heads, t)
        for s in range(t + 1):
            add_scaled(dq, dscores[t, s], row_of(qkv, 1, C, n, num_heads, s))
            add_scaled(row_of(dqkv, 1, C, n, num_heads, s), dscores[t, s], q)
            add_scaled(row_of(dqkv, 2, C, n, num_heads, s), p[t, s], dy)


@njit(**SHARED_OUT)
def attention_backward_v1(dqkv, dout, out, att, qkv, num_heads, scratch):
    """All weights and all score gradients first, then the three products. Scratch: 2*B*NH*T*T."""
    for n in prange(out.shape[0] * num_heads):
        backward_head_v1(n, dqkv, dout, out, att, qkv, num_heads, scratch)


@njit(fastmath=CONTRACT, error_model="numpy")
def backward_head_v2(n, dqkv, dout, out, att, qkv, num_heads, scratch):
    """One query and KEYS keys at a time: recompute their weights, use them for all three gradients, discard them."""
    B, T, C = out.shape
    lse = att[n // num_heads, n % num_heads]
    scale = ONE / np.float32(math.sqrt(C // num_heads))
    p, dscores = np.empty(KEYS, np.float32), np.empty(KEYS, np.float32)
    clear(dqkv, n, num_heads)
    for t in range(T):
        q, dy = row_of(qkv, 0, C, n, num_heads, t), row_of(dout, 0, C, n, num_heads, t)
        dq = row_of(dqkv, 0, C, n, num_heads, t)
        delta = dot(dy, row_of(out, 0, C, n, num_heads, t))
        for s0 in range(0, t + 1, KEYS):
            count = min(KEYS, t + 1 - s0)
            for s in range(count):
                p[s] = dot(q, row_of(qkv, 1, C, n, num_heads, s0 + s)) * scale - lse[t]
                dscores[s] = (dot(dy, row_of(qkv, 2, C, n, num_heads, s0 + s)) - delta) * scale
            for s in range(count):
                p[s] = exp(p[s])
                dscores[s] *= p[s]
            for s in range(count):
                add_scaled(dq, dscores[s], row_of(qkv, 1, C, n, num_heads, s0 + s))
                add_scaled(row_of(dqkv, 1, C, n, num_heads, s0 + s), dscores[s], q)
                add_scaled(row_of(dqkv, 2, C, n, num_heads, s0 + s), p[s], dy)


@njit(**SHARED_OUT)
def attention_backward_v2(dqkv, dout, out, att, qkv, num_heads, scratch):
    """No matrix: weights are recomputed from q, k and one element per query. Scratch: none."""
    for n in prange(out.shape[0] * num_heads):
        backward_head_v2(n, dqkv, dout, out, att, qkv, num_heads, scratch)


def scratch_for(B, T, C, NH):
    """Scratch for the first rungs, which need two (T, T) matrices per head."""
    return garbage(max(attention_scratch_size(B, T, C, NH), 2 * B * NH * T * T))


def forward_inputs(rng, B, T, C, NH):
    return dict(
        out=garbage(B, T, C), att=garbage(B, NH, T), qkv=2 * normal(rng, B, T, 3 * C), num_heads=NH,
        scratch=scratch_for(B, T, C, NH),
    )  # fmt: skip


def backward_inputs(rng, B, T, C, NH):
    qkv, out, att = 2 * normal(rng, B, T, 3 * C), garbage(B, T, C), garbage(B, NH, T)
    oracle.attention_forward(out, att, qkv, NH, None)
    return dict(
        dqkv=garbage(B, T, 3 * C), dout=normal(rng, B, T, C), out=out, att=att, qkv=qkv, num_heads=NH,
        scratch=scratch_for(B, T, C, NH),
    )  # fmt: skip


SIZES = (
    dict(B=1, T=1, C=1, NH=1), dict(B=2, T=3, C=12, NH=3), dict(B=1, T=97, C=97, NH=1), dict(B=1, T=257, C=32, NH=2),
    dict(B=3, T=129, C=48, NH=3),
)  # fmt: skip
TIMED, QUICK = dict(B=1, T=1024, C=768, NH=12), dict(B=1, T=64, C=48, NH=3)

FORWARD = Ladder(
    "attention_forward",
    Problem(oracle.attention_forward, forward_inputs, ("out", "att"), SIZES),
    (attention_forward_v1, attention_forward_v2, attention_forward_v3, attention_forward),
    timed=TIMED,
    quick=QUICK,
    flops=lambda B, T, C, NH: 2 * B * T * T * C,
    torch="attention_forward",
)
BACKWARD = Ladder(
    "attention_backward",
    Problem(oracle.attention_backward, backward_inputs, ("dqkv",), SIZES, tolerance=3e-5),
    (attention_backward_v1, attention_backward_v2, attention_backward),
    timed=TIMED,
    quick=QUICK,
    flops=lambda B, T, C, NH: 4 * B * T * T * C,
    torch="attention_backward",
)
