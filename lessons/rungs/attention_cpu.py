"""The rungs of lesson 05 on a CPU: attention, forward and backward, with as many kv heads as query heads."""

import math

import numpy as np
from numba import njit, prange

from llm_numba import lessons, oracle
from llm_numba.cpu import naive
from llm_numba.cpu.attention import (
    attention_backward,
    attention_backward_scratch,
    attention_forward,
    attention_forward_scratch,
)
from llm_numba.cpu.jit import dot, exp, largest, sum_of
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

ZERO, ONE, LOWEST = np.float32(0), np.float32(1), np.float32(-np.inf)
CONTRACT = {"contract"}  # LLVM may fuse a multiply and an add
SHARED_OUT = dict(parallel=not lessons.FAST)  # tests save the compile time: `prange` is then a `range`
KEYS = 128  # between two rescalings of a query's sums


@njit
def matrix_of(scratch, n, T):
    """The n-th (T, T) matrix in scratch."""
    return scratch[n * T * T : (n + 1) * T * T].reshape(T, T)


def attention_forward_v1(out, lse, qkv, num_heads, num_kv_heads, scratch):
    """The formula: all scores of a head, all weights, all outputs."""
    naive.attention_forward(out, lse, qkv, num_heads, num_kv_heads, scratch)


@njit
def row_of(rows, part, C, n, num_heads, t):
    """The HS elements of token t for head n. Numba sees that they are contiguous, which it does not see for a row of a
    slice such as rows[b, :, first:last]."""
    first = part * C + n % num_heads * (C // num_heads)
    return rows[n // num_heads, t, first : first + C // num_heads]


@njit
def add_scaled(sums, x, numbers):
    """sums (HS,) += x * numbers (HS,)."""
    for i in range(sums.shape[0]):
        sums[i] += x * numbers[i]


@njit(fastmath=CONTRACT, error_model="numpy")
def forward_head_v2(n, out, lse_of_all, qkv, num_heads, scratch):
    """The same, but each innermost loop runs along a row of memory, and LLVM may reorder its sums."""
    B, T, C = out.shape
    lse, weights = lse_of_all[n // num_heads, n % num_heads], matrix_of(scratch, n, T)
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
def attention_forward_v2(out, lse, qkv, num_heads, num_kv_heads, scratch):
    """Vectorised: the innermost loops run along rows of memory. Scratch: B*NH*T*T, a matrix for every head."""
    for n in prange(out.shape[0] * num_heads):
        forward_head_v2(n, out, lse, qkv, num_heads, scratch)


@njit(fastmath=CONTRACT, error_model="numpy")
def forward_head_v3(n, out, lse_of_all, qkv, num_heads, scratch):
    """The same without a matrix: a query takes KEYS keys at a time and keeps the largest score, the sum of the weights
    and the weighted sum of the values. When a larger score appears, both sums are rescaled."""
    B, T, C = out.shape
    lse = lse_of_all[n // num_heads, n % num_heads]
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
def attention_forward_v3(out, lse, qkv, num_heads, num_kv_heads, scratch):
    """The online softmax: KEYS of a head's T*T weights exist at a time. Scratch: none."""
    for n in prange(out.shape[0] * num_heads):
        forward_head_v3(n, out, lse, qkv, num_heads, scratch)


@njit
def clear(dqkv, n, num_heads):
    """dqkv = 0 for head n."""
    B, T, C = dqkv.shape
    for t in range(T):
        for part in range(3):
            row_of(dqkv, part, C // 3, n, num_heads, t)[:] = ZERO


@njit(fastmath=CONTRACT, error_model="numpy")
def backward_head_v1(n, dqkv, dout, out, lse_of_all, qkv, num_heads, scratch):
    """All weights p (T, T) from lse, the gradients of all scores, then the three products."""
    B, T, C = out.shape
    lse = lse_of_all[n // num_heads, n % num_heads]
    p, dscores = matrix_of(scratch, 2 * n, T), matrix_of(scratch, 2 * n + 1, T)
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
def attention_backward_v1(dqkv, dout, out, lse, qkv, num_heads, num_kv_heads, scratch):
    """All weights and the gradients of all scores, then the three products. Scratch: 2*B*NH*T*T."""
    for n in prange(out.shape[0] * num_heads):
        backward_head_v1(n, dqkv, dout, out, lse, qkv, num_heads, scratch)


@njit(fastmath=CONTRACT, error_model="numpy")
def backward_head_v2(n, dqkv, dout, out, lse_of_all, qkv, num_heads, scratch):
    """The same for one query and KEYS keys at a time: the weights are recomputed, used three times and dropped."""
    B, T, C = out.shape
    lse = lse_of_all[n // num_heads, n % num_heads]
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
def attention_backward_v2(dqkv, dout, out, lse, qkv, num_heads, num_kv_heads, scratch):
    """No matrix: each weight is recomputed from q, k and lse where it is needed. Scratch: none."""
    for n in prange(out.shape[0] * num_heads):
        backward_head_v2(n, dqkv, dout, out, lse, qkv, num_heads, scratch)


def forward_inputs(rng, B, T, C, NH):
    arguments = dict(
        out=garbage(B, T, C), lse=garbage(B, NH, T), qkv=2 * normal(rng, B, T, 3 * C), num_heads=NH, num_kv_heads=NH
    )
    rungs = B * NH * T * T  # for the matrix of every head
    return arguments | dict(scratch=garbage(max(rungs, attention_forward_scratch(**arguments))))


def backward_inputs(rng, B, T, C, NH):
    qkv, out, lse = 2 * normal(rng, B, T, 3 * C), garbage(B, T, C), garbage(B, NH, T)
    oracle.attention_forward(out, lse, qkv, NH, NH, None)
    arguments = dict(
        dqkv=garbage(B, T, 3 * C), dout=normal(rng, B, T, C), out=out, lse=lse, qkv=qkv, num_heads=NH, num_kv_heads=NH
    )
    rungs = 2 * B * NH * T * T  # for two matrices of every head
    return arguments | dict(scratch=garbage(max(rungs, attention_backward_scratch(**arguments))))


SIZES = (
    dict(B=1, T=1, C=1, NH=1), dict(B=2, T=3, C=12, NH=3), dict(B=1, T=97, C=97, NH=1), dict(B=1, T=257, C=32, NH=2),
    dict(B=3, T=129, C=48, NH=3),
)  # fmt: skip
TIMED, QUICK = dict(B=1, T=1024, C=768, NH=12), dict(B=1, T=64, C=48, NH=3)

FORWARD = Ladder(
    "attention_forward",
    Problem(oracle.attention_forward, forward_inputs, ("out", "lse"), SIZES),
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
