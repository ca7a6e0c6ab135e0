"""Causal multi-head attention that never stores the (T, T) matrix of scores; kv heads may serve groups of query heads.

variants.py chooses the kernels for training: attention_wgmma.py (bf16 on Hopper), attention_mma.py (bf16 on tensor
cores) or attention_simt.py (any GPU). The kernels for sampling from a KV cache and for debugging are here.
"""

import functools
import math

import numpy as np
from numba import cuda

from llm_numba.cuda.attention_common import WIDEST
from llm_numba.cuda.jit import (
    ALL_LANES,
    THREADS,
    WARP,
    blocks_for,
    device,
    float32,
    kernel,
    sized,
    stream,
    to_float,
    to_storage,
    uint32,
)
from llm_numba.cuda.overlap import let_next_start, overlapping, wait_for_previous
from llm_numba.cuda.variants import choose
from llm_numba.cuda.vectors import load_vector, vector_size
from llm_numba.util.cli import UserError

ZERO, ONE = float32(0), float32(1)
LOWEST, MASKED = np.finfo(float32).min, float32(-np.inf)  # before the first score; the score of a key after its query
ATTENDING = sized(512, 2)  # threads of a block of attend_kernel
AT_ONCE = sized(4, 2)  # tokens that a team loads at once
ONE_WARP = sized(WARP, 1)


@functools.cache
def attend_kernel(HS: int, group: int):
    """The kernel of `attention_cached_forward` for heads of HS channels, `group` query heads for each kv head."""
    size = vector_size(HS)
    lanes = min(ONE_WARP, 1 << (blocks_for(HS, size) - 1).bit_length())  # threads of a team
    each = blocks_for(HS, lanes * size) * size  # channels of a thread
    stride, loaded = lanes * size, AT_ONCE * each
    warps, teams = ATTENDING // ONE_WARP, ATTENDING // lanes

    @device
    def over_threads(x, first, end):
        """The sum of x over the threads of a warp that are `first`, 2 * `first`, ... below `end` apart."""
        distance = first
        while distance < end:
            x += cuda.shfl_xor_sync(ALL_LANES, x, distance)
            distance *= 2
        return x

    @device
    def load_channels(x, first, tensor, row, head, lane):
        """x[first : first + each] = this lane's channels of a head, whose first column is `head`; 0 past the last."""
        for k in range(0, each, size):
            c = lane * size + k // size * stride
            if c < HS:
                load_vector(x, first + k, tensor, row, head + c, size)
            else:
                for i in range(size):
                    x[first + k + i] = ZERO

    @kernel(launch_bounds=(ATTENDING, 1))
    def attend_kernel(out, cache, qkv, position, T, maxT, scale):
        """out (B*T, NH*HS) = attention of the queries of qkv (B*T, (NH + 2*NKV)*HS); query t sees the tokens up to
        position[0] + t: earlier ones in cache (B*maxT*2, NKV*HS), those of this call in qkv. cache = their keys and
        values.

        Grid: (T, NH, B); block: ATTENDING, in teams of `lanes` threads. A team owns every teams-th token, AT_ONCE at a
        time, a thread `each` channels of them; it keeps the sum of the values, each times e**(score - top), where top
        is the largest score so far. At the end the teams' sums are added, in a fixed order.
        Moves: the head's part of the cache, once per block
        """
        thread, t, h, b = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x), cuda.blockIdx.y, uint32(cuda.blockIdx.z)
        team, lane = thread // uint32(lanes), thread % uint32(lanes)
        width = cache.shape[1]
        head, key = h // group * HS, qkv.shape[1] - 2 * width + h // group * HS
        q = cuda.local.array(each, float32)
        keys = cuda.local.array(loaded, float32)
        values = cuda.local.array(loaded, float32)
        sums = cuda.local.array(each, float32)
        scores = cuda.local.array(AT_ONCE, float32)
        tops = cuda.shared.array(warps, float32)
        totals = cuda.shared.array(warps, float32)
        of_warps = cuda.shared.array((warps, HS), float32)
        let_next_start()
        wait_for_previous()

        start, row = uint32(position[0]), uint32(b * uint32(T) + t)
        if h % group == 0:
            for c in range(thread, HS, ATTENDING):
                to = uint32(2) * (b * uint32(maxT) + start + t)
                cache[to, head + c] = qkv[row, key + c]
                cache[to + 1, head + c] = qkv[row, key + width + c]
        load_channels(q, 0, qkv, row, h * HS, lane)
        for k in range(each):
            sums[k] = ZERO
        top, total = LOWEST, ZERO
        end = uint32(start + t + uint32(1))
        first = uint32(0)
        while first < end:
            for i in range(AT_ONCE):
                s = uint32(first + team + uint32(i * teams))
                if s < start:
                    at = uint32(2) * (b * uint32(maxT) + s)
                    load_channels(keys, i * each, cache, at, head, lane)
                    load_channels(values, i * each, cache, at + 1, head, lane)
                elif s < end:
                    at = uint32(b * uint32(T) + s - start)
                    load_channels(keys, i * each, qkv, at, key, lane)
                    load_channels(values, i * each, qkv, at, key + width, lane)
            before = top
            for i in range(AT_ONCE):
                score = ZERO
                for k in range(each):
                    score += q[k] * keys[i * each + k]
                score = over_threads(score, 1, lanes) * scale
                scores[i] = score if first + team + uint32(i * teams) < end else MASKED
                top = max(top, scores[i])
            shrink = math.exp(before - top)
            total *= shrink
            for k in range(each):
                sums[k] *= shrink
            for i in range(AT_ONCE):
                if first + team + uint32(i * teams) < end:
                    weight = math.exp(scores[i] - top)
                    total += weight
                    for k in range(each):
                        sums[k] += weight * values[i * each + k]
            first = uint32(first + uint32(AT_ONCE * teams))

        # add the teams of a warp, then the warps
        highest = top
        distance = lanes
        while distance < ONE_WARP:
            highest = max(highest, cuda.shfl_xor_sync(ALL_LANES, highest, distance))
            distance *= 2
        shrink = math.exp(top - highest)
        total = over_threads(total * shrink, lanes, ONE_WARP)
        warp, of_team = thread // uint32(ONE_WARP), thread % uint32(ONE_WARP) < lanes
        if of_team and lane == 0:
            tops[warp], totals[warp] = highest, total
        for k in range(each):
            c = lane * size + k // size * stride + k % size
            of_warp = over_threads(sums[k] * shrink, lanes, ONE_WARP)
            if of_team and c < HS:
                of_warps[warp, c] = of_warp
        cuda.syncthreads()
        for c in range(thread, HS, ATTENDING):
            highest = tops[0]
            for warp in range(1, warps):
                highest = max(highest, tops[warp])
            value, total = ZERO, ZERO
            for warp in range(warps):
                shrink = math.exp(tops[warp] - highest)
                value += shrink * of_warps[warp, c]
                total += shrink * totals[warp]
            out[row, h * HS + c] = to_storage(value / total, out)

    return attend_kernel


