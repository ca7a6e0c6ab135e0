"""The rungs of lesson 01 on a CPU: layer normalisation, forward and backward."""

import math

import numpy as np
from numba import njit, prange

from llm_numba import oracle
from llm_numba.cpu.layernorm import layernorm_backward, layernorm_backward_scratch, layernorm_forward
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

ZERO, ONE, EPSILON = np.float32(0), np.float32(1), np.float32(1e-5)
BLOCK = 64  # channels per iteration of the backward's second loop


@njit
def layernorm_forward_v1(out, mean, rstd, inp, weight, bias):
    """The formula, with one loop per sum. 0.0 and 1e-5 are float64, so everything computed with them is float64."""
    B, T, C = inp.shape
    for b in range(B):
        for t in range(T):
            m = 0.0
            for c in range(C):
                m += inp[b, t, c]
            m /= C
            variance = 0.0
            for c in range(C):
                variance += (inp[b, t, c] - m) ** 2
            variance /= C
            r = 1.0 / math.sqrt(variance + 1e-5)
            for c in range(C):
                out[b, t, c] = (inp[b, t, c] - m) * r * weight[c] + bias[c]
            mean[b, t] = m
            rstd[b, t] = r


@njit
def layernorm_forward_v2(out, mean, rstd, inp, weight, bias):
    """float32 only: a vector register holds twice as many elements, and nothing is converted."""
    B, T, C = inp.shape
    for b in range(B):
        for t in range(T):
            x, y = inp[b, t], out[b, t]
            m = ZERO
            for c in range(C):
                m += x[c]
            m /= np.float32(C)
            variance = ZERO
            for c in range(C):
                variance += (x[c] - m) * (x[c] - m)
            variance /= np.float32(C)
            r = ONE / np.sqrt(variance + EPSILON)
            for c in range(C):
                y[c] = (x[c] - m) * r * weight[c] + bias[c]
            mean[b, t] = m
            rstd[b, t] = r


@njit(fastmath={"reassoc", "contract", "nsz"})
def layernorm_forward_v3(out, mean, rstd, inp, weight, bias):
    """Sums may be reordered, so that a vector register holds 8 or 16 partial sums."""
    B, T, C = inp.shape
    for b in range(B):
        for t in range(T):
            x, y = inp[b, t], out[b, t]
            m = ZERO
            for c in range(C):
                m += x[c]
            m /= np.float32(C)
            variance = ZERO
            for c in range(C):
                variance += (x[c] - m) * (x[c] - m)
            variance /= np.float32(C)
            r = ONE / np.sqrt(variance + EPSILON)
            for c in range(C):
                y[c] = (x[c] - m) * r * weight[c] + bias[c]
            mean[b, t] = m
            rstd[b, t] = r


@njit(parallel=True, fastmath={"reassoc", "contract", "nsz"})
def layernorm_forward_v4(out, mean, rstd, inp, weight, bias):
    """The rows are distributed over the cores: each row has one owner, so nothing waits and nothing races."""
    B, T, C = inp.shape
    for row in prange(B * T):
        b, t = row // T, row % T
        x, y = inp[b, t], out[b, t]
        m = ZERO
        for c in range(C):
            m += x[c]
        m /= np.float32(C)
        variance = ZERO
        for c in range(C):
            variance += (x[c] - m) * (x[c] - m)
        variance /= np.float32(C)
        r = ONE / np.sqrt(variance + EPSILON)
        for c in range(C):
            y[c] = (x[c] - m) * r * weight[c] + bias[c]
        mean[b, t] = m
        rstd[b, t] = r


@njit(fastmath={"reassoc", "contract", "nsz"})
def layernorm_backward_v1(dinp, dweight, dbias, dout, inp, weight, mean, rstd, scratch, accumulate):
    """Row by row: two averages, then the row's gradient and its contribution to dweight and dbias."""
    B, T, C = inp.shape
    if not accumulate:
        dweight[:] = ZERO
        dbias[:] = ZERO
    for b in range(B):
        for t in range(T):
            m, r = mean[b, t], rstd[b, t]
            x, dy, dx = inp[b, t], dout[b, t], dinp[b, t]
            dnorm_average, dnorm_norm_average = ZERO, ZERO
            for c in range(C):
                dnorm = weight[c] * dy[c]
                dnorm_average += dnorm
                dnorm_norm_average += dnorm * (x[c] - m) * r
            dnorm_average /= np.float32(C)
            dnorm_norm_average /= np.float32(C)
            for c in range(C):
                norm = (x[c] - m) * r
                dx[c] += r * (weight[c] * dy[c] - dnorm_average - norm * dnorm_norm_average)
                dweight[c] += dy[c] * norm
                dbias[c] += dy[c]


@njit(parallel=True, fastmath={"reassoc", "contract", "nsz"})
def layernorm_backward_v2(dinp, dweight, dbias, dout, inp, weight, mean, rstd, scratch, accumulate):
    """Every sum has one owner: a parallel loop over the rows of dinp, another over the channels of dweight."""
    B, T, C = inp.shape
    for row in prange(B * T):
        b, t = row // T, row % T
        m, r = mean[b, t], rstd[b, t]
        x, dy, dx = inp[b, t], dout[b, t], dinp[b, t]
        dnorm_average, dnorm_norm_average = ZERO, ZERO
        for c in range(C):
            dnorm = weight[c] * dy[c]
            dnorm_average += dnorm
            dnorm_norm_average += dnorm * (x[c] - m) * r
        dnorm_average /= np.float32(C)
        dnorm_norm_average /= np.float32(C)
        for c in range(C):
            dx[c] += r * (weight[c] * dy[c] - dnorm_average - (x[c] - m) * r * dnorm_norm_average)
    for c in prange(C):
        dw = dweight[c] if accumulate else ZERO
        db = dbias[c] if accumulate else ZERO
        for b in range(B):
            for t in range(T):
                dw += dout[b, t, c] * (inp[b, t, c] - mean[b, t]) * rstd[b, t]
                db += dout[b, t, c]
        dweight[c] = dw
        dbias[c] = db


