"""Causal multi-head attention that never holds the (T, T) matrix of scores, forward or backward.

Every kernel works on tiles: some rows of one head's q, k, v, dout in shared memory, and of the scores between a tile
of queries and one of keys only what its threads hold in registers. Block (TX, TY): thread (x, y) owns the scores of the
rows y, y + TY, ... with the columns x, x + TX, ..., and of what comes out, four neighbouring channels in every 4*TX of
these rows. A tile's rows are PAD floats longer than the head, so that the rows which a warp reads together lie in
different banks of the memory.

Source: Dao 2023, FlashAttention-2, arXiv:2307.08691.
"""

import math

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import (
    SIMULATED,
    block_max,
    block_sum,
    blocks_for,
    device,
    float32,
    kernel,
    load_float4,
    sized,
    stream,
    to_float,
    to_storage,
    uint16,
)
from llm_numba.cuda.matmul import has_tensor_cores
from llm_numba.util.cli import UserError

PAD = 4
ZERO, ONE = float32(0), float32(1)
NOTHING = float32(-np.inf)  # the score of a key that a query must not see
WIDTHS = (16, 32, 64, 128)  # channels of a head in shared memory: its own, and zeros up to the next of these
FORWARD_BLOCKS, BACKWARD_BLOCKS = 4, 3  # of one multiprocessor at a time; the registers are shared out accordingly
DOT_ROWS, DOT_THREADS = sized(32, 2), sized(128, 4)
WIDEST, DOT_PITCH = WIDTHS[-1], WIDTHS[-1] + 1
CHUNK = sized(256, 4)  # threads of a block that attends to a cache, and the cached tokens it takes at a time
SUMS = CHUNK // min(WIDTHS[0], CHUNK // 2) * WIDEST  # floats in which its threads add up values

# for each width, rows of the tile a block owns, rows of the tiles it goes through, TY, TX; all arrays of a kernel
# together stay within the 48 KB of shared memory that every card has
FORWARD_TILES = {16: (64, 32, 32, 4), 32: (64, 32, 16, 8), 64: (64, 32, 16, 8), 128: (32, 16, 8, 16)}
BACKWARD_TILES = {16: (64, 32, 32, 4), 32: (32, 32, 8, 8), 64: (32, 32, 8, 8), 128: (16, 16, 8, 8)}
if SIMULATED:
    FORWARD_TILES = BACKWARD_TILES = dict.fromkeys(WIDTHS, (16, 8, 2, 2))


