"""The optimiser: Adam with decoupled weight decay."""

import numpy as np
from numba import njit, prange

from llm_numba.cpu.jit import PARALLEL

BLOCK = 16384  # parameters that one task updates


@njit(**PARALLEL)
def adamw_update(param, grad, m, v, learning_rate, beta1, beta2, eps, weight_decay, step, grad_scale):
    """Move each parameter against its gradient's running mean, measured in the root of its running mean square.

    param, m, v <- grad, all of one shape; learning_rate (1,), step (1,) int32, which is 1 at the first update,
        grad_scale (1,), by which every gradient is multiplied first (clipping); beta1, beta2, eps, weight_decay numbers
    Writes:   m = beta1 * m + (1 - beta1) * grad, v = beta2 * v + (1 - beta2) * grad**2,
              param -= learning_rate * (mhat / (sqrt(vhat) + eps) + weight_decay * param)
              with mhat = m / (1 - beta1**step), vhat = v / (1 - beta2**step)
    Parallel: over blocks of BLOCK parameters; each thread owns its blocks, so nothing races
    Moves:    7 floats a parameter
    Source:   Loshchilov and Hutter 2017, arXiv:1711.05101; Kingma and Ba 2014, arXiv:1412.6980
    """
    params, grads, ms, vs = param.reshape(-1), grad.reshape(-1), m.reshape(-1), v.reshape(-1)
    n = params.shape[0]
    # all that the loop needs, as float32: one float64 would make the whole loop float64
    scale, rate = grad_scale[0], learning_rate[0]
    m_correction = np.float32(1 / (1 - beta1 ** step[0]))
    v_correction = np.float32(1 / (1 - beta2 ** step[0]))
    m_keep, m_gain = np.float32(beta1), np.float32(1 - beta1)
    v_keep, v_gain = np.float32(beta2), np.float32(1 - beta2)
    epsilon, decay = np.float32(eps), np.float32(weight_decay)
    for block in prange((n + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, (block + 1) * BLOCK
        p, g, m_block, v_block = params[first:last], grads[first:last], ms[first:last], vs[first:last]
        for i in range(p.shape[0]):
            gradient = g[i] * scale
            m_new = m_keep * m_block[i] + m_gain * gradient
            v_new = v_keep * v_block[i] + v_gain * gradient * gradient
            m_block[i] = m_new
            v_block[i] = v_new
            p[i] -= rate * (m_new * m_correction / (np.sqrt(v_new * v_correction) + epsilon) + decay * p[i])
