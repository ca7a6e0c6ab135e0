"""Naive matmul and attention: the formulas, one loop per index, nothing else.

They have the signatures of the ops in matmul.py and attention.py, and the same results up to rounding, but are many
times slower. Read them first, step through them in a debugger, or use them to check the fast ops:

    python -m llm_numba.train --preset nano --use matmul_forward=llm_numba.cpu.naive:matmul_forward

The other layers are already this simple in their own files. No function here uses scratch.
"""

import math

import numpy as np
from numba import njit, prange

from llm_numba.cpu.jit import ONE, PARALLEL, ZERO

ONE_THREAD = PARALLEL | dict(parallel=False)


@njit(**ONE_THREAD)
def matmul_forward(out, inp, weight, bias, scratch):
    """out[b, t, o] = sum over c of inp[b, t, c] * weight[o, c], + bias[o]; see matmul.py."""
    B, T, C = inp.shape
    for b in range(B):
        for t in range(T):
            for o in range(weight.shape[0]):
                total = ZERO
                for c in range(C):
                    total += inp[b, t, c] * weight[o, c]
                if bias is not None:
                    total += bias[o]
                out[b, t, o] = total


@njit(**ONE_THREAD)
def matmul_backward(dinp, dweight, dbias, dout, inp, weight, scratch, accumulate):
    """Each product of the forward adds to two gradients; see matmul.py."""
    B, T, C = inp.shape
    dinp[:] = ZERO
    if not accumulate:
        dweight[:] = ZERO
        if dbias is not None:
            dbias[:] = ZERO
    for b in range(B):
        for t in range(T):
            for o in range(weight.shape[0]):
                for c in range(C):
                    dinp[b, t, c] += dout[b, t, o] * weight[o, c]
                    dweight[o, c] += dout[b, t, o] * inp[b, t, c]
                if dbias is not None:
                    dbias[o] += dout[b, t, o]


@njit(**PARALLEL)
def attention_forward(out, lse, qkv, num_heads, num_kv_heads, scratch):
    """All scores of a head, all weights (T, T), all outputs; see attention.py."""
    B, T, C = out.shape
    HS, group = C // num_heads, num_heads // num_kv_heads
    scale = ONE / np.float32(math.sqrt(HS))
    for n in prange(B * num_heads):
        b, h = n // num_heads, n % num_heads
        q0, k0 = h * HS, (num_heads + h // group) * HS
        v0 = k0 + num_kv_heads * HS
        q, k, v = qkv[b, :, q0 : q0 + HS], qkv[b, :, k0 : k0 + HS], qkv[b, :, v0 : v0 + HS]
        y = out[b, :, q0 : q0 + HS]
        weights = np.zeros((T, T), np.float32)
        for t in range(T):
            for s in range(t + 1):
                score = ZERO
                for i in range(HS):
                    score += q[t, i] * k[s, i]
                weights[t, s] = score * scale
        for t in range(T):
            top = weights[t, 0]
            for s in range(t + 1):
                top = max(top, weights[t, s])
            total = ZERO
            for s in range(t + 1):
                weights[t, s] = math.exp(weights[t, s] - top)
                total += weights[t, s]
            for s in range(t + 1):
                weights[t, s] /= total
            lse[b, h, t] = top + math.log(total)
        for t in range(T):
            for i in range(HS):
                total = ZERO
                for s in range(t + 1):
                    total += weights[t, s] * v[s, i]
                y[t, i] = total


@njit(**PARALLEL)
def attention_backward(dqkv, dout, out, lse, qkv, num_heads, num_kv_heads, scratch):
    """The weights are recomputed from lse, one after the other; see attention.py."""
    B, T, C = out.shape
    HS, group = C // num_heads, num_heads // num_kv_heads
    scale = ONE / np.float32(math.sqrt(HS))
    for n in prange(B * num_kv_heads):
        b, g = n // num_kv_heads, n % num_kv_heads
        k0, v0 = (num_heads + g) * HS, (num_heads + num_kv_heads + g) * HS
        k, v = qkv[b, :, k0 : k0 + HS], qkv[b, :, v0 : v0 + HS]
        dk, dv = dqkv[b, :, k0 : k0 + HS], dqkv[b, :, v0 : v0 + HS]
        dk[:, :] = ZERO
        dv[:, :] = ZERO
        for h in range(g * group, (g + 1) * group):
            q0, q1 = h * HS, h * HS + HS
            q, dq, y, dy = qkv[b, :, q0:q1], dqkv[b, :, q0:q1], out[b, :, q0:q1], dout[b, :, q0:q1]
            dq[:, :] = ZERO
            for t in range(T):
                # the gradient of a softmax is p * (dp - sum(p * dp)), and that sum is dy . y
                average = ZERO
                for i in range(HS):
                    average += dy[t, i] * y[t, i]
                for s in range(t + 1):
                    score, dp = ZERO, ZERO
                    for i in range(HS):
                        score += q[t, i] * k[s, i]
                        dp += dy[t, i] * v[s, i]
                    p = math.exp(score * scale - lse[b, h, t])
                    dscore = p * (dp - average) * scale
                    for i in range(HS):
                        dq[t, i] += dscore * k[s, i]
                        dk[s, i] += dscore * q[t, i]
                        dv[s, i] += p * dy[t, i]
