"""Tiles of matrix products on Hopper: which tiles a block computes, loading and multiplying them. See wgmma_product.py.

A step is DEPTH along K. A stage of the ring in shared memory holds one step of both operands, in boxes of 64 columns:

    a    TILE_M rows of 64; if a is transposed, 2 boxes of 64 rows of K and 64 columns
    b    TILE_N rows of 64; if b is transposed, TILE_N / 64 boxes of 64 rows of K and 64 columns

Position p of the ring is stage p % STAGES, in round p // STAGES. Two mbarriers of a stage say that it has been written
(full) and read (empty). A block's mbarriers lie one after the other: full, empty (at EMPTY), turn (at TURN), others.

K is split where that is faster. Tiles 0 to whole - 1 are computed by one block each. Each of the other `splits` tiles
has an owner, which takes its first `owned` steps; the rest of all is dealt evenly to `helpers` blocks. A helper leaves
its part of a tile in global memory and sets a flag. The owner adds the parts in the order of K, so the sum is always
the same. Helpers are the first blocks and owners the last, so no block waits for one that has not started.
"""

from llm_numba.cuda.hopper import (
    CHUNK,
    bulk_load,
    clear_flag,
    descriptor,
    divide,
    expanded,
    fence_mbarrier_init,
    fence_proxy_async_global,
    forget,
    inlined,
    load_shared_float2,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    named_barrier,
    opaque,
    settle,
    store_flag,
    store_float2,
    tma_load_2d,
    wait_flag,
    wgmma,
    wgmma_wait,
)
from llm_numba.cuda.jit import int32, int64, uint32

CONSUMER = 128  # threads
TILE_M, DEPTH, BOX = 128, 64, CHUNK
LOG_STAGES = 2
STAGES = 1 << LOG_STAGES
A_TILE = TILE_M * DEPTH * 2  # bytes from the start of a stage to its tile of b
EMPTY, TURN, OTHERS = 8 * STAGES, 16 * STAGES, 16 * STAGES + 16  # bytes from the first mbarrier
ROW = 8 * CONSUMER  # bytes of 2 registers of each thread of a consumer
PIECE = 32  # such rows of a part that go through a stage at once: the smallest stage has as many


@inlined
def place_of(tile, rows, columns, group):
    """(row, column) of a tile. Tiles are counted down `group` rows, then along the columns, then in the next group."""
    above = uint32(divide(tile, group * columns) * group)
    within, height = uint32(tile - above * columns), uint32(min(group, uint32(rows - above)))
    column = divide(within, height)
    return uint32(above + within - column * height), column


@inlined
def share_of(block, blocks, steps, splits, helpers, owned):
    """A block's share of the split tiles, whose steps are counted one tile after the other.

    Returns (start, stop, base, length): its steps are `start` to `stop` - 1, where each split tile has `length` steps
    from `base` on.
    """
    if block >= blocks - splits:
        start = uint32((block - (blocks - splits)) * owned)
        return start, uint32(start + owned), uint32(0), owned
    n = uint32(splits * (steps - owned))
    if block >= helpers:
        return uint32(0), uint32(0), owned, uint32(1)
    return divide(block * n, helpers), divide((block + 1) * n, helpers), owned, uint32(steps - owned)


@inlined
def next_item(tile, done, block, blocks, steps, whole, splits, helpers, owned):
    """What a block computes next: (tile, its steps from ... to, then the new `tile` and `done`); no steps: it is done.

    First every blocks-th whole tile, then its share of the split tiles, of which it has done `done` steps.
    """
    if tile < whole:
        return tile, uint32(0), steps, uint32(tile + blocks), done
    start, stop, base, length = share_of(block, blocks, steps, splits, helpers, owned)
    start = uint32(start + done)
    if start >= stop:
        return tile, uint32(0), uint32(0), tile, done
    split = divide(start, length)
    first = uint32(base + start - split * length)
    last = uint32(min(uint32(base + length), uint32(first + stop - start)))
    return uint32(whole + split), first, last, tile, uint32(done + last - first)


@inlined
def helpers_of(split, steps, splits, helpers, owned):
    """The first and the last helper that has a part of a split tile; their parts lie at slot helper + split."""
    length = uint32(steps - owned)
    n = uint32(splits * length)
    return divide((split * length + 1) * helpers - 1, n), divide((split + 1) * length * helpers - 1, n)


@inlined
def init_mbarriers(barriers, others):
    for i in range(2 * STAGES + 2 + others):
        mbarrier_init(barriers + 8 * i, 1)
    fence_mbarrier_init()


