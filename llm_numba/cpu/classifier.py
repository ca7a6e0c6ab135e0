"""Softmax and cross-entropy in one op, so that the probabilities are never stored."""

import numpy as np
from numba import njit, prange

from llm_numba.cpu.jit import PARALLEL, REDUCTION, ZERO, exp, largest


@njit(**REDUCTION)
def sum_of_exp(x, top):
    """The sum of e**(x - top), x (n,)."""
    total = ZERO
    for v in range(x.shape[0]):
        total += exp(x[v] - top)
    return total


@njit(**PARALLEL)
def fused_classifier(logits, losses, targets, dloss, vocab_size, write_dlogits):
    """The loss of each prediction; its gradient overwrites the logits.

    logits (B, T, Vp), losses (B, T) <- targets (B, T) int32, dloss (a float, the gradient of every loss)
    With softmax over the first vocab_size (V) columns:
    Writes:   losses = -log(softmax[target]), in nats;
              if write_dlogits: logits = (softmax - onehot(target)) * dloss, and 0 in the padding columns V..Vp
    Parallel: over the B*T rows; each thread owns its rows, so nothing races
    Moves:    B*T*Vp floats in and as many out; a row is read again while it is in the cache
    Expects:  0 <= targets < vocab_size, unchecked; a NaN among the logits of a row makes its loss NaN
    """
    B, T, Vp = logits.shape
    V = vocab_size
    rows, row_losses, row_targets = logits.reshape(B * T, Vp), losses.reshape(B * T), targets.reshape(B * T)
    for i in prange(B * T):
        x, target = rows[i, :V], row_targets[i]
        top = largest(x)
        total = sum_of_exp(x, top)
        # in float64, because a large logit would swallow log(total)
        row_losses[i] = np.log(np.float64(total)) + (np.float64(top) - np.float64(x[target]))

        if write_dlogits:
            scale = np.float32(dloss) / total
            for v in range(V):
                x[v] = exp(x[v] - top) * scale
            x[target] -= np.float32(dloss)
            rows[i, V:] = ZERO


@njit(cache=True)
def add_mean(loss, losses, share):
    """Add the mean loss of a micro-batch to the loss of a step.

    loss (1,) float64 <- losses (B, T), share (a float)
    Writes:   loss += share * the mean of losses
    """
    flat = losses.reshape(-1)
    total = 0.0
    for i in range(flat.shape[0]):
        total += np.float64(flat[i])
    loss[0] += share * total / flat.shape[0]
