"""Matmul and attention as anyone would write them first: the formula, a loop for each index, and nothing else.

The same signatures as in matmul.py and attention.py, and the same results but for rounding, many times slower: to be
read first, to step through, and to hold the fast ones against. The other layers are as plain as this where they are.

    python -m llm_numba.train --preset nano --use matmul_forward=llm_numba.cpu.naive:matmul_forward_v1
"""

import math

import numpy as np
from numba import njit, prange

from llm_numba.cpu.jit import ONE, PARALLEL, ZERO


@njit(**PARALLEL)
def matmul_forward_v1(out, inp, weight, bias, scratch):
    """out[b, t, o] = sum over c of inp[b, t, c] * weight[o, c], + bias[o]; see `matmul_forward`."""
    B, T, C = inp.shape
    for row in prange(B * T):
        b, t = row // T, row % T
        for o in range(weight.shape[0]):
            total = ZERO
            for c in range(C):
                total += inp[b, t, c] * weight[o, c]
            out[b, t, o] = total
            if bias is not None:
                out[b, t, o] += bias[o]


@njit(**PARALLEL)
def matmul_backward_v1(dinp, dweight, dbias, dout, inp, weight, scratch, accumulate):
    """The gradients of `matmul_forward_v1`; see `matmul_backward`.

    A loop for each of them, over its owners: a loop over dout that added to all three would race.
    """
    B, T, C = inp.shape
    OC = weight.shape[0]
    for row in prange(B * T):
        b, t = row // T, row % T
        for c in range(C):
            total = ZERO
            for o in range(OC):
                total += dout[b, t, o] * weight[o, c]
            dinp[b, t, c] = total
    for o in prange(OC):
        for c in range(C):
            total = dweight[o, c] if accumulate else ZERO
            for b in range(B):
                for t in range(T):
                    total += dout[b, t, o] * inp[b, t, c]
            dweight[o, c] = total
        if dbias is not None:
            total = dbias[o] if accumulate else ZERO
            for b in range(B):
                for t in range(T):
                    total += dout[b, t, o]
            dbias[o] = total


@njit(**PARALLEL)
def attention_forward_v1(out, att, qkv, num_heads, scratch):
    """Every token looks at itself and at those before it; see `attention_forward`.

    att (B, NH, T, T) only, all of the weights.
    """
    B, T, C = out.shape
    HS = C // num_heads
    scale = ONE / np.float32(math.sqrt(HS))
    for n in prange(B * num_heads):
        b, h = n // num_heads, n % num_heads
        q, k, v = h * HS, C + h * HS, 2 * C + h * HS  # where the head's parts of a row of qkv begin
        for t in range(T):
            weights = att[b, h, t]
            # scores against the keys of this token and of those before it, and the largest of them
            top = np.float32(-np.inf)
            for s in range(t + 1):
                score = ZERO
                for i in range(HS):
                    score += qkv[b, t, q + i] * qkv[b, s, k + i]
                weights[s] = score * scale
                top = max(top, weights[s])
            # their softmax
            total = ZERO
            for s in range(t + 1):
                weights[s] = math.exp(weights[s] - top)
                total += weights[s]
            for s in range(T):
                weights[s] = weights[s] / total if s <= t else ZERO
            # the values, weighed
            for i in range(HS):
                y = ZERO
                for s in range(t + 1):
                    y += weights[s] * qkv[b, s, v + i]
                out[b, t, h * HS + i] = y


@njit(**PARALLEL)
def attention_backward_v1(dqkv, dout, out, att, qkv, num_heads, scratch):
    """The gradient of `attention_forward_v1` with respect to q, k and v; see `attention_backward`."""
    B, T, C = out.shape
    HS = C // num_heads
    scale = ONE / np.float32(math.sqrt(HS))
    for n in prange(B * num_heads):
        b, h = n // num_heads, n % num_heads
        q, k, v = h * HS, C + h * HS, 2 * C + h * HS
        for t in range(T):
            for i in range(HS):
                dqkv[b, t, q + i] = ZERO
                dqkv[b, t, k + i] = ZERO
                dqkv[b, t, v + i] = ZERO
        for t in range(T):
            # the softmax's gradient is p * (dp - sum(p * dp)), and that sum is dout . out
            average = ZERO
            for i in range(HS):
                average += dout[b, t, h * HS + i] * out[b, t, h * HS + i]
            for s in range(t + 1):
                p, dp = att[b, h, t, s], ZERO
                for i in range(HS):
                    dp += dout[b, t, h * HS + i] * qkv[b, s, v + i]
                    dqkv[b, s, v + i] += p * dout[b, t, h * HS + i]
                dscore = p * (dp - average) * scale
                for i in range(HS):
                    dqkv[b, t, q + i] += dscore * qkv[b, s, k + i]
                    dqkv[b, s, k + i] += dscore * qkv[b, t, q + i]
