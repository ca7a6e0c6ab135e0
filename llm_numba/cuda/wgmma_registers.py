"""Softmax and its gradient on the registers that wgmma leaves, and how the results reach shared and global memory.

A warpgroup's float32 sums of a 64 x N tile lie as hopper.py describes: a thread has two rows, its first and the one 8
below, and in each the columns 8 j + 2 q and the next, where q = lane % 4: sums[4 j] and sums[4 j + 1] are in the first
row, the other two in the second. Four adjacent threads share their rows.

The loops here have constant bounds. The compiler unrolls them, so the arrays stay in registers.
"""

import numpy as np

from llm_numba.cuda.hopper import (
    CHUNK,
    add_float4,
    inlined,
    load_float4,
    load_shared_float2,
    opaque,
    pack,
    shuffle_xor,
    stmatrix,
    store_float4,
)
from llm_numba.cuda.jit import exp2, float32, int64, uint32

MASKED = float32(-np.inf)  # the score of a key after its query


@inlined
def first_row(thread):
    """The row of the 64 in which this thread's sums[0] is; the row of sums[2] is 8 below."""
    return (thread >> 5 & 3) * 16 + (thread >> 2 & 7)


@inlined
def first_column(thread):
    """The column of this thread's sums[0]."""
    return (thread & 3) * 2


@inlined
def mask_columns(scores, limit):
    """scores = -inf where column - row > limit, both counted from the thread's first."""
    for i in range(scores.shape[0]):
        if (i >> 2) * 8 + (i & 1) - (i >> 1 & 1) * 8 > limit:
            scores[i] = MASKED


@inlined
def mask_rows(scores, limit):
    """scores = -inf where row - column > limit, both counted from the thread's first."""
    for i in range(scores.shape[0]):
        if (i >> 1 & 1) * 8 - (i >> 2) * 8 - (i & 1) > limit:
            scores[i] = MASKED


@inlined
def row_max(scores, top, low_top):
    """The maximum of top and the first row's scores, of low_top and the second row's; four threads get the same."""
    odd, low_odd = scores[1], scores[3]
    for i in range(0, scores.shape[0], 4):
        top, odd = max(top, scores[i]), max(odd, scores[i + 1])
        low_top, low_odd = max(low_top, scores[i + 2]), max(low_odd, scores[i + 3])
    top, low_top = max(top, odd), max(low_top, low_odd)
    top, low_top = max(top, shuffle_xor(top, 1)), max(low_top, shuffle_xor(low_top, 1))
    return max(top, shuffle_xor(top, 2)), max(low_top, shuffle_xor(low_top, 2))


@inlined
def exp2_rows(scores, factor, shift, low_shift):
    """scores = 2**(scores * factor + the row's shift). Returns the thread's sums of its two rows."""
    for i in range(scores.shape[0]):
        scores[i] = exp2(scores[i] * factor + (low_shift if i & 2 else shift))
    even, odd, low_even, low_odd = scores[0], scores[1], scores[2], scores[3]
    for i in range(4, scores.shape[0], 4):
        even += scores[i]
        odd += scores[i + 1]
        low_even += scores[i + 2]
        low_odd += scores[i + 3]
    return even + odd, low_even + low_odd


@inlined
def load_columns(columns, numbers):
    """A number for each of the thread's columns of a tile, from shared memory.

    numbers: the address of the number of the thread's first column
    """
    for i in range(0, columns.shape[0], 2):
        columns[i], columns[i + 1] = load_shared_float2(numbers + i * 16)


@inlined
def exp2_columns(scores, factor, columns):
    """scores = 2**(scores * factor - the column's number)."""
    for i in range(scores.shape[0]):
        scores[i] = exp2(scores[i] * factor - columns[(i >> 2) * 2 + (i & 1)])


@inlined
def score_gradients(dscores, weights, columns):
    """dscores = weights * (dscores - the column's number)."""
    for i in range(dscores.shape[0]):
        dscores[i] = weights[i] * (dscores[i] - columns[(i >> 2) * 2 + (i & 1)])


@inlined
def scale_rows(sums, factor, low_factor):
    """sums *= the row's factor."""
    for i in range(sums.shape[0]):
        sums[i] *= low_factor if i & 2 else factor


@inlined
def pack_pairs(pairs, sums):
    """pairs = sums in bf16: the tile as the first operand of the next product, or for `store_tile`."""
    for i in range(pairs.shape[0]):
        pairs[i] = pack(sums[2 * i], sums[2 * i + 1])


@inlined
def pack_scaled(pairs, sums, factor):
    """pairs = sums * factor in bf16."""
    for i in range(pairs.shape[0]):
        pairs[i] = pack(sums[2 * i] * factor, sums[2 * i + 1] * factor)


@inlined
def place_of(thread):
    """Where `store_tile` begins in a tile: the thread's row and 16-byte chunk for stmatrix."""
    row, chunk = (thread >> 5 & 3) * 16 + (thread & 15), thread >> 4 & 1
    return opaque(row * 128 + ((chunk ^ (row & 7)) << 4))


@inlined
def store_tile(tile, pairs, place):
    """The warpgroup's 64 rows to shared memory, as boxes of 64 columns in the order that TMA and wgmma expect."""
    for i in range(pairs.shape[0] // 4):
        at = (tile + place ^ (i & 3) << 5) + (i >> 2) * CHUNK
        stmatrix(at, (pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]))


@inlined
def store_sums(to, sums):
    """Sums to global memory in the order of the registers: 16 bytes of a thread every 2048.

    to: the tile's address, plus 16 times the thread's index in the warpgroup
    """
    for i in range(0, sums.shape[0], 4):
        store_float4(to + i * 512, (sums[i], sums[i + 1], sums[i + 2], sums[i + 3]))


@inlined
def add_sums(to, sums):
    """Sums added to those in global memory."""
    for i in range(0, sums.shape[0], 4):
        add_float4(to + i * 512, (sums[i], sums[i + 1], sums[i + 2], sums[i + 3]))


@inlined
def load_sums(sums, source):
    """Sums from global memory."""
    for i in range(0, sums.shape[0], 4):
        sums[i], sums[i + 1], sums[i + 2], sums[i + 3] = load_float4(source + i * 512)


@inlined
def next_stage(stage, parity, stages):
    """The stage of a ring after this one, and the parity of its phase."""
    if stage + 1 == stages:
        return uint32(0), uint32(parity ^ 1)
    return uint32(stage + 1), uint32(parity)


@inlined
def at_stage(first, stage, nbytes):
    """The descriptor of a ring's tile at this stage, of tiles of nbytes; `first` is that at stage 0."""
    return first + int64(uint32(stage * (nbytes >> 4)))
