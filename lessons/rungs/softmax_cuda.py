"""The rungs of lesson 04 on a GPU: softmax and cross-entropy, with their gradient."""

import math

import numpy as np
from numba import cuda

from llm_numba import oracle
from llm_numba.cuda.classifier import fused_classifier
from llm_numba.cuda.jit import blocks_for, float32, sized, stream
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

ZERO, ONE, LOWEST = float32(0), float32(1), float32(-np.inf)
THREADS = sized(256, 32)  # per block: on a GPU, in the simulator


@cuda.jit
def kernel_v1(logits, losses, targets, dloss, V, write_dlogits):
    """Thread i of the grid owns row i, with three loops over it, as on the CPU."""
    row = cuda.grid(1)
    if row < logits.shape[0]:
        top = LOWEST
        for v in range(V):
            top = max(top, logits[row, v])
        total = ZERO
        for v in range(V):
            total += math.exp(logits[row, v] - top)
        losses[row] = math.log(total) + (top - logits[row, targets[row]])
        if write_dlogits:
            for v in range(logits.shape[1]):
                p = math.exp(logits[row, v] - top) / total if v < V else ZERO
                hit = ONE if v == targets[row] else ZERO
                logits[row, v] = (p - hit) * dloss


def fused_classifier_v1(logits, losses, targets, dloss, vocab_size, write_dlogits):
    B, T, Vp = logits.shape
    kernel_v1[blocks_for(B * T, THREADS), THREADS, stream()](
        logits.reshape(B * T, Vp), losses.reshape(B * T), targets.reshape(B * T),
        float32(dloss), vocab_size, write_dlogits,
    )  # fmt: skip


@cuda.jit(device=True)
def max_of_block(number, shared):
    """The maximum over the block, returned to every thread; a tree like `sum_of_block`."""
    thread = cuda.threadIdx.x
    shared[thread] = number
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if thread < half:
            shared[thread] = max(shared[thread], shared[thread + half])
        cuda.syncthreads()
        half //= 2
    top = shared[0]
    cuda.syncthreads()
    return top


@cuda.jit(device=True)
def sum_of_block(number, shared):
    """The sum over the block, returned to every thread: half of the threads add the others' values, then a quarter."""
    thread = cuda.threadIdx.x
    shared[thread] = number
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if thread < half:
            shared[thread] += shared[thread + half]
        cuda.syncthreads()
        half //= 2
    total = shared[0]
    cuda.syncthreads()
    return total


@cuda.jit(device=True)
def write_gradient(row, target, V, top, total, dloss):
    """row (Vp,) = (softmax - onehot) * dloss, by all threads of a block; padding from V on = 0."""
    for v in range(cuda.threadIdx.x, row.shape[0], THREADS):
        p = math.exp(row[v] - top) / total if v < V else ZERO
        hit = ONE if v == target else ZERO
        row[v] = (p - hit) * dloss


@cuda.jit
def kernel_v2(logits, losses, targets, dloss, V, write_dlogits):
    """A block owns a row; consecutive threads read consecutive logits. The same three loops."""
    i, thread = cuda.blockIdx.x, cuda.threadIdx.x
    row, target = logits[i], targets[i]
    shared = cuda.shared.array(THREADS, float32)
    top = LOWEST
    for v in range(thread, V, THREADS):
        top = max(top, row[v])
    top = max_of_block(top, shared)
    total = ZERO
    for v in range(thread, V, THREADS):
        total += math.exp(row[v] - top)
    total = sum_of_block(total, shared)
    if thread == 0:
        losses[i] = math.log(total) + (top - row[target])
    cuda.syncthreads()  # the target's logit must be read before it is overwritten
    if write_dlogits:
        write_gradient(row, target, V, top, total, dloss)


def fused_classifier_v2(logits, losses, targets, dloss, vocab_size, write_dlogits):
    B, T, Vp = logits.shape
    kernel_v2[B * T, THREADS, stream()](
        logits.reshape(B * T, Vp), losses.reshape(B * T), targets.reshape(B * T),
        float32(dloss), vocab_size, write_dlogits,
    )  # fmt: skip


@cuda.jit
def kernel_v3(logits, losses, targets, dloss, V, write_dlogits):
    """The online softmax: one pass finds the largest logit and the sum; the sum is rescaled when a larger logit
    appears."""
    i, thread = cuda.blockIdx.x, cuda.threadIdx.x
    row, target = logits[i], targets[i]
    shared = cuda.shared.array(THREADS, float32)
    top, total = LOWEST, ZERO
    for v in range(thread, V, THREADS):
        logit, before = row[v], top
        top = max(top, logit)
        total = total * math.exp(before - top) + math.exp(logit - top)
    row_top = max_of_block(top, shared)
    total = sum_of_block(total * math.exp(top - row_top), shared)
    if thread == 0:
        losses[i] = math.log(total) + (row_top - row[target])
    cuda.syncthreads()
    if write_dlogits:
        write_gradient(row, target, V, row_top, total, dloss)


def fused_classifier_v3(logits, losses, targets, dloss, vocab_size, write_dlogits):
    B, T, Vp = logits.shape
    kernel_v3[B * T, THREADS, stream()](
        logits.reshape(B * T, Vp), losses.reshape(B * T), targets.reshape(B * T),
        float32(dloss), vocab_size, write_dlogits,
    )  # fmt: skip


def inputs(rng, B, T, V, Vp):
    """Logits of up to a few hundred: their exponentials overflow float32."""
    return dict(
        logits=100 * normal(rng, B, T, Vp), losses=garbage(B, T),
        targets=rng.integers(V, size=(B, T), dtype=np.int32), dloss=1 / (B * T), vocab_size=V, write_dlogits=True,
    )  # fmt: skip


CLASSIFIER = Ladder(
    "fused_classifier",
    Problem(
        oracle.fused_classifier,
        inputs,
        ("logits", "losses"),
        (
            dict(B=1, T=1, V=1, Vp=1), dict(B=1, T=3, V=97, Vp=100), dict(B=3, T=1, V=3, Vp=8),
            dict(B=1, T=33, V=3, Vp=3), dict(B=1, T=2, V=257, Vp=264),
        ),
        device="cuda",
    ),
    (fused_classifier_v1, fused_classifier_v2, fused_classifier_v3, fused_classifier),
    timed=dict(B=4, T=1024, V=50257, Vp=50304),
    quick=dict(B=1, T=4, V=40, Vp=64),
    counted=dict(B=1, T=32, V=64, Vp=64),
    nbytes=lambda B, T, V, Vp: 2 * 4 * B * T * Vp,
    pattern="update",
    torch="fused_classifier",
)  # fmt: skip
