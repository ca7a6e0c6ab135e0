"""The matrix products of a linear layer in bf16 on Hopper's tensor cores. matmul_wgmma.py launches them.

A block has three warpgroups. The first thread of warpgroup 0, the producer, has TMA copy tiles of a and b to a ring of
STAGES buffers. Warpgroups 1 and 2, the consumers, take turns: a tile of the result each, and while one multiplies, the
other one finishes its tile (bias, GELU, storing) and waits. So the tensor cores always have work.

    producer     load load load load load load load load          full[s]: stage s has been written
    consumer 0   multiply tile 0 | finish | wait | multiply       empty[s]: stage s has been read
    consumer 1   wait            | multiply tile 1 | finish       turn[c]: consumer c may multiply

A tile is TILE_M x TILE_N. A step is DEPTH along K. A stage holds one step of both operands, in boxes of 64 columns:

    a    TILE_M rows of 64; if a is transposed, 2 boxes of 64 rows of K and 64 columns
    b    TILE_N rows of 64; if b is transposed, TILE_N / 64 boxes of 64 rows of K and 64 columns

A thread of a consumer sums in TILE_N registers: those of rows 0 to 63 of the tile, then those of the other 64.
"""

from numba import cuda

from llm_numba.cuda.gelu import CUBIC, LINEAR
from llm_numba.cuda.hopper import (
    CHUNK,
    add_float,
    add_float2,
    bulk_load,
    clear,
    descriptor,
    divide,
    dynamic_shared,
    expanded,
    fence_mbarrier_init,
    fence_proxy_async,
    fence_proxy_async_global,
    inlined,
    ldmatrix,
    load_constant_pair,
    load_shared_float4,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    named_barrier,
    opaque,
    pack,
    reciprocal,
    setmaxnreg_dec,
    setmaxnreg_inc,
    settle,
    stmatrix,
    store_flag,
    store_float,
    store_float2,
    store_float4,
    store_shared_16_bytes,
    tensor_map_acquire,
    tma_commit,
    tma_load_2d,
    tma_prefetch_2d,
    tma_store_2d,
    tma_store_wait_read,
    uniform,
    unpack,
    unrolled,
    wait_flag,
    wgmma,
    wgmma_wait,
)
from llm_numba.cuda.jit import exp2, float32, int32, int64, kernel, uint32

BLOCK, CONSUMER = 384, 128  # threads
TILE_M, DEPTH, BOX = 128, 64, CHUNK
LOG_STAGES = 2
STAGES = 1 << LOG_STAGES
A_TILE = TILE_M * DEPTH * 2  # bytes from the start of a stage to its tile of b
EMPTY, TURN, PRE = 8 * STAGES, 16 * STAGES, 16 * STAGES + 16  # bytes from the first mbarrier, full[0], to others
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
PLAIN, WITH_BIAS, GELU, GELU_BACKWARD = range(4)  # how a product is finished
LOG2_E = 1.4426950408889634
LINEAR_LOG2, CUBIC_LOG2 = float32(float(LINEAR) * LOG2_E), float32(float(CUBIC) * LOG2_E)
ZERO, ONE, THREE = float32(0), float32(1), float32(3)
TWO_ONES = 0x3F803F80  # bf16
PIECE = 18  # 4 registers of each thread of a consumer are 2048 bytes; so many go through a stage at once


@inlined
def place_of(tile, rows, columns, group):
    """(row, column) of a tile. Tiles are counted down `group` rows, then along the columns, then in the next group."""
    above = uint32(divide(tile, group * columns) * group)
    within, height = uint32(tile - above * columns), uint32(min(group, uint32(rows - above)))
    column = divide(within, height)
    return uint32(above + within - column * height), column


@inlined
def init_mbarriers(barriers, pre_barriers):
    """full, empty and turn, and those of the boxes of pre."""
    for i in range(2 * STAGES + 2 + pre_barriers):
        mbarrier_init(barriers + 8 * i, 1)
    fence_mbarrier_init()


