"""The encoder: token embedding plus position embedding.

The backward adds up the rows of dout that belong to the same token, always in the same order and without atomics. It
first sorts the positions (b, t) by their token, in passes over a few bits (a radix sort): then the rows of a token are
neighbours in that list. The list is cut into equal pieces, each added up by one warp, so a token that occurs everywhere
is no slower than many that occur once.

    tokens     5 2 5 5 2 7 5 2         in the order of (b, t)
    keys       2 2 2 | 5 5 5 | 5 7     sorted, in pieces of 3
    positions  1 4 7 | 0 2 3 | 6 5     each token's positions stay in order

A run is all of a piece with the same token. A run that begins in its piece goes to dwte; one that goes on from the
piece before (the 5 in the last piece) goes to `heads`, and a last kernel adds those.
"""

import functools
import math

from numba import cuda

from llm_numba.cuda.jit import (
    block_scan,
    block_sum,
    blocks_for,
    device,
    float32,
    int32,
    kernel,
    sized,
    stream,
    uint32,
)
from llm_numba.cuda.overlap import let_next_start, overlapping, wait_for_previous
from llm_numba.cuda.vectors import load_vector, store_vector, vector_size

ZERO = float32(0)
TOKENS = sized(8, 2)  # rows of a block of the forward
DIGIT = sized(6, 3)  # bits that a pass sorts by: then all blocks of sort_kernel run at once on most GPUs
SORT_BLOCK, SORT_EACH = sized(1024, 4), sized(8, 2)  # threads, and adjacent keys of each
PIECE = sized(32, 3)  # positions
LANES = sized(32, 2)  # threads of a row, each with a vector
ROWS, HEADS = sized(4, 2), sized(16, 2)  # rows of dout and of heads that a thread loads at once


@functools.cache
def forward_kernel(size: int, at: bool):
    """The kernel of `encoder_forward`, or of `encoder_forward_at` if `at`, for vectors of `size` channels."""

    @kernel
    def encoder_forward_kernel(out, tokens, wte, wpe, T, position):
        """out (n, C) = wte (Vp, C)[tokens (n,)] + wpe (at least T, C)[t], or [position[0] + t] if `at`; a token below
        0 counts as 0.

        Grid: (T / TOKENS, C / (LANES * size), B); block: (LANES, TOKENS); a thread owns a vector of a row.
        Moves: 2*n*C + T*C elements.
        """
        t = uint32(cuda.blockIdx.x) * TOKENS + uint32(cuda.threadIdx.y)
        c = (uint32(cuda.blockIdx.y) * LANES + uint32(cuda.threadIdx.x)) * size
        row = uint32(cuda.blockIdx.z) * T + t
        sums = cuda.local.array(size, float32)
        added = cuda.local.array(size, float32)
        let_next_start()
        wait_for_previous()
        if t < T and c < out.shape[1]:
            load_vector(sums, 0, wte, max(tokens[row], 0), c, size)
            load_vector(added, 0, wpe, t + position[0] if at else t, c, size)
            for k in range(size):
                sums[k] += added[k]
            store_vector(out, row, c, sums, 0, size)

    return encoder_forward_kernel


@device
def digit_of(key, shift):
    """DIGIT bits of the key, `shift` and up, in 32-bit arithmetic."""
    return uint32(uint32(uint32(key) >> uint32(shift)) & uint32((1 << DIGIT) - 1))


@functools.cache
def sort_kernel(size: int):
    """The kernel of a pass of the sort, for vectors of `size` keys."""

    @kernel
    def sort_digits_kernel(sorted_keys, sorted_positions, keys, positions, shift, first):
        """sorted_keys, sorted_positions (n,) <- keys (1, n), positions (n,), sorted by DIGIT bits of the keys, `shift`
        and up; equal digits keep their order. If `first`, the positions are 0, 1, 2, ...

        Grid: 2**DIGIT; block: SORT_BLOCK; a block owns a digit: it counts the smaller digits, which come before its
        own, then appends its keys. A thread owns SORT_EACH adjacent keys at a time.
        Moves: 2**(DIGIT + 1) * n keys, from cache.
        """
        digit, n = uint32(cuda.blockIdx.x), uint32(keys.shape[1])
        own = uint32(cuda.threadIdx.x) * SORT_EACH
        shared = cuda.shared.array(SORT_BLOCK, int32)
        found = cuda.local.array(SORT_EACH, int32)
        smaller = int32(0)
        for start in range(own, n, SORT_BLOCK * SORT_EACH):
            for k in range(0, SORT_EACH, size):
                if start + k < n:
                    load_vector(found, k, keys, 0, start + k, size)
                    for j in range(k, k + size):
                        smaller = int32(smaller + (digit_of(found[j], shift) < digit))
        end = block_sum(smaller, shared)

        for start in range(0, n, SORT_BLOCK * SORT_EACH):
            count = int32(0)
            for k in range(0, SORT_EACH, size):
                if start + own + k < n:
                    load_vector(found, k, keys, 0, start + own + k, size)
                    for j in range(k, k + size):
                        count = int32(count + (digit_of(found[j], shift) == digit))
            before, total = block_scan(count, shared)
            if count > 0:
                place = uint32(end + before)
                for k in range(SORT_EACH):
                    i = uint32(start + own + k)
                    if i < n and digit_of(found[k], shift) == digit:
                        sorted_keys[place] = found[k]
                        sorted_positions[place] = i if first else positions[i]
                        place = uint32(place + 1)
            end = int32(end + total)

    return sort_digits_kernel


