"""The solution, and wrong answers with the phrases that `check` must print for each."""

import numpy as np
from numba import njit, prange

ZERO = np.float32(0)


@njit(parallel=True)
def solution(dinp, dout, inp, weight, mean, rstd):
    R, C = inp.shape
    for row in prange(R):
        m, r = mean[row], rstd[row]
        dnorm_sum, dnorm_norm_sum = ZERO, ZERO
        for c in range(C):
            dnorm = weight[c] * dout[row, c]
            dnorm_sum += dnorm
            dnorm_norm_sum += dnorm * (inp[row, c] - m) * r
        for c in range(C):
            norm = (inp[row, c] - m) * r
            dinp[row, c] += r * (weight[c] * dout[row, c] - dnorm_sum / C - norm * (dnorm_norm_sum / C))


@njit(parallel=True)
def writes_instead_of_adding(dinp, dout, inp, weight, mean, rstd):
    R, C = inp.shape
    for row in prange(R):
        m, r = mean[row], rstd[row]
        dnorm_sum, dnorm_norm_sum = ZERO, ZERO
        for c in range(C):
            dnorm = weight[c] * dout[row, c]
            dnorm_sum += dnorm
            dnorm_norm_sum += dnorm * (inp[row, c] - m) * r
        for c in range(C):
            norm = (inp[row, c] - m) * r
            dinp[row, c] = r * (weight[c] * dout[row, c] - dnorm_sum / C - norm * (dnorm_norm_sum / C))


@njit(parallel=True)
def forgets_the_variance(dinp, dout, inp, weight, mean, rstd):
    R, C = inp.shape
    for row in prange(R):
        dnorm_sum = ZERO
        for c in range(C):
            dnorm_sum += weight[c] * dout[row, c]
        for c in range(C):
            dinp[row, c] += rstd[row] * (weight[c] * dout[row, c] - dnorm_sum / C)


@njit(parallel=True)
def one_too_far(dinp, dout, inp, weight, mean, rstd):
    R, C = inp.shape
    for row in prange(R):
        dnorm_sum = ZERO
        for c in range(C + 1):
            dnorm_sum += weight[c] * dout[row, c]
        for c in range(C):
            dinp[row, c] += rstd[row] * (weight[c] * dout[row, c] - dnorm_sum / C)


@njit(parallel=True)
def rows_for_channels(dinp, dout, inp, weight, mean, rstd):
    R, C = inp.shape
    for row in prange(R):
        m, r = mean[row], rstd[row]
        dnorm_sum, dnorm_norm_sum = ZERO, ZERO
        for c in range(C):
            dnorm_sum += weight[row] * dout[row, c]
            dnorm_norm_sum += weight[row] * dout[row, c] * (inp[row, c] - m) * r
        for c in range(C):
            norm = (inp[row, c] - m) * r
            dinp[row, c] += r * (weight[row] * dout[row, c] - dnorm_sum / C - norm * (dnorm_norm_sum / C))


@njit(parallel=True)
def parallel_over_channels(dinp, dout, inp, weight, mean, rstd):
    """Multiplies by the Jacobian column by column: the mathematics is right, but it races."""
    R, C = inp.shape
    for i in prange(C):
        for row in range(R):
            m, r = mean[row], rstd[row]
            dnorm = weight[i] * dout[row, i]
            for j in range(C):
                same = 1 if i == j else 0
                norms = (inp[row, i] - m) * r * (inp[row, j] - m) * r
                dinp[row, j] += dnorm * r * (same - 1 / C - norms / C)


@njit(parallel=True)
def keeps_dnorm_in_dout(dinp, dout, inp, weight, mean, rstd):
    R, C = inp.shape
    for row in prange(R):
        m, r = mean[row], rstd[row]
        dnorm_sum, dnorm_norm_sum = ZERO, ZERO
        for c in range(C):
            dout[row, c] *= weight[c]
            dnorm_sum += dout[row, c]
            dnorm_norm_sum += dout[row, c] * (inp[row, c] - m) * r
        for c in range(C):
            norm = (inp[row, c] - m) * r
            dinp[row, c] += r * (dout[row, c] - dnorm_sum / C - norm * (dnorm_norm_sum / C))


@njit(parallel=True)
def all_but_the_last_channel(dinp, dout, inp, weight, mean, rstd):
    R, C = inp.shape
    for row in prange(R):
        m, r = mean[row], rstd[row]
        dnorm_sum, dnorm_norm_sum = ZERO, ZERO
        for c in range(C):
            dnorm = weight[c] * dout[row, c]
            dnorm_sum += dnorm
            dnorm_norm_sum += dnorm * (inp[row, c] - m) * r
        for c in range(C - 1):
            norm = (inp[row, c] - m) * r
            dinp[row, c] += r * (weight[c] * dout[row, c] - dnorm_sum / C - norm * (dnorm_norm_sum / C))


WRONG = (
    (writes_instead_of_adding, ["R=1, C=1: dinp[0, 0] is 0, but should be", "it is the only element of dinp"]),
    (forgets_the_variance, ["R=3, C=5: dinp[0, 0] is", "all elements of dinp are wrong"]),
    (one_too_far, ["iteration 0 of prange reads weight[1], which is out of bounds", "the index must be 0 to 0"]),
    (rows_for_channels, ["R=3, C=5: dinp[0, 0] is", "all elements of dinp are wrong"]),
    (parallel_over_channels, ["R=3, C=5: a race: iteration 0 of prange writes dinp[0, 0]", "iteration 1", "one owner"]),
    (keeps_dnorm_in_dout, ["it changes its input dout, at dout[0, 0]"]),
    (all_but_the_last_channel, ["R=3, C=5: dinp[0, 4]", "3 of 15 elements are wrong, all of them in dinp[:, 4]"]),
)