@expanded
def load_steps(shared, barriers, position, k, k_end, a, b, m, n, a_transposed, b_transposed, TILE_N, STAGE):
    """The producer: copy steps k to k_end - 1 of a tile's operands to the ring. Returns the position after them.

    position: the number of stages filled so far; m, n: the tile's first row and column
    """
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
    clear(sums, size)
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
def box_address(box, thread, pair):
    """Where a thread's row of the `pair`-th two 16-byte chunks of a box lies, for ldmatrix and stmatrix."""
    row = (thread >> 5) * 16 + (thread & 15)
    return uint32(box + row * 128 + (((2 * pair + (thread >> 4 & 1)) ^ (row & 7)) << 4))


@inlined
def gate(x):
    """GELU(x) / x: 1 / (1 + e^(-2u)), see gelu.py."""
    return reciprocal(ONE + exp2(x * (LINEAR_LOG2 + CUBIC_LOG2 * x * x)))


@inlined
def gelu(pair):
    """Of two bf16."""
    x, y = unpack(pair)
    return pack(x * gate(x), y * gate(y))


@inlined
def gelu_derivative(x):
    s = gate(x)
    return s - x * s * (ONE - s) * (LINEAR + THREE * CUBIC * x * x)


@inlined
def times_gelu_derivative(low, high, pair):
    """Two float32 times GELU' of two bf16, as bf16."""
    x, y = unpack(pair)
    return pack(low * gelu_derivative(x), high * gelu_derivative(y))


@inlined
def add_bias(low, high, pair):
    """Two float32 and two bf16, added, as bf16."""
    x, y = unpack(pair)
    return pack(low + x, high + y)