@njit(parallel=True, fastmath={"reassoc", "contract", "nsz"})
def layernorm_backward_v3(dinp, dweight, dbias, dout, inp, weight, mean, rstd, scratch, accumulate):
    """In the second loop each owner has BLOCK consecutive channels, which are a few cache lines per row."""
    B, T, C = inp.shape
    for row in prange(B * T):
        b, t = row // T, row % T
        m, r = mean[b, t], rstd[b, t]
        x, dy, dx = inp[b, t], dout[b, t], dinp[b, t]
        dnorm_average, dnorm_norm_average = ZERO, ZERO
        for c in range(C):
            dnorm = weight[c] * dy[c]
            dnorm_average += dnorm
            dnorm_norm_average += dnorm * (x[c] - m) * r
        dnorm_average /= np.float32(C)
        dnorm_norm_average /= np.float32(C)
        for c in range(C):
            dx[c] += r * (weight[c] * dy[c] - dnorm_average - (x[c] - m) * r * dnorm_norm_average)
    for block in prange((C + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, min(C, (block + 1) * BLOCK)
        dw, db = dweight[first:last], dbias[first:last]
        if not accumulate:
            dw[:] = ZERO
            db[:] = ZERO
        for b in range(B):
            for t in range(T):
                m, r = mean[b, t], rstd[b, t]
                x, dy = inp[b, t, first:last], dout[b, t, first:last]
                for c in range(last - first):
                    dw[c] += dy[c] * ((x[c] - m) * r)
                    db[c] += dy[c]


@njit(parallel=True)
def layernorm_backward_racing(dinp, dweight, dbias, dout, inp, weight, mean, rstd, scratch, accumulate):
    """Not a rung but a mistake: the first rung's loop over the rows, made parallel without any other change."""
    B, T, C = inp.shape
    for row in prange(B * T):
        b, t = row // T, row % T
        m, r = mean[b, t], rstd[b, t]
        dnorm_average, dnorm_norm_average = ZERO, ZERO
        for c in range(C):
            dnorm_average += weight[c] * dout[b, t, c] / np.float32(C)
            dnorm_norm_average += weight[c] * dout[b, t, c] * (inp[b, t, c] - m) * r / np.float32(C)
        for c in range(C):
            norm = (inp[b, t, c] - m) * r
            dinp[b, t, c] += r * (weight[c] * dout[b, t, c] - dnorm_average - norm * dnorm_norm_average)
            dweight[c] += dout[b, t, c] * norm
            dbias[c] += dout[b, t, c]


def forward_inputs(rng, B, T, C):
    return dict(
        out=garbage(B, T, C), mean=garbage(B, T), rstd=garbage(B, T),
        inp=normal(rng, B, T, C) + 1, weight=normal(rng, C), bias=normal(rng, C),
    )  # fmt: skip


def backward_inputs(rng, B, T, C):
    inp, mean, rstd = normal(rng, B, T, C) + 1, garbage(B, T), garbage(B, T)
    oracle.layernorm_forward(garbage(B, T, C), mean, rstd, inp, ONE, ZERO)
    arguments = dict(
        dinp=normal(rng, B, T, C), dweight=normal(rng, C), dbias=normal(rng, C),
        dout=normal(rng, B, T, C), inp=inp, weight=normal(rng, C), mean=mean, rstd=rstd,
    )  # fmt: skip
    scratch = garbage(layernorm_backward_scratch(**arguments, accumulate=True))
    return arguments | dict(scratch=scratch, accumulate=True)


SIZES = (dict(B=1, T=1, C=1), dict(B=1, T=3, C=97), dict(B=3, T=1, C=3), dict(B=2, T=97, C=257), dict(B=1, T=257, C=97))
TIMED, QUICK = dict(B=16, T=1024, C=768), dict(B=1, T=64, C=96)

FORWARD = Ladder(
    "layernorm_forward",
    Problem(oracle.layernorm_forward, forward_inputs, ("out", "mean", "rstd"), SIZES),
    (layernorm_forward_v1, layernorm_forward_v2, layernorm_forward_v3, layernorm_forward_v4, layernorm_forward),
    timed=TIMED,
    quick=QUICK,
    nbytes=lambda B, T, C: 2 * 4 * B * T * C,
    pattern="copy",
    torch="layernorm_forward",
)
BACKWARD = Ladder(
    "layernorm_backward",
    Problem(oracle.layernorm_backward, backward_inputs, ("dinp", "dweight", "dbias"), SIZES),
    (layernorm_backward_v1, layernorm_backward_v2, layernorm_backward_v3, layernorm_backward),
    timed=TIMED,
    quick=QUICK,
    nbytes=lambda B, T, C: 4 * 4 * B * T * C,
    pattern="update",
    torch="layernorm_backward",
)
