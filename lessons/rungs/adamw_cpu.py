"""The rungs of lesson 08 on a CPU: AdamW."""

import math

import numpy as np
from numba import njit

from llm_numba import oracle
from llm_numba.arena import RUN
from llm_numba.cpu.adamw import adamw_update
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, normal

ZERO = np.float32(0)


def adamw_update_v1(
    params, master, grads, m, v, decays, learning_rate, beta1, beta2, eps, weight_decay, step, seed, grad_scale
):
    """The formula in NumPy: one pass per operator."""
    if grad_scale[0] < 0:
        return
    t = int(step[0])
    gradient = grads * grad_scale[0]
    m[:] = beta1 * m + (1 - beta1) * gradient
    v[:] = beta2 * v + (1 - beta2) * gradient * gradient
    mhat, vhat = m / (1 - beta1**t), v / (1 - beta2**t)
    decay = np.repeat(decays * np.float32(weight_decay), RUN)
    params -= learning_rate[0] * (mhat / (np.sqrt(vhat) + eps) + decay * params)


@njit
def adamw_update_v2(
    params, master, grads, m, v, decays, learning_rate, beta1, beta2, eps, weight_decay, step, seed, grad_scale
):
    """One loop. Python's floats are float64, so everything computed with them is float64."""
    if grad_scale[0] < 0:
        return
    m_correction, v_correction = 1 / (1 - beta1 ** step[0]), 1 / (1 - beta2 ** step[0])
    for i in range(params.shape[0]):
        gradient = grads[i] * grad_scale[0]
        m[i] = beta1 * m[i] + (1 - beta1) * gradient
        v[i] = beta2 * v[i] + (1 - beta2) * gradient * gradient
        move = m[i] * m_correction / (math.sqrt(v[i] * v_correction) + eps)
        params[i] -= learning_rate[0] * (move + weight_decay * decays[i // RUN] * params[i])


@njit(fastmath={"contract"}, error_model="numpy")
def adamw_update_v3(
    params, master, grads, m, v, decays, learning_rate, beta1, beta2, eps, weight_decay, step, seed, grad_scale
):
    """float32 only; values that all parameters of a run share are computed before the inner loop."""
    if grad_scale[0] < ZERO:
        return
    rate, scale, epsilon = learning_rate[0], grad_scale[0], np.float32(eps)
    m_keep, m_gain, m_correction = np.float32(beta1), np.float32(1 - beta1), np.float32(1 / (1 - beta1 ** step[0]))
    v_keep, v_gain, v_correction = np.float32(beta2), np.float32(1 - beta2), np.float32(1 / (1 - beta2 ** step[0]))
    for run in range(decays.shape[0]):
        decay = np.float32(weight_decay) if decays[run] else ZERO
        for i in range(run * RUN, (run + 1) * RUN):
            gradient = grads[i] * scale
            m_new = m_keep * m[i] + m_gain * gradient
            v_new = v_keep * v[i] + v_gain * gradient * gradient
            m[i] = m_new
            v[i] = v_new
            move = m_new * m_correction / (np.sqrt(v_new * v_correction) + epsilon)
            params[i] -= rate * (move + decay * params[i])


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
    Problem(oracle.adamw_update, inputs, ("params", "m", "v"), (dict(n=1), dict(n=3), dict(n=97), dict(n=257))),
    (adamw_update_v1, adamw_update_v2, adamw_update_v3, adamw_update),
    timed=dict(n=1 << 24),
    quick=dict(n=1 << 12),
    nbytes=lambda n: 28 * n,
    pattern="update",
    torch="adamw_update",
)
