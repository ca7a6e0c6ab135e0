"""The solution of the exercise, and wrong answers with what `check` has to say of each."""

from numba import cuda

from llm_numba.cuda.jit import float32


@cuda.jit
def solution(shares, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    zero = float32(0)
    for s in range(8):
        row = 16 * i + g + s // 2 % 2 * 8
        column = 16 * j + 2 * q + s // 4 * 8 + s % 2
        shares[i, j, lane, s] = a[row, column] if row < a.shape[0] and column < a.shape[1] else zero


@cuda.jit
def right_before_below(shares, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    for s in range(8):
        row = 16 * i + g + s // 4 * 8
        column = 16 * j + 2 * q + s // 2 % 2 * 8 + s % 2
        shares[i, j, lane, s] = a[row, column] if row < a.shape[0] and column < a.shape[1] else float32(0)


@cuda.jit
def beyond_the_edge(shares, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    for s in range(8):
        shares[i, j, lane, s] = a[16 * i + g + s // 2 % 2 * 8, 16 * j + 2 * q + s // 4 * 8 + s % 2]


@cuda.jit
def nothing_at_the_edge(shares, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    for s in range(8):
        row = 16 * i + g + s // 2 % 2 * 8
        column = 16 * j + 2 * q + s // 4 * 8 + s % 2
        if row < a.shape[0] and column < a.shape[1]:
            shares[i, j, lane, s] = a[row, column]


@cuda.jit
def always_the_first_piece(shares, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    for s in range(8):
        row = g + s // 2 % 2 * 8
        column = 2 * q + s // 4 * 8 + s % 2
        shares[i, j, lane, s] = a[row, column] if row < a.shape[0] and column < a.shape[1] else float32(0)


@cuda.jit
def columns_apart(shares, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    for s in range(8):
        row = 16 * i + g + s // 2 % 2 * 8
        column = 16 * j + q + s // 4 * 8 + s % 2 * 4
        shares[i, j, lane, s] = a[row, column] if row < a.shape[0] and column < a.shape[1] else float32(0)


@cuda.jit
def all_in_one_place(shares, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    for s in range(8):
        row = 16 * i + g + s // 2 % 2 * 8
        column = 16 * j + 2 * q + s // 4 * 8 + s % 2
        shares[i, j, g, s] = a[row, column] if row < a.shape[0] and column < a.shape[1] else float32(0)


@cuda.jit
def one_too_many(shares, a):
    lane = cuda.threadIdx.x
    i, j = cuda.blockIdx.x, cuda.blockIdx.y
    g, q = lane // 4, lane % 4
    for s in range(9):
        row = 16 * i + g + s // 2 % 2 * 8
        column = 16 * j + 2 * q + s // 4 * 8 + s % 2
        shares[i, j, lane, s] = a[row, column] if row < a.shape[0] and column < a.shape[1] else float32(0)


WRONG = (
    (right_before_below, ["M=16, K=16: shares[0, 0, 0, 2] is", "128 of 256 elements are wrong"]),
    (beyond_the_edge, ["M=1, K=1: thread 0 of block 0 reads a[0, 1], which is out of bounds", "the index of axis 1"]),
    (nothing_at_the_edge, ["M=1, K=1: nothing is ever written to shares[0, 0, 0, 1], which should be 0"]),
    (always_the_first_piece, ["M=3, K=97: shares[0, 1, 0, 0] is"]),
    (columns_apart, ["M=16, K=16: shares[0, 0, 0, 1] is"]),
    (all_in_one_place, ["a race", "shares[0, 0, 0, 0]", "thread 1", "shares[i, j, g, s]"]),
    (one_too_many, ["writes shares[0, 0, 0, 8], which is out of bounds", "axis 3 must be 0 to 7"]),
)
