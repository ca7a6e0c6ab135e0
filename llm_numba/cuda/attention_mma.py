"""Attention in bf16 on tensor cores, for cards of capability 8.0 and later: the tiles of attention.py, held otherwise.

A warp owns 16 rows of a tile, or 32. Of the scores of its rows it holds in each thread what the tensor cores gave it,
and as a product's result is spread over the threads like the next product's first operand, the weights go from one to
the other without leaving the registers; they are rounded to bf16 for it, while their sums stay in float32. What the
block goes through comes to shared memory in the background, the next tile while the present one is worked on.

In shared memory a row's chunks of 8 numbers (16 bytes) are shuffled by an exclusive or with the row's number, so that
the eight rows that a warp reads at once lie in different banks.

Source: Dao 2023, FlashAttention-2, arXiv:2307.08691.
"""

import math

import numpy as np
from numba import cuda
from numba.cuda import types

from llm_numba.cuda.jit import ALL_LANES, blocks_for, device, exp2, float32, kernel, uint32, with_shared
from llm_numba.cuda.tensor_cores import (
    address,
    close_group,
    copy_async,
    ldmatrix,
    ldmatrix_transposed,
    mma,
    pack,
    shared_address,
    store_16_bytes,
    store_shared,
    wait_for_all_but,
)

ZERO, ONE, LOG2_E = float32(0), float32(1), float32(1 / math.log(2))
NOTHING = float32(-np.inf)  # the score of a key that a query must not see
wait_for_copies = wait_for_all_but(0)

# for each head size: warps of a block, rows of a warp / 16, rows of the tiles that the block goes through, and how many
# blocks share one multiprocessor's registers
FORWARD_TILES = {64: (4, 2, 64, 2), 128: (8, 1, 64, 1)}
DKV_TILES = {64: (4, 1, 32, 3), 128: (4, 1, 32, 2)}
DQ_TILES = {64: (4, 2, 32, 2), 128: (4, 1, 32, 2)}


