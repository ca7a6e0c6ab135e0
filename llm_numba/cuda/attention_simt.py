"""Attention on CUDA cores (SIMT): any GPU, float32 or bf16, heads of up to WIDEST channels.

Every kernel works on tiles: some rows of one head's q, k, v, dout in shared memory; the scores between a tile of
queries and a tile of keys exist only in registers. A block has TX * TY threads: thread (x, y), see `place`, owns the
scores of rows y, y + TY, ... with columns x, x + TX, ..., and of the result four adjacent channels out of every 4*TX in
the same rows. Rows of a tile are PAD floats longer than the head, so that the rows a warp reads together lie in
different banks.

Source: Dao 2023, FlashAttention-2, arXiv:2307.08691.
"""

import functools
import math

import numpy as np
from numba import cuda

from llm_numba.cuda.attention_common import WIDEST, attention_delta, end_of_steps, query_tile
from llm_numba.cuda.jit import (
    SIMULATED,
    blocks_for,
    device,
    float32,
    inlined,
    int32,
    kernel,
    load_float4,
    stream,
    uint32,
    unrolled,
)
from llm_numba.cuda.vectors import load_vector, store_vector

PAD = 4
ZERO, ONE = float32(0), float32(1)
MASKED = float32(-np.inf)  # the score of a key after its query
WIDTHS = (16, 32, 64, WIDEST)  # row lengths of the tiles; a head's channels are padded with zeros to the next of these
FORWARD_BLOCKS, BACKWARD_BLOCKS = 4, 3  # resident blocks per SM, which limit the registers of a thread

# width -> rows of the tile that a block owns, rows of the tiles that it iterates over, TY, TX. All shared arrays of a
# kernel fit in the 48 KB that every GPU has
FORWARD_TILES = {16: (64, 32, 32, 4), 32: (64, 32, 16, 8), 64: (64, 32, 16, 8), 128: (32, 16, 8, 16)}
BACKWARD_TILES = {16: (64, 32, 32, 4), 32: (32, 32, 8, 8), 64: (32, 32, 8, 8), 128: (16, 16, 8, 8)}
if SIMULATED:
    FORWARD_TILES = BACKWARD_TILES = dict.fromkeys(WIDTHS, (16, 8, 2, 2))


def supports(dtype, HS) -> str:
    """Why the kernels cannot run with this head size, or ""."""
    return "" if HS <= WIDEST else f"needs heads of at most {WIDEST} channels"