@device
def load_rows(tile, rows, first, channel, HS, threads):
    """tile[i, c] = rows[first + i, channel + c]; zero beyond the rows there are and beyond the head's HS channels."""
    width = tile.shape[1] - PAD
    thread = cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    for step in range(tile.shape[0] * width // threads):
        i, c = (step * threads + thread) // width, (step * threads + thread) % width
        # the address is always good, so that no load waits for a decision
        number = to_float(rows[min(first + i, rows.shape[0] - 1), channel + min(c, HS - 1)])
        tile[i, c] = number if first + i < rows.shape[0] and c < HS else ZERO


@device
def multiply(scores, a, b):
    """scores[r, s] = the product of the thread's row r of tile a with its row s of tile b, over the channels."""
    R, S = scores.shape
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    for r in range(R):
        for s in range(S):
            scores[r, s] = ZERO
    for c in range(0, a.shape[1] - PAD, 4):
        for s in range(S):
            b4 = load_float4(b, x + s * (b.shape[0] // S), c)
            for r in range(R):
                a4 = load_float4(a, y + r * (a.shape[0] // R), c)
                for i in range(4):
                    scores[r, s] += a4[i] * b4[i]


@device
def add_weighted(acc, weights, b, row, TX):
    """acc[r, :] += the sum over tile b's rows, each times its number in the thread's row r of the weights.

    row: a local array (R, 4)."""
    R, channels = acc.shape
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    for j in range(0, b.shape[0], 4):
        for r in range(R):
            row[r, 0], row[r, 1], row[r, 2], row[r, 3] = load_float4(weights, y + r * (weights.shape[0] // R), j)
        for group in range(channels // 4):
            for i in range(4):
                b4 = load_float4(b, j + i, (group * TX + x) * 4)
                for r in range(R):
                    for e in range(4):
                        acc[r, group * 4 + e] += row[r, i] * b4[e]


@device
def clear(acc):
    """acc = 0."""
    for r in range(acc.shape[0]):
        for i in range(acc.shape[1]):
            acc[r, i] = ZERO


@device
def scale_rows(acc, factors):
    """acc[r, :] *= factors[r]."""
    for r in range(acc.shape[0]):
        for i in range(acc.shape[1]):
            acc[r, i] *= factors[r]


@device
def store_rows(rows, acc, tile, first, channel, HS, TX, threads):
    """rows[first + i, channel + c] = acc, by way of a tile that nobody needs any more, so that neighbours write
    neighbours; nothing beyond the rows there are and the head's channels."""
    R, channels = acc.shape
    width = tile.shape[1] - PAD
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    for r in range(R):
        for group in range(channels // 4):
            for e in range(4):
                tile[y + r * (tile.shape[0] // R), (group * TX + x) * 4 + e] = acc[r, group * 4 + e]
    cuda.syncthreads()
    for n in range(y * cuda.blockDim.x + x, tile.shape[0] * width, threads):
        i, c = n // width, n % width
        if first + i < rows.shape[0] and c < HS:
            rows[first + i, channel + c] = to_storage(tile[i, c], rows)


def make_forward_kernel(width: int, BQ: int, BK: int, TY: int, TX: int):
    """attention_forward for heads of up to width channels, on tiles of BQ queries and BK keys."""
    R, S, CHANNELS = BQ // TY, BK // TX, width // TX
    LONG, KEYS, TOPS, THREADS = width + PAD, BK + PAD, TX + PAD, TX * TY

    @kernel(launch_bounds=(THREADS, FORWARD_BLOCKS))
    def attention_forward_kernel(out, lse, qkv, HS, scale):
        """out (B, T, C) =, lse (B, NH, T) = <- qkv (B, T, 3*C), HS channels a head, scale of the scores.

        Grid: (tiles of queries, NH, B), the longest rows first; block (TX, TY). A thread owns some of its queries'
        scores, then some of their channels. Moves about T / (2 * BQ) times k and v, and q and out once.
        """
        q = cuda.shared.array((BQ, LONG), float32)
        k = cuda.shared.array((BK, LONG), float32)
        v = cuda.shared.array((BK, LONG), float32)
        p = cuda.shared.array((BQ, KEYS), float32)
        tops = cuda.shared.array((BQ, TOPS), float32)  # what each thread of a row has to say of it
        scores, acc = cuda.local.array((R, S), float32), cuda.local.array((R, CHANNELS), float32)
        top, total = cuda.local.array(R, float32), cuda.local.array(R, float32)
        shrink, row = cuda.local.array(R, float32), cuda.local.array((R, 4), float32)
        x, y, h, b = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockIdx.y, cuda.blockIdx.z
        C = out.shape[2]
        t0 = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * BQ
        load_rows(q, qkv[b], t0, h * HS, HS, THREADS)
        clear(acc)
        for r in range(R):
            top[r], total[r] = NOTHING, ZERO
        for s0 in range(0, min(t0 + BQ, out.shape[1]), BK):
            load_rows(k, qkv[b], s0, C + h * HS, HS, THREADS)
            load_rows(v, qkv[b], s0, 2 * C + h * HS, HS, THREADS)
            cuda.syncthreads()

            # scores, and the largest of each row so far
            multiply(scores, q, k)
            for r in range(R):
                largest = NOTHING
                for s in range(S):
                    seen = s0 + x + s * TX <= t0 + y + r * TY
                    scores[r, s] = scores[r, s] * scale if seen else NOTHING
                    largest = max(largest, scores[r, s])
                tops[y + r * TY, x] = largest
            cuda.syncthreads()

            # weights; where a larger score has appeared, what was summed so far shrinks
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

            add_weighted(acc, p, v, row, TX)
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
        store_rows(out[b], acc, q, t0, h * HS, HS, TX, THREADS)

    return attention_forward_kernel


@kernel
def dot_rows_kernel(delta, dout, out, HS):
    """delta (B, NH, T) = sum(dout * out) over the HS channels of each head; dout, out (B, T, C).

    Grid: (groups of DOT_ROWS tokens, NH, B); block: DOT_THREADS. A thread multiplies, neighbours neighbours, then adds
    up a row. Moves: 2*B*T*C*itemsize bytes.
    """
    products = cuda.shared.array((DOT_ROWS, DOT_PITCH), float32)
    thread, h, b = cuda.threadIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
    t0 = cuda.blockIdx.x * DOT_ROWS
    for i in range(min(DOT_ROWS, out.shape[1] - t0)):
        for c in range(thread, HS, DOT_THREADS):
            products[i, c] = to_float(dout[b, t0 + i, h * HS + c]) * to_float(out[b, t0 + i, h * HS + c])
    cuda.syncthreads()
    if thread < DOT_ROWS and t0 + thread < out.shape[1]:
        total = ZERO
        for c in range(HS):
            total += products[thread, c]
        delta[b, h, t0 + thread] = total


def make_backward_kernels(width: int, BK: int, BQ: int, TY: int, TX: int):
    """(kernel for dk and dv, kernel for dq) of heads of up to width channels.

    A block of the first owns a tile of BK keys and goes through tiles of BQ queries; of the second, it owns BK queries
    and goes through BQ keys. Both make the weights of their tiles anew, p = e**(score - lse), and from them the scores'
    gradient, ds = p * (dout vT - delta) * scale.
    """
    R, S, CHANNELS = BK // TY, BQ // TX, width // TX
    LONG, COLUMNS, THREADS = width + PAD, BQ + PAD, TX * TY

    @kernel(launch_bounds=(THREADS, BACKWARD_BLOCKS))
    def attention_dkv_kernel(dqkv, dout, lse, delta, qkv, HS, scale):
        """The keys' and the values' parts of dqkv (B, T, 3*C) = <- dout (B, T, C), lse, delta (B, NH, T), qkv.

        Grid: (tiles of keys, NH, B), the keys that most queries see first; block (TX, TY). A thread owns some of its
        keys' scores, then some of their channels of dk and dv. Moves about T / (2 * BK) times q and dout, once k and v.
        """
        k = cuda.shared.array((BK, LONG), float32)
        v = cuda.shared.array((BK, LONG), float32)
        q = cuda.shared.array((BQ, LONG), float32)
        dy = cuda.shared.array((BQ, LONG), float32)
        p = cuda.shared.array((BK, COLUMNS), float32)
        ds = cuda.shared.array((BK, COLUMNS), float32)
        scores, dweights = cuda.local.array((R, S), float32), cuda.local.array((R, S), float32)
        dk, dv = cuda.local.array((R, CHANNELS), float32), cuda.local.array((R, CHANNELS), float32)
        row = cuda.local.array((R, 4), float32)
        x, y, h, b = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockIdx.y, cuda.blockIdx.z
        T, C = dout.shape[1], dout.shape[2]
        s0 = cuda.blockIdx.x * BK
        load_rows(k, qkv[b], s0, C + h * HS, HS, THREADS)
        load_rows(v, qkv[b], s0, 2 * C + h * HS, HS, THREADS)
        clear(dk)
        clear(dv)
        for t0 in range(s0 // BQ * BQ, T, BQ):
            load_rows(q, qkv[b], t0, h * HS, HS, THREADS)
            load_rows(dy, dout[b], t0, h * HS, HS, THREADS)
            cuda.syncthreads()

            # scores and the weights' gradient, a key a row
            multiply(scores, k, q)
            multiply(dweights, v, dy)
            for s in range(S):
                t = t0 + x + s * TX
                known, owed = lse[b, h, min(t, T - 1)], delta[b, h, min(t, T - 1)]
                for r in range(R):
                    sees = s0 + y + r * TY <= t and t < T
                    weight = math.exp(scores[r, s] * scale - known) if sees else ZERO
                    p[y + r * TY, x + s * TX] = weight
                    ds[y + r * TY, x + s * TX] = weight * (dweights[r, s] - owed) * scale if sees else ZERO
            cuda.syncthreads()

            add_weighted(dv, p, dy, row, TX)
            add_weighted(dk, ds, q, row, TX)
            cuda.syncthreads()
        store_rows(dqkv[b], dk, k, s0, C + h * HS, HS, TX, THREADS)
        store_rows(dqkv[b], dv, v, s0, 2 * C + h * HS, HS, TX, THREADS)

    @kernel(launch_bounds=(THREADS, BACKWARD_BLOCKS))
    def attention_dq_kernel(dqkv, dout, lse, delta, qkv, HS, scale):
        """The queries' part of dqkv (B, T, 3*C) = <- dout (B, T, C), lse, delta (B, NH, T), qkv.

        Grid: (tiles of queries, NH, B), the longest rows first; block (TX, TY). A thread owns some of its queries'
        scores, then some of their channels of dq. Moves about T / (2 * BK) times k and v, q and dout once.
        """
        q = cuda.shared.array((BK, LONG), float32)
        dy = cuda.shared.array((BK, LONG), float32)
        k = cuda.shared.array((BQ, LONG), float32)
        v = cuda.shared.array((BQ, LONG), float32)
        ds = cuda.shared.array((BK, COLUMNS), float32)
        scores, dweights = cuda.local.array((R, S), float32), cuda.local.array((R, S), float32)
        dq, row = cuda.local.array((R, CHANNELS), float32), cuda.local.array((R, 4), float32)
        known, owed = cuda.local.array(R, float32), cuda.local.array(R, float32)
        x, y, h, b = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockIdx.y, cuda.blockIdx.z
        T, C = dout.shape[1], dout.shape[2]
        t0 = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * BK
        load_rows(q, qkv[b], t0, h * HS, HS, THREADS)
        load_rows(dy, dout[b], t0, h * HS, HS, THREADS)
        for r in range(R):
            t = min(t0 + y + r * TY, T - 1)
            known[r], owed[r] = lse[b, h, t], delta[b, h, t]
        clear(dq)
        for s0 in range(0, min(t0 + BK, T), BQ):
            load_rows(k, qkv[b], s0, C + h * HS, HS, THREADS)
            load_rows(v, qkv[b], s0, 2 * C + h * HS, HS, THREADS)
            cuda.syncthreads()

            multiply(scores, q, k)
            multiply(dweights, dy, v)
            for r in range(R):
                for s in range(S):
                    seen = s0 + x + s * TX <= t0 + y + r * TY and t0 + y + r * TY < T
                    weight = math.exp(scores[r, s] * scale - known[r]) if seen else ZERO
                    ds[y + r * TY, x + s * TX] = weight * (dweights[r, s] - owed[r]) * scale if seen else ZERO
            cuda.syncthreads()

            add_weighted(dq, ds, k, row, TX)
            cuda.syncthreads()
        store_rows(dqkv[b], dq, q, t0, h * HS, HS, TX, THREADS)

    return attention_dkv_kernel, attention_dq_kernel


@kernel
def append_kernel(cache, qkv, position):
    """cache (B, maxT, 2, C) = the keys and values of qkv (B, T, 3*C), at the rows from position[0] on.

    Grid: (groups of CHUNK channels, T, B); block: CHUNK; a thread owns a channel's key and value.
    """
    c, t, b = cuda.blockIdx.x * CHUNK + cuda.threadIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
    C = cache.shape[3]
    if c < C:
        row = position[0] + t
        cache[b, row, 0, c] = qkv[b, t, C + c]
        cache[b, row, 1, c] = qkv[b, t, 2 * C + c]


@kernel
def attend_kernel(out, cache, qkv, position, lanes, HS, scale):
    """out (B, T, C) = for the queries of qkv (B, T, 3*C), the t-th of which sees the cache up to row position[0] + t.

    Grid: (T, NH, B); block: CHUNK. In each chunk of the cache a thread owns a token, whose score it makes; then it owns
    a channel, or some, and of the chunk's values every (CHUNK / lanes)th. Moves the head's part of the cache once for
    each block.
    """
    q = cuda.shared.array(WIDEST, float32)
    scratch = cuda.shared.array(CHUNK, float32)
    weights = cuda.shared.array(CHUNK, float32)
    sums = cuda.shared.array(SUMS, float32)
    thread, t, h, b = cuda.threadIdx.x, cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
    group, groups, first = thread // lanes, CHUNK // lanes, h * HS
    end = position[0] + t + 1
    for c in range(thread, HS, CHUNK):
        q[c] = to_float(qkv[b, t, first + c])
    for i in range(thread, SUMS, CHUNK):
        sums[i] = ZERO
    top, total = NOTHING, ZERO
    cuda.syncthreads()
    for s0 in range(0, end, CHUNK):
        # a score each; its share of the sum of the weights stays with the thread
        score, s = NOTHING, s0 + thread
        if s < end:
            score = ZERO
            for c in range(HS):
                score += q[c] * to_float(cache[b, s, 0, first + c])
            score *= scale
        before, top = top, max(top, block_max(score, scratch))
        shrink, weight = math.exp(before - top), math.exp(score - top)
        total = total * shrink + weight
        weights[thread] = weight
        cuda.syncthreads()

        # the values, a channel each
        for c in range(thread % lanes, HS, lanes):
            value = sums[group * WIDEST + c] * shrink
            for i in range(group, min(CHUNK, end - s0), groups):
                value += weights[i] * to_float(cache[b, s0 + i, 1, first + c])
            sums[group * WIDEST + c] = value
        cuda.syncthreads()
    inverse = ONE / block_sum(total, scratch)
    for c in range(thread, HS, CHUNK):
        value = ZERO
        for i in range(groups):
            value += sums[i * WIDEST + c]
        out[b, t, first + c] = to_storage(value * inverse, out)


FORWARD = {width: make_forward_kernel(width, *tiles) for width, tiles in FORWARD_TILES.items()}
BACKWARD = {width: make_backward_kernels(width, *tiles) for width, tiles in BACKWARD_TILES.items()}


def head_of(C: int, num_heads: int) -> tuple[int, int, np.float32]:
    """(channels of a head, of the kernels that serve it, what scores are multiplied by); a UserError beyond WIDEST."""
    HS = C // num_heads
    if HS > WIDEST:
        raise UserError(
            f"num_heads {num_heads} splits {C} channels into heads of {HS}, but attention on a GPU takes heads of "
            f"up to {WIDEST}: use more heads"
        )
    return HS, next(width for width in WIDTHS if width >= HS), ONE / float32(math.sqrt(HS))


def on_tensor_cores(qkv, HS: int):
    """The module of kernels for tensor cores where it serves this dtype, head size and card, else None."""
    if qkv.dtype == uint16 and HS in (64, 128) and has_tensor_cores():
        from llm_numba.cuda import attention_mma  # not in the simulator, which has none of its instructions

        return attention_mma
    return None


def attention_scratch_size(B, T, C, num_heads):
    """Floats of scratch that the backward of attention over T tokens needs."""
    return B * num_heads * T


def attention_forward(out, att, qkv, num_heads, scratch):
    """Every token looks at itself and at those before it.

    out (B, T, C), att (B, NH, T) <- qkv (B, T, 3*C), each row q, k, v of all heads; of 128 channels a head at most
    Writes:   out =, att = the log-sum-exp of each query's scores
    Parallel: over tiles of queries of the B*NH heads; a block owns its queries
    Flops:    2*B*T*T*C
    Source:   Vaswani et al. 2017, arXiv:1706.03762
    """
    B, T, C = out.shape
    HS, width, scale = head_of(C, num_heads)
    tensor_cores = on_tensor_cores(qkv, HS)
    if tensor_cores:
        tensor_cores.flash_forward(out, att, qkv, HS, scale)
        return
    BQ, _, TY, TX = FORWARD_TILES[width]
    FORWARD[width][(blocks_for(T, BQ), num_heads, B), (TX, TY), stream()](out, att, qkv, HS, scale)


def attention_backward(dqkv, dout, out, att, qkv, num_heads, scratch):
    """The gradient of attention with respect to q, k and v.

    dqkv (B, T, 3*C) <- dout (B, T, C), out (B, T, C), att (B, NH, T) as the forward wrote it, qkv (B, T, 3*C)
    Writes:   dqkv =
    Scratch:  attention_scratch_size(B, T, C, num_heads)
    Parallel: over tiles of keys, then over tiles of queries of the B*NH heads; a block owns its keys or queries, so
              that no two add to the same number, and the scores are made twice
    Flops:    7*B*T*T*C
    Source:   with p a row of the weights and dp that of dout vT, a softmax's gradient is p * (dp - sum(p * dp)),
              and sum(p * dp) = sum(dout * out) (Dao et al. 2022, arXiv:2205.14135, appendix B)
    """
    B, T, C = out.shape
    HS, width, scale = head_of(C, num_heads)
    delta = scratch[: B * num_heads * T].reshape(B, num_heads, T)
    dot_rows_kernel[(blocks_for(T, DOT_ROWS), num_heads, B), DOT_THREADS, stream()](delta, dout, out, HS)
    tensor_cores = on_tensor_cores(qkv, HS)
    if tensor_cores:
        tensor_cores.flash_backward(dqkv, dout, att, delta, qkv, HS, scale)
        return
    BK, _, TY, TX = BACKWARD_TILES[width]
    for half in BACKWARD[width]:
        half[(blocks_for(T, BK), num_heads, B), (TX, TY), stream()](dqkv, dout, att, delta, qkv, HS, scale)


def attention_cached_forward(out, cache, qkv, position, num_heads):
    """Attention for sampling: T new tokens, which stand at position, position + 1, ... of their sequence.

    Their keys and values go into the cache first; then their queries look at everything it holds up to themselves. The
    softmax is taken in one pass: when a larger score appears, what was summed so far shrinks.

    out (B, T, C), cache (B, maxT, 2, C) <- qkv (B, T, 3*C), position (1,) int32 (index of the first new token)
    Writes:   out =, cache = at rows position to position + T - 1
    Parallel: over the new tokens' heads, and within a block over the cached tokens
    Moves:    2*B*(position + T)*C*itemsize bytes for each of the T tokens
    Source:   Milakov and Gimelshein 2018, arXiv:1805.02867
    """
    B, T, C = out.shape
    HS, width, scale = head_of(C, num_heads)
    append_kernel[(blocks_for(C, CHUNK), T, B), CHUNK, stream()](cache, qkv, position)
    lanes = min(width, CHUNK // 2)
    attend_kernel[(T, num_heads, B), CHUNK, stream()](out, cache, qkv, position, lanes, HS, scale)
