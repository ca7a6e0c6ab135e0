"""The solution, and wrong answers with the phrases that `check` must print for each."""

import numpy as np
from numba import njit, prange

MR, NR = 2, 4


@njit(parallel=True)
def solution(out, a, b):
    R, K = a.shape
    O = b.shape[1]
    for strip in prange((R + MR - 1) // MR):
        tile = np.empty((MR, NR), np.float32)
        for first in range(0, O, NR):
            rows, columns = min(MR, R - strip * MR), min(NR, O - first)
            tile[:] = 0
            for k in range(K):
                for r in range(rows):
                    for c in range(columns):
                        tile[r, c] += a[strip * MR + r, k] * b[k, first + c]
            for r in range(rows):
                for c in range(columns):
                    out[strip * MR + r, first + c] = tile[r, c]


@njit(parallel=True)
def cleared_once(out, a, b):
    R, K = a.shape
    O = b.shape[1]
    for strip in prange((R + MR - 1) // MR):
        tile = np.zeros((MR, NR), np.float32)
        for first in range(0, O, NR):
            rows, columns = min(MR, R - strip * MR), min(NR, O - first)
            for k in range(K):
                for r in range(rows):
                    for c in range(columns):
                        tile[r, c] += a[strip * MR + r, k] * b[k, first + c]
            for r in range(rows):
                for c in range(columns):
                    out[strip * MR + r, first + c] = tile[r, c]


@njit(parallel=True)
def beyond_the_right_edge(out, a, b):
    R, K = a.shape
    O = b.shape[1]
    for strip in prange((R + MR - 1) // MR):
        tile = np.empty((MR, NR), np.float32)
        for first in range(0, O, NR):
            rows = min(MR, R - strip * MR)
            tile[:] = 0
            for k in range(K):
                for r in range(rows):
                    for c in range(NR):
                        tile[r, c] += a[strip * MR + r, k] * b[k, first + c]
            for r in range(rows):
                for c in range(NR):
                    out[strip * MR + r, first + c] = tile[r, c]


@njit(parallel=True)
def beyond_the_lower_edge(out, a, b):
    R, K = a.shape
    O = b.shape[1]
    for strip in prange((R + MR - 1) // MR):
        tile = np.empty((MR, NR), np.float32)
        for first in range(0, O, NR):
            columns = min(NR, O - first)
            tile[:] = 0
            for k in range(K):
                for r in range(MR):
                    for c in range(columns):
                        tile[r, c] += a[strip * MR + r, k] * b[k, first + c]
            for r in range(MR):
                for c in range(columns):
                    out[strip * MR + r, first + c] = tile[r, c]


@njit(parallel=True)
def whole_strips_only(out, a, b):
    R, K = a.shape
    O = b.shape[1]
    for strip in prange(R // MR):
        tile = np.empty((MR, NR), np.float32)
        for first in range(0, O, NR):
            columns = min(NR, O - first)
            tile[:] = 0
            for k in range(K):
                for r in range(MR):
                    for c in range(columns):
                        tile[r, c] += a[strip * MR + r, k] * b[k, first + c]
            for r in range(MR):
                for c in range(columns):
                    out[strip * MR + r, first + c] = tile[r, c]


@njit(parallel=True)
def strips_overlap(out, a, b):
    R, K = a.shape
    O = b.shape[1]
    for strip in prange(R):
        tile = np.empty((MR, NR), np.float32)
        for first in range(0, O, NR):
            rows, columns = min(MR, R - strip), min(NR, O - first)
            tile[:] = 0
            for k in range(K):
                for r in range(rows):
                    for c in range(columns):
                        tile[r, c] += a[strip + r, k] * b[k, first + c]
            for r in range(rows):
                for c in range(columns):
                    out[strip + r, first + c] = tile[r, c]


@njit(parallel=True)
def parallel_over_terms(out, a, b):
    R, K = a.shape
    O = b.shape[1]
    for r in range(R):
        for o in range(O):
            out[r, o] = 0
    for k in prange(K):
        for r in range(R):
            for o in range(O):
                out[r, o] += a[r, k] * b[k, o]


@njit(parallel=True)
def accumulates_into_garbage(out, a, b):
    R, K = a.shape
    O = b.shape[1]
    for strip in prange((R + MR - 1) // MR):
        tile = np.empty((MR, NR), np.float32)
        for first in range(0, O, NR):
            rows, columns = min(MR, R - strip * MR), min(NR, O - first)
            tile[:] = 0
            for k in range(K):
                for r in range(rows):
                    for c in range(columns):
                        tile[r, c] += a[strip * MR + r, k] * b[k, first + c]
            for r in range(rows):
                for c in range(columns):
                    out[strip * MR + r, first + c] += tile[r, c]


@njit(parallel=True)
def indices_swapped(out, a, b):
    R, K = a.shape
    O = b.shape[1]
    for strip in prange((R + MR - 1) // MR):
        tile = np.empty((MR, NR), np.float32)
        for first in range(0, O, NR):
            rows, columns = min(MR, R - strip * MR), min(NR, O - first)
            tile[:] = 0
            for k in range(K):
                for r in range(rows):
                    for c in range(columns):
                        tile[r, c] += a[strip * MR + r, k] * b[first + c, k]
            for r in range(rows):
                for c in range(columns):
                    out[strip * MR + r, first + c] = tile[r, c]


WRONG = (
    (cleared_once, ["R=3, K=17, O=7: out[0, 4] is", "9 of 21 elements are wrong"]),
    (beyond_the_right_edge, ["iteration 0 of prange reads b[0, 7], which is out of bounds", "must be 0 to 6"]),
    (beyond_the_lower_edge, ["iteration 1 of prange reads a[3, 0], which is out of bounds", "must be 0 to 2"]),
    (
        whole_strips_only,
        ["out[2, 0] is never written", "7 of 21 elements are wrong, all of them in out[2, :]"],
    ),
    (
        strips_overlap,
        ["a race: iteration 0 of prange writes out[1, 0] and iteration 1", "each element must have one owner"],
    ),
    (parallel_over_terms, ["a race", "out[0, 0]", "iteration 1 of prange"]),
    (accumulates_into_garbage, ["out[0, 0] is nan", "all elements of out are wrong"]),
    (indices_swapped, ["reads b[0, 7], which is out of bounds", "the index of axis 1 must be 0 to 6"]),
)
