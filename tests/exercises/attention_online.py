"""The solution, and wrong answers with the phrases that `check` must print for each."""

import math

import numpy as np
from numba import njit, prange

ZERO, ONE, LOWEST = np.float32(0), np.float32(1), np.float32(-np.inf)


@njit(parallel=True, error_model="numpy")
def solution(out, q, k, v):
    T, HS = q.shape
    scale = ONE / np.float32(math.sqrt(HS))
    for t in prange(T):
        top, total = LOWEST, ZERO
        for i in range(HS):
            out[t, i] = ZERO
        for s in range(t + 1):
            score = ZERO
            for i in range(HS):
                score += q[t, i] * k[s, i]
            score *= scale
            before, top = top, max(top, score)
            shrink, weight = np.exp(before - top), np.exp(score - top)
            total = total * shrink + weight
            for i in range(HS):
                out[t, i] = out[t, i] * shrink + weight * v[s, i]
        for i in range(HS):
            out[t, i] /= total


def variant(last=lambda t, T: t + 1, shrink_out=True, shrink_total=True, divide=True, keep_top=True, row=None):
    """The solution with one thing wrong."""

    def answer(out, q, k, v):
        T, HS = q.shape
        scale = ONE / np.float32(math.sqrt(HS))
        for t in prange(T):
            top, total = LOWEST if keep_top else ZERO, ZERO
            to = t if row is None else row
            for i in range(HS):
                out[to, i] = ZERO
            for s in range(last(t, T)):
                score = ZERO
                for i in range(HS):
                    score += q[t, i] * k[s, i]
                score *= scale
                before = top
                if keep_top:
                    top = max(top, score)
                shrink, weight = np.exp(before - top), np.exp(score - top)
                total = (total * shrink if shrink_total else total) + weight
                for i in range(HS):
                    out[to, i] = (out[to, i] * shrink if shrink_out else out[to, i]) + weight * v[s, i]
            for i in range(HS):
                if divide:
                    out[to, i] /= total

    return answer


WRONG = (
    (variant(last=lambda t, T: T), ["T=3, HS=4: out[0, 0] is", "8 of 12 elements are wrong"]),
    (variant(last=lambda t, T: t), ["T=3, HS=4: out[0, 0] is nan, but should be"]),
    (variant(shrink_out=False), ["T=3, HS=4: out[1, 0] is", "8 of 12 elements are wrong"]),
    (variant(shrink_total=False), ["T=3, HS=4: out[1, 0] is", "8 of 12 elements are wrong"]),
    (variant(divide=False), ["T=3, HS=4: out[1, 0] is", "7 of 12 elements are wrong"]),
    (variant(keep_top=False), ["T=3, HS=4: out[0, 0] is nan, but should be", "all elements of out are wrong"]),
    (variant(row=0), ["a race: iteration 0 of prange writes out[0, 0]", "each element must have one owner"]),
    (variant(last=lambda t, T: t + 2), ["iteration 2 of prange reads k[3, 0], which is out of bounds"]),
)
