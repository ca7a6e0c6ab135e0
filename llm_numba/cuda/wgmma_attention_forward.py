"""The forward kernel of attention_wgmma.py.

A block has a producer, one thread of the first warpgroup, and 3 consumer warpgroups (2 for heads of 128). It works
through its items: an item is 192 (128) adjacent queries of a head, 64 for each consumer.

    global memory           shared memory                      registers of a consumer

           producer, TMA    q: 2 buffers of 192 x HS  wgmma
    qkv ─────────────────▶  ring of 8 (4) tiles      ───────▶  scores  (64 x 128) = q kT         float32
                            of 128 keys or values:                │ softmax
                            k2 k1 v2 k0 v1 v0                     ▼
                                                     ───────▶  weights (64 x 128)                bf16
          consumers, TMA                                       acc     (64 x HS) += weights v    float32
    out ◀─────────────────  out: 64 x HS each        ◀─────────────┘

The tiles of keys go from the last one, which contains the diagonal, to the first. During a softmax the tensor cores add
the values of the tile before, and work for the other consumers:

    tensor cores   scores 2 │           │ scores 1, acc += v2 │ scores 0, acc += v1 │ acc += v0
    softmax                 │ of tile 2 │            of tile 1 │          of tile 0 │

The assembler, ptxas, waits for every single product (its warnings C7510 to C7519) if there is a branch around a
product, if a loop can end between a product and the wait for it, if a round of a loop reads what an earlier round
started, or if more than one group of products is in flight beside the one that is read. It also moves `wgmma_wait` up
past arithmetic, though not past a loop, such as the one in `mbarrier_wait`: hence the order of these two below.
"""

import functools
import math

from numba import cuda

from llm_numba.cuda.hopper import (
    CHUNK,
    clear,
    descriptor,
    divide,
    dynamic_shared,
    fence_mbarrier_init,
    fence_proxy_async,
    inlined,
    keep,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    named_barrier,
    remainder,
    setmaxnreg_dec,
    setmaxnreg_inc,
    settle,
    shuffle_xor,
    sync_warp,
    tensor_map_acquire,
    tma_commit,
    tma_load_3d,
    tma_store_3d,
    tma_store_wait_read,
    uniform,
    wgmma,
    wgmma_open,
    wgmma_rs,
    wgmma_wait,
)
from llm_numba.cuda.jit import exp2, float32, int32, kernel, uint32
from llm_numba.cuda.wgmma_registers import (
    MASKED,
    at_stage,
    exp2_rows,
    first_column,
    first_row,
    mask_columns,
    next_stage,
    pack_pairs,
    place_of,
    row_max,
    scale_rows,
    store_tile,
)

ONE, LOG2_E = float32(1), float32(1 / math.log(2))
KEYS = 128  # rows of a tile of keys or values
CONSUMERS = {64: 3, 128: 2}  # warpgroups, by head size
STAGES = {64: 8, 128: 4}  # tiles in the ring
# of a thread of the producer, of a consumer: together as many as a block starts with, else setmaxnreg waits forever
REGISTERS = {64: (32, 160), 128: (40, 232)}


def forward_shared(HS: int) -> int:
    """Bytes of shared memory of a block."""
    boxes = HS // 64
    return (3 * CONSUMERS[HS] + 2 * STAGES[HS]) * boxes * CHUNK + 16 * (STAGES[HS] + 2)


