"""The solution, and wrong answers with the phrases that `check` must print for each."""

from numba import cuda

from llm_numba.cuda.jit import float32


@cuda.jit
def solution(fragments, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    zero = float32(0)
    for s in range(8):
        row = 16 * i + g + s // 2 % 2 * 8
        column = 16 * j + 2 * q + s // 4 * 8 + s % 2
        fragments[i, j, lane, s] = a[row, column] if row < a.shape[0] and column < a.shape[1] else zero


@cuda.jit
def right_before_lower(fragments, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    for s in range(8):
        row = 16 * i + g + s // 4 * 8
        column = 16 * j + 2 * q + s // 2 % 2 * 8 + s % 2
        fragments[i, j, lane, s] = a[row, column] if row < a.shape[0] and column < a.shape[1] else float32(0)


@cuda.jit
def beyond_the_edge(fragments, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    for s in range(8):
        fragments[i, j, lane, s] = a[16 * i + g + s // 2 % 2 * 8, 16 * j + 2 * q + s // 4 * 8 + s % 2]


@cuda.jit
def no_zeros_at_the_edge(fragments, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    for s in range(8):
        row = 16 * i + g + s // 2 % 2 * 8
        column = 16 * j + 2 * q + s // 4 * 8 + s % 2
        if row < a.shape[0] and column < a.shape[1]:
            fragments[i, j, lane, s] = a[row, column]


@cuda.jit
def always_the_first_tile(fragments, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    for s in range(8):
        row = g + s // 2 % 2 * 8
        column = 2 * q + s // 4 * 8 + s % 2
        fragments[i, j, lane, s] = a[row, column] if row < a.shape[0] and column < a.shape[1] else float32(0)


@cuda.jit
def columns_apart(fragments, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    for s in range(8):
        row = 16 * i + g + s // 2 % 2 * 8
        column = 16 * j + q + s // 4 * 8 + s % 2 * 4
        fragments[i, j, lane, s] = a[row, column] if row < a.shape[0] and column < a.shape[1] else float32(0)


@cuda.jit
def threads_share_a_fragment(fragments, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    for s in range(8):
        row = 16 * i + g + s // 2 % 2 * 8
        column = 16 * j + 2 * q + s // 4 * 8 + s % 2
        fragments[i, j, g, s] = a[row, column] if row < a.shape[0] and column < a.shape[1] else float32(0)


@cuda.jit
def one_too_many(fragments, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    for s in range(9):
        row = 16 * i + g + s // 2 % 2 * 8
        column = 16 * j + 2 * q + s // 4 * 8 + s % 2
        fragments[i, j, lane, s] = a[row, column] if row < a.shape[0] and column < a.shape[1] else float32(0)


WRONG = (
    (right_before_lower, ["M=16, K=16: fragments[0, 0, 0, 2] is", "128 of 256 elements are wrong"]),
    (beyond_the_edge, ["M=1, K=1: thread 0 of block 0 reads a[0, 1], which is out of bounds", "the index of axis 1"]),
    (no_zeros_at_the_edge, ["M=1, K=1: fragments[0, 0, 0, 1] is never written, but should be 0"]),
    (always_the_first_tile, ["M=3, K=97: fragments[0, 1, 0, 0] is"]),
    (columns_apart, ["M=16, K=16: fragments[0, 0, 0, 1] is"]),
    (threads_share_a_fragment, ["a race", "fragments[0, 0, 0, 0]", "thread 1", "fragments[i, j, g, s]"]),
    (one_too_many, ["writes fragments[0, 0, 0, 8], which is out of bounds", "axis 3 must be 0 to 7"]),
)
