"""The solution, and wrong answers with the phrases that `check` must print for each."""

import numpy as np
from numba import njit, prange

ZERO = np.float32(0)


@njit(parallel=True)
def solution(dscores, dp, p):
    R, C = p.shape
    for r in prange(R):
        total = ZERO
        for c in range(C):
            total += p[r, c] * dp[r, c]
        for c in range(C):
            dscores[r, c] = p[r, c] * (dp[r, c] - total)


def without_the_sum(dscores, dp, p):
    for r in prange(p.shape[0]):
        for c in range(p.shape[1]):
            dscores[r, c] = p[r, c] * dp[r, c]


def sum_of_dp(dscores, dp, p):
    for r in prange(p.shape[0]):
        total = ZERO
        for c in range(p.shape[1]):
            total += dp[r, c]
        for c in range(p.shape[1]):
            dscores[r, c] = p[r, c] * (dp[r, c] - total)


def one_sum_for_all(dscores, dp, p):
    total = ZERO
    for r in prange(p.shape[0]):
        for c in range(p.shape[1]):
            total += p[r, c] * dp[r, c]
        for c in range(p.shape[1]):
            dscores[r, c] = p[r, c] * (dp[r, c] - total)


def sum_in_a_shared_element(dscores, dp, p):
    for r in prange(p.shape[0]):
        dscores[0, 0] = ZERO
        for c in range(p.shape[1]):
            dscores[0, 0] += p[r, c] * dp[r, c]
        total = dscores[0, 0]
        for c in range(p.shape[1]):
            dscores[r, c] = p[r, c] * (dp[r, c] - total)


def accumulates_into_garbage(dscores, dp, p):
    for r in prange(p.shape[0]):
        total = ZERO
        for c in range(p.shape[1]):
            total += p[r, c] * dp[r, c]
        for c in range(p.shape[1]):
            dscores[r, c] += p[r, c] * (dp[r, c] - total)


def last_one_missing(dscores, dp, p):
    for r in prange(p.shape[0]):
        total = ZERO
        for c in range(p.shape[1]):
            total += p[r, c] * dp[r, c]
        for c in range(p.shape[1] - 1):
            dscores[r, c] = p[r, c] * (dp[r, c] - total)


def one_too_far(dscores, dp, p):
    for r in prange(p.shape[0]):
        total = ZERO
        for c in range(p.shape[1] + 1):
            total += p[r, c] * dp[r, c]
        for c in range(p.shape[1]):
            dscores[r, c] = p[r, c] * (dp[r, c] - total)


def overwrites_dp(dscores, dp, p):
    for r in prange(p.shape[0]):
        total = ZERO
        for c in range(p.shape[1]):
            dp[r, c] *= p[r, c]
            total += dp[r, c]
        for c in range(p.shape[1]):
            dscores[r, c] = dp[r, c] - p[r, c] * total


WRONG = (
    (without_the_sum, ["R=3, C=5: dscores[0, 0] is", "all elements of dscores are wrong"]),
    (sum_of_dp, ["R=3, C=5: dscores[0, 0] is", "all elements of dscores are wrong"]),
    (one_sum_for_all, ["R=3, C=5: dscores[1, 0] is", "10 of 15 elements are wrong"]),
    (
        sum_in_a_shared_element,
        ["a race: iteration 0 of prange writes dscores[0, 0] and iteration 1", "each element must have one owner"],
    ),
    (accumulates_into_garbage, ["dscores[0, 0] is nan", "all elements of dscores are wrong"]),
    (last_one_missing, ["dscores[0, 4] is never written", "all of them in dscores[:, 4]"]),
    (one_too_far, ["iteration 0 of prange reads p[0, 5], which is out of bounds", "must be 0 to 4"]),
    (overwrites_dp, ["it changes its input dp, at dp[0, 0]"]),
)