@functools.cache
def forward_kernel(HS: int):
    """The kernel of `forward` for heads of HS channels."""
    WARPGROUPS, RING, BOXES = CONSUMERS[HS], STAGES[HS], HS // 64
    QUERIES, WARPS, THREADS = 64 * WARPGROUPS, 4 * WARPGROUPS, 128 * (WARPGROUPS + 1)
    PRODUCER_REGISTERS, CONSUMER_REGISTERS = REGISTERS[HS]
    SCORES, WEIGHTS, SUMS, PAIRS = KEYS // 2, KEYS // 4, HS // 2, HS // 4  # registers
    OWN = BOXES * CHUNK  # bytes of a warpgroup's queries
    Q, TILE = WARPGROUPS * OWN, 2 * BOXES * CHUNK  # bytes of an item's queries, of a tile of keys
    KV_AT, OUT_AT = 2 * Q, 2 * Q + RING * TILE
    BARRIERS = OUT_AT + WARPGROUPS * OWN
    Q_FULL, Q_EMPTY, FULL, EMPTY = BARRIERS, BARRIERS + 16, BARRIERS + 32, BARRIERS + 32 + 8 * RING

    @inlined
    def item_of(schedule, i):
        """(i + 1, head, first query): this block's item i."""
        return int32(i + 1), schedule[i, cuda.blockIdx.x, 0], schedule[i, cuda.blockIdx.x, 1]

    @inlined
    def last_tile(t0, T):
        """The last tile of keys that an item's queries see."""
        return int32(int32(min(t0 + QUERIES, T) - 1) >> 7)

    @inlined
    def load_tile(shared, kv_map, stage, parity, channel, tile, b):
        """Fill a stage of the ring with a tile of keys or values, and return the next stage."""
        full = shared + FULL + 8 * stage
        mbarrier_wait(shared + EMPTY + 8 * stage, parity ^ 1)
        mbarrier_arrive_expect_tx(full, TILE)
        for box in range(BOXES):
            to = shared + KV_AT + stage * TILE + box * 2 * CHUNK
            tma_load_3d(to, kv_map, full, channel + box * 64, tile * KEYS, b)
        return next_stage(stage, parity, RING)

    @inlined
    def produce(shared, qkv_map, kv_map, schedule, T, num_heads, num_kv_heads):
        """The producer, one thread: the items' queries, keys and values to shared memory."""
        stage, parity, buffer, q_parity = uint32(0), uint32(0), uint32(0), uint32(0)
        tensor_map_acquire(qkv_map)
        tensor_map_acquire(kv_map)
        i, head, t0 = item_of(schedule, 0)
        while head >= 0:
            b, h = int32(divide(head, num_heads)), int32(remainder(head, num_heads))
            kv_head = int32(divide(h * num_kv_heads, num_heads))
            full = shared + Q_FULL + 8 * buffer
            mbarrier_wait(shared + Q_EMPTY + 8 * buffer, q_parity ^ 1)
            mbarrier_arrive_expect_tx(full, Q)
            for w in range(WARPGROUPS):
                for box in range(BOXES):
                    to = shared + buffer * Q + w * OWN + box * CHUNK
                    tma_load_3d(to, qkv_map, full, h * HS + box * 64, t0 + w * 64, b)
            buffer, q_parity = next_stage(buffer, q_parity, 2)

            # k(last), then k(n - 1) and v(n) for n = last, ... 0; there is no k(-1)
            k, last = (num_heads + kv_head) * HS, last_tile(t0, T)
            v = k + num_kv_heads * HS
            stage, parity = load_tile(shared, kv_map, stage, parity, k, last, b)
            for n in range(last, -1, -1):
                if n > 0:
                    stage, parity = load_tile(shared, kv_map, stage, parity, k, n - 1, b)
                stage, parity = load_tile(shared, kv_map, stage, parity, v, n, b)
            i, head, t0 = item_of(schedule, i)

    @inlined
    def release(barrier):
        """This warp has read what the barrier stands for."""
        if cuda.threadIdx.x & 31 == 0:
            mbarrier_arrive(barrier)

    @inlined
    def pass_over(shared, stage, parity):
        """Let a tile of the ring pass unread, and return the next stage."""
        mbarrier_wait(shared + FULL + 8 * stage, parity)
        sync_warp()
        release(shared + EMPTY + 8 * stage)
        return next_stage(stage, parity, RING)

    @inlined
    def start_scores(scores, q, k):
        """Start scores (64 x KEYS) = q kT."""
        if HS == 64:
            wgmma(scores, q, k, 0, 64, KEYS, 64, 0, 0)
        else:
            wgmma_open(scores, q, k, 0, 64, KEYS, 64, 0, 0)
            wgmma(scores, q + (CHUNK >> 4), k + (2 * CHUNK >> 4), 1, 64, KEYS, 64, 0, 0)

    @inlined
    def consume(shared, out_map, lse, schedule, T, num_heads, scale):
        """A consumer warpgroup: 64 queries of each item."""
        warpgroup, thread = uniform(cuda.threadIdx.x >> 7) - 1, cuda.threadIdx.x & 127
        row, column, factor = first_row(thread), first_column(thread), scale * LOG2_E
        staging = shared + OUT_AT + warpgroup * OWN
        first_q = keep(descriptor(shared + warpgroup * OWN, 0))
        first_k = keep(descriptor(shared + KV_AT, 2 * CHUNK))
        place = place_of(thread)
        scores, acc = cuda.local.array(SCORES, float32), cuda.local.array(SUMS, float32)
        weights, rounded = cuda.local.array(WEIGHTS, uint32), cuda.local.array(PAIRS, uint32)
        stage, parity, buffer, q_parity = uint32(0), uint32(0), uint32(0), uint32(0)
        if thread == 0:
            tensor_map_acquire(out_map)
        i, head, first = item_of(schedule, 0)
        while head >= 0:
            i, next_head, next_first = item_of(schedule, i)  # early, as it takes long to arrive
            last, t0 = last_tile(first, T), int32(first + int32(warpgroup * 64))
            mbarrier_wait(shared + Q_FULL + 8 * buffer, q_parity)
            if t0 < 0:  # no such queries
                for _ in range(2 * (last + 1)):
                    stage, parity = pass_over(shared, stage, parity)
                release(shared + Q_EMPTY + 8 * buffer)
            else:
                # the warpgroup may need one tile less than others
                n = int32(int32(min(t0 + 63, T - 1)) >> 7)
                skips = n < last
                q = at_stage(first_q, buffer, Q)

                # the last tile contains the diagonal
                if skips:
                    stage, parity = pass_over(shared, stage, parity)
                mbarrier_wait(shared + FULL + 8 * stage, parity)
                start_scores(scores, q, at_stage(first_k, stage, TILE))
                wgmma_wait(0)
                settle(scores, SCORES)
                release(shared + EMPTY + 8 * stage)
                stage, parity = next_stage(stage, parity, RING)
                mask_columns(scores, int32(t0 + row - n * KEYS - column))
                top, low_top = row_max(scores, MASKED, MASKED)
                total, low_total = exp2_rows(scores, factor, -top * factor, -low_top * factor)
                pack_pairs(weights, scores)
                if skips:
                    stage, parity = pass_over(shared, stage, parity)
                clear(acc, SUMS)
                mbarrier_wait(shared + FULL + 8 * stage, parity)
                while n > 0:
                    # start the scores of tile n - 1 and add the values of tile n
                    start_scores(scores, q, at_stage(first_k, stage, TILE))
                    k_stage = stage
                    stage, parity = next_stage(stage, parity, RING)
                    mbarrier_wait(shared + FULL + 8 * stage, parity)
                    wgmma_rs(acc, weights, at_stage(first_k, stage, TILE), 1, HS, KEYS, 1)
                    wgmma_wait(1)
                    settle(scores, SCORES)
                    release(shared + EMPTY + 8 * k_stage)

                    # softmax of tile n - 1; when a row's maximum grows, its sums so far shrink
                    before, low_before = top, low_top
                    top, low_top = row_max(scores, top, low_top)
                    shrink, low_shrink = exp2((before - top) * factor), exp2((low_before - low_top) * factor)
                    added, low_added = exp2_rows(scores, factor, -top * factor, -low_top * factor)
                    total, low_total = total * shrink + added, low_total * low_shrink + low_added
                    settle(scores, SCORES)
                    v_stage = stage
                    stage, parity = next_stage(stage, parity, RING)
                    mbarrier_wait(shared + FULL + 8 * stage, parity)  # keeps wgmma_wait behind the softmax
                    wgmma_wait(0)
                    settle(acc, SUMS)
                    settle(scores, SCORES)
                    release(shared + EMPTY + 8 * v_stage)
                    scale_rows(acc, shrink, low_shrink)
                    pack_pairs(weights, scores)
                    n = int32(n - 1)
                release(shared + Q_EMPTY + 8 * buffer)
                wgmma_rs(acc, weights, at_stage(first_k, stage, TILE), 1, HS, KEYS, 1)

                # each thread has summed the weights of its own keys
                total += shuffle_xor(total, 1)
                low_total += shuffle_xor(low_total, 1)
                total += shuffle_xor(total, 2)
                low_total += shuffle_xor(low_total, 2)
                if column == 0:
                    if t0 + row < T:
                        lse[head, t0 + row] = top * scale + math.log(total)
                    if t0 + row + 8 < T:
                        lse[head, t0 + row + 8] = low_top * scale + math.log(low_total)

                # out, once the previous item's has been read from shared memory
                if thread == 0:
                    tma_store_wait_read(0)
                named_barrier(warpgroup + 1, 128)
                wgmma_wait(0)
                settle(acc, SUMS)
                release(shared + EMPTY + 8 * stage)
                stage, parity = next_stage(stage, parity, RING)
                scale_rows(acc, ONE / total, ONE / low_total)
                pack_pairs(rounded, acc)
                store_tile(staging, rounded, place)
                fence_proxy_async()
                named_barrier(warpgroup + 1, 128)
                if thread == 0:
                    b, h = divide(head, num_heads), remainder(head, num_heads)
                    for box in range(BOXES):
                        tma_store_3d(out_map, staging + box * CHUNK, h * HS + box * 64, t0, b)
                    tma_commit()
            buffer, q_parity = next_stage(buffer, q_parity, 2)
            head, first = next_head, next_first
        if thread == 0:
            tma_store_wait_read(0)

    @kernel(launch_bounds=(THREADS, 1))
    def attention_forward_kernel(qkv_map, kv_map, out_map, lse, schedule, num_heads, num_kv_heads, scale):
        """out =, lse (B*NH, T) = <- qkv; out and qkv through tensor maps.

        kv_map: qkv in boxes of 128 rows; the other maps have boxes of 64
        schedule (rounds, blocks, 2) int32: a block's items, each a head of B*NH and a first query; then the head is -1
        Grid: one block per SM; block: a producer and the consumer warpgroups.
        """
        shared, thread = dynamic_shared(), cuda.threadIdx.x
        if thread == 0:
            for i in range(2):
                mbarrier_init(shared + Q_FULL + 8 * i, 1)
                mbarrier_init(shared + Q_EMPTY + 8 * i, WARPS)
            for i in range(RING):
                mbarrier_init(shared + FULL + 8 * i, 1)
                mbarrier_init(shared + EMPTY + 8 * i, WARPS)
            fence_mbarrier_init()
            fence_proxy_async()
        cuda.syncthreads()
        if uniform(thread >> 7) == 0:
            setmaxnreg_dec(PRODUCER_REGISTERS)
            if thread == 0:
                produce(shared, qkv_map, kv_map, schedule, lse.shape[1], num_heads, num_kv_heads)
        else:
            setmaxnreg_inc(CONSUMER_REGISTERS)
            consume(shared, out_map, lse, schedule, lse.shape[1], num_heads, scale)

    return attention_forward_kernel
