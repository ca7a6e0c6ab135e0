"""The optimizer: Adam with decoupled weight decay."""

import numpy as np
from numba import njit, prange

from llm_numba.cpu.jit import PARALLEL, TASK, ZERO

RUN = 64  # parameters that share one weight decay flag
BLOCK = 256  # runs per task


@njit(**TASK)
def update_runs(params, grads, m, v, decays, rate, m_factors, v_factors, eps, weight_decay, scale):
    """AdamW on params, grads, m, v (runs, RUN); decays (runs,).

    m_factors, v_factors: the weights of the old mean and of the new value, and the bias correction. All scalars are
    float32: a single float64 would make the whole loop float64.
    """
    m_keep, m_gain, m_correction = m_factors
    v_keep, v_gain, v_correction = v_factors
    for run in range(params.shape[0]):
        decay = weight_decay if decays[run] else ZERO
        for i in range(RUN):
            gradient = grads[run, i] * scale
            m_new = m_keep * m[run, i] + m_gain * gradient
            v_new = v_keep * v[run, i] + v_gain * gradient * gradient
            m[run, i] = m_new
            v[run, i] = v_new
            move = m_new * m_correction / (np.sqrt(v_new * v_correction) + eps)
            params[run, i] -= rate * (move + decay * params[run, i])


@njit(**PARALLEL)
def adamw_update(
    params, master, grads, m, v, decays, learning_rate, beta1, beta2, eps, weight_decay, step, seed, grad_scale
):
    """One step of AdamW.

    params, m, v <- grads, all (n,), n a multiple of RUN; decays (n / RUN,) uint8, 1 if weight decay applies to a run of
        parameters, else 0; learning_rate (1,); step (1,) int32, 1 at the first update; grad_scale (1,), which
        multiplies every gradient first (clipping); beta1, beta2, eps and weight_decay are Python floats; master and
        seed are for bf16 parameters and ignored on the CPU
    Writes:   m = beta1 * m + (1 - beta1) * grads, v = beta2 * v + (1 - beta2) * grads**2,
              params -= learning_rate * (mhat / (sqrt(vhat) + eps) + weight_decay * decays * params)
              with mhat = m / (1 - beta1**step), vhat = v / (1 - beta2**step); nothing if grad_scale is negative
    Parallel: over blocks of BLOCK runs; each thread owns its blocks, so nothing races
    Moves:    7 floats per parameter
    Source:   Loshchilov and Hutter 2017, arXiv:1711.05101; Kingma and Ba 2014, arXiv:1412.6980
    """
    if grad_scale[0] < ZERO:
        return
    runs = decays.shape[0]
    params, grads = params.reshape(runs, RUN), grads.reshape(runs, RUN)
    m, v = m.reshape(runs, RUN), v.reshape(runs, RUN)
    m_factors = np.float32(beta1), np.float32(1 - beta1), np.float32(1 / (1 - beta1 ** step[0]))
    v_factors = np.float32(beta2), np.float32(1 - beta2), np.float32(1 / (1 - beta2 ** step[0]))
    epsilon, decay = np.float32(eps), np.float32(weight_decay)
    for block in prange((runs + BLOCK - 1) // BLOCK):
        own = slice(block * BLOCK, (block + 1) * BLOCK)
        update_runs(
            params[own], grads[own], m[own], v[own], decays[own],
            learning_rate[0], m_factors, v_factors, epsilon, decay, grad_scale[0],
        )  # fmt: skip
