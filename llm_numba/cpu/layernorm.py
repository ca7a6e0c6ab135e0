"""Layer normalisation over the channels."""

import numpy as np
from numba import njit, prange
from numba.extending import register_jitable

from llm_numba.cpu.jit import INLINE, ONE, PARALLEL, REDUCTION, ZERO, dot, sum_of

EPSILON = np.float32(1e-5)
PIECES = 64  # the backward splits the rows into at most this many pieces, whatever the number of threads
PIECE = 16  # the smallest number of rows per piece
BLOCK = 64  # channels per task when the pieces are added up


@njit(**REDUCTION)
def sum_of_squared_differences(x, m):
    """The sum of (x - m)**2. (Computing the variance from sum(x**2) - m**2 would cancel.)"""
    total = ZERO
    for c in range(x.shape[0]):
        total += (x[c] - m) * (x[c] - m)
    return total


@njit(**REDUCTION)
def sum_of_dnorm_norm(weight, dy, x, m):
    """The sum of dnorm * norm, without norm's factor rstd."""
    total = ZERO
    for c in range(x.shape[0]):
        total += (weight[c] * dy[c]) * (x[c] - m)
    return total


@njit(**INLINE)
def normalise(y, x, weight, bias):
    """y (C,) = x (C,) normalised, scaled and shifted; returns mean and rstd."""
    C = x.shape[0]
    m = sum_of(x) / np.float32(C)
    r = ONE / np.sqrt(sum_of_squared_differences(x, m) / np.float32(C) + EPSILON)
    for c in range(C):
        y[c] = (x[c] - m) * r * weight[c] + bias[c]
    return m, r


@njit(**PARALLEL)
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Normalise each (b, t) row to zero mean and unit variance, then scale and shift.

    out (B, T, C), mean (B, T), rstd (B, T) <- inp (B, T, C), weight (C,), bias (C,)
    Writes:   out =, mean =, rstd = 1 / sqrt(biased variance + 1e-5)
    Parallel: over the B*T rows; each thread owns its rows, so nothing races
    Moves:    2*B*T*C floats
    Source:   Ba et al. 2016, arXiv:1607.06450
    """
    B, T, C = inp.shape
    x_rows, y_rows = inp.reshape(B * T, C), out.reshape(B * T, C)
    means, rstds = mean.reshape(B * T), rstd.reshape(B * T)
    for i in prange(B * T):
        means[i], rstds[i] = normalise(y_rows[i], x_rows[i], weight, bias)


@register_jitable
def pieces_of(rows):
    """The number of pieces into which the backward splits the rows."""
    return min(PIECES, (rows + PIECE - 1) // PIECE)


def layernorm_backward_scratch(dinp, dweight, dbias, dout, inp, weight, mean, rstd, accumulate):
    """A share of dweight and one of dbias for each piece."""
    B, T, C = inp.shape
    return pieces_of(B * T) * 2 * C


@njit(**PARALLEL)
def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, scratch, accumulate):
    """The gradients of `layernorm_forward`, in one pass over the rows.

    dinp (B, T, C), dweight (C,), dbias (C,)
        <- dout (B, T, C), inp (B, T, C), weight (C,), mean (B, T), rstd (B, T), scratch
    With norm = (inp - mean) * rstd and dnorm = weight * dout, both (B, T, C), and averages over a row's channels:
    Writes:   dinp += rstd * (dnorm - average(dnorm) - norm * average(dnorm * norm)),
              dweight: sum over b, t of dout * norm, dbias: sum over b, t of dout; both += if accumulate, else =
    Parallel: over at most PIECES pieces of rows, each of which sums its share of dweight and dbias in its own part of
              scratch; then over blocks of channels, each of which adds the shares in order. Neither split depends on
              the number of threads, so the sums do not either
    Moves:    4*B*T*C floats
    Scratch:  layernorm_backward_scratch(...)
    """
    B, T, C = inp.shape
    dx_rows, dy_rows, x_rows = dinp.reshape(B * T, C), dout.reshape(B * T, C), inp.reshape(B * T, C)
    means, rstds = mean.reshape(B * T), rstd.reshape(B * T)
    pieces = pieces_of(B * T)
    shares = scratch[: pieces * 2 * C].reshape(pieces, 2, C)

    for piece in prange(pieces):
        dweight_share, dbias_share = shares[piece, 0], shares[piece, 1]
        dweight_share[:] = ZERO
        dbias_share[:] = ZERO
        for i in range(piece * B * T // pieces, (piece + 1) * B * T // pieces):
            dx, dy, x, m, r = dx_rows[i], dy_rows[i], x_rows[i], means[i], rstds[i]
            dnorm_average = dot(weight, dy) / np.float32(C)
            dnorm_norm_average = sum_of_dnorm_norm(weight, dy, x, m) * r / np.float32(C)
            for c in range(C):
                dx[c] += r * (weight[c] * dy[c] - dnorm_average - (x[c] - m) * r * dnorm_norm_average)
                dweight_share[c] += dy[c] * ((x[c] - m) * r)
                dbias_share[c] += dy[c]

    for block in prange((C + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, (block + 1) * BLOCK
        dw, db = dweight[first:last], dbias[first:last]
        if not accumulate:
            dw[:] = ZERO
            db[:] = ZERO
        for piece in range(pieces):
            dweight_share, dbias_share = shares[piece, 0, first:last], shares[piece, 1, first:last]
            for c in range(dw.shape[0]):
                dw[c] += dweight_share[c]
                db[c] += dbias_share[c]