@functools.cache
def dwte_kernel(size: int):
    """The kernel that adds the rows of a piece, for vectors of `size` channels."""
    loaded = ROWS * size

    @kernel
    def add_rows_kernel(dwte, heads, dout, keys, positions):
        """dwte (Vp, C), heads (pieces, C) <- dout (n, C), keys and positions (n,) sorted by key.

        For each run of a piece: dwte[key] += its rows of dout, but heads[piece] = the rows of a run that began earlier.
        Grid: (n / PIECE, C / (LANES * size)); block: LANES; a thread owns a vector of channels.
        Moves: n*C elements; 2*C floats for each run.
        """
        piece, C, n = cuda.blockIdx.x, dout.shape[1], dout.shape[0]
        c = (uint32(cuda.blockIdx.y) * LANES + uint32(cuda.threadIdx.x)) * size
        start, end = piece * PIECE, min(piece * PIECE + PIECE, n)
        x = cuda.local.array(loaded, float32)
        before = cuda.local.array(loaded, float32)  # of dwte
        sums = cuda.local.array(size, float32)
        ends = cuda.local.array(ROWS, int32)
        if c >= C:
            return
        for k in range(size):
            sums[k] = ZERO
        earlier = keys[start - 1] if piece > 0 else -1
        for i in range(start, end, ROWS):
            # load ROWS rows, and the rows of dwte for those that end a run
            for j in range(ROWS):
                row = min(i + j, end - 1)
                ends[j] = i + j == end - 1 or keys[row] != keys[min(row + 1, n - 1)]
                load_vector(x, j * size, dout, positions[row], c, size)
                if ends[j] and keys[row] != earlier:
                    load_vector(before, j * size, dwte, keys[row], c, size)
            for j in range(ROWS):
                if i + j < end:
                    for k in range(size):
                        sums[k] += x[j * size + k]
                    if ends[j]:
                        if keys[i + j] == earlier:
                            store_vector(heads, piece, c, sums, 0, size)
                        else:
                            for k in range(size):
                                sums[k] += before[j * size + k]
                            store_vector(dwte, keys[i + j], c, sums, 0, size)
                        for k in range(size):
                            sums[k] = ZERO

    return add_rows_kernel


@functools.cache
def heads_kernel(size: int):
    """The kernel that adds what `dwte_kernel` has left in heads, for vectors of `size` channels."""
    loaded = HEADS * size

    @kernel
    def add_heads_kernel(dwte, heads, keys):
        """dwte (Vp, C)[key] += the rows of heads (pieces, C) with this key.

        Grid: (pieces, C / (LANES * size)); block: LANES; the block of a key's first head adds all of them, in order.
        Moves: C floats for each head, and 2*C for each key with heads.
        """
        piece, pieces, C = cuda.blockIdx.x, heads.shape[0], heads.shape[1]
        c = (uint32(cuda.blockIdx.y) * LANES + uint32(cuda.threadIdx.x)) * size
        key = keys[piece * PIECE]
        if c >= C or piece == 0 or keys[piece * PIECE - 1] != key:
            return  # no head
        if piece > 1 and keys[(piece - 1) * PIECE - 1] == key:
            return  # not the first
        x = cuda.local.array(loaded, float32)
        sums = cuda.local.array(size, float32)
        load_vector(sums, 0, dwte, key, c, size)
        for i in range(piece, pieces, HEADS):
            for j in range(HEADS):
                load_vector(x, j * size, heads, min(i + j, pieces - 1), c, size)
            for j in range(HEADS):
                if i + j < pieces and keys[min(i + j, pieces - 1) * PIECE] == key:
                    for k in range(size):
                        sums[k] += x[j * size + k]
            if keys[min(i + HEADS, pieces - 1) * PIECE] != key:
                break
        store_vector(dwte, key, c, sums, 0, size)

    return add_heads_kernel


