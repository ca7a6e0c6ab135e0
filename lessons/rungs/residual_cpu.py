"""The rungs of lesson 06 on a CPU: add two activations and normalise the sum."""

import numpy as np
from numba import njit, prange

from llm_numba import oracle
from llm_numba.cpu.layernorm import layernorm_forward
from llm_numba.cpu.residual import residual_layernorm_forward
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

ZERO, ONE, EPSILON = np.float32(0), np.float32(1), np.float32(1e-5)
SUMS = dict(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")  # sums may be reordered


@njit(**SUMS)
def mean_of(x):
    total = ZERO
    for c in range(x.shape[0]):
        total += x[c]
    return total / np.float32(x.shape[0])


@njit(**SUMS)
def rstd_of(x, m):
    total = ZERO
    for c in range(x.shape[0]):
        total += (x[c] - m) * (x[c] - m)
    return ONE / np.sqrt(total / np.float32(x.shape[0]) + EPSILON)


@njit(parallel=True)
def add(residual, inp1, inp2):
    """residual = inp1 + inp2, all (rows, C)."""
    for i in prange(residual.shape[0]):
        for c in range(residual.shape[1]):
            residual[i, c] = inp1[i, c] + inp2[i, c]


@njit(parallel=True)
def means(mean, x):
    for i in prange(x.shape[0]):
        mean[i] = mean_of(x[i])


@njit(parallel=True)
def rstds(rstd, x, mean):
    for i in prange(x.shape[0]):
        rstd[i] = rstd_of(x[i], mean[i])


@njit(parallel=True)
def scale_and_shift(out, x, mean, rstd, weight, bias):
    for i in prange(x.shape[0]):
        for c in range(x.shape[1]):
            out[i, c] = (x[i, c] - mean[i]) * rstd[i] * weight[c] + bias[c]


def residual_layernorm_forward_v1(residual, out, mean, rstd, inp1, inp2, weight, bias):
    """One pass over the whole array per line of the formula."""
    rows = residual.reshape(-1, weight.size)
    add(rows, inp1.reshape(rows.shape), inp2.reshape(rows.shape))
    means(mean.reshape(-1), rows)
    rstds(rstd.reshape(-1), rows, mean.reshape(-1))
    scale_and_shift(out.reshape(rows.shape), rows, mean.reshape(-1), rstd.reshape(-1), weight, bias)


def residual_layernorm_forward_v2(residual, out, mean, rstd, inp1, inp2, weight, bias):
    """Two passes: the sum, then the model's layernorm, row by row."""
    rows = residual.reshape(-1, weight.size)
    add(rows, inp1.reshape(rows.shape), inp2.reshape(rows.shape))
    layernorm_forward(out, mean, rstd, residual, weight, bias)


@njit(parallel=True)
def one_pass(residual, out, mean, rstd, inp1, inp2, weight, bias):
    """Row by row: add, and normalise while the row is still in the cache."""
    for i in prange(residual.shape[0]):
        x = residual[i]
        for c in range(x.shape[0]):
            x[c] = inp1[i, c] + inp2[i, c]
        m = mean_of(x)
        r = rstd_of(x, m)
        for c in range(x.shape[0]):
            out[i, c] = (x[c] - m) * r * weight[c] + bias[c]
        mean[i] = m
        rstd[i] = r


def residual_layernorm_forward_v3(residual, out, mean, rstd, inp1, inp2, weight, bias):
    """One pass: a row is added and normalised before the next row."""
    rows = residual.reshape(-1, weight.size)
    one_pass(
        rows, out.reshape(rows.shape), mean.reshape(-1), rstd.reshape(-1),
        inp1.reshape(rows.shape), inp2.reshape(rows.shape), weight, bias,
    )  # fmt: skip


def inputs(rng, B, T, C):
    return dict(
        residual=garbage(B, T, C), out=garbage(B, T, C), mean=garbage(B, T), rstd=garbage(B, T),
        inp1=normal(rng, B, T, C) + 1, inp2=normal(rng, B, T, C), weight=normal(rng, C), bias=normal(rng, C),
    )  # fmt: skip


FORWARD = Ladder(
    "residual_layernorm_forward",
    Problem(
        oracle.residual_layernorm_forward,
        inputs,
        ("residual", "out", "mean", "rstd"),
        (dict(B=1, T=1, C=1), dict(B=1, T=3, C=97), dict(B=3, T=1, C=3), dict(B=2, T=97, C=257)),
    ),
    (
        residual_layernorm_forward_v1, residual_layernorm_forward_v2, residual_layernorm_forward_v3,
        residual_layernorm_forward,
    ),
    timed=dict(B=16, T=1024, C=768),
    quick=dict(B=1, T=64, C=96),
    nbytes=lambda B, T, C: 4 * 4 * B * T * C,
    pattern="add",
    torch="residual_layernorm_forward",
)  # fmt: skip
