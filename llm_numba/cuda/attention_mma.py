"""Attention in bf16 on tensor cores with mma.sync, from compute capability 8.0 on: heads of 64 or 128 channels.

A warp owns 16 or 32 rows of a tile. Its scores stay in the registers in which the tensor cores left them: the result of
a product is spread over the threads like the first operand of the next one, so the weights go from one product to the
other without leaving the registers. They are rounded to bf16 for it; their sums stay in float32. The tiles that a block
iterates over come to shared memory by asynchronous copies, the next tile during the work on the current one.

In shared memory the 16-byte chunks of a row are swizzled (XOR with the row's index), so that the eight rows that
ldmatrix reads at once lie in different banks.

Source: Dao 2023, FlashAttention-2, arXiv:2307.08691.
"""

import functools
import math

import numpy as np
from numba import cuda
from numba.cuda import types

from llm_numba.cuda.attention_common import attention_delta, end_of_steps, query_tile
from llm_numba.cuda.jit import (
    ALL_LANES,
    blocks_for,
    compute_capability,
    device,
    exp2,
    float32,
    kernel,
    uint16,
    uint32,
    with_shared,
)
from llm_numba.cuda.tensor_cores import (
    address,
    commit_group,
    copy_async,
    ldmatrix,
    ldmatrix_transposed,
    mma,
    pack,
    shared_address,
    store_16_bytes,
    store_shared,
    wait_group,
)

ZERO, ONE, LOG2_E = float32(0), float32(1), float32(1 / math.log(2))
MASKED = float32(-np.inf)  # the score of a key after its query
wait_for_copies = wait_group(0)

# head size -> warps of a block, rows of a warp / 16, rows of the tiles that the block iterates over, blocks per SM
FORWARD_TILES = {64: (4, 2, 64, 2), 128: (8, 1, 64, 1)}
DKV_TILES = {64: (4, 1, 32, 3), 128: (4, 1, 32, 2)}
DQ_TILES = {64: (4, 2, 32, 2), 128: (4, 1, 32, 2)}


def supports(dtype, HS) -> str:
    """Why the kernels cannot run with this dtype and head size, or ""."""
    if dtype != uint16:
        return "needs bf16"
    if compute_capability() < (8, 0):
        return "needs compute capability 8.0"
    return "" if HS in FORWARD_TILES else "needs heads of 64 or 128 channels"