@functools.cache
def dwpe_kernel(size: int):
    """The kernel of dwpe, for vectors of `size` channels."""
    loaded = ROWS * size

    @kernel
    def add_positions_kernel(dwpe, dout):
        """dwpe (at least T, C) += the sum over b of dout (B*T, C).

        Grid: (T, C / (LANES * size)); block: LANES; a thread owns a vector of channels of a position, and adds its rows
        in the order of b. Moves: B*T*C elements and 2*T*C floats.
        """
        t, T, n, C = cuda.blockIdx.x, cuda.gridDim.x, dout.shape[0], dout.shape[1]
        c = (uint32(cuda.blockIdx.y) * LANES + uint32(cuda.threadIdx.x)) * size
        x = cuda.local.array(loaded, float32)
        sums = cuda.local.array(size, float32)
        if c >= C:
            return
        load_vector(sums, 0, dwpe, t, c, size)
        for row in range(t, n, ROWS * T):
            for j in range(ROWS):
                load_vector(x, j * size, dout, min(row + j * T, n - T + t), c, size)
            for j in range(ROWS):
                if row + j * T < n:
                    for k in range(size):
                        sums[k] += x[j * size + k]
        store_vector(dwpe, t, c, sums, 0, size)

    return add_positions_kernel


def encoder_forward(out, tokens, wte, wpe):
    """Look up the embedding of each token and add the embedding of its position.

    out (B, T, C) <- tokens (B, T) int32, wte (Vp, C), wpe (at least T, C)
    Writes:   out[b, t] = wte[tokens[b, t]] + wpe[t]
    Parallel: over the elements of out; nothing races
    Moves:    2*B*T*C + T*C elements
    Expects:  0 <= tokens < Vp, unchecked
    Source:   Radford et al. 2019, GPT-2
    """
    launch_forward(out, tokens, wte, wpe, tokens.reshape(-1), False)  # an array instead of the position


def encoder_forward_at(out, tokens, wte, wpe, position):
    """The same for tokens in the middle of a sequence.

    out (B, T, C) <- tokens (B, T) int32, wte (Vp, C), wpe (at least position + T, C), position (1,) int32
    Writes:   out[b, t] = wte[tokens[b, t]] + wpe[position + t]; a token below 0 counts as 0
    Parallel: over the elements of out; nothing races
    Expects:  tokens < Vp, unchecked
    """
    launch_forward(out, tokens, wte, wpe, position, True)


def launch_forward(out, tokens, wte, wpe, position, at):
    B, T, C = out.shape
    size = vector_size(C)
    grid = blocks_for(T, TOKENS), blocks_for(C, LANES * size), B
    launch = overlapping(forward_kernel(size, at), grid, (LANES, TOKENS))
    launch(out.reshape(B * T, C), tokens.reshape(B * T), wte, wpe, T, position)


def encoder_backward(dwte, dwpe, dout, tokens, scratch):
    """Add each row of dout to the gradients of its token embedding and of its position embedding.

    dwte (Vp, C), dwpe (at least T, C) float32 <- dout (B, T, C), tokens (B, T) int32
    Writes:   dwte[tokens[b, t]] += dout[b, t], dwpe[t] += dout[b, t]
    Scratch:  encoder_backward_scratch
    Parallel: over the digits of the sort, over pieces of the sorted positions, and over the positions t. The rows of
              a token are added in the order of (b, t), in pieces that depend on the tokens alone, so nothing races and
              the order of each sum is fixed
    Moves:    2*B*T*C elements, 2*T*C floats, and 2*C floats per distinct token
    Expects:  0 <= tokens < Vp, unchecked
    """
    (_, T, C), n = dout.shape, tokens.size
    dout, size, pieces = dout.reshape(n, C), vector_size(C), blocks_for(n, PIECE)
    lists, rest = scratch[: 4 * n].view(int32), scratch[4 * n :]
    lists, heads = [lists[i * n : (i + 1) * n] for i in range(4)], rest[: pieces * C].reshape(pieces, C)
    keys, positions = tokens.reshape(n), lists[1]
    for i in range(passes_of(dwte.shape[0])):
        to = lists[:2] if i % 2 == 0 else lists[2:]
        launch = sort_kernel(math.gcd(n, SORT_EACH))[1 << DIGIT, SORT_BLOCK, stream()]
        launch(*to, keys.reshape(1, n), positions, i * DIGIT, i == 0)
        keys, positions = to
    columns = blocks_for(C, LANES * size)
    dwte_kernel(size)[(pieces, columns), LANES, stream()](dwte, heads, dout, keys, positions)
    heads_kernel(size)[(pieces, columns), LANES, stream()](dwte, heads, keys)
    dwpe_kernel(size)[(T, columns), LANES, stream()](dwpe, dout)


def encoder_backward_scratch(dwte, dwpe, dout, tokens) -> int:
    """Floats of scratch that `encoder_backward` needs: two lists of keys and positions, and the heads."""
    n, C = math.prod(tokens.shape), dout.shape[-1]
    return 4 * n + blocks_for(n, PIECE) * C


def passes_of(Vp: int) -> int:
    """The passes of the sort: enough for every bit of a token."""
    return max(1, blocks_for((Vp - 1).bit_length(), DIGIT))