@inlined
def place(TX):
    """The thread's (x, y). Adjacent threads have the same x, and every second thread the same y: then 16-byte reads of
    shared memory are served for half a warp at once, else for a quarter."""
    thread = uint32(cuda.threadIdx.x)
    return int32(thread // 2 % TX), int32(thread // (2 * TX) * 2 + thread % 2)


@functools.cache
def row_functions(vector):
    """(load_rows, store_rows), which move `vector` adjacent channels at a time: heads are multiples of that long."""

    @inlined
    def load_rows(tile, rows, first, channel, HS, threads):
        """tile[i, c] = rows[first + i, channel + c]; zero past the last row and past the head's HS channels."""
        values = cuda.local.array(vector, float32)
        width = tile.shape[1] - PAD
        thread = uint32(cuda.threadIdx.x)
        last = uint32(rows.shape[0] - 1)
        for step in range(tile.shape[0] * width // (threads * vector)):
            n = uint32((step * threads + thread) * vector)
            i, c = uint32(n // width), uint32(n % width)
            t, inside_head = uint32(first + i), c < HS
            # the address is always valid, so no load waits for the comparison
            load_vector(values, 0, rows, min(t, last), uint32(channel + (c if inside_head else 0)), vector)
            inside = t <= last and inside_head
            for e in range(vector):
                values[e] = values[e] if inside else ZERO
            store_vector(tile, i, c, values, 0, vector)

    @inlined
    def store_rows(rows, acc, tile, first, channel, HS, x, y, TX, threads):
        """rows[first + i, channel + c] = acc, except past the last row and past the head's channels.

        tile: shared memory that is free now; through it adjacent threads write adjacent elements.
        """
        values = cuda.local.array(vector, float32)
        R, channels = acc.shape
        width = tile.shape[1] - PAD
        for r in range(R):
            for group in range(channels // 4):
                for e in range(4):
                    tile[y + r * (tile.shape[0] // R), (group * TX + x) * 4 + e] = acc[r, group * 4 + e]
        cuda.syncthreads()
        for n in range(cuda.threadIdx.x * vector, tile.shape[0] * width, threads * vector):
            i, c = n // width, n % width
            if first + i < rows.shape[0] and c < HS:
                load_vector(values, 0, tile, i, c, vector)
                store_vector(rows, first + i, channel + c, values, 0, vector)

    return load_rows, store_rows


@device
def clear(acc):
    """acc = 0."""
    for r in range(acc.shape[0]):
        for i in range(acc.shape[1]):
            acc[r, i] = ZERO


@inlined
def multiply_channels(n, first, scores, a, b, x, y):
    """Add the products of four channels to the dot products of `multiply`."""
    R, S = scores.shape
    c = first + 4 * n
    for s in range(S):
        b4 = load_float4(b, x + s * (b.shape[0] // S), c)
        for r in range(R):
            a4 = load_float4(a, y + r * (a.shape[0] // R), c)
            for i in range(4):
                scores[r, s] += a4[i] * b4[i]


@inlined
def multiply(scores, a, b, x, y):
    """scores[r, s] = the dot product of the thread's row r of tile a and its row s of tile b."""
    clear(scores)
    for first in range(0, a.shape[1] - PAD, 16):
        unrolled(4, multiply_channels, (first, scores, a, b, x, y))


@inlined
def add_weighted_rows(n, first, acc, weights, b, row, x, y, TX):
    """Add the products of four rows of b to the sums of `add_weighted`."""
    R, channels = acc.shape
    j = first + 4 * n
    for r in range(R):
        row[r, 0], row[r, 1], row[r, 2], row[r, 3] = load_float4(weights, y + r * (weights.shape[0] // R), j)
    for group in range(channels // 4):
        for i in range(4):
            b4 = load_float4(b, j + i, (group * TX + x) * 4)
            for r in range(R):
                for e in range(4):
                    acc[r, group * 4 + e] += row[r, i] * b4[e]


@inlined
def add_weighted(acc, weights, b, row, x, y, TX):
    """acc[r, :] += the sum over j of weights[r, j] * b[j, :], for the thread's rows r and its channels.

    row: a local array (R, 4)."""
    for first in range(0, b.shape[0], 8):
        unrolled(2, add_weighted_rows, (first, acc, weights, b, row, x, y, TX))


@device
def scale_rows(acc, factors):
    """acc[r, :] *= factors[r]."""
    for r in range(acc.shape[0]):
        for i in range(acc.shape[1]):
            acc[r, i] *= factors[r]


@functools.cache
def forward_kernel(width: int, GROUP: int, vector: int):
    """The kernel of `forward` for heads of up to `width` channels, where GROUP query heads share a kv head."""
    BQ, BK, TY, TX = FORWARD_TILES[width]
    R, S, CHANNELS = BQ // TY, BK // TX, width // TX
    LONG, KEYS, TOPS, THREADS = width + PAD, BK + PAD, TX + PAD, TX * TY
    load_rows, store_rows = row_functions(vector)

    @kernel(launch_bounds=(THREADS, FORWARD_BLOCKS if vector == 4 else 2))
    def attention_forward_kernel(out, lse, qkv, HS, scale):
        """out (B, T, C) =, lse (B, NH, T) = <- qkv (B, T, C + 2*C // GROUP), HS channels per head, scale of the scores.

        Grid: (tiles of queries, NH, B), the longest rows first; block: TX * TY threads. A thread owns some scores of
        its queries, then some of their channels. Moves k and v about T / (2 * BQ) times, q and out once.
        """
        q = cuda.shared.array((BQ, LONG), float32)
        k = cuda.shared.array((BK, LONG), float32)
        v = cuda.shared.array((BK, LONG), float32)
        p = cuda.shared.array((BQ, KEYS), float32)
        tops = cuda.shared.array((BQ, TOPS), float32)  # for reductions over the threads of a row
        scores, acc = cuda.local.array((R, S), float32), cuda.local.array((R, CHANNELS), float32)
        top, total = cuda.local.array(R, float32), cuda.local.array(R, float32)
        shrink, row = cuda.local.array(R, float32), cuda.local.array((R, 4), float32)
        x, y = place(TX)
        h, b = cuda.blockIdx.y, cuda.blockIdx.z
        C = out.shape[2]
        kv_head, kv_width = uint32(uint32(h) // GROUP), uint32(uint32(C) // GROUP)  # unsigned: division is cheap
        t0 = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * BQ
        load_rows(q, qkv[b], t0, h * HS, HS, THREADS)
        clear(acc)
        for r in range(R):
            top[r], total[r] = MASKED, ZERO
        for s0 in range(0, min(t0 + BQ, out.shape[1]), BK):
            load_rows(k, qkv[b], s0, C + kv_head * HS, HS, THREADS)
            load_rows(v, qkv[b], s0, C + kv_width + kv_head * HS, HS, THREADS)
            cuda.syncthreads()

            # scores, and the maximum of each row so far
            multiply(scores, q, k, x, y)
            ahead = int32(t0 + y - (s0 + x))  # of the thread's first query, from its first key
            for r in range(R):
                largest = MASKED
                for s in range(S):
                    seen = s * TX - r * TY <= ahead
                    scores[r, s] = scores[r, s] * scale if seen else MASKED
                    largest = max(largest, scores[r, s])
                tops[y + r * TY, x] = largest
            cuda.syncthreads()

            # online softmax: when the maximum grows, the sums so far shrink
            for r in range(R):
                before = top[r]
                for i in range(TX):
                    top[r] = max(top[r], tops[y + r * TY, i])
                shrink[r] = math.exp(before - top[r])
                total[r] *= shrink[r]
            scale_rows(acc, shrink)
            for r in range(R):
                for s in range(S):
                    weight = math.exp(scores[r, s] - top[r])
                    total[r] += weight
                    p[y + r * TY, x + s * TX] = weight
            cuda.syncthreads()

            add_weighted(acc, p, v, row, x, y, TX)
            cuda.syncthreads()

        # each thread has summed the weights of its own keys
        for r in range(R):
            tops[y + r * TY, x] = total[r]
        cuda.syncthreads()
        for r in range(R):
            total[r] = ZERO
            for i in range(TX):
                total[r] += tops[y + r * TY, i]
            shrink[r] = ONE / total[r]
            if x == 0 and t0 + y + r * TY < out.shape[1]:
                lse[b, h, t0 + y + r * TY] = top[r] + math.log(total[r])
        scale_rows(acc, shrink)
        store_rows(out[b], acc, q, t0, h * HS, HS, x, y, TX, THREADS)

    return attention_forward_kernel


@functools.cache
def dkv_kernel(width: int, GROUP: int, vector: int):
    """The kernel of `backward` for dk and dv. A block owns a tile of BK keys and iterates over tiles of BQ queries.

    The weights are computed again, p = e**(score - lse), and from them ds = p * (dout vT - delta) * scale.
    """
    BK, BQ, TY, TX = BACKWARD_TILES[width]
    R, S, CHANNELS = BK // TY, BQ // TX, width // TX
    LONG, COLUMNS, THREADS = width + PAD, BQ + PAD, TX * TY
    load_rows, store_rows = row_functions(vector)

    @kernel(launch_bounds=(THREADS, BACKWARD_BLOCKS if vector == 4 else 2))
    def attention_dkv_kernel(dqkv, dout, lse, delta, qkv, HS, scale):
        """dk and dv in dqkv (B, T, C + 2*C // GROUP) = <- dout (B, T, C), lse, delta (B, NH, T), qkv.

        The GROUP query heads of a kv head are added in order by the same block.
        Grid: (tiles of keys, NH / GROUP, B), the keys that most queries see first; block: TX * TY threads. A thread
        owns some scores of its keys, then some of their channels of dk and dv. Moves q and dout about T / (2 * BK)
        times, k and v once.
        """
        k = cuda.shared.array((BK, LONG), float32)
        v = cuda.shared.array((BK, LONG), float32)
        q = cuda.shared.array((BQ, LONG), float32)
        dy = cuda.shared.array((BQ, LONG), float32)
        p = cuda.shared.array((BK, COLUMNS), float32)
        ds = cuda.shared.array((BK, COLUMNS), float32)
        scores, dweights = cuda.local.array((R, S), float32), cuda.local.array((R, S), float32)
        dk, dv = cuda.local.array((R, CHANNELS), float32), cuda.local.array((R, CHANNELS), float32)
        t_lse, t_delta = cuda.local.array(S, float32), cuda.local.array(S, float32)
        row = cuda.local.array((R, 4), float32)
        x, y = place(TX)
        kv_head, b = cuda.blockIdx.y, cuda.blockIdx.z
        T, C = dout.shape[1], dout.shape[2]
        s0 = cuda.blockIdx.x * BK
        load_rows(k, qkv[b], s0, C + kv_head * HS, HS, THREADS)
        load_rows(v, qkv[b], s0, C + C // GROUP + kv_head * HS, HS, THREADS)
        clear(dk)
        clear(dv)
        first = s0 // BQ * BQ
        for step in range(first, end_of_steps(first, T, BQ, GROUP), BQ):
            h, t0 = query_tile(step, first, T, BQ, kv_head, GROUP)
            load_rows(q, qkv[b], t0, h * HS, HS, THREADS)
            load_rows(dy, dout[b], t0, h * HS, HS, THREADS)
            cuda.syncthreads()

            # scores and the gradient of the weights; a row per key
            for s in range(S):
                t = min(t0 + x + s * TX, T - 1)
                t_lse[s], t_delta[s] = lse[b, h, t], delta[b, h, t]
            multiply(scores, k, q, x, y)
            multiply(dweights, v, dy, x, y)
            ahead, left = int32(t0 + x - (s0 + y)), int32(T - (t0 + x))
            for s in range(S):
                for r in range(R):
                    sees = r * TY - s * TX <= ahead and s * TX < left
                    weight = math.exp(scores[r, s] * scale - t_lse[s]) if sees else ZERO
                    p[y + r * TY, x + s * TX] = weight
                    ds[y + r * TY, x + s * TX] = weight * (dweights[r, s] - t_delta[s]) * scale if sees else ZERO
            cuda.syncthreads()

            add_weighted(dv, p, dy, row, x, y, TX)
            add_weighted(dk, ds, q, row, x, y, TX)
            cuda.syncthreads()
        store_rows(dqkv[b], dk, k, s0, C + kv_head * HS, HS, x, y, TX, THREADS)
        store_rows(dqkv[b], dv, v, s0, C + C // GROUP + kv_head * HS, HS, x, y, TX, THREADS)

    return attention_dkv_kernel


@functools.cache
def dq_kernel(width: int, GROUP: int, vector: int):
    """The kernel of `backward` for dq. A block owns a tile of BQ queries and iterates over tiles of BK keys."""
    BQ, BK, TY, TX = BACKWARD_TILES[width]
    R, S, CHANNELS = BQ // TY, BK // TX, width // TX
    LONG, COLUMNS, THREADS = width + PAD, BK + PAD, TX * TY
    load_rows, store_rows = row_functions(vector)

    @kernel(launch_bounds=(THREADS, BACKWARD_BLOCKS if vector == 4 else 2))
    def attention_dq_kernel(dqkv, dout, lse, delta, qkv, HS, scale):
        """dq in dqkv (B, T, C + 2*C // GROUP) = <- dout (B, T, C), lse, delta (B, NH, T), qkv.

        Grid: (tiles of queries, NH, B), the longest rows first; block: TX * TY threads. A thread owns some scores of
        its queries, then some of their channels of dq. Moves k and v about T / (2 * BQ) times, q and dout once.
        """
        q = cuda.shared.array((BQ, LONG), float32)
        dy = cuda.shared.array((BQ, LONG), float32)
        k = cuda.shared.array((BK, LONG), float32)
        v = cuda.shared.array((BK, LONG), float32)
        ds = cuda.shared.array((BQ, COLUMNS), float32)
        scores, dweights = cuda.local.array((R, S), float32), cuda.local.array((R, S), float32)
        dq, row = cuda.local.array((R, CHANNELS), float32), cuda.local.array((R, 4), float32)
        t_lse, t_delta = cuda.local.array(R, float32), cuda.local.array(R, float32)
        x, y = place(TX)
        h, b = cuda.blockIdx.y, cuda.blockIdx.z
        T, C = dout.shape[1], dout.shape[2]
        kv_head = h // GROUP
        t0 = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * BQ
        load_rows(q, qkv[b], t0, h * HS, HS, THREADS)
        load_rows(dy, dout[b], t0, h * HS, HS, THREADS)
        for r in range(R):
            t = min(t0 + y + r * TY, T - 1)
            t_lse[r], t_delta[r] = lse[b, h, t], delta[b, h, t]
        clear(dq)
        for s0 in range(0, min(t0 + BQ, T), BK):
            load_rows(k, qkv[b], s0, C + kv_head * HS, HS, THREADS)
            load_rows(v, qkv[b], s0, C + C // GROUP + kv_head * HS, HS, THREADS)
            cuda.syncthreads()

            multiply(scores, q, k, x, y)
            multiply(dweights, dy, v, x, y)
            ahead, left = int32(t0 + y - (s0 + x)), int32(T - (t0 + y))
            for r in range(R):
                for s in range(S):
                    seen = s * TX - r * TY <= ahead and r * TY < left
                    weight = math.exp(scores[r, s] * scale - t_lse[r]) if seen else ZERO
                    ds[y + r * TY, x + s * TX] = weight * (dweights[r, s] - t_delta[r]) * scale if seen else ZERO
            cuda.syncthreads()

            add_weighted(dq, ds, k, row, x, y, TX)
            cuda.syncthreads()
        store_rows(dqkv[b], dq, q, t0, h * HS, HS, x, y, TX, THREADS)

    return attention_dq_kernel


def forward(out, lse, qkv, num_heads, num_kv_heads, scratch):
    """See attention.attention_forward."""
    B, NH, T = lse.shape
    HS, width, *kind = sizes(out, num_heads, num_kv_heads)
    BQ, _, TY, TX = FORWARD_TILES[width]
    launch = forward_kernel(width, *kind)[(blocks_for(T, BQ), NH, B), TX * TY, stream()]
    launch(out, lse, qkv, HS, ONE / float32(math.sqrt(HS)))


def backward(dqkv, dout, out, lse, qkv, num_heads, num_kv_heads, scratch):
    """See attention.attention_backward."""
    B, NH, T = lse.shape
    HS, width, *kind = sizes(out, num_heads, num_kv_heads)
    delta = attention_delta(dout, out, num_heads, scratch)
    rows, _, TY, TX = BACKWARD_TILES[width]
    for half, heads in (dkv_kernel(width, *kind), num_kv_heads), (dq_kernel(width, *kind), NH):
        launch = half[(blocks_for(T, rows), heads, B), TX * TY, stream()]
        launch(dqkv, dout, lse, delta, qkv, HS, ONE / float32(math.sqrt(HS)))


def backward_scratch(B: int, T: int, NH: int, HS: int) -> int:
    """Floats of scratch that `backward` needs, for delta."""
    return B * NH * T


def sizes(out, num_heads, num_kv_heads) -> tuple[int, int, int, int]:
    """(channels per head, row length of its tiles, query heads per kv head, channels moved at once)."""
    HS = out.shape[2] // num_heads
    return HS, next(width for width in WIDTHS if width >= HS), num_heads // num_kv_heads, math.gcd(HS, 4)
