"""The rungs of lesson 05 on a GPU: attention, forward."""

import functools
import math

import numpy as np
from numba import cuda

from llm_numba import lessons, oracle
from llm_numba.cuda.attention import attention_forward
from llm_numba.cuda.jit import blocks_for, float32, sized, stream
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

ZERO, ONE, LOWEST = float32(0), float32(1), float32(-np.inf)
THREADS = sized(64, 32)  # per block: on a GPU, in the simulator
KEYS = sized(32, 8)  # rows of k and v in shared memory


@cuda.jit
def scores_kernel(weights, qkv, HS, scale):
    """weights[b, h, t, s] = score of query t and key s. One thread per key, THREADS keys per block."""
    s, t, n = cuda.grid(1), cuda.blockIdx.y, cuda.blockIdx.z
    NH, C = weights.shape[1], qkv.shape[2] // 3
    b, h = n // NH, n % NH
    if s <= t:
        score = ZERO
        for c in range(HS):
            score += qkv[b, t, h * HS + c] * qkv[b, s, C + h * HS + c]
        weights[b, h, t, s] = score * scale


@cuda.jit
def softmax_kernel(lse, weights):
    """weights[b, h, t, :t + 1] = softmax of the scores. One thread per row."""
    t, h, b = cuda.grid(1), cuda.blockIdx.y, cuda.blockIdx.z
    if t < weights.shape[2]:
        top, total = LOWEST, ZERO
        for s in range(t + 1):
            score, before = weights[b, h, t, s], top
            top = max(top, score)
            total = total * math.exp(before - top) + math.exp(score - top)
        for s in range(t + 1):
            weights[b, h, t, s] = math.exp(weights[b, h, t, s] - top) / total
        lse[b, h, t] = top + math.log(total)