@device
def copy_rows(tile, rows, b, first, channel, count, HS, threads):
    """Start copying rows[b, first : first + count, channel : channel + HS] to a tile; zeros past the last row."""
    T, chunks = rows.shape[1], HS // 8
    for i in range(count * chunks // threads):
        n = cuda.threadIdx.x + i * threads
        r, chunk = n // chunks, n % chunks
        source = (b * T + min(first + r, T - 1)) * rows.shape[2] + channel + chunk * 8
        copy_async(tile + r * HS * 2 + ((chunk ^ (r & 7)) << 4), address(rows) + source * 2, 16 if first + r < T else 0)


@device
def a_address(tile, row, HS):
    """ldmatrix address of this lane's row of the A fragment (16 rows from `row`), summed over channels."""
    lane = cuda.threadIdx.x & 31
    r = row + (lane & 15)
    return tile + r * HS * 2 + (((lane >> 4) ^ (r & 7)) << 4)


@device
def b_address(tile, HS):
    """ldmatrix address of this lane's row of the B fragment (16 rows, 16 channels), summed over channels."""
    lane = cuda.threadIdx.x & 31
    r = (lane & 7) + ((lane >> 4) << 3)
    return tile + r * HS * 2 + (((lane >> 3 & 1) ^ (r & 7)) << 4)


@device
def b_address_transposed(tile, HS):
    """ldmatrix.trans address of this lane's row of the B fragment (16 rows, 16 channels), summed over rows."""
    return a_address(tile, 0, HS)


@device
def add_product(sums, m, n, a, b0, b1):
    """sums[m, n] += a @ b on the tensor cores."""
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
def multiply(scores, a_fragments, a, b, HS):
    """scores = the warp's rows (see a_address) times those of another tile (see b_address), summed over channels.

    a_fragments: a local array (rows of the warp / 16, 4) uint32
    """
    clear(scores)
    for k in range(HS // 16):
        for m in range(scores.shape[0]):
            a_row = (a ^ (k << 5)) + m * 32 * HS
            a_fragments[m, 0], a_fragments[m, 1], a_fragments[m, 2], a_fragments[m, 3] = ldmatrix(a_row)
        for n in range(0, scores.shape[1], 2):
            b_fragment = ldmatrix((b ^ (k << 5)) + n * 16 * HS)
            for m in range(scores.shape[0]):
                a_fragment = a_fragments[m, 0], a_fragments[m, 1], a_fragments[m, 2], a_fragments[m, 3]
                add_product(scores, m, n, a_fragment, b_fragment[0], b_fragment[1])
                add_product(scores, m, n + 1, a_fragment, b_fragment[2], b_fragment[3])


@device
def add_weighted(acc, weights, a_fragments, b, HS):
    """acc += the weights, rounded to bf16, times the rows of another tile (see b_address_transposed)."""
    for k in range(weights.shape[1] // 2):
        for m in range(acc.shape[0]):
            a_fragments[m, 0] = pack(weights[m, 2 * k, 0], weights[m, 2 * k, 1])
            a_fragments[m, 1] = pack(weights[m, 2 * k, 2], weights[m, 2 * k, 3])
            a_fragments[m, 2] = pack(weights[m, 2 * k + 1, 0], weights[m, 2 * k + 1, 1])
            a_fragments[m, 3] = pack(weights[m, 2 * k + 1, 2], weights[m, 2 * k + 1, 3])
        for n in range(0, acc.shape[1], 2):
            b_fragment = ldmatrix_transposed((b ^ (n << 4)) + k * 32 * HS)
            for m in range(acc.shape[0]):
                a_fragment = a_fragments[m, 0], a_fragments[m, 1], a_fragments[m, 2], a_fragments[m, 3]
                add_product(acc, m, n, a_fragment, b_fragment[0], b_fragment[1])
                add_product(acc, m, n + 1, a_fragment, b_fragment[2], b_fragment[3])


@device
def scale_rows(acc, factors):
    """acc *= factors, for the thread's two rows of each m: row lane // 4, and the row 8 below."""
    for m in range(acc.shape[0]):
        for n in range(acc.shape[1]):
            for i in range(4):
                acc[m, n, i] *= factors[m, i // 2]


@device
def store_rows(rows, acc, factor, tile, b, first, channel, HS):
    """rows[b, first + i, channel + c] = acc * factor for the warp's rows, through its part of shared memory, tile."""
    T, chunks, lane = rows.shape[1], HS // 8, cuda.threadIdx.x & 31
    cuda.syncwarp()
    for m in range(acc.shape[0]):
        for half in range(2):
            r = m * 16 + half * 8 + (lane >> 2)
            row = tile + r * HS * 2 + ((lane & 3) << 2)
            for n in range(acc.shape[1]):
                pair = pack(acc[m, n, 2 * half] * factor, acc[m, n, 2 * half + 1] * factor)
                store_shared(row + ((n ^ (r & 7)) << 4), pair)
    cuda.syncwarp()
    for i in range(acc.shape[0] * 16 * chunks // 32):
        n = lane + i * 32
        r, chunk = n // chunks, n % chunks
        if first + r < T:
            target = (b * T + first + r) * rows.shape[2] + channel + chunk * 8
            store_16_bytes(address(rows) + target * 2, tile + r * HS * 2 + ((chunk ^ (r & 7)) << 4))


@functools.cache
def forward_kernel(HS: int, GROUP: int):
    """The kernel of `forward` for heads of HS channels, where GROUP query heads share a kv head."""
    WARPS, M, BK, BLOCKS = FORWARD_TILES[HS]
    BQ, THREADS, N, CHANNELS = WARPS * M * 16, WARPS * 32, BK // 8, HS // 8
    OWN, TILE, ROWS = WARPS * M * 16 * HS * 2, BK * HS * 2, M * 16  # bytes, bytes, rows of a warp

    @kernel(launch_bounds=(THREADS, BLOCKS))
    def attention_forward_kernel(out, lse, qkv, scale):
        """out (B, T, C) =, lse (B, NH, T) = <- qkv (B, T, C + 2*C // GROUP), scale of the scores.

        Grid: (tiles of queries, NH, B), the longest rows first; block: WARPS warps. A warp owns M * 16 queries, a
        thread its fragments of their scores and channels. Moves k and v about T / (2 * BQ) times, q and out once.
        """
        shared = shared_address(cuda.shared.array(0, types.uint8, alignment=256))
        scores, acc = cuda.local.array((M, N, 4), float32), cuda.local.array((M, CHANNELS, 4), float32)
        top, total = cuda.local.array((M, 2), float32), cuda.local.array((M, 2), float32)
        shrink, a_fragments = cuda.local.array((M, 2), float32), cuda.local.array((M, 4), uint32)
        h, b, T, C = cuda.blockIdx.y, cuda.blockIdx.z, out.shape[1], out.shape[2]
        kv_head = h // GROUP
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        t0 = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * BQ
        row, column = t0 + warp * ROWS + (lane >> 2), (lane & 3) * 2
        factor = scale * LOG2_E
        copy_rows(shared, qkv, b, t0, h * HS, BQ, HS, THREADS)
        current, next = shared + OWN, shared + OWN + 2 * TILE
        copy_rows(current, qkv, b, 0, C + kv_head * HS, BK, HS, THREADS)
        copy_rows(current + TILE, qkv, b, 0, C + C // GROUP + kv_head * HS, BK, HS, THREADS)
        commit_group()
        q_address = a_address(shared, warp * ROWS, HS)
        clear(acc)
        for m in range(M):
            for i in range(2):
                top[m, i], total[m, i] = MASKED, ZERO
        for s0 in range(0, min(t0 + BQ, T), BK):
            # wait for this tile, and for the warps that still read the one that is filled next
            wait_for_copies()
            cuda.syncthreads()
            if s0 + BK < min(t0 + BQ, T):
                copy_rows(next, qkv, b, s0 + BK, C + kv_head * HS, BK, HS, THREADS)
                copy_rows(next + TILE, qkv, b, s0 + BK, C + C // GROUP + kv_head * HS, BK, HS, THREADS)
            commit_group()

            if s0 < t0 + warp * ROWS + ROWS:  # else all keys come after the warp's queries
                multiply(scores, a_fragments, q_address, b_address(current, HS), HS)
                if s0 + BK > t0 + warp * ROWS:
                    diagonal = row - column - s0
                    for m in range(M):
                        for n in range(N):
                            for i in range(4):
                                if diagonal < n * 8 + (i & 1) - m * 16 - (i >> 1) * 8:
                                    scores[m, n, i] = MASKED

                # online softmax: when the maximum of a row grows, its sums so far shrink
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
                add_weighted(acc, scores, a_fragments, b_address_transposed(current + TILE, HS), HS)
            current, next = next, current

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

    return attention_forward_kernel


@functools.cache
def dkv_kernel(HS: int, GROUP: int):
    """The kernel of `backward` for dk and dv. A block owns BK keys and iterates over tiles of BQ queries."""
    WARPS, M, BQ, BLOCKS = DKV_TILES[HS]
    BK, THREADS, N, CHANNELS = WARPS * M * 16, WARPS * 32, BQ // 8, HS // 8
    OWN, TILE, ROWS = WARPS * M * 16 * HS * 2, BQ * HS * 2, M * 16

    @kernel(launch_bounds=(THREADS, BLOCKS))
    def attention_dkv_kernel(dqkv, dout, lse, delta, qkv, scale):
        """dk and dv in dqkv (B, T, C + 2*C // GROUP) = <- dout (B, T, C), lse, delta (B, NH, T), qkv.

        The block of a kv head adds up its GROUP query heads in order.
        Grid: (tiles of keys, NH / GROUP, B), the keys that most queries see first; block: WARPS warps. A warp owns
        M * 16 keys, a thread its fragments of their scores and channels. Moves q and dout about T / (2 * BK) times.
        """
        shared = shared_address(cuda.shared.array(0, types.uint8, alignment=256))
        weights, ds = cuda.local.array((M, N, 4), float32), cuda.local.array((M, N, 4), float32)
        dk, dv = cuda.local.array((M, CHANNELS, 4), float32), cuda.local.array((M, CHANNELS, 4), float32)
        a_fragments = cuda.local.array((M, 4), uint32)
        kv_head, b, T, C = cuda.blockIdx.y, cuda.blockIdx.z, dout.shape[1], dout.shape[2]
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        s0 = cuda.blockIdx.x * BK
        row, column = s0 + warp * ROWS + (lane >> 2), (lane & 3) * 2
        factor = scale * LOG2_E
        k, v, current, next = shared, shared + OWN, shared + 2 * OWN, shared + 2 * OWN + 2 * TILE
        copy_rows(k, qkv, b, s0, C + kv_head * HS, BK, HS, THREADS)
        copy_rows(v, qkv, b, s0, C + C // GROUP + kv_head * HS, BK, HS, THREADS)
        first_head = kv_head * GROUP
        copy_rows(current, qkv, b, s0, first_head * HS, BQ, HS, THREADS)
        copy_rows(current + TILE, dout, b, s0, first_head * HS, BQ, HS, THREADS)
        commit_group()
        clear(dk)
        clear(dv)
        end = end_of_steps(s0, T, BQ, GROUP)
        for step in range(s0, end, BQ):
            h, t0 = query_tile(step, s0, T, BQ, kv_head, GROUP)
            wait_for_copies()
            cuda.syncthreads()
            if step + BQ < end:
                next_h, next_t0 = query_tile(step + BQ, s0, T, BQ, kv_head, GROUP)
                copy_rows(next, qkv, b, next_t0, next_h * HS, BQ, HS, THREADS)
                copy_rows(next + TILE, dout, b, next_t0, next_h * HS, BQ, HS, THREADS)
            commit_group()

            if t0 + BQ > s0 + warp * ROWS:  # else all queries come before the warp's keys
                # weights; a row per key
                multiply(weights, a_fragments, a_address(k, warp * ROWS, HS), b_address(current, HS), HS)
                for n in range(N):
                    for j in range(2):
                        row_lse = lse[b, h, uint32(min(t0 + column + n * 8 + j, T - 1))] * LOG2_E
                        for m in range(M):
                            for half in range(2):
                                weights[m, n, half * 2 + j] = exp2(weights[m, n, half * 2 + j] * factor - row_lse)
                if t0 < s0 + warp * ROWS + ROWS or t0 + BQ > T:
                    diagonal, last = row - column - t0, T - column - t0
                    for m in range(M):
                        for n in range(N):
                            for i in range(4):
                                if diagonal > n * 8 + (i & 1) - m * 16 - (i >> 1) * 8 or last <= n * 8 + (i & 1):
                                    weights[m, n, i] = ZERO
                add_weighted(dv, weights, a_fragments, b_address_transposed(current + TILE, HS), HS)

                # gradient of the scores
                multiply(ds, a_fragments, a_address(v, warp * ROWS, HS), b_address(current + TILE, HS), HS)
                for n in range(N):
                    for j in range(2):
                        row_delta = delta[b, h, uint32(min(t0 + column + n * 8 + j, T - 1))]
                        for m in range(M):
                            for half in range(2):
                                i = half * 2 + j
                                ds[m, n, i] = weights[m, n, i] * (ds[m, n, i] - row_delta)
                add_weighted(dk, ds, a_fragments, b_address_transposed(current, HS), HS)
            current, next = next, current
        own = warp * ROWS * HS * 2
        store_rows(dqkv, dk, scale, k + own, b, s0 + warp * ROWS, C + kv_head * HS, HS)
        store_rows(dqkv, dv, ONE, v + own, b, s0 + warp * ROWS, C + C // GROUP + kv_head * HS, HS)

    return attention_dkv_kernel


@functools.cache
def dq_kernel(HS: int, GROUP: int):
    """The kernel of `backward` for dq. A block owns BQ queries and iterates over tiles of BK keys."""
    WARPS, M, BK, BLOCKS = DQ_TILES[HS]
    BQ, THREADS, N, CHANNELS = WARPS * M * 16, WARPS * 32, BK // 8, HS // 8
    OWN, TILE, ROWS = WARPS * M * 16 * HS * 2, BK * HS * 2, M * 16

    @kernel(launch_bounds=(THREADS, BLOCKS))
    def attention_dq_kernel(dqkv, dout, lse, delta, qkv, scale):
        """dq in dqkv (B, T, C + 2*C // GROUP) = <- dout (B, T, C), lse, delta (B, NH, T), qkv.

        Grid: (tiles of queries, NH, B), the longest rows first; block: WARPS warps. A warp owns M * 16 queries, a
        thread its fragments of their scores and channels. Moves k and v about T / (2 * BQ) times.
        """
        shared = shared_address(cuda.shared.array(0, types.uint8, alignment=256))
        weights, ds = cuda.local.array((M, N, 4), float32), cuda.local.array((M, N, 4), float32)
        dq, a_fragments = cuda.local.array((M, CHANNELS, 4), float32), cuda.local.array((M, 4), uint32)
        row_lse, row_delta = cuda.local.array((M, 2), float32), cuda.local.array((M, 2), float32)
        h, b, T, C = cuda.blockIdx.y, cuda.blockIdx.z, dout.shape[1], dout.shape[2]
        kv_head = h // GROUP
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        t0 = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * BQ
        row, column = t0 + warp * ROWS + (lane >> 2), (lane & 3) * 2
        factor = scale * LOG2_E
        q, dy, current, next = shared, shared + OWN, shared + 2 * OWN, shared + 2 * OWN + 2 * TILE
        copy_rows(q, qkv, b, t0, h * HS, BQ, HS, THREADS)
        copy_rows(dy, dout, b, t0, h * HS, BQ, HS, THREADS)
        copy_rows(current, qkv, b, 0, C + kv_head * HS, BK, HS, THREADS)
        copy_rows(current + TILE, qkv, b, 0, C + C // GROUP + kv_head * HS, BK, HS, THREADS)
        commit_group()
        for m in range(M):
            for i in range(2):
                t = min(row + m * 16 + i * 8, T - 1)
                row_lse[m, i], row_delta[m, i] = lse[b, h, t] * LOG2_E, delta[b, h, t]
        clear(dq)
        for s0 in range(0, min(t0 + BQ, T), BK):
            wait_for_copies()
            cuda.syncthreads()
            if s0 + BK < min(t0 + BQ, T):
                copy_rows(next, qkv, b, s0 + BK, C + kv_head * HS, BK, HS, THREADS)
                copy_rows(next + TILE, qkv, b, s0 + BK, C + C // GROUP + kv_head * HS, BK, HS, THREADS)
            commit_group()

            if s0 < t0 + warp * ROWS + ROWS:
                multiply(weights, a_fragments, a_address(q, warp * ROWS, HS), b_address(current, HS), HS)
                multiply(ds, a_fragments, a_address(dy, warp * ROWS, HS), b_address(current + TILE, HS), HS)
                for m in range(M):
                    for n in range(N):
                        for i in range(4):
                            weight = exp2(weights[m, n, i] * factor - row_lse[m, i >> 1])
                            ds[m, n, i] = weight * (ds[m, n, i] - row_delta[m, i >> 1])
                if s0 + BK > t0 + warp * ROWS:
                    diagonal = row - column - s0
                    for m in range(M):
                        for n in range(N):
                            for i in range(4):
                                if diagonal < n * 8 + (i & 1) - m * 16 - (i >> 1) * 8:
                                    ds[m, n, i] = ZERO
                add_weighted(dq, ds, a_fragments, b_address_transposed(current, HS), HS)
            current, next = next, current
        store_rows(dqkv, dq, scale, q + warp * ROWS * HS * 2, b, t0 + warp * ROWS, h * HS, HS)

    return attention_dq_kernel


def forward(out, lse, qkv, num_heads, num_kv_heads, scratch):
    """See attention.attention_forward."""
    HS, group = out.shape[2] // num_heads, num_heads // num_kv_heads
    launch = launcher(forward_kernel(HS, group), FORWARD_TILES, 1, lse, num_heads, HS)
    launch(out, lse, qkv, ONE / float32(math.sqrt(HS)))


def backward(dqkv, dout, out, lse, qkv, num_heads, num_kv_heads, scratch):
    """See attention.attention_backward."""
    HS, group = out.shape[2] // num_heads, num_heads // num_kv_heads
    delta = attention_delta(dout, out, num_heads, scratch)
    scale = ONE / float32(math.sqrt(HS))
    launcher(dkv_kernel(HS, group), DKV_TILES, 2, lse, num_kv_heads, HS)(dqkv, dout, lse, delta, qkv, scale)
    launcher(dq_kernel(HS, group), DQ_TILES, 2, lse, num_heads, HS)(dqkv, dout, lse, delta, qkv, scale)


def backward_scratch(B: int, T: int, NH: int, HS: int) -> int:
    """Floats of scratch that `backward` needs, for delta."""
    return B * NH * T


def launcher(kernel, tiles, owned, lse, heads, HS):
    """A function that launches the kernel with a block for each tile of rows of each head.

    owned: how many tiles a block owns; it iterates over two more, each of them double buffered
    """
    B, _, T = lse.shape
    warps, M, rows, _ = tiles[HS]
    own = warps * M * 16
    return with_shared(kernel, (blocks_for(T, own), heads, B), warps * 32, (owned * own + 4 * rows) * HS * 2)
