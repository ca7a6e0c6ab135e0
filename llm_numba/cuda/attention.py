"""Causal multi-head attention that never stores the (T, T) matrix of scores; kv heads may serve groups of query heads.

variants.py chooses the kernels for training: attention_wgmma.py (bf16 on Hopper), attention_mma.py (bf16 on tensor
cores) or attention_simt.py (any GPU).
The kernels for sampling from a KV cache and for debugging are here.
"""

import math

import numpy as np
from numba import cuda

from llm_numba.cuda.attention_common import WIDEST
from llm_numba.cuda.jit import (
    THREADS,
    block_max,
    block_sum,
    blocks_for,
    float32,
    kernel,
    sized,
    stream,
    to_float,
    to_storage,
)
from llm_numba.cuda.variants import choose
from llm_numba.util.cli import UserError

ZERO, ONE = float32(0), float32(1)
MASKED = float32(-np.inf)  # the score of a key after its query
CHUNK = sized(256, 4)  # threads of a block of attend_kernel, and the cached tokens that it takes at a time
MIN_LANES = min(16, CHUNK // 2)
SUMS = CHUNK // MIN_LANES * WIDEST  # floats of shared memory in which the threads sum values


@kernel
def append_kernel(cache, qkv, position):
    """cache (B, maxT, 2, NKV*HS) = the keys and values of qkv (B, T, (NH + 2*NKV)*HS), at the rows from position[0].

    Grid: (groups of CHUNK channels, T, B); block: CHUNK; a thread owns a channel of the key and of the value.
    """
    c, t, b = cuda.blockIdx.x * CHUNK + cuda.threadIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
    width = cache.shape[3]
    if c < width:
        row, first = position[0] + t, qkv.shape[2] - 2 * width
        cache[b, row, 0, c] = qkv[b, t, first + c]
        cache[b, row, 1, c] = qkv[b, t, first + width + c]


@kernel
def attend_kernel(out, cache, qkv, position, group, lanes, HS, scale):
    """out (B, T, NH*HS) = attention of the queries of qkv; query t sees the cache up to row position[0] + t.

    group: query heads per kv head; lanes: threads that share the channels of a value
    Grid: (T, NH, B); block: CHUNK. For each chunk of the cache a thread first owns a token, whose score it computes,
    then some channels of every (CHUNK / lanes)th value of the chunk. Moves the head's part of the cache once per block.
    """
    q = cuda.shared.array(WIDEST, float32)
    scratch = cuda.shared.array(CHUNK, float32)
    weights = cuda.shared.array(CHUNK, float32)
    sums = cuda.shared.array(SUMS, float32)
    thread, t, h, b = cuda.threadIdx.x, cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
    part, parts, first = thread // lanes, CHUNK // lanes, h // group * HS
    end = position[0] + t + 1
    for c in range(thread, HS, CHUNK):
        q[c] = to_float(qkv[b, t, h * HS + c])
    for i in range(thread, SUMS, CHUNK):
        sums[i] = ZERO
    top, total = MASKED, ZERO
    cuda.syncthreads()
    for s0 in range(0, end, CHUNK):
        # a score per thread; each thread keeps its share of the sum of the weights
        score, s = MASKED, s0 + thread
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

        # values, some channels per thread
        for c in range(thread % lanes, HS, lanes):
            value = sums[part * WIDEST + c] * shrink
            for i in range(part, min(CHUNK, end - s0), parts):
                value += weights[i] * to_float(cache[b, s0 + i, 1, first + c])
            sums[part * WIDEST + c] = value
        cuda.syncthreads()
    inverse = ONE / block_sum(total, scratch)
    for c in range(thread, HS, CHUNK):
        value = ZERO
        for i in range(parts):
            value += sums[i * WIDEST + c]
        out[b, t, h * HS + c] = to_storage(value * inverse, out)


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
    Parallel: over tiles of keys of the B*NKV kv heads, then over tiles of queries of the B*NH heads. A block owns its
              keys or queries, so nothing races; the scores are computed twice
    Flops:    7*B*T*T*NH*HS
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

    Their keys and values are written to the cache; then each query attends to the cache up to its own token. The
    softmax takes one pass: when the maximum score grows, the sums so far shrink.

    out (B, T, NH*HS), cache (B, maxT, 2, NKV*HS) <- qkv (B, T, (NH + 2*NKV)*HS), position (1,) int32, the index of the
        first new token
    Writes:   out =, cache = at rows position to position + T - 1
    Parallel: over the new tokens' heads, and within a block over the cached tokens
    Moves:    2*B*(position + T)*NH*HS*itemsize bytes for each of the T tokens
    Errors:   UserError for heads of more than WIDEST channels
    Source:   Milakov and Gimelshein 2018, arXiv:1805.02867
    """
    B, T, _ = out.shape
    HS, width = head_size(out, num_heads), cache.shape[3]
    append_kernel[(blocks_for(width, CHUNK), T, B), CHUNK, stream()](cache, qkv, position)
    lanes = min(max(MIN_LANES, 1 << (HS - 1).bit_length()), CHUNK // 2)  # HS rounded up to a power of two
    attend_kernel[(T, num_heads, B), CHUNK, stream()](
        out, cache, qkv, position, num_heads // num_kv_heads, lanes, HS, ONE / float32(math.sqrt(HS))
    )


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
