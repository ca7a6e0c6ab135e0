"""The backward kernels of attention_wgmma.py.

The unit of work is the scores of 128 keys and 64 queries, one row per key. With p the weights and dp = v doutT their
gradients, ds = p * (dp - delta). A block takes 128 keys and goes through the tiles of 64 queries that see them:

    global memory     shared memory                      registers

                TMA   k, v: 128 x HS           wgmma     warpgroups 1 and 2, 64 keys each:
    qkv, dout ──────▶ ring of q, dout: 64 x HS ──────▶     scores = k qT      ─▶ p             float32, then bf16
    lse, delta        and their lse, delta                 dp     = v doutT   ─▶ ds            float32, then bf16
                                                           dv += p dout,  dk += ds q           float32
                      ring of ds: 128 x 64     ◀──────     ds
                                               ──────▶   warpgroup 3; with heads of 128, 64 channels by each of 1 and 2:
    dq sums     ◀───────────────────────────────────────   dsT k, added to dq                  float32
    dqkv        ◀──── dk, dv, dq                                                               bf16

The first warpgroup has four threads at work, each in a warp of its own: `load_keys`, `load_queries`, `await_turns`,
`announce`.

dq is the sum over the blocks of keys, which are different blocks' work. They add to it in global memory, in fact in L2,
from the last block of keys that a tile of queries sees to the first, so the sum always has the same bits. The first
addition stores, the last one leaves as bf16. A flag for each tile counts its additions; a block waits for its turn.

There is no deadlock: all blocks are resident, as there is at most one per SM. Think of all work in one order, head by
head, and within a head from the last block of keys to the first. Every block does its part in this order and waits only
for work that comes earlier, so the block that has the earliest unfinished work can always go on.

ptxas wants the same things as in wgmma_attention_forward.py.
"""

import functools
import math

import numpy as np
from numba import cuda

from llm_numba.cuda.hopper import (
    CHUNK,
    EVICT_FIRST,
    address,
    bulk_load,
    clear,
    descriptor,
    divide,
    dynamic_shared,
    fence_mbarrier_init,
    fence_proxy_async,
    forget,
    inlined,
    keep,
    load_constant_16_bytes,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    named_barrier,
    opaque,
    remainder,
    setmaxnreg_dec,
    setmaxnreg_inc,
    settle,
    shuffle_xor,
    store_flag,
    sync_warp,
    tensor_map_acquire,
    tma_commit,
    tma_load_3d,
    tma_load_3d_hint,
    tma_store_3d_hint,
    tma_store_wait_read,
    uniform,
    unpack,
    wait_flag,
    wgmma,
    wgmma_open,
    wgmma_rs,
    wgmma_rs_open,
    wgmma_wait,
)
from llm_numba.cuda.jit import float32, int32, int64, kernel, uint32
from llm_numba.cuda.wgmma_registers import (
    add_sums,
    at_stage,
    exp2_columns,
    first_column,
    first_row,
    load_columns,
    load_sums,
    mask_rows,
    next_stage,
    pack_pairs,
    pack_scaled,
    place_of,
    score_gradients,
    store_sums,
    store_tile,
)

ONE, LOG2_E = float32(1), float32(1 / math.log(2))
QUERIES, KEYS = 64, 128
STATISTICS = 512  # bytes of a tile's lse and delta
STAGES = {64: 4, 128: 2}  # tiles of queries in shared memory
KV_STAGES = {64: 2, 128: 1}  # blocks of keys and values in shared memory
DS_STAGES = {64: 3, 128: 2}
THREADS = {64: 512, 128: 384}
TURN_BITS = 2  # 4 stages between the warpgroups that add to dq and the threads that await turns and announce


