"""The rungs of lesson 08 on a GPU: AdamW."""

import math

import numpy as np
from numba import cuda

from llm_numba import oracle
from llm_numba.arena import RUN
from llm_numba.cuda.adamw import adamw_update, correction
from llm_numba.cuda.jit import blocks_for, float32, sized, stream
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, normal

THREADS = sized(256, 32)  # per block: on a GPU, in the simulator
ZERO, ONE = float32(0), float32(1)


@cuda.jit
def mean_kernel(m, grads, beta1, grad_scale):
    """m = beta1 * m + (1 - beta1) * gradient; a thread owns a parameter."""
    i = cuda.grid(1)
    if i < m.shape[0] and grad_scale[0] >= ZERO:
        m[i] = beta1 * m[i] + (ONE - beta1) * (grads[i] * grad_scale[0])


@cuda.jit
def mean_square_kernel(v, grads, beta2, grad_scale):
    """v = beta2 * v + (1 - beta2) * gradient**2."""
    i = cuda.grid(1)
    if i < v.shape[0] and grad_scale[0] >= ZERO:
        gradient = grads[i] * grad_scale[0]
        v[i] = beta2 * v[i] + (ONE - beta2) * gradient * gradient


@cuda.jit
def move_kernel(params, m, v, decays, learning_rate, log_beta1, log_beta2, eps, weight_decay, step, grad_scale):
    """Update params from m and v. correction(t, log(beta)) = 1 / (1 - beta**t)."""
    i = cuda.grid(1)
    if i < params.shape[0] and grad_scale[0] >= ZERO:
        mhat, vhat = m[i] * correction(step[0], log_beta1), v[i] * correction(step[0], log_beta2)
        decay = weight_decay if decays[i // RUN] else ZERO
        weight = params[i]
        params[i] = weight - learning_rate[0] * (mhat / (math.sqrt(vhat) + eps) + decay * weight)


def adamw_update_v1(
    params, master, grads, m, v, decays, learning_rate, beta1, beta2, eps, weight_decay, step, seed, grad_scale
):
    """One kernel per line of the formula."""
    blocks = blocks_for(params.size, THREADS)
    mean_kernel[blocks, THREADS, stream()](m, grads, float32(beta1), grad_scale)
    mean_square_kernel[blocks, THREADS, stream()](v, grads, float32(beta2), grad_scale)
    move_kernel[blocks, THREADS, stream()](
        params, m, v, decays, learning_rate, float32(math.log(beta1)), float32(math.log(beta2)), float32(eps),
        float32(weight_decay), step, grad_scale,
    )  # fmt: skip


@cuda.jit
def adamw_kernel(
    params, grads, m, v, decays, learning_rate, beta1, beta2, log_beta1, log_beta2, eps, weight_decay, step, grad_scale
):
    """A thread owns a parameter with its gradient, m and v."""
    i = cuda.grid(1)
    if i < params.shape[0] and grad_scale[0] >= ZERO:
        gradient, weight = grads[i] * grad_scale[0], params[i]
        m_new = beta1 * m[i] + (ONE - beta1) * gradient
        v_new = beta2 * v[i] + (ONE - beta2) * gradient * gradient
        m[i] = m_new
        v[i] = v_new
        mhat, vhat = m_new * correction(step[0], log_beta1), v_new * correction(step[0], log_beta2)
        decay = weight_decay if decays[i // RUN] else ZERO
        params[i] = weight - learning_rate[0] * (mhat / (math.sqrt(vhat) + eps) + decay * weight)


def adamw_update_v2(
    params, master, grads, m, v, decays, learning_rate, beta1, beta2, eps, weight_decay, step, seed, grad_scale
):
    """One kernel: intermediate results stay in registers."""
    adamw_kernel[blocks_for(params.size, THREADS), THREADS, stream()](
        params, grads, m, v, decays, learning_rate, float32(beta1), float32(beta2), float32(math.log(beta1)),
        float32(math.log(beta2)), float32(eps), float32(weight_decay), step, grad_scale,
    )  # fmt: skip


def inputs(rng, n):
    """n parameters, padded with zeros to whole runs, as in the model's memory."""
    size = -(-n // RUN) * RUN
    given = {name: np.zeros(size, np.float32) for name in ("params", "grads", "m", "v")}
    for x in given.values():
        x[:n] = normal(rng, n)
    given["v"] *= given["v"]
    return dict(
        params=given["params"], master=None, grads=given["grads"], m=given["m"], v=given["v"],
        decays=rng.integers(0, 2, size // RUN).astype(np.uint8), learning_rate=np.array([0.01], np.float32),
        beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=np.array([3], np.int32), seed=np.array([7], np.int32),
        grad_scale=np.array([0.5], np.float32),
    )  # fmt: skip


UPDATE = Ladder(
    "adamw_update",
    Problem(
        oracle.adamw_update,
        inputs,
        ("params", "m", "v"),
        (dict(n=1), dict(n=3), dict(n=97), dict(n=257)),
        device="cuda",
    ),
    (adamw_update_v1, adamw_update_v2, adamw_update),
    timed=dict(n=1 << 26),
    quick=dict(n=64),
    counted=dict(n=256),
    nbytes=lambda n: 28 * n,
    pattern="update",
    torch="adamw_update",
)