@kernel
def weights_kernel(weights, lse, qkv, num_heads, num_kv_heads, HS, scale):
    """weights (B, NH, T, T) = e**(score - lse), 0 above the diagonal; lse (B, NH, T), qkv (B, T, (NH + 2*NKV)*HS).

    Grid: (blocks of THREADS keys, T, B*NH); block: THREADS; a thread owns an element. Moves q and k T times.
    """
    s, t = cuda.blockIdx.x * THREADS + cuda.threadIdx.x, cuda.blockIdx.y
    b, h = cuda.blockIdx.z // num_heads, cuda.blockIdx.z % num_heads
    k_channel = (num_heads + h // (num_heads // num_kv_heads)) * HS
    if s < weights.shape[3]:
        score = ZERO
        if s <= t:
            for c in range(HS):
                score += to_float(qkv[b, t, h * HS + c]) * to_float(qkv[b, s, k_channel + c])
        weights[b, h, t, s] = math.exp(score * scale - lse[b, h, t]) if s <= t else ZERO


def attention_forward(out, lse, qkv, num_heads, num_kv_heads, scratch):
    """Causal attention: each token sees itself and the tokens before it.

    out (B, T, NH*HS), lse (B, NH, T) float32 <- qkv (B, T, (NH + 2*NKV)*HS), each row q of all query heads, then k,
        then v of all kv heads; query head h uses kv head h // (NH / NKV)
    Writes:   out =, lse = the log-sum-exp of each query's scores
    Parallel: over tiles of queries of the B*NH heads; a block owns its queries
    Scratch:  none
    Flops:    2*B*T*T*NH*HS
    Errors:   UserError for heads of more than WIDEST channels
    Source:   Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023, arXiv:2305.13245 (groups of query heads)
    """
    variant = choose("attention", qkv.dtype, head_size(out, num_heads))
    variant.forward(out, lse, qkv, num_heads, num_kv_heads, scratch)


def attention_forward_scratch(out, lse, qkv, num_heads, num_kv_heads):
    """Floats of scratch that `attention_forward` needs: none."""
    return 0


def attention_backward(dqkv, dout, out, lse, qkv, num_heads, num_kv_heads, scratch):
    """The gradient of attention with respect to q, k and v.

    dqkv (B, T, (NH + 2*NKV)*HS) <- dout, out (B, T, NH*HS), lse (B, NH, T) of the forward, qkv (B, T, (NH + 2*NKV)*HS)
    Writes:   dqkv =; dk and dv are sums over the query heads of a group, in order
    Scratch:  attention_backward_scratch
    Parallel: over tiles of keys of the B*NKV kv heads, and for dq over tiles of queries of the B*NH heads. A block owns
              its keys or queries and computes the scores once more for dq; or, with wgmma, blocks add to dq in turn
    Flops:    7*B*T*T*NH*HS; with wgmma 5
    Errors:   UserError for heads of more than WIDEST channels
    Source:   with p a row of the weights and dp that of dout vT, the gradient of softmax is p * (dp - sum(p * dp)), and
              sum(p * dp) = sum(dout * out) (Dao et al. 2022, arXiv:2205.14135, appendix B)
    """
    variant = choose("attention", qkv.dtype, head_size(out, num_heads))
    variant.backward(dqkv, dout, out, lse, qkv, num_heads, num_kv_heads, scratch)


def attention_backward_scratch(dqkv, dout, out, lse, qkv, num_heads, num_kv_heads):
    """Floats of scratch that `attention_backward` needs."""
    HS, (B, NH, T) = head_size(out, num_heads), lse.shape
    return choose("attention", qkv.dtype, HS).backward_scratch(B, T, NH, HS)


def attention_cached_forward(out, cache, qkv, position, num_heads, num_kv_heads):
    """Attention for sampling: T new tokens at position, position + 1, ... of their sequence.

    Their keys and values are written to the cache, and each query attends to the tokens up to its own. The softmax
    takes one pass: when the maximum score grows, the sums so far shrink.

    out (B, T, NH*HS), cache (B, maxT, 2, NKV*HS) <- qkv (B, T, (NH + 2*NKV)*HS), position (1,) int32, the index of the
        first new token
    Writes:   out =, cache = at rows position to position + T - 1
    Parallel: over the new tokens' heads, and within a block over the cached tokens
    Moves:    2*B*(position + T)*NH*HS*itemsize bytes for each of the T tokens
    Errors:   UserError for heads of more than WIDEST channels
    Source:   Milakov and Gimelshein 2018, arXiv:1805.02867
    """
    (B, T, C), HS, (maxT, _, width) = out.shape, head_size(out, num_heads), cache.shape[1:]
    overlapping(attend_kernel(HS, num_heads // num_kv_heads), (T, num_heads, B), ATTENDING)(
        out.reshape(B * T, C), cache.reshape(-1, width), qkv.reshape(B * T, -1), position, T, maxT,
        ONE / float32(math.sqrt(HS)),
    )  # fmt: skip


def attention_weights(weights, lse, qkv, num_heads, num_kv_heads):
    """The matrix of attention weights, for debugging; training never stores it.

    weights (B, NH, T, T) float32 <- lse (B, NH, T) of the forward, qkv (B, T, (NH + 2*NKV)*HS)
    Writes:   weights = softmax of the scores, 0 above the diagonal
    Parallel: over the elements of weights
    """
    B, NH, T, _ = weights.shape
    HS = qkv.shape[2] // (num_heads + 2 * num_kv_heads)
    weights_kernel[(blocks_for(T), T, B * NH), THREADS, stream()](
        weights, lse, qkv, num_heads, num_kv_heads, HS, ONE / float32(math.sqrt(HS))
    )


def head_size(out, num_heads: int) -> int:
    """Channels per head. Errors: UserError if they are more than WIDEST."""
    C = out.shape[2]
    if C // num_heads > WIDEST:
        raise UserError(
            f"num_heads {num_heads} splits {C} channels into heads of {C // num_heads}, but attention on a GPU "
            f"supports heads of up to {WIDEST}: use more heads"
        )
    return C // num_heads