@inlined
def store_columns(i, sums, size, end, staging, thread, consumer, m, n, N, out, pre, bias):
    """Finish columns 64 i to 64 i + 63 of a tile: two boxes, through shared memory.

    staging: two boxes; with GELU twice two, of which the second is for the result
    """
    biases = cuda.local.array(8, uint32)
    for p in range(8):
        biases[p] = 0
        if end != PLAIN and bias != 0:  # past the right edge any address will do
            column = min(int64(n) + (i * 64 + p * 8 + (thread & 3) * 2), N - 2)
            biases[p] = load_constant_pair(bias + column * 2)
    for half in range(2):
        box = uint32(staging + half * (2 * BOX if end == GELU else BOX))
        if thread == 0:
            tma_store_wait_read(1)
        named_barrier(1 + consumer, CONSUMER)
        for p in range(4):
            j, to = half * (size // 2) + i * 32 + p * 8, box_address(box, thread, p)
            v = add_bias(sums[j], sums[j + 1], biases[2 * p])
            w = add_bias(sums[j + 2], sums[j + 3], biases[2 * p])
            x = add_bias(sums[j + 4], sums[j + 5], biases[2 * p + 1])
            y = add_bias(sums[j + 6], sums[j + 7], biases[2 * p + 1])
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
def load_pre(i, staging, buffers, pre_barriers, pre, m, n):
    """Start loading box i of a tile of pre: the upper 64 rows, then the lower ones, of 64 columns, then the next."""
    barrier = uint32(pre_barriers + 8 * (i % buffers))
    mbarrier_arrive_expect_tx(barrier, BOX)
    tma_load_2d(staging + i % buffers * BOX, pre, barrier, n + i // 2 * 64, m + i % 2 * 64)


@inlined
def store_gelu_gradient(i, sums, size, staging, buffers, pre_barriers, thread, consumer, m, n, out, pre):
    """Finish box i of a tile: 64 x 64, times GELU' of pre, in place of pre's box; then load a later one.

    buffers: how many boxes there are; each is used twice for a tile
    """
    buffer = i % buffers
    box, barrier = uint32(staging + buffer * BOX), uint32(pre_barriers + 8 * buffer)
    mbarrier_wait(barrier, i // buffers)
    pairs = cuda.local.array((2, 4), uint32)
    for p in range(4):
        if p % 2 == 0:  # two loads at a time, so that work on one overlaps the other
            for q in range(2):
                v, w, x, y = ldmatrix(box_address(box, thread, p + q))
                pairs[q, 0], pairs[q, 1], pairs[q, 2], pairs[q, 3] = v, w, x, y
        j, q = i % 2 * (size // 2) + i // 2 * 32 + p * 8, p % 2
        v = times_gelu_derivative(sums[j], sums[j + 1], pairs[q, 0])
        w = times_gelu_derivative(sums[j + 2], sums[j + 3], pairs[q, 1])
        x = times_gelu_derivative(sums[j + 4], sums[j + 5], pairs[q, 2])
        y = times_gelu_derivative(sums[j + 6], sums[j + 7], pairs[q, 3])
        stmatrix(box_address(box, thread, p), (v, w, x, y))
    fence_proxy_async()
    named_barrier(1 + consumer, CONSUMER)
    if thread == 0:
        tma_store_2d(out, box, n + i // 2 * 64, m + i % 2 * 64)
        tma_commit()
        if 0 < i and i + buffers - 1 < 2 * buffers:
            tma_store_wait_read(1)  # of the box before
            load_pre(i + buffers - 1, staging, buffers, pre_barriers, pre, m, n)


def activation_kernel(b_transposed, end, TILE_N):
    """The kernel whose result is bf16: an activation or its gradient. end: what is done with the product."""
    CHUNKS, BOXES, STAGE = TILE_N // 64, TILE_N // 32, A_TILE + TILE_N * DEPTH * 2
    BUFFERS = {PLAIN: 2, WITH_BIAS: 2, GELU: 4, GELU_BACKWARD: CHUNKS}[end]  # boxes of a consumer
    STAGING = STAGES * STAGE
    BARRIERS = STAGING + 2 * BUFFERS * BOX
    PRE_BARRIERS = 2 * BUFFERS if end == GELU_BACKWARD else 0

    @kernel(launch_bounds=(BLOCK, 1))
    def activation(out, pre, a, b, bias, M, N, K, group):
        """out (M, N) = a (M, K) @ b.T, b (N, K), or (K, N) if transposed; then as `end` says:

        WITH_BIAS: + bias (N,), if its address is not 0; GELU: pre = that, and out = GELU(pre);
        GELU_BACKWARD: times GELU'(pre). All are bf16; out, pre, a and b are tensor maps, bias is an address.

        Grid: a block for each multiprocessor; block: BLOCK threads; tiles in groups of `group` rows of tiles
        Moves: a, b, out and pre at least once
        """
        shared, thread = dynamic_shared(), uint32(cuda.threadIdx.x)
        barriers, warpgroup = uint32(shared + BARRIERS), uniform(thread >> 7)
        if thread == 0:
            init_mbarriers(barriers, PRE_BARRIERS)
        cuda.syncthreads()
        rows, columns = uint32((M + TILE_M - 1) // TILE_M), uint32((N + TILE_N - 1) // TILE_N)
        steps, tiles = uint32((K + DEPTH - 1) // DEPTH), uint32(rows * columns)
        tile, blocks = uint32(cuda.blockIdx.x), uint32(cuda.gridDim.x)

        if warpgroup == 0:
            setmaxnreg_dec(24)
            if thread == 0:
                tensor_map_acquire(a)
                tensor_map_acquire(b)
                position = uint32(0)
                while tile < tiles:
                    row, column = place_of(tile, rows, columns, uint32(group))
                    m, n = int32(row * TILE_M), int32(column * TILE_N)
                    position = load_steps(
                        shared, barriers, position, uint32(0), steps, a, b, m, n, 0, b_transposed, TILE_N, STAGE
                    )
                    tile = uint32(tile + blocks)
        else:
            setmaxnreg_inc(240)
            consumer, thread = uint32(warpgroup - 1), uint32(thread & (CONSUMER - 1))
            staging = uint32(shared + STAGING + consumer * (BUFFERS * BOX))
            pre_barriers = uint32(barriers + PRE + consumer * (8 * BUFFERS))
            if thread == 0:
                tensor_map_acquire(out)
                if end == GELU or end == GELU_BACKWARD:
                    tensor_map_acquire(pre)
            sums = cuda.local.array(TILE_N, float32)
            turn = uint32(0)
            tile, position = uint32(tile + consumer * blocks), uint32(consumer * steps)
            while tile < tiles:
                row, column = place_of(tile, rows, columns, uint32(group))
                m, n = int32(row * TILE_M), int32(column * TILE_N)
                if end == GELU_BACKWARD and thread == 0:
                    tma_store_wait_read(0)
                    for i in range(BUFFERS):
                        load_pre(i, staging, BUFFERS, pre_barriers, pre, m, n)
                    for i in range(BUFFERS, 2 * BUFFERS):
                        tma_prefetch_2d(pre, n + i // 2 * 64, m + i % 2 * 64)
                position = multiply_steps(
                    sums, shared, barriers, position, steps, turn, thread, consumer,
                    TILE_N, TILE_N, 0, b_transposed, STAGE,
                )  # fmt: skip
                if end == GELU_BACKWARD:
                    unrolled(
                        BOXES,
                        store_gelu_gradient,
                        (sums, TILE_N, staging, BUFFERS, pre_barriers, thread, consumer, m, n, out, pre),
                    )
                else:
                    unrolled(
                        CHUNKS,
                        store_columns,
                        (sums, TILE_N, end, staging, thread, consumer, m, n, N, out, pre, bias),
                    )
                turn = uint32(turn + 1)
                tile, position = uint32(tile + 2 * blocks), uint32(position + steps)
            if thread == 0:
                tma_store_wait_read(0)

    activation.shared_bytes = BARRIERS + PRE + 8 * PRE_BARRIERS
    return activation


@inlined
def next_item(tile, whole, blocks, steps, position, end, base, length):
    """(the next tile of this block, its steps along K from ... to, then the new `tile` and `position`).

    First whole tiles, every blocks-th; then split ones, of which this block does the steps from `position` to `end`,
    counted in all split tiles one after the other, where a tile has `length` steps from `base` on.
    """
    if tile < whole:
        return tile, uint32(0), steps, uint32(tile + blocks), position
    split = divide(position, length)
    first = uint32(base + position - split * length)
    last = uint32(min(uint32(base + length), uint32(first + end - position)))
    return uint32(whole + split), first, last, tile, uint32(position + last - first)


@inlined
def store_group(i, sums, size, out, row_bytes, left, accumulate):
    """Columns 8 i to 8 i + 7 of a tile: a thread's two in each of four rows.

    out: address of the thread's first; left: how many columns of the matrix each row has from there on, 0 outside
    """
    for r in range(4):
        j = r // 2 * (size // 2) + i * 4 + r % 2 * 2
        if 8 * i < left[r]:
            to = out + (r // 2 * 64 + r % 2 * 8) * row_bytes + i * 32
            if accumulate:
                add_float2(to, sums[j], sums[j + 1])
            else:
                store_float2(to, sums[j], sums[j + 1])


@inlined
def store_part(i, sums, part):
    store_float4(part + i * (16 * CONSUMER), (sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]))


@inlined
def add_piece(i, sums, size, shared, barriers, position, thread, consumer, STAGE):
    """sums += the part of another block, as far as it is in the i-th piece."""
    stage = uint32(position + i & STAGES - 1)
    full = uint32(barriers + 8 * stage)
    mbarrier_wait(full, (position + i) >> LOG_STAGES & 1)
    for g in range(PIECE):
        j = 4 * (i * PIECE + g)
        if j < size:
            v, w, x, y = load_shared_float4(shared + stage * STAGE + g * (16 * CONSUMER) + thread * 16)
            sums[j] += v
            sums[j + 1] += w
            sums[j + 2] += x
            sums[j + 3] += y
    named_barrier(1 + consumer, CONSUMER)
    if thread == 0:
        mbarrier_arrive(full + EMPTY)


@inlined
def helpers_of(split, length, splits, helpers):
    """(first, last) helper that has steps of a split tile. Helper j has steps j n / helpers to (j + 1) n / helpers."""
    n = uint32(splits * length)
    first = divide(uint32((split * length + 1) * helpers - 1), n)
    return first, divide(uint32((split + 1) * length * helpers - 1), n)


def gradient_kernel(with_bias, TILE_N):
    """The kernel whose result is the float32 gradient of a weight, and with_bias also of its bias."""
    # the bias's gradient is one more column: dout.T @ ones. 8 columns of ones lie after each tile of b
    N = TILE_N + 8 * with_bias
    COPIED = A_TILE + TILE_N * DEPTH * 2
    STAGE = COPIED + BOX * with_bias
    GROUPS, PARTS, PIECES = TILE_N // 8, N // 4, -(-(N // 4) // PIECE)
    BARRIERS, HALF = STAGES * STAGE, N // 2

    @kernel(launch_bounds=(BLOCK, 1))
    def gradient(out, dbias, a, b, parts, flags, M, N_, K, whole, splits, helpers, first, accumulate):
        """out (M, N) float32 = (+= if accumulate) a.T @ b, a (K, M), b (K, N) bf16; dbias (M,) the same with ones.

        out, dbias, parts and flags are addresses, a and b tensor maps.

        Tiles 0 to whole - 1 are summed by one block each. The K of the other `splits` tiles is split: each has an
        owner, which takes its first `first` steps; the rest of all is dealt evenly to `helpers` blocks. A helper leaves
        its part of a tile in `parts` and sets a flag. The owner adds the parts in the order of K, so the sum is always
        the same. Helpers are the first blocks and owners the last: no block waits for one that has not started.

        Grid: at most a block for each multiprocessor; block: BLOCK threads
        Moves: a and b at least once, out once or twice
        """
        shared, thread = dynamic_shared(), uint32(cuda.threadIdx.x)
        barriers, warpgroup = uint32(shared + BARRIERS), uniform(thread >> 7)
        if thread == 0:
            init_mbarriers(barriers, 0)
        if with_bias:
            for s in range(STAGES):
                i = thread
                while i < BOX // 16:
                    store_shared_16_bytes(
                        shared + s * STAGE + COPIED + i * 16, (TWO_ONES, TWO_ONES, TWO_ONES, TWO_ONES)
                    )
                    i = uint32(i + BLOCK)
            fence_proxy_async()
        cuda.syncthreads()
        rows, columns = uint32((M + TILE_M - 1) // TILE_M), uint32((N_ + TILE_N - 1) // TILE_N)
        steps, whole, rest = uint32((K + DEPTH - 1) // DEPTH), uint32(whole), uint32(0)
        tile, blocks = uint32(cuda.blockIdx.x), uint32(cuda.gridDim.x)
        # this block's steps of split tiles
        rest = uint32(steps - first)
        base, length, start, end = uint32(0), uint32(first), uint32(0), uint32(0)
        if tile >= blocks - splits:
            start = uint32((tile - (blocks - splits)) * length)
            end = uint32(start + length)
        elif tile < helpers:
            base, length = uint32(first), rest
            start = divide(uint32(tile * splits * rest), helpers)
            end = divide(uint32((tile + 1) * splits * rest), helpers)
        item = uint32(0)

        position = uint32(0)
        if warpgroup == 0:
            setmaxnreg_dec(24)
            if thread == 0:
                tensor_map_acquire(a)
                tensor_map_acquire(b)
                while tile < whole or start < end:
                    current, k, k_end, tile, start = next_item(tile, whole, blocks, steps, start, end, base, length)
                    row, column = place_of(current, rows, columns, uint32(1))
                    m, n = int32(row * TILE_M), int32(column * TILE_N)
                    position = load_steps(shared, barriers, position, k, k_end, a, b, m, n, 1, 1, TILE_N, STAGE)
                    if k == 0 and k_end < steps:
                        helper, last = helpers_of(uint32(current - whole), rest, uint32(splits), uint32(helpers))
                        while helper <= last:
                            slot = uint32(helper + current - whole)
                            wait_flag(flags + int64(slot) * 4, 1)
                            store_flag(flags + int64(slot) * 4, 0)
                            fence_proxy_async_global()
                            for i in range(PIECES):
                                stage = uint32(position & (STAGES - 1))
                                full = uint32(barriers + 8 * stage)
                                nbytes = min(PIECE, PARTS - i * PIECE) * (16 * CONSUMER)
                                mbarrier_wait(full + EMPTY, position >> LOG_STAGES & 1 ^ 1)
                                mbarrier_arrive_expect_tx(full, nbytes)
                                source = parts + (int64(slot) * PARTS + i * PIECE) * (16 * CONSUMER)
                                bulk_load(shared + stage * STAGE, source, nbytes, full)
                                position = uint32(position + 1)
                            helper = uint32(helper + 1)
        else:
            setmaxnreg_inc(240)
            consumer, thread = uint32(warpgroup - 1), uint32(thread & (CONSUMER - 1))
            sums = cuda.local.array(N, float32)
            turn = uint32(0)
            while tile < whole or start < end:
                current, k, k_end, tile, start = next_item(tile, whole, blocks, steps, start, end, base, length)
                if item & 1 == consumer:
                    row, column = place_of(current, rows, columns, uint32(1))
                    position = multiply_steps(
                        sums, shared, barriers, position, uint32(k_end - k), turn, thread, consumer, N, N, 1, 1, STAGE
                    )
                    turn = uint32(turn + 1)
                    if k > 0:  # a helper
                        slot = uint32(cuda.blockIdx.x + current - whole)
                        part = parts + int64(slot) * (PARTS * 16 * CONSUMER) + int64(thread) * 16
                        unrolled(PARTS, store_part, (sums, part))
                        fence_proxy_async_global()
                        named_barrier(1 + consumer, CONSUMER)
                        if thread == 0:
                            store_flag(flags + int64(slot) * 4, 1)
                    else:
                        if k_end < steps:
                            helper, last = helpers_of(uint32(current - whole), rest, uint32(splits), uint32(helpers))
                            while helper <= last:
                                unrolled(
                                    PIECES, add_piece, (sums, N, shared, barriers, position, thread, consumer, STAGE)
                                )
                                position = uint32(position + PIECES)
                                helper = uint32(helper + 1)
                        lane = thread & 31
                        y = int64(row * TILE_M + (thread >> 5) * 16 + (lane >> 2))
                        x = int64(column * TILE_N + (lane & 3) * 2)
                        to, left = out + (y * N_ + x) * 4, int32(N_ - column * TILE_N)
                        inside = (
                            left if y < M else int32(0),
                            left if y + 8 < M else int32(0),
                            left if y + 64 < M else int32(0),
                            left if y + 72 < M else int32(0),
                        )
                        if accumulate != 0:
                            unrolled(GROUPS, store_group, (sums, N, to, N_ * 4, inside, True))
                        else:
                            unrolled(GROUPS, store_group, (sums, N, to, N_ * 4, inside, False))
                        if with_bias:
                            if column == 0 and lane & 3 == 0:
                                for r in range(4):
                                    if inside[r] > 0:
                                        value = sums[r // 2 * HALF + TILE_N // 2 + r % 2 * 2]
                                        to = dbias + (y + r // 2 * 64 + r % 2 * 8) * 4
                                        if accumulate != 0:
                                            add_float(to, value)
                                        else:
                                            store_float(to, value)
                else:
                    position = uint32(position + k_end - k)
                item = uint32(item + 1)

    gradient.shared_bytes = BARRIERS + PRE
    gradient.part_floats = N * CONSUMER
    return gradient