@device
def fetch(box, rows, b, first, channel, count, HS, threads):
    """Start to copy rows[b, first : first + count, channel : channel + HS]; zeros stand for rows past the last."""
    T, chunks = rows.shape[1], HS // 8
    for i in range(count * chunks // threads):
        n = cuda.threadIdx.x + i * threads
        r, chunk = n // chunks, n % chunks
        source = (b * T + min(first + r, T - 1)) * rows.shape[2] + channel + chunk * 8
        copy_async(box + r * HS * 2 + ((chunk ^ (r & 7)) << 4), address(rows) + source * 2, 16 if first + r < T else 0)


@device
def own_rows(box, row, HS):
    """Where this lane's row of a first operand lies: 16 rows from `row` on, of which all channels are summed over."""
    lane = cuda.threadIdx.x & 31
    r = row + (lane & 15)
    return box + r * HS * 2 + (((lane >> 4) ^ (r & 7)) << 4)


@device
def their_rows(box, HS):
    """Where this lane's row of a second operand lies, whose channels are summed over: 16 rows, 16 channels."""
    lane = cuda.threadIdx.x & 31
    r = (lane & 7) + ((lane >> 4) << 3)
    return box + r * HS * 2 + (((lane >> 3 & 1) ^ (r & 7)) << 4)


@device
def their_columns(box, HS):
    """Where this lane's row of a second operand lies, whose rows are summed over: 16 rows, 16 channels."""
    return own_rows(box, 0, HS)


@device
def add_product(sums, m, n, a, b0, b1):
    """sums[m, n] += a times b on the tensor cores."""
    new = mma((sums[m, n, 0], sums[m, n, 1], sums[m, n, 2], sums[m, n, 3]), a, b0, b1)
    sums[m, n, 0] = new[0]
    sums[m, n, 1] = new[1]
    sums[m, n, 2] = new[2]
    sums[m, n, 3] = new[3]


@device
def clear(sums):
    """sums = 0."""
    for m in range(sums.shape[0]):
        for n in range(sums.shape[1]):
            for i in range(4):
                sums[m, n, i] = ZERO


@device
def multiply(scores, pieces, mine, theirs, HS):
    """scores = the warp's rows (see own_rows) times those of another tile (see their_rows), over the channels.

    pieces: room for a first operand, (rows of the warp / 16, 4) uint32
    """
    clear(scores)
    for k in range(HS // 16):
        for m in range(scores.shape[0]):
            pieces[m, 0], pieces[m, 1], pieces[m, 2], pieces[m, 3] = ldmatrix((mine ^ (k << 5)) + m * 32 * HS)
        for n in range(0, scores.shape[1], 2):
            b = ldmatrix((theirs ^ (k << 5)) + n * 16 * HS)
            for m in range(scores.shape[0]):
                a = pieces[m, 0], pieces[m, 1], pieces[m, 2], pieces[m, 3]
                add_product(scores, m, n, a, b[0], b[1])
                add_product(scores, m, n + 1, a, b[2], b[3])


@device
def add_weighted(acc, weights, pieces, theirs, HS):
    """acc += the weights, rounded to bf16, times the rows of another tile (see their_columns)."""
    for k in range(weights.shape[1] // 2):
        for m in range(acc.shape[0]):
            pieces[m, 0] = pack(weights[m, 2 * k, 0], weights[m, 2 * k, 1])
            pieces[m, 1] = pack(weights[m, 2 * k, 2], weights[m, 2 * k, 3])
            pieces[m, 2] = pack(weights[m, 2 * k + 1, 0], weights[m, 2 * k + 1, 1])
            pieces[m, 3] = pack(weights[m, 2 * k + 1, 2], weights[m, 2 * k + 1, 3])
        for n in range(0, acc.shape[1], 2):
            b = ldmatrix_transposed((theirs ^ (n << 4)) + k * 32 * HS)
            for m in range(acc.shape[0]):
                a = pieces[m, 0], pieces[m, 1], pieces[m, 2], pieces[m, 3]
                add_product(acc, m, n, a, b[0], b[1])
                add_product(acc, m, n + 1, a, b[2], b[3])


@device
def scale_rows(acc, factors):
    """Each of the thread's rows of acc *= its factor, two for each m: of row lane // 4 and of the one 8 below."""
    for m in range(acc.shape[0]):
        for n in range(acc.shape[1]):
            for i in range(4):
                acc[m, n, i] *= factors[m, i // 2]


@device
def store_rows(rows, acc, factor, box, b, first, channel, HS):
    """rows[b, first + i, channel + c] = acc * factor, the warp's rows, by way of its part of shared memory, box."""
    T, chunks, lane = rows.shape[1], HS // 8, cuda.threadIdx.x & 31
    cuda.syncwarp()
    for m in range(acc.shape[0]):
        for half in range(2):
            r = m * 16 + half * 8 + (lane >> 2)
            row = box + r * HS * 2 + ((lane & 3) << 2)
            for n in range(acc.shape[1]):
                pair = pack(acc[m, n, 2 * half] * factor, acc[m, n, 2 * half + 1] * factor)
                store_shared(row + ((n ^ (r & 7)) << 4), pair)
    cuda.syncwarp()
    for i in range(acc.shape[0] * 16 * chunks // 32):
        n = lane + i * 32
        r, chunk = n // chunks, n % chunks
        if first + r < T:
            target = (b * T + first + r) * rows.shape[2] + channel + chunk * 8
            store_16_bytes(address(rows) + target * 2, box + r * HS * 2 + ((chunk ^ (r & 7)) << 4))


def make_forward_kernel(HS: int, WARPS: int, M: int, BK: int, BLOCKS: int):
    """attention_forward for heads of HS channels."""
    BQ, THREADS, N, CHANNELS = WARPS * M * 16, WARPS * 32, BK // 8, HS // 8
    OWN, TILE, ROWS = WARPS * M * 16 * HS * 2, BK * HS * 2, M * 16  # bytes of shared memory; rows of a warp

    @kernel(launch_bounds=(THREADS, BLOCKS))
    def flash_forward_kernel(out, lse, qkv, scale):
        """out (B, T, C) =, lse (B, NH, T) = <- qkv (B, T, 3*C), scale of the scores.

        Grid: (tiles of queries, NH, B), the longest rows first; block: WARPS warps. A thread owns, of M * 16 queries,
        the scores and channels that the tensor cores give it. Moves about T / (2 * BQ) times k and v, q and out once.
        """
        shared = shared_address(cuda.shared.array(0, types.uint8, alignment=256))
        scores, acc = cuda.local.array((M, N, 4), float32), cuda.local.array((M, CHANNELS, 4), float32)
        top, total = cuda.local.array((M, 2), float32), cuda.local.array((M, 2), float32)
        shrink, pieces = cuda.local.array((M, 2), float32), cuda.local.array((M, 4), uint32)
        h, b, T, C = cuda.blockIdx.y, cuda.blockIdx.z, out.shape[1], out.shape[2]
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        t0 = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * BQ
        row, column = t0 + warp * ROWS + (lane >> 2), (lane & 3) * 2
        factor = scale * LOG2_E
        fetch(shared, qkv, b, t0, h * HS, BQ, HS, THREADS)
        here, there = shared + OWN, shared + OWN + 2 * TILE
        fetch(here, qkv, b, 0, C + h * HS, BK, HS, THREADS)
        fetch(here + TILE, qkv, b, 0, 2 * C + h * HS, BK, HS, THREADS)
        close_group()
        mine = own_rows(shared, warp * ROWS, HS)
        clear(acc)
        for m in range(M):
            for i in range(2):
                top[m, i], total[m, i] = NOTHING, ZERO
        for s0 in range(0, min(t0 + BQ, T), BK):
            # wait for this tile, and for the warps that still read the one that is filled next
            wait_for_copies()
            cuda.syncthreads()
            if s0 + BK < min(t0 + BQ, T):
                fetch(there, qkv, b, s0 + BK, C + h * HS, BK, HS, THREADS)
                fetch(there + TILE, qkv, b, s0 + BK, 2 * C + h * HS, BK, HS, THREADS)
            close_group()

            if s0 < t0 + warp * ROWS + ROWS:  # else none of the warp's queries sees any of these keys
                multiply(scores, pieces, mine, their_rows(here, HS), HS)
                if s0 + BK > t0 + warp * ROWS:
                    ahead = row - column - s0
                    for m in range(M):
                        for n in range(N):
                            for i in range(4):
                                if ahead < n * 8 + (i & 1) - m * 16 - (i >> 1) * 8:
                                    scores[m, n, i] = NOTHING

                # the largest of each row so far; where a larger one has appeared, what was summed so far shrinks
                for m in range(M):
                    for i in range(2):
                        largest = top[m, i]
                        for n in range(N):
                            largest = max(largest, max(scores[m, n, 2 * i], scores[m, n, 2 * i + 1]))
                        largest = max(largest, cuda.shfl_xor_sync(ALL_LANES, largest, 1))
                        largest = max(largest, cuda.shfl_xor_sync(ALL_LANES, largest, 2))
                        shrink[m, i] = exp2((top[m, i] - largest) * factor)
                        top[m, i] = largest
                        total[m, i] *= shrink[m, i]
                scale_rows(acc, shrink)

                # weights
                for m in range(M):
                    for n in range(N):
                        for i in range(4):
                            scores[m, n, i] = exp2((scores[m, n, i] - top[m, i >> 1]) * factor)
                            total[m, i >> 1] += scores[m, n, i]
                add_weighted(acc, scores, pieces, their_columns(here + TILE, HS), HS)
            here, there = there, here

        # each thread has summed the weights of its own keys
        for m in range(M):
            for i in range(2):
                total[m, i] += cuda.shfl_xor_sync(ALL_LANES, total[m, i], 1)
                total[m, i] += cuda.shfl_xor_sync(ALL_LANES, total[m, i], 2)
                shrink[m, i] = ONE / total[m, i]
                t = row + m * 16 + i * 8
                if column == 0 and t < T:
                    lse[b, h, t] = top[m, i] * scale + math.log(total[m, i])
        scale_rows(acc, shrink)
        own = shared + warp * ROWS * HS * 2
        store_rows(out, acc, ONE, own, b, t0 + warp * ROWS, h * HS, HS)

    return flash_forward_kernel


def make_dkv_kernel(HS: int, WARPS: int, M: int, BQ: int, BLOCKS: int):
    """The keys' and values' half of attention_backward for heads of HS channels."""
    BK, THREADS, N, CHANNELS = WARPS * M * 16, WARPS * 32, BQ // 8, HS // 8
    OWN, TILE, ROWS = WARPS * M * 16 * HS * 2, BQ * HS * 2, M * 16

    @kernel(launch_bounds=(THREADS, BLOCKS))
    def flash_dkv_kernel(dqkv, dout, lse, delta, qkv, scale):
        """The keys' and the values' parts of dqkv (B, T, 3*C) = <- dout (B, T, C), lse, delta (B, NH, T), qkv.

        Grid: (tiles of keys, NH, B), the keys that most queries see first; block: WARPS warps. A thread owns, of M * 16
        keys, the scores and channels that the tensor cores give it. Moves about T / (2 * BK) times q and dout.
        """
        shared = shared_address(cuda.shared.array(0, types.uint8, alignment=256))
        weights, ds = cuda.local.array((M, N, 4), float32), cuda.local.array((M, N, 4), float32)
        dk, dv = cuda.local.array((M, CHANNELS, 4), float32), cuda.local.array((M, CHANNELS, 4), float32)
        pieces = cuda.local.array((M, 4), uint32)
        h, b, T, C = cuda.blockIdx.y, cuda.blockIdx.z, dout.shape[1], dout.shape[2]
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        s0 = cuda.blockIdx.x * BK
        row, column = s0 + warp * ROWS + (lane >> 2), (lane & 3) * 2
        factor = scale * LOG2_E
        k, v, here, there = shared, shared + OWN, shared + 2 * OWN, shared + 2 * OWN + 2 * TILE
        fetch(k, qkv, b, s0, C + h * HS, BK, HS, THREADS)
        fetch(v, qkv, b, s0, 2 * C + h * HS, BK, HS, THREADS)
        fetch(here, qkv, b, s0, h * HS, BQ, HS, THREADS)
        fetch(here + TILE, dout, b, s0, h * HS, BQ, HS, THREADS)
        close_group()
        clear(dk)
        clear(dv)
        for t0 in range(s0, T, BQ):
            wait_for_copies()
            cuda.syncthreads()
            if t0 + BQ < T:
                fetch(there, qkv, b, t0 + BQ, h * HS, BQ, HS, THREADS)
                fetch(there + TILE, dout, b, t0 + BQ, h * HS, BQ, HS, THREADS)
            close_group()

            if t0 + BQ > s0 + warp * ROWS:  # else none of these queries sees any of the warp's keys
                # weights, a key a row
                multiply(weights, pieces, own_rows(k, warp * ROWS, HS), their_rows(here, HS), HS)
                for n in range(N):
                    for j in range(2):
                        known = lse[b, h, uint32(min(t0 + column + n * 8 + j, T - 1))] * LOG2_E
                        for m in range(M):
                            for half in range(2):
                                weights[m, n, half * 2 + j] = exp2(weights[m, n, half * 2 + j] * factor - known)
                if t0 < s0 + warp * ROWS + ROWS or t0 + BQ > T:
                    ahead, left = row - column - t0, T - column - t0
                    for m in range(M):
                        for n in range(N):
                            for i in range(4):
                                if ahead > n * 8 + (i & 1) - m * 16 - (i >> 1) * 8 or left <= n * 8 + (i & 1):
                                    weights[m, n, i] = ZERO
                add_weighted(dv, weights, pieces, their_columns(here + TILE, HS), HS)

                # the scores' gradient
                multiply(ds, pieces, own_rows(v, warp * ROWS, HS), their_rows(here + TILE, HS), HS)
                for n in range(N):
                    for j in range(2):
                        owed = delta[b, h, uint32(min(t0 + column + n * 8 + j, T - 1))]
                        for m in range(M):
                            for half in range(2):
                                i = half * 2 + j
                                ds[m, n, i] = weights[m, n, i] * (ds[m, n, i] - owed)
                add_weighted(dk, ds, pieces, their_columns(here, HS), HS)
            here, there = there, here
        own = warp * ROWS * HS * 2
        store_rows(dqkv, dk, scale, k + own, b, s0 + warp * ROWS, C + h * HS, HS)
        store_rows(dqkv, dv, ONE, v + own, b, s0 + warp * ROWS, 2 * C + h * HS, HS)

    return flash_dkv_kernel


def make_dq_kernel(HS: int, WARPS: int, M: int, BK: int, BLOCKS: int):
    """The queries' half of attention_backward for heads of HS channels."""
    BQ, THREADS, N, CHANNELS = WARPS * M * 16, WARPS * 32, BK // 8, HS // 8
    OWN, TILE, ROWS = WARPS * M * 16 * HS * 2, BK * HS * 2, M * 16

    @kernel(launch_bounds=(THREADS, BLOCKS))
    def flash_dq_kernel(dqkv, dout, lse, delta, qkv, scale):
        """The queries' part of dqkv (B, T, 3*C) = <- dout (B, T, C), lse, delta (B, NH, T), qkv.

        Grid: (tiles of queries, NH, B), the longest rows first; block: WARPS warps. A thread owns, of M * 16 queries,
        the scores and channels that the tensor cores give it. Moves about T / (2 * BQ) times k and v.
        """
        shared = shared_address(cuda.shared.array(0, types.uint8, alignment=256))
        weights, ds = cuda.local.array((M, N, 4), float32), cuda.local.array((M, N, 4), float32)
        dq, pieces = cuda.local.array((M, CHANNELS, 4), float32), cuda.local.array((M, 4), uint32)
        known, owed = cuda.local.array((M, 2), float32), cuda.local.array((M, 2), float32)
        h, b, T, C = cuda.blockIdx.y, cuda.blockIdx.z, dout.shape[1], dout.shape[2]
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        t0 = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * BQ
        row, column = t0 + warp * ROWS + (lane >> 2), (lane & 3) * 2
        factor = scale * LOG2_E
        q, dy, here, there = shared, shared + OWN, shared + 2 * OWN, shared + 2 * OWN + 2 * TILE
        fetch(q, qkv, b, t0, h * HS, BQ, HS, THREADS)
        fetch(dy, dout, b, t0, h * HS, BQ, HS, THREADS)
        fetch(here, qkv, b, 0, C + h * HS, BK, HS, THREADS)
        fetch(here + TILE, qkv, b, 0, 2 * C + h * HS, BK, HS, THREADS)
        close_group()
        for m in range(M):
            for i in range(2):
                t = min(row + m * 16 + i * 8, T - 1)
                known[m, i], owed[m, i] = lse[b, h, t] * LOG2_E, delta[b, h, t]
        clear(dq)
        for s0 in range(0, min(t0 + BQ, T), BK):
            wait_for_copies()
            cuda.syncthreads()
            if s0 + BK < min(t0 + BQ, T):
                fetch(there, qkv, b, s0 + BK, C + h * HS, BK, HS, THREADS)
                fetch(there + TILE, qkv, b, s0 + BK, 2 * C + h * HS, BK, HS, THREADS)
            close_group()

            if s0 < t0 + warp * ROWS + ROWS:
                multiply(weights, pieces, own_rows(q, warp * ROWS, HS), their_rows(here, HS), HS)
                multiply(ds, pieces, own_rows(dy, warp * ROWS, HS), their_rows(here + TILE, HS), HS)
                for m in range(M):
                    for n in range(N):
                        for i in range(4):
                            weight = exp2(weights[m, n, i] * factor - known[m, i >> 1])
                            ds[m, n, i] = weight * (ds[m, n, i] - owed[m, i >> 1])
                if s0 + BK > t0 + warp * ROWS:
                    ahead = row - column - s0
                    for m in range(M):
                        for n in range(N):
                            for i in range(4):
                                if ahead < n * 8 + (i & 1) - m * 16 - (i >> 1) * 8:
                                    ds[m, n, i] = ZERO
                add_weighted(dq, ds, pieces, their_columns(here, HS), HS)
            here, there = there, here
        store_rows(dqkv, dq, scale, q + warp * ROWS * HS * 2, b, t0 + warp * ROWS, h * HS, HS)

    return flash_dq_kernel


FORWARD = {HS: make_forward_kernel(HS, *tiles) for HS, tiles in FORWARD_TILES.items()}
DKV = {HS: make_dkv_kernel(HS, *tiles) for HS, tiles in DKV_TILES.items()}
DQ = {HS: make_dq_kernel(HS, *tiles) for HS, tiles in DQ_TILES.items()}


def flash_forward(out, lse, qkv, HS, scale):
    """See attention.attention_forward; all but lse in bf16, of a head size in FORWARD."""
    launch(FORWARD, FORWARD_TILES, 1, lse, HS)(out, lse, qkv, scale)


def flash_backward(dqkv, dout, lse, delta, qkv, HS, scale):
    """See attention.attention_backward, of whose scratch delta (B, NH, T) = sum(dout * out) of each head is made."""
    launch(DKV, DKV_TILES, 2, lse, HS)(dqkv, dout, lse, delta, qkv, scale)
    launch(DQ, DQ_TILES, 2, lse, HS)(dqkv, dout, lse, delta, qkv, scale)


def launch(kernels, tiles, owned, lse, HS):
    """The kernel for this head size, ready to be called: a block owns that many tiles, and goes through two at a time,
    each of which needs room for the next."""
    B, NH, T = lse.shape
    warps, M, rows, _ = tiles[HS]
    own = warps * M * 16
    return with_shared(kernels[HS], (blocks_for(T, own), NH, B), warps * 32, (owned * own + 4 * rows) * HS * 2)