@cuda.jit
def values_kernel(out, weights, qkv, HS):
    """out = weighted sum of the values. One thread per channel of a query."""
    i, t, b = cuda.grid(1), cuda.blockIdx.y, cuda.blockIdx.z
    C = out.shape[2]
    if i < C:
        y = ZERO
        for s in range(t + 1):
            y += weights[b, i // HS, t, s] * qkv[b, s, 2 * C + i]
        out[b, t, i] = y


def attention_forward_v1(out, lse, qkv, num_heads, num_kv_heads, scratch):
    """Three kernels that communicate through the (T, T) matrices of all heads. Scratch: B*NH*T*T."""
    B, T, C = out.shape
    HS = C // num_heads
    weights = scratch[: B * num_heads * T * T].reshape(B, num_heads, T, T)
    scores_kernel[(blocks_for(T, THREADS), T, B * num_heads), THREADS, stream()](
        weights, qkv, HS, ONE / float32(math.sqrt(HS))
    )
    softmax_kernel[(blocks_for(T, THREADS), num_heads, B), THREADS, stream()](lse, weights)
    values_kernel[(blocks_for(C, THREADS), T, B), THREADS, stream()](out, weights, qkv, HS)


def attention_forward_v1_scratch(out, lse, qkv, num_heads, num_kv_heads):
    B, NH, T = lse.shape
    return B * NH * T * T


@functools.cache
def make_kernel_v2(HS):
    @cuda.jit
    def kernel_v2(out, lse, qkv, scale):
        """A thread owns a query and passes once over the keys and values: the online softmax. No matrix."""
        t, h, b = cuda.grid(1), cuda.blockIdx.y, cuda.blockIdx.z
        T, C = out.shape[1], out.shape[2]
        q, y = cuda.local.array(HS, float32), cuda.local.array(HS, float32)
        if t < T:
            for c in range(HS):
                q[c] = qkv[b, t, h * HS + c]
                y[c] = ZERO
            top, total = LOWEST, ZERO
            for s in range(t + 1):
                score = ZERO
                for c in range(HS):
                    score += q[c] * qkv[b, s, C + h * HS + c]
                score *= scale
                before, top = top, max(top, score)
                shrink, weight = math.exp(before - top), math.exp(score - top)
                total = total * shrink + weight
                for c in range(HS):
                    y[c] = y[c] * shrink + weight * qkv[b, s, 2 * C + h * HS + c]
            for c in range(HS):
                out[b, t, h * HS + c] = y[c] / total
            lse[b, h, t] = top + math.log(total)

    return kernel_v2


def attention_forward_v2(out, lse, qkv, num_heads, num_kv_heads, scratch):
    """One kernel; the matrix is never stored."""
    B, T, C = out.shape
    HS = C // num_heads
    grid = blocks_for(T, THREADS), num_heads, B
    make_kernel_v2(HS)[grid, THREADS, stream()](out, lse, qkv, ONE / float32(math.sqrt(HS)))


@functools.cache
def make_kernel_v3(HS):
    @cuda.jit
    def kernel_v3(out, lse, qkv, scale):
        """As v2, with tiles of KEYS keys and values in shared memory, loaded once for all queries of the block."""
        t, h, b, thread = cuda.grid(1), cuda.blockIdx.y, cuda.blockIdx.z, cuda.threadIdx.x
        T, C = out.shape[1], out.shape[2]
        k = cuda.shared.array((KEYS, HS), float32)
        v = cuda.shared.array((KEYS, HS), float32)
        q, y = cuda.local.array(HS, float32), cuda.local.array(HS, float32)
        for c in range(HS):
            q[c] = qkv[b, min(t, T - 1), h * HS + c]
            y[c] = ZERO
        top, total = LOWEST, ZERO
        for s0 in range(0, min(T, (cuda.blockIdx.x + 1) * THREADS), KEYS):
            for n in range(thread, KEYS * HS, THREADS):
                s, c = n // HS, n % HS
                if s0 + s < T:
                    k[s, c] = qkv[b, s0 + s, C + h * HS + c]
                    v[s, c] = qkv[b, s0 + s, 2 * C + h * HS + c]
            cuda.syncthreads()  # the tile is complete
            for s in range(min(KEYS, T - s0)):
                if s0 + s <= t:
                    score = ZERO
                    for c in range(HS):
                        score += q[c] * k[s, c]
                    score *= scale
                    before, top = top, max(top, score)
                    shrink, weight = math.exp(before - top), math.exp(score - top)
                    total = total * shrink + weight
                    for c in range(HS):
                        y[c] = y[c] * shrink + weight * v[s, c]
            cuda.syncthreads()  # all threads are done with the tile
        if t < T:
            for c in range(HS):
                out[b, t, h * HS + c] = y[c] / total
            lse[b, h, t] = top + math.log(total)

    return kernel_v3


def attention_forward_v3(out, lse, qkv, num_heads, num_kv_heads, scratch):
    """Tiles of keys and values in shared memory."""
    B, T, C = out.shape
    HS = C // num_heads
    grid = blocks_for(T, THREADS), num_heads, B
    make_kernel_v3(HS)[grid, THREADS, stream()](out, lse, qkv, ONE / float32(math.sqrt(HS)))


def forward_inputs(rng, B, T, C, NH):
    given = dict(
        out=garbage(B, T, C), lse=garbage(B, NH, T), qkv=2 * normal(rng, B, T, 3 * C), num_heads=NH, num_kv_heads=NH
    )  # fmt: skip
    return given | dict(scratch=garbage(attention_forward_v1_scratch(**given)))


# The simulator is slow and there are T * T / 2 scores, so the head size is 97 and the number of heads 257.
FEW = (dict(B=1, T=1, C=97, NH=1), dict(B=1, T=9, C=3, NH=1), dict(B=1, T=3, C=2, NH=2))
MANY = (dict(B=1, T=1, C=257, NH=257), dict(B=1, T=33, C=4, NH=1), dict(B=1, T=3, C=97, NH=1), *FEW)
TIMED, QUICK = dict(B=4, T=1024, C=768, NH=12), dict(B=1, T=4, C=8, NH=2)
COUNTED = dict(B=1, T=32, C=lessons.sized(16, 4), NH=1)

FORWARD = Ladder(
    "attention_forward",
    Problem(oracle.attention_forward, forward_inputs, ("out", "lse"), lessons.sized(MANY, FEW), device="cuda"),
    (attention_forward_v1, attention_forward_v2, attention_forward_v3, attention_forward),
    timed=TIMED,
    quick=QUICK,
    counted=COUNTED,
    flops=lambda B, T, C, NH: 2 * B * T * T * C,
    torch="attention_forward",
)
