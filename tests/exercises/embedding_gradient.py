"""The solution, and wrong answers with the phrases that `check` must print for each."""

from numba import njit, prange

BLOCK = 4


@njit(parallel=True)
def solution(dwte, dout, tokens):
    n, C = dout.shape
    for block in prange((C + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, min(block * BLOCK + BLOCK, C)
        for i in range(n):
            for c in range(first, last):
                dwte[tokens[i], c] += dout[i, c]


@njit(parallel=True)
def parallel_over_rows(dwte, dout, tokens):
    n, C = dout.shape
    for i in prange(n):
        for c in range(C):
            dwte[tokens[i], c] += dout[i, c]


@njit(parallel=True)
def blocks_overlap(dwte, dout, tokens):
    n, C = dout.shape
    for block in prange((C + BLOCK - 1) // BLOCK):
        for i in range(n):
            for c in range(block * BLOCK, min(block * BLOCK + BLOCK + 1, C)):
                dwte[tokens[i], c] += dout[i, c]


@njit(parallel=True)
def beyond_the_channels(dwte, dout, tokens):
    n, C = dout.shape
    for block in prange((C + BLOCK - 1) // BLOCK):
        for i in range(n):
            for c in range(block * BLOCK, block * BLOCK + BLOCK):
                dwte[tokens[i], c] += dout[i, c]


@njit(parallel=True)
def whole_blocks_only(dwte, dout, tokens):
    n, C = dout.shape
    for block in prange(C // BLOCK):
        for i in range(n):
            for c in range(block * BLOCK, block * BLOCK + BLOCK):
                dwte[tokens[i], c] += dout[i, c]


@njit(parallel=True)
def keeps_the_last_row(dwte, dout, tokens):
    n, C = dout.shape
    for block in prange((C + BLOCK - 1) // BLOCK):
        for i in range(n):
            for c in range(block * BLOCK, min(block * BLOCK + BLOCK, C)):
                dwte[tokens[i], c] = dout[i, c]


@njit(parallel=True)
def forgets_the_tokens(dwte, dout, tokens):
    n, C = dout.shape
    for block in prange((C + BLOCK - 1) // BLOCK):
        for i in range(n):
            for c in range(block * BLOCK, min(block * BLOCK + BLOCK, C)):
                dwte[i, c] += dout[i, c]


@njit(parallel=True)
def clears_dwte_first(dwte, dout, tokens):
    n, C = dout.shape
    for block in prange((C + BLOCK - 1) // BLOCK):
        for c in range(block * BLOCK, min(block * BLOCK + BLOCK, C)):
            for token in range(dwte.shape[0]):
                dwte[token, c] = 0
            for i in range(n):
                dwte[tokens[i], c] += dout[i, c]


WRONG = (
    (parallel_over_rows, ["a race: iteration", "of prange writes dwte[", "each element must have one owner"]),
    (blocks_overlap, ["a race: iteration 0 of prange writes dwte[", ", 4] and iteration 1 of prange"]),
    (beyond_the_channels, ["iteration 2 of prange reads", ", 10], which is out of bounds", "must be 0 to 9"]),
    (whole_blocks_only, ["n=7, C=10, V=3: dwte[", ", 8] is"]),
    (keeps_the_last_row, ["n=7, C=10, V=3: dwte[0, 0] is", "all elements of dwte are wrong"]),
    (forgets_the_tokens, ["dwte[3, 0], which is out of bounds", "the index of axis 0 must be 0 to 2"]),
    (clears_dwte_first, ["n=7, C=10, V=3: dwte[0, 0] is", "all elements of dwte are wrong"]),
)