@expanded
def load_steps(shared, barriers, position, k, k_end, a, b, m, n, a_transposed, b_transposed, TILE_N, STAGE):
    """The producer: copy steps k to k_end - 1 of the tile at row m and column n to the ring. Returns the position after
    them."""
    while k < k_end:
        stage = uint32(position & (STAGES - 1))
        full = uint32(barriers + 8 * stage)
        mbarrier_wait(full + EMPTY, position >> LOG_STAGES & 1 ^ 1)
        mbarrier_arrive_expect_tx(full, A_TILE + TILE_N * DEPTH * 2)
        to, column = uint32(shared + stage * STAGE), int32(k * DEPTH)
        if a_transposed:
            tma_load_2d(to, a, full, m, column)
            tma_load_2d(to + BOX, a, full, m + 64, column)
        else:
            tma_load_2d(to, a, full, column, m)
        if b_transposed:
            for i in range(TILE_N // 64):
                tma_load_2d(to + A_TILE + i * BOX, b, full, n + i * 64, column)
        else:
            tma_load_2d(to + A_TILE, b, full, column, n)
        k = opaque(k + 1)
        position = uint32(position + 1)
    return position


@expanded
def multiply_steps(
    sums, shared, barriers, position, steps, turn, thread, consumer, N, size, a_transposed, b_transposed, STAGE
):
    """A consumer: sums = the product of the ring's next steps, when it is its turn. Returns the position after them.

    turn: how many turns it had before; size: of sums
    """
    a, b = descriptor(shared, BOX), descriptor(shared + A_TILE, BOX)
    forget(sums, size)
    mbarrier_wait(barriers + TURN + 8 * consumer, turn + consumer + 1 & 1)
    k, read = uint32(0), uint32(0)
    while k < steps:
        stage = uint32(position & (STAGES - 1))
        full = uint32(barriers + 8 * stage)
        mbarrier_wait(full, position >> LOG_STAGES & 1)
        offset = int64(uint32(stage * (STAGE >> 4)))
        wgmma(sums, a + offset, b + offset, k, 128, N, 64, a_transposed, b_transposed)
        wgmma_wait(1)  # the step before has been read
        if k > 0 and thread == 0:
            mbarrier_arrive(read)
        read = uint32(full + EMPTY)
        k = opaque(k + 1)
        position = uint32(position + 1)
    if thread == 0:
        mbarrier_arrive(barriers + TURN + 8 - 8 * consumer)
    wgmma_wait(0)
    settle(sums, size)
    if thread == 0:
        mbarrier_arrive(read)
    return position


@inlined
def store_row(i, sums, part):
    store_float2(part + i * ROW, sums[2 * i], sums[2 * i + 1])


@inlined
def publish_part(flag, thread, consumer):
    """A helper's consumer has stored its part."""
    fence_proxy_async_global()
    named_barrier(1 + consumer, CONSUMER)
    if thread == 0:
        store_flag(flag, 1)


@inlined
def load_part(shared, barriers, position, part, flag, size, STAGE):
    """The producer of an owner: wait for a part, and copy it to the ring in pieces. Returns the position after them."""
    wait_flag(flag, 1)
    clear_flag(flag)  # for the next launch
    fence_proxy_async_global()
    for i in range(-(-size // 2 // PIECE)):
        stage = uint32(position & (STAGES - 1))
        full, nbytes = uint32(barriers + 8 * stage), min(PIECE, size // 2 - i * PIECE) * ROW
        mbarrier_wait(full + EMPTY, position >> LOG_STAGES & 1 ^ 1)
        mbarrier_arrive_expect_tx(full, nbytes)
        bulk_load(shared + stage * STAGE, part + i * (PIECE * ROW), nbytes, full)
        position = uint32(position + 1)
    return position


@inlined
def add_piece(i, sums, size, shared, barriers, position, thread, consumer, STAGE):
    """The consumer of an owner: add piece i of the part that begins at this position."""
    stage = uint32(position + i & STAGES - 1)
    full = uint32(barriers + 8 * stage)
    mbarrier_wait(full, (position + i) >> LOG_STAGES & 1)
    piece = opaque(shared + stage * STAGE + thread * 8)
    for g in range(PIECE):
        j = 2 * (i * PIECE + g)
        if j < size:
            x, y = load_shared_float2(piece + g * ROW)
            sums[j] += x
            sums[j + 1] += y
    named_barrier(1 + consumer, CONSUMER)
    if thread == 0:
        mbarrier_arrive(full + EMPTY)


@inlined
def part_at(parts, slot, size):
    """The address of a part: `size` registers of each thread of a consumer."""
    return parts + int64(slot) * (size // 2 * ROW)
