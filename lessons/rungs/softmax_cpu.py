"""The rungs of lesson 04 on a CPU: softmax and cross-entropy, with their gradient."""

import math

import numpy as np
from numba import njit, prange

from llm_numba import oracle
from llm_numba.cpu.classifier import fused_classifier
from llm_numba.cpu.jit import exp
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

ZERO, ONE = np.float32(0), np.float32(1)
ANY_ORDER = {"reassoc", "contract", "nsz"}


def softmax_overflowing(x):
    """Not a rung but a mistake: the textbook formula in NumPy, for a row x. It overflows."""
    e = np.exp(x)
    return e / e.sum()


@njit(error_model="numpy")
def fused_classifier_v1(logits, losses, targets, dloss, vocab_size, write_dlogits):
    """Three layers: all probabilities, stored in an array, then all losses, then all gradients."""
    B, T, Vp = logits.shape
    V = vocab_size
    probabilities = np.empty((B, T, V), np.float32)
    for b in range(B):
        for t in range(T):
            top = logits[b, t, 0]
            for v in range(V):
                top = max(top, logits[b, t, v])
            total = ZERO
            for v in range(V):
                probabilities[b, t, v] = math.exp(logits[b, t, v] - top)
                total += probabilities[b, t, v]
            for v in range(V):
                probabilities[b, t, v] /= total
            losses[b, t] = math.log(total) + (top - logits[b, t, targets[b, t]])
    if write_dlogits:
        for b in range(B):
            for t in range(T):
                for v in range(V):
                    hit = ONE if v == targets[b, t] else ZERO
                    logits[b, t, v] = (probabilities[b, t, v] - hit) * np.float32(dloss)
                logits[b, t, V:] = ZERO


@njit(fastmath=ANY_ORDER, error_model="numpy")
def softmax_row(probabilities, x, target):
    """probabilities (V,) = softmax(x (V,)); returns the loss. `exp` is a polynomial without branches."""
    top = x[0]
    for v in range(x.shape[0]):
        top = max(top, x[v])
    total = ZERO
    for v in range(x.shape[0]):
        probabilities[v] = exp(x[v] - top)
        total += probabilities[v]
    inverse = ONE / total
    for v in range(x.shape[0]):
        probabilities[v] *= inverse
    return np.log(total) + (top - x[target])


@njit
def fused_classifier_v2(logits, losses, targets, dloss, vocab_size, write_dlogits):
    """The same three layers, with an e**x of additions, multiplications and shifts, for 8 or 16 elements at once."""
    B, T, Vp = logits.shape
    V = vocab_size
    probabilities = np.empty((B, T, V), np.float32)
    for b in range(B):
        for t in range(T):
            losses[b, t] = softmax_row(probabilities[b, t], logits[b, t, :V], targets[b, t])
    if write_dlogits:
        for b in range(B):
            for t in range(T):
                x, p = logits[b, t, :V], probabilities[b, t]
                for v in range(V):
                    x[v] = p[v] * np.float32(dloss)
                x[targets[b, t]] -= np.float32(dloss)
                logits[b, t, V:] = ZERO


@njit(fastmath=ANY_ORDER, error_model="numpy")
def classify_row(x, target, dloss, write_dlogits):
    """Returns the row's loss; if write_dlogits, x (V,) = its gradient. Each e**x is computed twice."""
    top = x[0]
    for v in range(x.shape[0]):
        top = max(top, x[v])
    total = ZERO
    for v in range(x.shape[0]):
        total += exp(x[v] - top)
    loss = np.log(total) + (top - x[target])
    if write_dlogits:
        scale = dloss / total
        for v in range(x.shape[0]):
            x[v] = exp(x[v] - top) * scale
        x[target] -= dloss
    return loss


@njit
def fused_classifier_v3(logits, losses, targets, dloss, vocab_size, write_dlogits):
    """Everything for one row before the next: the row stays in the cache, and no probabilities are stored."""
    B, T, Vp = logits.shape
    for b in range(B):
        for t in range(T):
            losses[b, t] = classify_row(logits[b, t, :vocab_size], targets[b, t], np.float32(dloss), write_dlogits)
            if write_dlogits:
                logits[b, t, vocab_size:] = ZERO


@njit(parallel=True)
def fused_classifier_v4(logits, losses, targets, dloss, vocab_size, write_dlogits):
    """The rows are distributed over the cores; each row has one owner, so nothing races."""
    B, T, Vp = logits.shape
    for row in prange(B * T):
        b, t = row // T, row % T
        losses[b, t] = classify_row(logits[b, t, :vocab_size], targets[b, t], np.float32(dloss), write_dlogits)
        if write_dlogits:
            logits[b, t, vocab_size:] = ZERO


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
            dict(B=1, T=1, V=1, Vp=1), dict(B=1, T=3, V=97, Vp=128), dict(B=3, T=1, V=3, Vp=64),
            dict(B=2, T=97, V=257, Vp=257), dict(B=1, T=257, V=97, Vp=97),
        ),
    ),
    (fused_classifier_v1, fused_classifier_v2, fused_classifier_v3, fused_classifier_v4, fused_classifier),
    timed=dict(B=1, T=512, V=50257, Vp=50304),
    quick=dict(B=1, T=32, V=257, Vp=320),
    nbytes=lambda B, T, V, Vp: 2 * 4 * B * T * Vp,
    pattern="update",
    torch="fused_classifier",
)  # fmt: skip
