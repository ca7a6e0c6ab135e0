"""The optimiser: Adam with decoupled weight decay."""

import math

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import (
    blocks_for,
    device,
    float32,
    kernel,
    sized,
    stream,
    to_float,
    to_storage,
    uint32,
)

uint64 = np.uint64
RUN = 64  # consecutive parameters that share one weight decay flag
THREADS = sized(256, 8)
EACH = sized(8, 16)  # parameters per thread
BLOCK = EACH * THREADS
ZERO, ONE = float32(0), float32(1)


@device
def correction(step, log_beta):
    """1 / (1 - beta**step), by expm1: for beta**step close to 1 the plain difference would lose precision."""
    return -ONE / float32(math.expm1(float32(step) * log_beta))


@device
def multiply_add(a, b, c):
    """a * b + c modulo 2**32."""
    return uint32(uint64(a) * uint64(b) + uint64(c))


@device
def random_bits(i, step, seed):
    """16 pseudo-random bits, a hash of the arguments.

    Source: Jarzynski and Olano 2020, "Hash Functions for GPU Rendering", JCGT 9(3), pcg3d; the upper half of its x.
    """
    x = multiply_add(uint32(i), uint32(1664525), uint32(1013904223))
    y = multiply_add(uint32(step), uint32(1664525), uint32(1013904223))
    z = multiply_add(uint32(seed), uint32(1664525), uint32(1013904223))
    x = multiply_add(y, z, x)
    y = multiply_add(z, x, y)
    z = multiply_add(x, y, z)
    x, y, z = x ^ (x >> uint32(16)), y ^ (y >> uint32(16)), z ^ (z >> uint32(16))
    return multiply_add(y, z, x) >> uint32(16)


@device
def round_stochastically(x, random):
    """x stochastically rounded to bf16, as float32: hence unbiased. random: 16 bits.

    bf16 is the upper half of the bits of a float32; if adding `random` to the lower half carries, x is rounded away
    from 0. A NaN is returned unchanged, because a carry could turn it into a number. The lower half of infinity, of 0
    and of any bf16 is 0, so they do not change.
    """
    if math.isnan(x):
        return x
    bits = uint32(x.view(uint32) + random) & uint32(0xFFFF0000)
    return uint32(bits).view(float32)


@kernel
def adamw_kernel(
    params, weights, has_master, grads, m, v, decays,
    learning_rate, m_factors, v_factors, eps, weight_decay, step, seed, grad_scale,
):  # fmt: skip
    """AdamW on weights (n,), which are the master weights if has_master, else params.

    m_factors, v_factors: beta, 1 - beta, log(beta)
    Grid: n / BLOCK; block: THREADS; a thread owns EACH parameters, THREADS apart.
    Moves: 28 bytes per parameter; 30 with master weights, 24 in bf16 without them.
    """
    rate, scale = learning_rate[0], grad_scale[0]
    if scale < ZERO:
        return
    m_keep, m_gain, m_log_beta = m_factors
    v_keep, v_gain, v_log_beta = v_factors
    m_correction, v_correction = correction(step[0], m_log_beta), correction(step[0], v_log_beta)
    first = cuda.blockIdx.x * BLOCK + cuda.threadIdx.x
    for index in range(first, min(first + BLOCK, params.shape[0]), THREADS):
        i = uint64(index)  # unsigned: no check for negative indices
        decay = weight_decay if decays[uint64(index // RUN)] else ZERO
        gradient, weight = grads[i] * scale, to_float(weights[i])
        m_new = m_keep * m[i] + m_gain * gradient
        v_new = v_keep * v[i] + v_gain * gradient * gradient
        m[i] = m_new
        v[i] = v_new
        move = m_new * m_correction / (math.sqrt(v_new * v_correction) + eps)
        weight -= rate * (move + decay * weight)
        if weights.itemsize == 2:
            weight = round_stochastically(weight, random_bits(index, step[0], seed[0]))
        weights[i] = to_storage(weight, weights)
        if has_master:
            params[i] = to_storage(weight, params)


def adamw_update(
    params, master, grads, m, v, decays, learning_rate, beta1, beta2, eps, weight_decay, step, seed, grad_scale
):
    """One AdamW update of every parameter.

    params, master, m, v <- grads, all (n,), n a multiple of RUN. params: float32 or bf16; master: float32 master
        weights of bf16 params, or None; decays (n / RUN,) uint8: 1 if weight decay applies to these RUN parameters,
        else 0; learning_rate (1,); step (1,) int32, 1 at the first update; seed (1,) int32; grad_scale (1,), a factor
        for every gradient (clipping); beta1, beta2, eps, weight_decay: numbers
    Writes:   m = beta1 * m + (1 - beta1) * grads, v = beta2 * v + (1 - beta2) * grads**2,
              params -= learning_rate * (mhat / (sqrt(vhat) + eps) + weight_decay * decays * params)
              with mhat = m / (1 - beta1**step), vhat = v / (1 - beta2**step); nothing if grad_scale is negative.
              With master, the update applies to master, and params = master rounded to nearest. bf16 params without
              master are stochastically rounded, hence unbiased; the bits depend on seed, step and index
    Parallel: over the parameters; each thread owns EACH of them
    Moves:    28 bytes per parameter; 30 with master, 24 in bf16 without it
    Source:   Loshchilov and Hutter 2017, arXiv:1711.05101; Kingma and Ba 2014, arXiv:1412.6980
    """
    adamw_kernel[blocks_for(params.size, BLOCK), THREADS, stream()](
        params, params if master is None else master, master is not None, grads, m, v, decays,
        learning_rate, _factors(beta1), _factors(beta2), float32(eps), float32(weight_decay), step, seed, grad_scale,
    )  # fmt: skip


def _factors(beta: float) -> tuple:
    """beta, 1 - beta and log(beta), each rounded to float32 once."""
    return float32(beta), float32(1 - beta), float32(math.log(beta) if beta else -math.inf)
