"""The solution, and wrong answers with the phrases that `check` must print for each."""

import math

import numpy as np
from numba import njit, prange

HALF, ONE, THREE = np.float32(0.5), np.float32(1), np.float32(3)
SCALE, CUBIC = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)


@njit(parallel=True)
def solution(dinp, inp, dout):
    R, C = inp.shape
    for row in prange(R):
        for c in range(C):
            x = inp[row, c]
            t = math.tanh(SCALE * (x + CUBIC * x * x * x))
            slope = SCALE * (ONE + THREE * CUBIC * x * x)
            dinp[row, c] = dout[row, c] * (HALF * (ONE + t) + HALF * x * (ONE - t * t) * slope)


@njit(parallel=True)
def adds_to_garbage(dinp, inp, dout):
    R, C = inp.shape
    for row in prange(R):
        for c in range(C):
            x = inp[row, c]
            t = math.tanh(SCALE * (x + CUBIC * x * x * x))
            slope = SCALE * (ONE + THREE * CUBIC * x * x)
            dinp[row, c] += dout[row, c] * (HALF * (ONE + t) + HALF * x * (ONE - t * t) * slope)


@njit(parallel=True)
def forgets_dout(dinp, inp, dout):
    R, C = inp.shape
    for row in prange(R):
        for c in range(C):
            x = inp[row, c]
            t = math.tanh(SCALE * (x + CUBIC * x * x * x))
            slope = SCALE * (ONE + THREE * CUBIC * x * x)
            dinp[row, c] = HALF * (ONE + t) + HALF * x * (ONE - t * t) * slope


@njit(parallel=True)
def forgets_that_u_depends_on_x(dinp, inp, dout):
    R, C = inp.shape
    for row in prange(R):
        for c in range(C):
            x = inp[row, c]
            t = math.tanh(SCALE * (x + CUBIC * x * x * x))
            dinp[row, c] = dout[row, c] * HALF * (ONE + t)


@njit(parallel=True)
def starts_at_one(dinp, inp, dout):
    R, C = inp.shape
    for row in prange(R):
        for c in range(1, C + 1):
            x = inp[row, c]
            t = math.tanh(SCALE * (x + CUBIC * x * x * x))
            slope = SCALE * (ONE + THREE * CUBIC * x * x)
            dinp[row, c] = dout[row, c] * (HALF * (ONE + t) + HALF * x * (ONE - t * t) * slope)


@njit(parallel=True)
def every_core_every_row(dinp, inp, dout):
    R, C = inp.shape
    for _ in prange(R):
        for row in range(R):
            for c in range(C):
                x = inp[row, c]
                t = math.tanh(SCALE * (x + CUBIC * x * x * x))
                slope = SCALE * (ONE + THREE * CUBIC * x * x)
                dinp[row, c] = dout[row, c] * (HALF * (ONE + t) + HALF * x * (ONE - t * t) * slope)


@njit(parallel=True)
def keeps_tanh_in_inp(dinp, inp, dout):
    R, C = inp.shape
    for row in prange(R):
        for c in range(C):
            x = inp[row, c]
            inp[row, c] = math.tanh(SCALE * (x + CUBIC * x * x * x))
            slope = SCALE * (ONE + THREE * CUBIC * x * x)
            dinp[row, c] = dout[row, c] * (HALF * (ONE + inp[row, c]) + HALF * x * (ONE - inp[row, c] ** 2) * slope)


@njit(parallel=True)
def all_but_the_last_element(dinp, inp, dout):
    R, C = inp.shape
    for row in prange(R):
        for c in range(max(C - 1, 1)):
            x = inp[row, c]
            t = math.tanh(SCALE * (x + CUBIC * x * x * x))
            slope = SCALE * (ONE + THREE * CUBIC * x * x)
            dinp[row, c] = dout[row, c] * (HALF * (ONE + t) + HALF * x * (ONE - t * t) * slope)


WRONG = (
    (adds_to_garbage, ["R=1, C=1: dinp[0, 0] is nan, but should be"]),
    (forgets_dout, ["R=1, C=1: dinp[0, 0] is", "it is the only element of dinp"]),
    (forgets_that_u_depends_on_x, ["dinp[0, 0] is", "but should be"]),
    (starts_at_one, ["iteration 0 of prange reads inp[0, 1], which is out of bounds", "axis 1 must be 0 to 0"]),
    (every_core_every_row, ["R=3, C=5: a race: iteration 0 of prange writes dinp[0, 0]", "one owner"]),
    (keeps_tanh_in_inp, ["it changes its input inp, at inp[0, 0]"]),
    (
        all_but_the_last_element,
        ["R=3, C=5: dinp[0, 4] is never written", "3 of 15 elements are wrong, all of them in dinp[:, 4]"],
    ),
)