def layout(HS: int) -> dict[str, int]:
    """Where everything lies in shared memory: name -> offset; "end" is the size."""
    box = HS // 64 * CHUNK  # 64 rows
    sizes = {
        "kv": 4 * box * KV_STAGES[HS],
        "queries": 2 * box * STAGES[HS],
        "ds": 2 * CHUNK * DS_STAGES[HS],
        "dkv": 4 * box,
        "dq": CHUNK if HS == 64 else 0,
        "statistics": STATISTICS * STAGES[HS],
        "full": 8 * STAGES[HS],
        "empty": 8 * STAGES[HS],
        "kv_full": 8 * KV_STAGES[HS],
        "kv_empty": 8 * KV_STAGES[HS],
        "ds_full": 8 * DS_STAGES[HS],
        "ds_empty": 8 * DS_STAGES[HS],
        "turn_full": 8 << TURN_BITS,
        "turn_empty": 8 << TURN_BITS,
        "added_full": 8 << TURN_BITS,
        "added_empty": 8 << TURN_BITS,
        "end": 0,
    }
    ends = np.cumsum([0, *sizes.values()])
    return {name: int(end) for name, end in zip(sizes, ends, strict=False)}


@functools.cache
def statistics_kernel(HS: int):
    """The kernel that makes what `backward_kernel` reads for each query, and clears the flags."""
    LANES = HS // 16  # threads of a query

    @kernel(launch_bounds=QUERIES * LANES)
    def attention_statistics_kernel(statistics, flags, out, dout, lse):
        """statistics (B*NH, tiles, 2, 64) =: of each tile of 64 queries lse / ln(2), then delta = sum(dout * out).

        Rows past the last query get infinity and 0, which make their weights 0. flags (B*NH, tiles) = 0.
        out, dout (B, T, C), lse (B, NH, T)
        Grid: (tiles, NH, B); block: QUERIES * LANES; a thread owns 16 channels of a query. Moves: out and dout once.
        """
        tile, h, b = uint32(cuda.blockIdx.x), uint32(cuda.blockIdx.y), uint32(cuda.blockIdx.z)
        i, lane, T = uint32(cuda.threadIdx.x // LANES), uint32(cuda.threadIdx.x % LANES), uint32(lse.shape[2])
        t = uint32(tile * QUERIES + i)
        first = int64(uint32(b * T + min(t, uint32(T - 1)))) * out.shape[2] + uint32(h * HS + lane * 8)
        delta = float32(0)
        for part in range(2):
            at = (first + part * (HS // 2)) * 2
            x, y = load_constant_16_bytes(address(out) + at), load_constant_16_bytes(address(dout) + at)
            for pair in range(4):
                (left, right), (dleft, dright) = unpack(x[pair]), unpack(y[pair])
                delta += left * dleft + right * dright
        delta += shuffle_xor(delta, 1)
        delta += shuffle_xor(delta, 2)
        if LANES == 8:
            delta += shuffle_xor(delta, 4)
        if lane == 0:
            head = uint32(b * uint32(lse.shape[1]) + h)
            statistics[head, tile, 0, i] = lse[b, h, t] * LOG2_E if t < T else float32(np.inf)
            statistics[head, tile, 1, i] = delta if t < T else float32(0)
            if i == 0:
                flags[head, tile] = 0

    return attention_statistics_kernel


@functools.cache
def backward_kernel(HS: int):
    """The kernel of `backward` for heads of HS channels."""
    BOXES, RING, KV_RING, DS_RING = HS // 64, STAGES[HS], KV_STAGES[HS], DS_STAGES[HS]
    TILE, KV = BOXES * CHUNK, 2 * BOXES * CHUNK  # bytes of 64 queries, of 128 keys
    SCORES, PAIRS, COLUMNS, SUMS, SUM_PAIRS = 32, 16, 16, HS // 2, HS // 4  # registers
    at = layout(HS)
    QUERIES_AT, DS_AT, DKV_AT, DQ_AT, STATISTICS_AT = (at[x] for x in ("queries", "ds", "dkv", "dq", "statistics"))
    FULL, EMPTY, KV_FULL, KV_EMPTY = at["full"], at["empty"], at["kv_full"], at["kv_empty"]
    DS_FULL, DS_EMPTY, TURN_FULL, TURN_EMPTY = at["ds_full"], at["ds_empty"], at["turn_full"], at["turn_empty"]
    ADDED_FULL, ADDED_EMPTY = at["added_full"], at["added_empty"]
    # registers: as in the forward, all warpgroups together have as many as a block starts with
    DQ_WARPS, KV_READERS, PRODUCER_REGISTERS = {64: (4, 12, 32), 128: (8, 8, 24)}[HS]

    @inlined
    def block_of_keys(head, turn, work):
        """The block of keys of this block's turn, or -1 if there are fewer, or no such head."""
        team, _, heads, tiles, _, _, _ = work
        rank = int32(remainder(cuda.blockIdx.x, team))
        n = ((tiles + 1) >> 1) - 1 - turn * team - (team - 1 - rank if turn & 1 else rank)
        return int32(n if n >= 0 and head < heads else -1)

    @inlined
    def first_tile(work):
        """(head, turn, n, g, m): the first tile of queries that this block works on; n is -1 if there is none.

        head: of the keys; n: block of keys, this team's turn; g: query head in the group; m: tile of queries.
        work: (blocks per team, teams, B*NKV, tiles of queries, NH / NKV, NH, NKV)
        """
        team, teams, heads, _, _, _, _ = work
        first = int32(divide(cuda.blockIdx.x, team))
        head = first if first < teams else heads
        n = block_of_keys(head, 0, work)
        return head, int32(0), n, int32(0), int32(2 * n)

    @inlined
    def next_tile(head, turn, n, g, m, work):
        """The next one: the tiles of a query head that see a block of keys, for each query head of the group."""
        _, teams, _, tiles, group, _, _ = work
        m += int32(1)
        if m == tiles:
            g += int32(1)
            if g == group:
                g = int32(0)
                turn += int32(1)
                n = block_of_keys(head, turn, work)
                if n < 0:
                    head, turn = int32(head + teams), int32(0)
                    n = block_of_keys(head, turn, work)
            m = int32(2 * n)
        return int32(head), int32(turn), int32(n), int32(g), int32(m)

    @inlined
    def tile_of(head, g, m, work):
        """(query head of B*NH, index of its tile m of B*NH*tiles)."""
        _, _, _, tiles, group, _, _ = work
        h = uint32(head * group + g)
        return h, uint32(h * tiles + m)

    @inlined
    def release(barrier):
        """This warp has read what the barrier stands for: all its lanes, before one of them says so."""
        sync_warp()
        if cuda.threadIdx.x & 31 == 0:
            mbarrier_arrive(barrier)

    @inlined
    def load_keys(shared, kv_map, work):
        """One thread: blocks of keys and values to shared memory."""
        stage, parity = uint32(0), uint32(0)
        _, _, _, tiles, group, num_heads, num_kv_heads = work
        tensor_map_acquire(kv_map)
        head, turn, n, g, m = first_tile(work)
        while n >= 0:
            b, kv_head = int32(divide(head, num_kv_heads)), int32(remainder(head, num_kv_heads))
            full, to = shared + KV_FULL + 8 * stage, shared + stage * (2 * KV)
            mbarrier_wait(shared + KV_EMPTY + 8 * stage, parity ^ 1)
            mbarrier_arrive_expect_tx(full, 2 * KV)
            for box in range(2 * BOXES):  # k's, then v's
                channel = (num_heads + kv_head + box // BOXES * num_kv_heads) * HS + box % BOXES * 64
                tma_load_3d_hint(to + box * 2 * CHUNK, kv_map, full, channel, n * KEYS, b, EVICT_FIRST)
            stage, parity = next_stage(stage, parity, KV_RING)
            head, turn, n, g, m = next_tile(head, turn, n, group - 1, tiles - 1, work)

    @inlined
    def load_queries(shared, qkv_map, dout_map, statistics, work):
        """One thread: tiles of q, dout, lse and delta to shared memory."""
        stage, parity = uint32(0), uint32(0)
        tensor_map_acquire(qkv_map)
        tensor_map_acquire(dout_map)
        head, turn, n, g, m = first_tile(work)
        while n >= 0:
            full, to = shared + FULL + 8 * stage, shared + QUERIES_AT + stage * (2 * TILE)
            mbarrier_wait(shared + EMPTY + 8 * stage, parity ^ 1)
            mbarrier_arrive_expect_tx(full, 2 * TILE + STATISTICS)
            h, tile = tile_of(head, g, m, work)
            b, channel = int32(divide(h, work[5])), int32(remainder(h, work[5])) * HS
            for box in range(BOXES):
                tma_load_3d(to + box * CHUNK, qkv_map, full, channel + box * 64, m * QUERIES, b)
                tma_load_3d(to + TILE + box * CHUNK, dout_map, full, channel + box * 64, m * QUERIES, b)
            to = shared + STATISTICS_AT + stage * STATISTICS
            bulk_load(to, address(statistics) + int64(tile) * STATISTICS, STATISTICS, full)
            stage, parity = next_stage(stage, parity, RING)
            head, turn, n, g, m = next_tile(head, turn, n, g, m, work)

    @inlined
    def await_turns(shared, flags, work):
        """One thread: wait until the additions to a tile of dq that come before this block's are there."""
        count = uint32(0)
        head, turn, n, g, m = first_tile(work)
        while n >= 0:
            barrier, parity = turn_barrier(shared, count)
            mbarrier_wait(barrier + TURN_EMPTY, parity ^ 1)
            _, tile = tile_of(head, g, m, work)
            wait_flag(address(flags) + int64(tile) * 4, (m >> 1) - n)
            mbarrier_arrive(barrier + TURN_FULL)
            count = uint32(count + 1)
            head, turn, n, g, m = next_tile(head, turn, n, g, m, work)

    @inlined
    def announce(shared, flags, work):
        """One thread: tell the other blocks which additions to dq are there."""
        count = uint32(0)
        head, turn, n, g, m = first_tile(work)
        while n >= 0:
            barrier, parity = turn_barrier(shared, count)
            mbarrier_wait(barrier + ADDED_FULL, parity)
            _, tile = tile_of(head, g, m, work)
            store_flag(address(flags) + int64(tile) * 4, (m >> 1) - n + 1)
            mbarrier_arrive(barrier + ADDED_EMPTY)
            count = uint32(count + 1)
            head, turn, n, g, m = next_tile(head, turn, n, g, m, work)

    @inlined
    def turn_barrier(shared, count):
        """(what to add to TURN_FULL, ... for the mbarrier of this block's tile number `count` of dq, its parity)"""
        return shared + 8 * (count & ((1 << TURN_BITS) - 1)), count >> TURN_BITS & 1

    @inlined
    def take_turn(shared, count):
        """Wait until this block may add to its tile of dq."""
        barrier, parity = turn_barrier(shared, count)
        mbarrier_wait(barrier + TURN_FULL, parity)
        release(barrier + TURN_EMPTY)

    @inlined
    def begin_dq(shared, dq, sums_at, n, m, count):
        """What a product is added to in registers: the sum of all others if it is a tile's last, else 0."""
        if n == 0 and m > 1:
            take_turn(shared, count)
            load_sums(dq, sums_at)
        else:
            clear(dq, SCORES)

    @inlined
    def end_dq(shared, dqkv_map, dq, pairs, place, warpgroup, staging, sums_at, h, box, n, m, work, scale, count):
        """Add a product to 64 channels of a tile of dq in its turn. The first stores, the last leaves as bf16."""
        if n == 0:
            if m < 2:
                take_turn(shared, count)
            elected = cuda.threadIdx.x & 127 == 0
            pack_scaled(pairs, dq, scale)
            if elected:
                tma_store_wait_read(0)
            named_barrier(warpgroup + 1, 128)
            store_tile(staging, pairs, place)
            fence_proxy_async()
            named_barrier(warpgroup + 1, 128)
            if elected:
                b, channel = divide(h, work[5]), remainder(h, work[5]) * HS + box * 64
                tma_store_3d_hint(dqkv_map, staging, channel, m * QUERIES, b, EVICT_FIRST)
                tma_commit()
        else:
            take_turn(shared, count)
            if m < 2 * n + 2:
                store_sums(sums_at, dq)
            else:
                add_sums(sums_at, dq)
        barrier, parity = turn_barrier(shared, count)
        mbarrier_wait(barrier + ADDED_EMPTY, parity ^ 1)
        release(barrier + ADDED_FULL)

    @inlined
    def add_up_dq(shared, dqkv_map, dq_sums, work, scale):
        """Warpgroup 3 for heads of 64: dq."""
        dq, pairs = cuda.local.array(SCORES, float32), cuda.local.array(PAIRS, uint32)
        kv_stage, kv_parity, ds_stage, ds_parity = uint32(0), uint32(0), uint32(0), uint32(0)
        count = uint32(0)
        first_ds, first_k = keep(descriptor(shared + DS_AT, 0)), keep(descriptor(shared, 0))
        place = place_of(cuda.threadIdx.x)
        own_sums = address(dq_sums) + (cuda.threadIdx.x & 127) * 16
        head, turn, n, g, m = first_tile(work)
        while n >= 0:
            if g == 0 and m == 2 * n:
                mbarrier_wait(shared + KV_FULL + 8 * kv_stage, kv_parity)
            h, tile = tile_of(head, g, m, work)
            sums_at = own_sums + int64(tile) * (QUERIES * HS * 4)
            begin_dq(shared, dq, sums_at, n, m, count)
            mbarrier_wait(shared + DS_FULL + 8 * ds_stage, ds_parity)
            ds, k = at_stage(first_ds, ds_stage, 2 * CHUNK), at_stage(first_k, kv_stage, 2 * KV)
            wgmma(dq, ds, k, 1, 64, 64, KEYS, 1, 1)
            wgmma_wait(0)
            settle(dq, SCORES)
            release(shared + DS_EMPTY + 8 * ds_stage)
            ds_stage, ds_parity = next_stage(ds_stage, ds_parity, DS_RING)
            end_dq(shared, dqkv_map, dq, pairs, place, 2, shared + DQ_AT, sums_at, h, 0, n, m, work, scale, count)
            count = uint32(count + 1)
            head_before, n_before = head, n
            head, turn, n, g, m = next_tile(head, turn, n, g, m, work)
            if head != head_before or n != n_before:
                release(shared + KV_EMPTY + 8 * kv_stage)
                kv_stage, kv_parity = next_stage(kv_stage, kv_parity, KV_RING)

    @inlined
    def store_dkv(shared, dqkv_map, warpgroup, dk, dv, pairs, place, head, n, work, scale):
        """A warpgroup's 64 rows of dk and dv, once the previous block's have been read from shared memory."""
        elected, staging = cuda.threadIdx.x & 127 == 0, shared + DKV_AT + warpgroup * (2 * TILE)
        if elected:
            tma_store_wait_read(0)
        named_barrier(warpgroup + 1, 128)
        pack_scaled(pairs, dk, scale)
        store_tile(staging, pairs, place)
        pack_scaled(pairs, dv, ONE)
        store_tile(staging + TILE, pairs, place)
        fence_proxy_async()
        named_barrier(warpgroup + 1, 128)
        if elected:
            num_heads, num_kv_heads = work[5], work[6]
            b, kv_head = divide(head, num_kv_heads), remainder(head, num_kv_heads)
            row = n * KEYS + int32(warpgroup * 64)
            for box in range(2 * BOXES):
                channel = (num_heads + kv_head + box // BOXES * num_kv_heads) * HS + box % BOXES * 64
                tma_store_3d_hint(dqkv_map, staging + box * CHUNK, channel, row, b, EVICT_FIRST)
            tma_commit()

    @inlined
    def own_keys(shared, dqkv_map, work, scale):
        """Warpgroup 1 or 2 for heads of 64: dk and dv of 64 keys of each block, and ds for dq.

        One loop over the tiles of all blocks of keys. The last part of a tile (ds to shared memory, dk) comes after the
        start of the next tile's scores, whatever block of keys that belongs to. There is one round more than tiles: in
        the last, the scores and what is made of them are of no use, as is dk in the first (see the traps above).
        """
        warpgroup, thread = uniform(cuda.threadIdx.x >> 7) - 1, cuda.threadIdx.x & 127
        diagonal = first_column(thread) - first_row(thread) - int32(warpgroup * 64)
        scores, dscores = cuda.local.array(SCORES, float32), cuda.local.array(SCORES, float32)
        dk, dv = cuda.local.array(SUMS, float32), cuda.local.array(SUMS, float32)
        weights, ds = cuda.local.array(PAIRS, uint32), cuda.local.array(PAIRS, uint32)
        pairs, columns = cuda.local.array(SUM_PAIRS, uint32), cuda.local.array(COLUMNS, float32)
        stage, parity, kv_stage, kv_parity = uint32(0), uint32(0), uint32(0), uint32(0)
        ds_stage, ds_parity = uint32(0), uint32(0)
        first_k = keep(descriptor(shared + warpgroup * CHUNK, 0))
        first_q = keep(descriptor(shared + QUERIES_AT, CHUNK))
        place, statistics = place_of(thread), opaque(shared + STATISTICS_AT + first_column(thread) * 4)
        ds_tile = shared + DS_AT + warpgroup * CHUNK
        clear(dk, SUMS)
        clear(dv, SUMS)
        clear(scores, SCORES)
        clear(dscores, SCORES)
        for i in range(PAIRS):
            ds[i] = 0
        head, turn, n, g, m = first_tile(work)
        if n >= 0:
            mbarrier_wait(shared + KV_FULL, 0)
        head_before, n_before = head, n
        accumulate = uint32(0)  # whether dk and dv have begun
        before = uint32(0)  # the barrier of the previous tile's stage, if there is a previous tile
        q_before = first_q
        ended = False  # whether the previous tile was the last of its block
        going = True
        while going:
            going = n >= 0
            if going:
                mbarrier_wait(shared + FULL + 8 * stage, parity)
            q, k = at_stage(first_q, stage, 2 * TILE), at_stage(first_k, kv_stage, 2 * KV)
            wgmma(scores, k, q, 0, 64, QUERIES, 64, 0, 0)
            if before > 0:
                mbarrier_wait(shared + DS_EMPTY + 8 * ds_stage, ds_parity ^ 1)
                store_tile(ds_tile + ds_stage * (2 * CHUNK), ds, place)
            wgmma_rs_open(dk, ds, q_before, accumulate, 64, QUERIES, 1)
            wgmma(dscores, k + (KV >> 4), q + (TILE >> 4), 0, 64, QUERIES, 64, 0, 0)
            if before > 0:
                fence_proxy_async()
                release(shared + DS_FULL + 8 * ds_stage)
                ds_stage, ds_parity = next_stage(ds_stage, ds_parity, DS_RING)
                accumulate = uint32(1)
            if ended:
                accumulate = uint32(0)
                wgmma_wait(0)
                settle(dk, SUMS)
                settle(dv, SUMS)
                release(shared + KV_EMPTY + 8 * (kv_stage ^ 1))
                store_dkv(shared, dqkv_map, warpgroup, dk, dv, pairs, place, head_before, n_before, work, scale)
            numbers, here = statistics + stage * STATISTICS, uint32(shared + EMPTY + 8 * stage)
            stage, parity = next_stage(stage, parity, RING)

            load_columns(columns, numbers)  # lse; while the products run
            wgmma_wait(1)
            settle(scores, SCORES)
            past = int32(m - 2 * n)  # tiles from the first that sees these keys
            if past < 2:
                mask_rows(scores, int32(past * QUERIES + diagonal))
            exp2_columns(scores, scale * LOG2_E, columns)
            pack_pairs(weights, scores)
            wgmma_rs(dv, weights, q + (TILE >> 4), accumulate, 64, QUERIES, 1)
            load_columns(columns, numbers + 256)  # delta
            wgmma_wait(1)
            settle(dscores, SCORES)
            if before > 0:
                release(before)
            before, q_before = here, q
            score_gradients(dscores, scores, columns)
            pack_pairs(ds, dscores)
            settle(ds, PAIRS)

            head_before, n_before = head, n
            if going:
                head, turn, n, g, m = next_tile(head, turn, n, g, m, work)
            ended = head != head_before or n != n_before
            if ended:
                kv_stage, kv_parity = next_stage(kv_stage, kv_parity, KV_RING)
                if n >= 0:
                    mbarrier_wait(shared + KV_FULL + 8 * kv_stage, kv_parity)
        wgmma_wait(0)

    @inlined
    def own_wide_keys(shared, dqkv_map, dq_sums, work, scale):
        """Warpgroup 1 or 2 for heads of 128: dk and dv of 64 keys of each block, and 64 channels of dq."""
        warpgroup, thread = uniform(cuda.threadIdx.x >> 7) - 1, cuda.threadIdx.x & 127
        diagonal = first_column(thread) - first_row(thread) - int32(warpgroup * 64)
        scores, dscores = cuda.local.array(SCORES, float32), cuda.local.array(SCORES, float32)
        dk, dv, dq = cuda.local.array(SUMS, float32), cuda.local.array(SUMS, float32), cuda.local.array(SCORES, float32)
        weights, ds = cuda.local.array(PAIRS, uint32), cuda.local.array(PAIRS, uint32)
        pairs, columns = cuda.local.array(SUM_PAIRS, uint32), cuda.local.array(COLUMNS, float32)
        count, kv_parity = uint32(0), uint32(0)
        k, k_columns = descriptor(shared + warpgroup * CHUNK, 0), descriptor(shared + warpgroup * (2 * CHUNK), 0)
        v = k + (KV >> 4)
        place = place_of(thread)
        staging = shared + DKV_AT + warpgroup * (2 * TILE)
        own_sums = address(dq_sums) + thread * 16 + warpgroup * (QUERIES * 64 * 4)
        clear(dk, SUMS)
        clear(dv, SUMS)
        head, turn, n, g, m = first_tile(work)
        while n >= 0:
            is_first, stage = g == 0 and m == 2 * n, count & 1
            if is_first:
                mbarrier_wait(shared + KV_FULL, kv_parity)
            accumulate = uint32(0) if is_first else uint32(1)
            mbarrier_wait(shared + FULL + 8 * stage, count >> 1 & 1)
            q = descriptor(shared + QUERIES_AT + stage * (2 * TILE), CHUNK)
            dout = q + (TILE >> 4)
            wgmma_open(scores, k, q, 0, 64, QUERIES, 64, 0, 0)
            wgmma(scores, k + (2 * CHUNK >> 4), q + (CHUNK >> 4), 1, 64, QUERIES, 64, 0, 0)
            wgmma_open(dscores, v, dout, 0, 64, QUERIES, 64, 0, 0)
            wgmma(dscores, v + (2 * CHUNK >> 4), dout + (CHUNK >> 4), 1, 64, QUERIES, 64, 0, 0)
            wgmma_wait(1)
            settle(scores, SCORES)
            past = int32(m - 2 * n)  # tiles from the first that sees these keys
            if past < 2:
                mask_rows(scores, int32(past * QUERIES + diagonal))
            numbers = shared + STATISTICS_AT + stage * STATISTICS + uint32(first_column(thread)) * 4
            load_columns(columns, numbers)
            exp2_columns(scores, scale * LOG2_E, columns)
            pack_pairs(weights, scores)
            wgmma_rs(dv, weights, dout, accumulate, HS, QUERIES, 1)
            wgmma_wait(1)
            settle(dscores, SCORES)
            load_columns(columns, numbers + 256)
            score_gradients(dscores, scores, columns)
            pack_pairs(ds, dscores)
            settle(ds, PAIRS)
            forget(scores, SCORES)
            forget(dscores, SCORES)
            ds_tile = shared + DS_AT + stage * (2 * CHUNK)
            store_tile(ds_tile + warpgroup * CHUNK, ds, place)
            fence_proxy_async()
            wgmma_rs(dk, ds, q, accumulate, HS, QUERIES, 1)

            # dq, once both warpgroups' ds are there; the next tile's ds go elsewhere, as these may still be read then
            named_barrier(3, 256)
            h, tile = tile_of(head, g, m, work)
            sums_at = own_sums + int64(tile) * (QUERIES * HS * 4)
            begin_dq(shared, dq, sums_at, n, m, count)
            wgmma(dq, descriptor(ds_tile, 0), k_columns, 1, 64, 64, KEYS, 1, 1)
            wgmma_wait(0)
            settle(dq, SCORES)
            settle(dk, SUMS)
            settle(dv, SUMS)
            release(shared + EMPTY + 8 * stage)
            end_dq(
                shared,
                dqkv_map,
                dq,
                weights,
                place,
                warpgroup,
                staging,
                sums_at,
                h,
                warpgroup,
                n,
                m,
                work,
                scale,
                count,
            )
            count = uint32(count + 1)
            head_before, n_before = head, n
            head, turn, n, g, m = next_tile(head, turn, n, g, m, work)
            if head != head_before or n != n_before:
                release(shared + KV_EMPTY)
                kv_parity = uint32(kv_parity ^ 1)
                store_dkv(shared, dqkv_map, warpgroup, dk, dv, pairs, place, head_before, n_before, work, scale)

    @inlined
    def consume_64(shared, dqkv_map, dq_sums, work, scale):
        if uniform(cuda.threadIdx.x >> 7) == 3:
            setmaxnreg_dec(80)
            add_up_dq(shared, dqkv_map, dq_sums, work, scale)
        else:
            setmaxnreg_inc(200)
            own_keys(shared, dqkv_map, work, scale)

    @inlined
    def consume_128(shared, dqkv_map, dq_sums, work, scale):
        setmaxnreg_inc(240)
        own_wide_keys(shared, dqkv_map, dq_sums, work, scale)

    consume = {64: consume_64, 128: consume_128}[HS]

    @kernel(launch_bounds=(THREADS[HS], 1))
    def attention_backward_kernel(
        qkv_map, kv_map, dout_map, dqkv_map, statistics, dq_sums, flags, team, teams, heads, tiles, NH, NKV, scale
    ):
        """dqkv = <- qkv, dout through tensor maps, and statistics (B*NH, tiles, 2, 64).

        kv_map: qkv in boxes of 128 rows; the other maps have boxes of 64. dq_sums: B*NH*tiles tiles (64, HS) float32 in
        the order of the registers, of which nothing is assumed. flags (B*NH, tiles): 0. heads: B*NKV. `team` blocks
        share a head of keys; there are `teams` of them.
        Grid: one block per SM, or fewer; block: THREADS.
        """
        shared, thread = dynamic_shared(), cuda.threadIdx.x
        if thread == 0:
            for i in range(RING):
                mbarrier_init(shared + FULL + 8 * i, 1)
                mbarrier_init(shared + EMPTY + 8 * i, 8)
            for i in range(KV_RING):
                mbarrier_init(shared + KV_FULL + 8 * i, 1)
                mbarrier_init(shared + KV_EMPTY + 8 * i, KV_READERS)
            for i in range(DS_RING):
                mbarrier_init(shared + DS_FULL + 8 * i, 8)
                mbarrier_init(shared + DS_EMPTY + 8 * i, 4)
            for i in range(1 << TURN_BITS):
                mbarrier_init(shared + TURN_FULL + 8 * i, 1)
                mbarrier_init(shared + TURN_EMPTY + 8 * i, DQ_WARPS)
                mbarrier_init(shared + ADDED_FULL + 8 * i, DQ_WARPS)
                mbarrier_init(shared + ADDED_EMPTY + 8 * i, 1)
            fence_mbarrier_init()
            fence_proxy_async()
        cuda.syncthreads()
        group = int32(divide(NH, NKV))
        work = int32(team), int32(teams), int32(heads), int32(tiles), group, int32(NH), int32(NKV)
        if uniform(thread >> 7) == 0:
            setmaxnreg_dec(PRODUCER_REGISTERS)
            if thread == 0:
                load_keys(shared, kv_map, work)
            elif thread == 32:
                load_queries(shared, qkv_map, dout_map, statistics, work)
            elif thread == 64:
                await_turns(shared, flags, work)
            elif thread == 96:
                announce(shared, flags, work)
        else:
            if thread & 127 == 0:
                tensor_map_acquire(dqkv_map)
            consume(shared, dqkv_map, dq_sums, work, scale)
            tma_store_wait_read(0)

    return attention_backward_kernel
