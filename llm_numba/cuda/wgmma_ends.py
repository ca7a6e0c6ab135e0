"""How a tile of a matrix product on Hopper is finished: bias, GELU, GELU's derivative, storing. See wgmma_product.py.

A thread holds N / 2 sums of rows 0 to 63 of the tile, then as many of rows 64 to 127, in the order that hopper.py
describes. bf16 results go through boxes of 64 x 64 in shared memory, from where TMA stores them; float32 results
directly, as eight bytes of each of four threads are adjacent.
"""

from llm_numba.cuda.gelu import gate, slope
from llm_numba.cuda.hopper import (
    add_float,
    add_float2,
    fence_proxy_async,
    ldmatrix,
    load_constant_pair,
    mbarrier_arrive_expect_tx,
    mbarrier_wait,
    named_barrier,
    pack,
    stmatrix,
    store_float,
    store_float2,
    tma_commit,
    tma_load_2d,
    tma_store_2d,
    tma_store_wait_read,
    unpack,
)
from llm_numba.cuda.jit import inlined, int32, int64, uint32
from llm_numba.cuda.wgmma_tiles import BOX, CONSUMER

PLAIN, BIAS, GELU, GELU_BACKWARD, GRADIENT, GRADIENT_WITH_BIAS = range(6)


@inlined
def gelu(pair):
    """Of two bf16."""
    x, y = unpack(pair)
    return pack(x * gate(x), y * gate(y))


@inlined
def times_slope(low, high, pair):
    """Two float32 times GELU' of two bf16, as bf16."""
    x, y = unpack(pair)
    return pack(low * slope(x), high * slope(y))


@inlined
def add_pair(low, high, pair):
    """Two float32 plus two bf16, as bf16."""
    x, y = unpack(pair)
    return pack(low + x, high + y)


@inlined
def box_address(box, thread, i):
    """Where a thread's row of 16-byte chunks 2 i and 2 i + 1 of a box lies, for ldmatrix and stmatrix."""
    row = (thread >> 5) * 16 + (thread & 15)
    return uint32(box + row * 128 + (((2 * i + (thread >> 4 & 1)) ^ (row & 7)) << 4))


@inlined
def bias_at(bias, column, N):
    """The bias of a column and the next, 0 without a bias; past the right edge that of others."""
    return load_constant_pair(bias + int64(min(int32(column), int32(N - 2))) * 2) if bias != 0 else uint32(0)


@inlined
def store_columns(i, sums, size, end, staging, thread, consumer, m, n, N, out, pre, bias):
    """Finish columns 64 i to 64 i + 63 of a tile at row m and column n: two boxes.

    staging: address of two boxes; with GELU of twice two, one for pre and one for the result
    """
    for half in range(2):
        box = uint32(staging + half * (2 * BOX if end == GELU else BOX))
        if thread == 0:
            tma_store_wait_read(1)
        named_barrier(1 + consumer, CONSUMER)
        for p in range(4):
            j, to = half * (size // 2) + i * 32 + p * 8, box_address(box, thread, p)
            first = second = uint32(0)
            if end != PLAIN:
                column = n + i * 64 + p * 16 + (thread & 3) * 2
                first, second = bias_at(bias, column, N), bias_at(bias, column + 8, N)
            v, w = add_pair(sums[j], sums[j + 1], first), add_pair(sums[j + 2], sums[j + 3], first)
            x, y = add_pair(sums[j + 4], sums[j + 5], second), add_pair(sums[j + 6], sums[j + 7], second)
            stmatrix(to, (v, w, x, y))
            if end == GELU:
                stmatrix(to + BOX, (gelu(v), gelu(w), gelu(x), gelu(y)))
        fence_proxy_async()
        named_barrier(1 + consumer, CONSUMER)
        if thread == 0:
            if end == GELU:
                tma_store_2d(pre, box, n + i * 64, m + half * 64)
                tma_store_2d(out, box + BOX, n + i * 64, m + half * 64)
            else:
                tma_store_2d(out, box, n + i * 64, m + half * 64)
            tma_commit()


@inlined
def load_pre(i, staging, buffers, barriers, pre, m, n):
    """Start loading box i of a tile of pre: the upper 64 rows, then the lower ones, of 64 columns, then the next."""
    barrier = uint32(barriers + 8 * (i % buffers))
    mbarrier_arrive_expect_tx(barrier, BOX)
    tma_load_2d(staging + i % buffers * BOX, pre, barrier, n + i // 2 * 64, m + i % 2 * 64)


@inlined
def store_times_slope(i, sums, size, staging, buffers, barriers, thread, consumer, m, n, out, pre):
    """Finish box i of a tile: times GELU' of pre, in place of pre's box. Then load the box after the next.

    buffers: how many boxes there are; each is used twice for a tile
    """
    box = uint32(staging + i % buffers * BOX)
    mbarrier_wait(barriers + 8 * (i % buffers), i // buffers)
    for p in range(0, 4, 2):  # two loads, so that work on one overlaps the other
        pairs = ldmatrix(box_address(box, thread, p)), ldmatrix(box_address(box, thread, p + 1))
        for q in range(2):
            j = i % 2 * (size // 2) + i // 2 * 32 + (p + q) * 8
            v, w = times_slope(sums[j], sums[j + 1], pairs[q][0]), times_slope(sums[j + 2], sums[j + 3], pairs[q][1])
            x, y = (
                times_slope(sums[j + 4], sums[j + 5], pairs[q][2]),
                times_slope(sums[j + 6], sums[j + 7], pairs[q][3]),
            )
            stmatrix(box_address(box, thread, p + q), (v, w, x, y))
    fence_proxy_async()
    named_barrier(1 + consumer, CONSUMER)
    if thread == 0:
        tma_store_2d(out, box, n + i // 2 * 64, m + i % 2 * 64)
        tma_commit()
        if 0 < i and i + buffers - 1 < 2 * buffers:
            tma_store_wait_read(1)  # of the box before
            load_pre(i + buffers - 1, staging, buffers, barriers, pre, m, n)


@inlined
def columns_inside(row, m, M, n, N):
    """How many columns of the matrix (M, N) a row of the tile at row m and column n has; 0 if it is outside."""
    return N - n if m + row < M else 0


@inlined
def store_float_columns(i, sums, size, out, thread, m, n, M, N, accumulate):
    """Finish columns 8 i to 8 i + 7 of a tile of float32: a thread's two in each of four rows."""
    first = (thread >> 5) * 16 + (thread >> 2 & 7)
    to = out + ((int64(m) + first) * N + n + (thread & 3) * 2 + 8 * i) * 4
    for r in range(4):
        row, j = r // 2 * 64 + r % 2 * 8, r // 2 * (size // 2) + i * 4 + r % 2 * 2
        if 8 * i < columns_inside(first + row, m, M, n, N):
            if accumulate:
                add_float2(to + row * N * 4, sums[j], sums[j + 1])
            else:
                store_float2(to + row * N * 4, sums[j], sums[j + 1])


@inlined
def store_bias_gradient(r, sums, size, out, thread, m, M, accumulate):
    """The sums of the column of ones, the first after the tile's own: one of a thread's four rows."""
    row = r // 2 * 64 + r % 2 * 8 + (thread >> 5) * 16 + (thread >> 2 & 7)
    value = sums[r // 2 * (size // 2) + size // 2 - 4 + r % 2 * 2]
    if thread & 3 == 0 and m + row < M:
        if accumulate:
            add_float(out + (int64(m) + row) * 4, value)
        else:
            store_float(out + (int64(m) + row) * 4, value)
