"""The solution, and wrong answers with the phrases that `check` must print for each."""

import math

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import float32

THREADS = 32
NEG_INF = float32(-np.inf)


@cuda.jit(device=True)
def pair_of_thread(inp, row):
    top, total = NEG_INF, float32(0)
    for c in range(cuda.threadIdx.x, inp.shape[1], THREADS):
        before = top
        top = max(top, inp[row, c])
        total = total * math.exp(before - top) + math.exp(inp[row, c] - top)
    return top, total


@cuda.jit
def solution(lse, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(THREADS, float32)
    totals = cuda.shared.array(THREADS, float32)
    tops[thread], totals[thread] = pair_of_thread(inp, row)
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if thread < half and tops[thread + half] > NEG_INF:
            top = max(tops[thread], tops[thread + half])
            mine = totals[thread] * math.exp(tops[thread] - top)
            totals[thread] = mine + totals[thread + half] * math.exp(tops[thread + half] - top)
            tops[thread] = top
        cuda.syncthreads()
        half //= 2
    if thread == 0:
        lse[row] = tops[0] + math.log(totals[0])


@cuda.jit
def no_barrier(lse, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(THREADS, float32)
    totals = cuda.shared.array(THREADS, float32)
    tops[thread], totals[thread] = pair_of_thread(inp, row)
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if thread < half and tops[thread + half] > NEG_INF:
            top = max(tops[thread], tops[thread + half])
            mine = totals[thread] * math.exp(tops[thread] - top)
            totals[thread] = mine + totals[thread + half] * math.exp(tops[thread + half] - top)
            tops[thread] = top
        half //= 2
    if thread == 0:
        lse[row] = tops[0] + math.log(totals[0])


@cuda.jit
def not_rescaled(lse, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(THREADS, float32)
    totals = cuda.shared.array(THREADS, float32)
    tops[thread], totals[thread] = pair_of_thread(inp, row)
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if thread < half:
            totals[thread] += totals[thread + half]
            tops[thread] = max(tops[thread], tops[thread + half])
        cuda.syncthreads()
        half //= 2
    if thread == 0:
        lse[row] = tops[0] + math.log(totals[0])


@cuda.jit
def inf_minus_inf(lse, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(THREADS, float32)
    totals = cuda.shared.array(THREADS, float32)
    tops[thread], totals[thread] = pair_of_thread(inp, row)
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if thread < half:
            top = max(tops[thread], tops[thread + half])
            mine = totals[thread] * math.exp(tops[thread] - top)
            totals[thread] = mine + totals[thread + half] * math.exp(tops[thread + half] - top)
            tops[thread] = top
        cuda.syncthreads()
        half //= 2
    if thread == 0:
        lse[row] = tops[0] + math.log(totals[0])


@cuda.jit
def one_round_short(lse, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(THREADS, float32)
    totals = cuda.shared.array(THREADS, float32)
    tops[thread], totals[thread] = pair_of_thread(inp, row)
    cuda.syncthreads()
    half = THREADS // 2
    while half > 1:
        if thread < half and tops[thread + half] > NEG_INF:
            top = max(tops[thread], tops[thread + half])
            mine = totals[thread] * math.exp(tops[thread] - top)
            totals[thread] = mine + totals[thread + half] * math.exp(tops[thread + half] - top)
            tops[thread] = top
        cuda.syncthreads()
        half //= 2
    if thread == 0:
        lse[row] = tops[0] + math.log(totals[0])


@cuda.jit
def beyond_the_block(lse, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(THREADS, float32)
    totals = cuda.shared.array(THREADS, float32)
    tops[thread], totals[thread] = pair_of_thread(inp, row)
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if tops[thread + half] > NEG_INF:
            totals[thread] += totals[thread + half]
        cuda.syncthreads()
        half //= 2
    if thread == 0:
        lse[row] = tops[0] + math.log(totals[0])


@cuda.jit
def all_write(lse, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(THREADS, float32)
    totals = cuda.shared.array(THREADS, float32)
    tops[thread], totals[thread] = pair_of_thread(inp, row)
    cuda.syncthreads()
    top, total = tops[0], float32(0)
    for i in range(THREADS):
        top = max(top, tops[i])
    for i in range(THREADS):
        total += totals[i] * math.exp(tops[i] - top)
    lse[row] = top + math.log(total)


@cuda.jit
def barrier_for_half(lse, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(THREADS, float32)
    totals = cuda.shared.array(THREADS, float32)
    tops[thread], totals[thread] = pair_of_thread(inp, row)
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if thread < half:
            top = max(tops[thread], tops[thread + half])
            totals[thread] += totals[thread + half] * math.exp(tops[thread + half] - top)
            tops[thread] = top
            cuda.syncthreads()
        half //= 2
    if thread == 0:
        lse[row] = tops[0] + math.log(totals[0])


@cuda.jit
def naive_formula(lse, inp):
    row = cuda.blockIdx.x
    if cuda.threadIdx.x == 0:
        total = float32(0)
        for c in range(inp.shape[1]):
            total += math.exp(inp[row, c])
        lse[row] = math.log(total)


WRONG = (
    (no_barrier, ["a race: thread", "tops[", "no barrier (cuda.syncthreads) separates the two"]),
    (not_rescaled, ["R=2, C=257: lse[0] is", "all elements of lse are wrong"]),
    (inf_minus_inf, ["R=1, C=1: lse[0] is nan, but should be"]),
    (one_round_short, ["R=2, C=257: lse[0] is", "all elements of lse are wrong"]),
    (beyond_the_block, ["thread 16 of block 0 reads tops[32], which is out of bounds", "must be 0 to 31"]),
    (all_write, ["a race", "lse[0]", "thread 1"]),
    (barrier_for_half, ["waits at syncthreads", "every thread of a block must reach every barrier"]),
    (naive_formula, ["R=2, C=257"]),
)
