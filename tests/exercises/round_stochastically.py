"""The solution, and wrong answers with the phrases that `check` must print for each."""

import math

from numba import cuda

from llm_numba.cuda.jit import float32, uint32


@cuda.jit
def solution(out, inp, random):
    i = cuda.grid(1)
    if i < inp.shape[0]:
        value = inp[i]
        if not math.isnan(value):
            bits = uint32(value.view(uint32) + random[i]) & uint32(0xFFFF0000)
            value = uint32(bits).view(float32)
        out[i] = value


@cuda.jit
def truncates(out, inp, random):
    i = cuda.grid(1)
    if i < inp.shape[0]:
        out[i] = uint32(inp[i].view(uint32) & uint32(0xFFFF0000)).view(float32)


@cuda.jit
def rounds_to_nearest(out, inp, random):
    i = cuda.grid(1)
    if i < inp.shape[0]:
        value = inp[i]
        if not math.isnan(value):
            bits = uint32(value.view(uint32) + uint32(0x8000)) & uint32(0xFFFF0000)
            value = uint32(bits).view(float32)
        out[i] = value


@cuda.jit
def keeps_the_lower_half(out, inp, random):
    i = cuda.grid(1)
    if i < inp.shape[0]:
        out[i] = uint32(inp[i].view(uint32) + random[i]).view(float32)


@cuda.jit
def one_random_number_for_all(out, inp, random):
    i = cuda.grid(1)
    if i < inp.shape[0]:
        bits = uint32(inp[i].view(uint32) + random[0]) & uint32(0xFFFF0000)
        out[i] = uint32(bits).view(float32)


@cuda.jit
def towards_minus_infinity(out, inp, random):
    i = cuda.grid(1)
    if i < inp.shape[0]:
        value = inp[i]
        if value < float32(0):
            bits = uint32(value.view(uint32) + (uint32(0xFFFF) - random[i])) & uint32(0xFFFF0000)
        else:
            bits = uint32(value.view(uint32) + random[i]) & uint32(0xFFFF0000)
        out[i] = uint32(bits).view(float32)


@cuda.jit
def turns_nan_into_a_number(out, inp, random):
    i = cuda.grid(1)
    if i < inp.shape[0]:
        bits = uint32(inp[i].view(uint32) + random[i]) & uint32(0xFFFF0000)
        out[i] = uint32(bits).view(float32)


@cuda.jit
def no_bound(out, inp, random):
    i = cuda.grid(1)
    bits = uint32(inp[i].view(uint32) + random[i]) & uint32(0xFFFF0000)
    out[i] = uint32(bits).view(float32)


@cuda.jit
def writes_inp(out, inp, random):
    i = cuda.grid(1)
    if i < inp.shape[0]:
        inp[i] = uint32(uint32(inp[i].view(uint32) + random[i]) & uint32(0xFFFF0000)).view(float32)
        out[i] = inp[i]


WRONG = (
    (truncates, ["n=3: out[1] is 1.25781, but should be 1.26562; 1 of 3 elements are wrong"]),
    (rounds_to_nearest, ["n=97: out[", "of 97 elements are wrong"]),
    (keeps_the_lower_half, ["n=1: out[0] is -0.296262, but should be -0.294922"]),
    (one_random_number_for_all, ["n=3: out[1] is 1.25781, but should be 1.26562"]),
    (towards_minus_infinity, ["n=3: out[0] is -0.296875, but should be -0.294922"]),
    (turns_nan_into_a_number, ["n=97: out[4] is -0, but should be nan"]),
    (no_bound, ["n=1: thread 1 of block 0 reads inp[1], which is out of bounds"]),
    (writes_inp, ["it changes its input inp, at inp[0]"]),
)
