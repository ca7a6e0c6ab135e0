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
RUN = 64  # parameters to all or none of which weight decay applies
THREADS = sized(256, 8)
EACH = sized(8, 16)  # parameters that a thread owns
BLOCK = EACH * THREADS
ZERO, ONE = float32(0), float32(1)


@device
def correction(step, log_beta):
    """1 / (1 - beta**step), where beta**step may be too near 1 for the difference to be exact enough."""
    return -ONE / float32(math.expm1(float32(step) * log_beta))


@device
def multiply_add(a, b, c):
    """a * b + c modulo 2**32."""
    return uint32(uint64(a) * uint64(b) + uint64(c))


@device
def random_bits(i, step, seed):
    """16 bits that depend on nothing else, and look as if they did not.

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
def round_stochastically(number, random):
    """One of the two bf16 between which number lies, as float32, with the greater probability the nearer it is, so that
    number is what is to be expected. random: 16 bits.

    bf16 is the upper half of a float32's bits: if the sum of its lower half and of random carries, it is rounded away
    from 0. A NaN stays as it is, as a carry could end it; infinity, 0 and all that is a bf16 have no lower half.
    """
    if math.isnan(number):
        return number
    bits = uint32(number.view(uint32) + random) & uint32(0xFFFF0000)
    return uint32(bits).view(float32)


@kernel
def adamw_kernel(
    params, weights, has_master, grads, m, v, decays,
    learning_rate, m_factors, v_factors, eps, weight_decay, step, seed, grad_scale,
):  # fmt: skip
    """AdamW on weights (n,): the master weights where there are any, else params; factors: beta, 1 - beta, log(beta).

    Grid: a block for BLOCK parameters; block: THREADS; a thread owns EACH parameters, THREADS apart.
    Moves: 28 bytes a parameter; with master weights 30, bf16 without them 24.
    """
    rate, scale = learning_rate[0], grad_scale[0]
    if scale < ZERO:
        return
    m_keep, m_gain, m_log_beta = m_factors
    v_keep, v_gain, v_log_beta = v_factors
    m_correction, v_correction = correction(step[0], m_log_beta), correction(step[0], v_log_beta)
    first = cuda.blockIdx.x * BLOCK + cuda.threadIdx.x
    for number in range(first, min(first + BLOCK, params.shape[0]), THREADS):
        i = uint64(number)  # spares each access the test whether the index counts from the end of the array
        decay = weight_decay if decays[uint64(number // RUN)] else ZERO
        gradient, weight = grads[i] * scale, to_float(weights[i])
        m_new = m_keep * m[i] + m_gain * gradient
        v_new = v_keep * v[i] + v_gain * gradient * gradient
        m[i] = m_new
        v[i] = v_new
        move = m_new * m_correction / (math.sqrt(v_new * v_correction) + eps)
        weight -= rate * (move + decay * weight)
        if weights.itemsize == 2:
            weight = round_stochastically(weight, random_bits(number, step[0], seed[0]))
        weights[i] = to_storage(weight, weights)
        if has_master:
            params[i] = to_storage(weight, params)


def adamw_update(
    params, master, grads, m, v, decays, learning_rate, beta1, beta2, eps, weight_decay, step, seed, grad_scale
):
    """Move each parameter against its gradient's running mean, measured in the root of its running mean square.

    params, master, m, v <- grads, all (n,), n a multiple of RUN, params float32 or bf16, master float32, the parameters
        that bf16 params are rounded from, or None; decays (n / RUN,) uint8: 1 where weight decay applies to a run of
        parameters, else 0; learning_rate (1,), step (1,) int32, which is 1 at the first update, seed (1,) int32,
        grad_scale (1,), by which every gradient is multiplied first (clipping); beta1, beta2, eps, weight_decay numbers
    Writes:   m = beta1 * m + (1 - beta1) * grads, v = beta2 * v + (1 - beta2) * grads**2,
              params -= learning_rate * (mhat / (sqrt(vhat) + eps) + weight_decay * decays * params)
              with mhat = m / (1 - beta1**step), vhat = v / (1 - beta2**step); nothing where grad_scale is negative.
              With master: the same to master, and params = the nearest bf16. bf16 params without master are rounded
              up or down at random, so that the result is to be expected; seed, step and the index decide
    Parallel: over the parameters; each thread owns EACH of them
    Moves:    28 bytes a parameter; with master 30, bf16 without it 24
    Source:   Loshchilov and Hutter 2017, arXiv:1711.05101; Kingma and Ba 2014, arXiv:1412.6980
    """
    adamw_kernel[blocks_for(params.size, BLOCK), THREADS, stream()](
        params, params if master is None else master, master is not None, grads, m, v, decays,
        learning_rate, _factors(beta1), _factors(beta2), float32(eps), float32(weight_decay), step, seed, grad_scale,
    )  # fmt: skip


def _factors(beta: float) -> tuple:
    """beta, 1 - beta and log(beta), each rounded once."""
    return float32(beta), float32(1 - beta), float32(math.log(beta) if beta else -math.inf)
