"""Softmax and cross-entropy in one op, so that the probabilities never need memory of their own.

A block owns a row of logits and goes over it twice: first for its largest logit and the sum of e**(x - largest), then,
while the row is still in the caches, for its gradient. A thread takes CHUNK logits at a time, THREADS apart, so that
neighbouring threads read neighbouring logits and each has CHUNK reads under way before it needs the first. There the
index is made unsigned, which spares each access the test whether it counts from the end of the array.

Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (the largest and the sum in one pass).
"""

import math

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import block_max, block_sum, device, exp2, float32, kernel, sized, stream, to_float, to_storage

float64, uint64 = np.float64, np.uint64
THREADS = sized(1024, 8)
CHUNK = sized(8, 2)  # logits that a thread reads at once
STRIDE = CHUNK * THREADS
ZERO, LOWEST, LOG2E = float32(0), np.finfo(float32).min, float32(1.4426950408889634)


@device
def exp(x):
    return exp2(x * LOG2E)


@kernel(launch_bounds=(THREADS, 2))
def classifier_kernel(logits, losses, targets, dloss, V, write_dlogits):
    """losses[i] = -log(softmax(logits[i, :V])[target]); where write_dlogits: logits = the gradient of dloss * losses.

    Grid: a block for each row; block: THREADS; a thread owns every THREADS-th column.
    Moves: the row from memory, and its gradient to it; the row again from a cache.
    """
    i, thread = cuda.blockIdx.x, cuda.threadIdx.x
    row, target = logits[i], targets[i]
    x = cuda.local.array(CHUNK, float32)
    chunks_end = V // STRIDE * STRIDE  # the columns from here on are taken one by one

    # each thread: the largest of its logits, and the sum of e**(x - top). The maximum may pass over a NaN, the sum not
    top, total = LOWEST, ZERO
    for first in range(thread, chunks_end, STRIDE):
        for k in range(CHUNK):
            x[k] = to_float(row[uint64(first + k * THREADS)])
        old_top = top
        for k in range(CHUNK):
            top = max(top, x[k])
        total *= exp(old_top - top)
        for k in range(CHUNK):
            total += exp(x[k] - top)
    for c in range(chunks_end + thread, V, THREADS):
        logit, old_top = to_float(row[c]), top
        top = max(top, logit)
        total = total * exp(old_top - top) + exp(logit - top)

    # the block: the same of the whole row
    shared = cuda.shared.array(THREADS, float32)
    row_top = block_max(top, shared)
    row_total = block_sum(total * exp(top - row_top), shared)
    at_target = to_float(row[target])
    if thread == 0:
        losses[i] = math.log(row_total) + (row_top - at_target)
    if not write_dlogits:
        return
    cuda.syncthreads()  # all have read the target's logit

    scale = dloss / row_total
    for first in range(thread, chunks_end, STRIDE):
        for k in range(CHUNK):
            x[k] = to_float(row[uint64(first + k * THREADS)])
        for k in range(CHUNK):
            row[uint64(first + k * THREADS)] = to_storage(exp(x[k] - row_top) * scale, row)
    for c in range(chunks_end + thread, V, THREADS):
        row[c] = to_storage(exp(to_float(row[c]) - row_top) * scale, row)
    for c in range(V + thread, row.shape[0], THREADS):
        row[c] = to_storage(ZERO, row)
    if thread == target % THREADS:  # the one who has written this column
        row[target] = to_storage(exp(at_target - row_top) * scale - dloss, row)


@kernel
def add_mean_kernel(loss, losses, share):
    """loss[0] += share * the mean of losses (n,), in float64. Grid: one block; block: THREADS; a thread owns every
    THREADS-th loss."""
    total = float64(0)
    for i in range(cuda.threadIdx.x, losses.shape[0], THREADS):
        total += float64(losses[i])
    total = block_sum(total, cuda.shared.array(THREADS, float64))
    if cuda.threadIdx.x == 0:
        loss[0] += share * total / losses.shape[0]


def fused_classifier(logits, losses, targets, dloss, vocab_size, write_dlogits):
    """The loss of each prediction and, in the logits' place, its gradient.

    logits (B, T, Vp), losses (B, T) <- targets (B, T) int32, dloss (a number: the gradient of every loss)
    With softmax over the first vocab_size (V) columns:
    Writes:   losses = -log(softmax[target]), in nats;
              where write_dlogits: logits = (softmax - onehot(target)) * dloss, and 0 in the padding columns V..Vp
    Parallel: a block for each of the B*T rows
    Moves:    B*T*Vp numbers in, as many out; a row is read again while it is in a cache
    Expects:  0 <= targets < vocab_size, unchecked; a NaN among a row's logits makes its loss NaN
    """
    B, T, Vp = logits.shape
    classifier_kernel[B * T, THREADS, stream()](
        logits.reshape(B * T, Vp), losses.reshape(B * T), targets.reshape(B * T),
        float32(dloss), vocab_size, write_dlogits,
    )  # fmt: skip


def add_mean(loss, losses, share):
    """Add a batch's share to the loss of a step.

    loss (1,) float64 <- losses (B, T), share (a number)
    Writes:   loss += share * the mean of losses
    Parallel: one block, whose sums are added in a fixed order
    """
    add_mean_kernel[1, THREADS, stream()](loss, losses.reshape(losses.size), float64(share))
