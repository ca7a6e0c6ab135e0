"""Softmax and cross-entropy in one op, so that the probabilities are never stored.

A block owns a row of logits and reads it twice: first for the maximum and the sum of e**(x - maximum), then, while the
row is still in cache, for the gradient. A thread owns every THREADS-th vector of the row (vectors.py) and loads CHUNK
logits at once, so accesses are coalesced and many bytes are in flight.

Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (the maximum and the sum in one pass).
"""

import functools
import math

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import block_max, block_sum, device, exp2, float32, kernel, sized, stream, to_float, to_storage
from llm_numba.cuda.vectors import load_vector, store_vector, vector_size

float64, uint32 = np.float64, np.uint32
THREADS, RESIDENT = sized(640, 8), 2  # of a block; blocks per SM
CHUNK = sized(8, 2)  # logits that a thread loads at once, at least
ZERO, LOWEST, LOG2E = float32(0), np.finfo(float32).min, float32(1.4426950408889634)


@device
def exp(x):
    return exp2(x * LOG2E)


@functools.cache
def classifier_kernel(size: int):
    """The kernel of `fused_classifier` for vectors of `size` logits."""
    chunk = max(CHUNK, size)  # logits that a thread loads at once
    stride = chunk * THREADS

    @kernel(launch_bounds=(THREADS, RESIDENT))
    def fused_classifier_kernel(logits, losses, targets, dloss, V, write_dlogits):
        """losses[i] = -log(softmax(logits[i, :V])[target]); if write_dlogits: logits = the gradient of dloss * losses.

        Grid: one block per row; block: THREADS. The first V // stride * stride columns are processed in vectors, the
        rest one by one, every THREADS-th by a thread.
        Moves: the row from memory, the row again from cache, and its gradient to memory.
        """
        i, thread = cuda.blockIdx.x, uint32(cuda.threadIdx.x)
        row, target = logits[i], targets[i]
        x = cuda.local.array(chunk, float32)
        vectors_end = V // stride * stride

        # per thread: the maximum, and the sum of e**(x - top). The maximum may ignore a NaN, the sum does not
        top, total = LOWEST, ZERO
        for start in range(thread * size, vectors_end, stride):
            for k in range(0, chunk, size):
                load_vector(x, k, logits, i, uint32(start + k * THREADS), size)
            old_top = top
            for k in range(chunk):
                top = max(top, x[k])
            total *= exp(old_top - top)
            for k in range(chunk):
                total += exp(x[k] - top)
        for c in range(vectors_end + thread, V, THREADS):
            logit, old_top = to_float(row[c]), top
            top = max(top, logit)
            total = total * exp(old_top - top) + exp(logit - top)

        # per block: the same for the whole row
        shared = cuda.shared.array(THREADS, float32)
        row_top = block_max(top, shared)
        row_total = block_sum(total * exp(top - row_top), shared)
        at_target = to_float(row[target])
        if thread == 0:
            losses[i] = math.log(row_total) + (row_top - at_target)
        if not write_dlogits:
            return
        cuda.syncthreads()  # every thread has read the logit of the target

        scale = dloss / row_total
        for start in range(thread * size, vectors_end, stride):
            for k in range(0, chunk, size):
                load_vector(x, k, logits, i, uint32(start + k * THREADS), size)
            for k in range(chunk):
                x[k] = exp(x[k] - row_top) * scale
            for k in range(0, chunk, size):
                store_vector(logits, i, uint32(start + k * THREADS), x, k, size)
        for c in range(vectors_end + thread, V, THREADS):
            row[c] = to_storage(exp(to_float(row[c]) - row_top) * scale, row)
        for c in range(V + thread, row.shape[0], THREADS):
            row[c] = to_storage(ZERO, row)
        cuda.syncthreads()  # the gradient of the target has been written by another thread, without the -1
        if thread == 0:
            row[target] = to_storage(exp(at_target - row_top) * scale - dloss, row)

    return fused_classifier_kernel


@kernel
def add_mean_kernel(loss, losses, share):
    """loss[0] += share * mean(losses), in float64.

    Grid: one block; block: THREADS; a thread owns every THREADS-th loss.
    """
    total = float64(0)
    for i in range(cuda.threadIdx.x, losses.shape[0], THREADS):
        total += float64(losses[i])
    total = block_sum(total, cuda.shared.array(THREADS, float64))
    if cuda.threadIdx.x == 0:
        loss[0] += share * total / losses.shape[0]


def fused_classifier(logits, losses, targets, dloss, vocab_size, write_dlogits):
    """The loss of each prediction and its gradient, which replaces the logits.

    logits (B, T, Vp), losses (B, T) <- targets (B, T) int32, dloss (a number: the gradient of every loss)
    With softmax over the first vocab_size (V) columns:
    Writes:   losses = -log(softmax[target]), in nats;
              if write_dlogits: logits = (softmax - onehot(target)) * dloss, and 0 in the padding columns V..Vp
    Parallel: over the B*T rows, one block each
    Moves:    B*T*Vp elements in and as many out; the second reading of a row comes from cache
    Expects:  0 <= targets < vocab_size, unchecked; a NaN in a row of logits makes its loss NaN
    """
    B, T, Vp = logits.shape
    classifier_kernel(vector_size(Vp))[B * T, THREADS, stream()](
        logits.reshape(B * T, Vp), losses.reshape(B * T), targets.reshape(B * T),
        float32(dloss), vocab_size, write_dlogits,
    )  # fmt: skip


def add_mean(loss, losses, share):
    """Add the share of one batch to the loss of a step.

    loss (1,) float64 <- losses (B, T), share (a number)
    Writes:   loss += share * the mean of losses
    Parallel: one block; the order of the sum is fixed
    """
    add_mean_kernel[1, THREADS, stream()](loss, losses.reshape(losses.size), float64(share))
