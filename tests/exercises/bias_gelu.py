"""The solution, and wrong answers with the phrases that `check` must print for each."""

import math

from numba import cuda

from llm_numba.cuda.jit import float32

ONE, SCALE, CUBIC = float32(1), float32(-2 * math.sqrt(2 / math.pi)), float32(0.044715)


@cuda.jit(device=True)
def gelu(x):
    return x / (ONE + math.exp(SCALE * (x + CUBIC * x * x * x)))


@cuda.jit
def solution(out, inp, bias):
    n, C = inp.shape[0], bias.shape[0]
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):
        out[i] = gelu(inp[i] + bias[i % C])


@cuda.jit
def one_element_each(out, inp, bias):
    i = cuda.grid(1)
    if i < inp.shape[0]:
        out[i] = gelu(inp[i] + bias[i % bias.shape[0]])


@cuda.jit
def no_bound(out, inp, bias):
    i = cuda.grid(1)
    out[i] = gelu(inp[i] + bias[i % bias.shape[0]])


@cuda.jit
def stride_of_a_block(out, inp, bias):
    for i in range(cuda.grid(1), inp.shape[0], cuda.blockDim.x):
        out[i] = gelu(inp[i] + bias[i % bias.shape[0]])


@cuda.jit
def every_block_does_all(out, inp, bias):
    for i in range(cuda.threadIdx.x, inp.shape[0], cuda.blockDim.x):
        out[i] = gelu(inp[i] + bias[i % bias.shape[0]])


@cuda.jit
def bias_of_the_row(out, inp, bias):
    for i in range(cuda.grid(1), inp.shape[0], cuda.gridsize(1)):
        out[i] = gelu(inp[i] + bias[i // bias.shape[0]])


@cuda.jit
def bias_afterwards(out, inp, bias):
    for i in range(cuda.grid(1), inp.shape[0], cuda.gridsize(1)):
        out[i] = gelu(inp[i]) + bias[i % bias.shape[0]]


@cuda.jit
def sum_in_memory(out, inp, bias):
    for i in range(cuda.grid(1), inp.shape[0], cuda.gridsize(1)):
        inp[i] += bias[i % bias.shape[0]]
        out[i] = gelu(inp[i])


WRONG = (
    (one_element_each, ["R=97, C=3: out[21, 1] is never written", "227 of 291 elements are wrong"]),
    (no_bound, ["R=1, C=1: thread 1 of block 0 reads inp[1], which is out of bounds", "must be 0 to 0"]),
    (stride_of_a_block, ["a race: thread 0 of block 0 writes out[32]", "thread 0 of block 1 writes it", "any order"]),
    (
        every_block_does_all,
        ["R=1, C=1: a race", "thread 0 of block 1 writes it", "does not synchronise"],
    ),
    (bias_of_the_row, ["R=97, C=3: thread 0 of block 0 reads bias[21], which is out of bounds"]),
    (bias_afterwards, ["R=1, C=1: out[0, 0] is", "but should be"]),
    (sum_in_memory, ["it changes its input inp, at inp[0, 0]"]),
)
