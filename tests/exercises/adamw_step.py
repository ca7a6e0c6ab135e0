"""The solution, and wrong answers with the phrases that `check` must print for each."""

import math

from numba import njit, prange

RUN = 4
BETA1, BETA2, EPS, WEIGHT_DECAY = 0.9, 0.95, 1e-8, 0.1


@njit(parallel=True)
def solution(params, grads, m, v, decays, rate, step):
    for i in prange(params.shape[0]):
        g = grads[i]
        m[i] = BETA1 * m[i] + (1 - BETA1) * g
        v[i] = BETA2 * v[i] + (1 - BETA2) * g * g
        mhat, vhat = m[i] / (1 - BETA1**step), v[i] / (1 - BETA2**step)
        decay = WEIGHT_DECAY if decays[i // RUN] else 0.0
        params[i] -= rate * (mhat / (math.sqrt(vhat) + EPS) + decay * params[i])


@njit(parallel=True)
def no_bias_correction(params, grads, m, v, decays, rate, step):
    for i in prange(params.shape[0]):
        g = grads[i]
        m[i] = BETA1 * m[i] + (1 - BETA1) * g
        v[i] = BETA2 * v[i] + (1 - BETA2) * g * g
        decay = WEIGHT_DECAY if decays[i // RUN] else 0.0
        params[i] -= rate * (m[i] / (math.sqrt(v[i]) + EPS) + decay * params[i])


@njit(parallel=True)
def decay_in_the_gradient(params, grads, m, v, decays, rate, step):
    for i in prange(params.shape[0]):
        g = grads[i] + (WEIGHT_DECAY * params[i] if decays[i // RUN] else 0.0)
        m[i] = BETA1 * m[i] + (1 - BETA1) * g
        v[i] = BETA2 * v[i] + (1 - BETA2) * g * g
        mhat, vhat = m[i] / (1 - BETA1**step), v[i] / (1 - BETA2**step)
        params[i] -= rate * mhat / (math.sqrt(vhat) + EPS)


@njit(parallel=True)
def a_decay_for_each_parameter(params, grads, m, v, decays, rate, step):
    for i in prange(params.shape[0]):
        g = grads[i]
        m[i] = BETA1 * m[i] + (1 - BETA1) * g
        v[i] = BETA2 * v[i] + (1 - BETA2) * g * g
        mhat, vhat = m[i] / (1 - BETA1**step), v[i] / (1 - BETA2**step)
        decay = WEIGHT_DECAY if decays[i] else 0.0
        params[i] -= rate * (mhat / (math.sqrt(vhat) + EPS) + decay * params[i])


@njit(parallel=True)
def all_decay(params, grads, m, v, decays, rate, step):
    for i in prange(params.shape[0]):
        g = grads[i]
        m[i] = BETA1 * m[i] + (1 - BETA1) * g
        v[i] = BETA2 * v[i] + (1 - BETA2) * g * g
        mhat, vhat = m[i] / (1 - BETA1**step), v[i] / (1 - BETA2**step)
        params[i] -= rate * (mhat / (math.sqrt(vhat) + EPS) + WEIGHT_DECAY * params[i])


@njit(parallel=True)
def stores_corrected_m_and_v(params, grads, m, v, decays, rate, step):
    for i in prange(params.shape[0]):
        g = grads[i]
        m[i] = (BETA1 * m[i] + (1 - BETA1) * g) / (1 - BETA1**step)
        v[i] = (BETA2 * v[i] + (1 - BETA2) * g * g) / (1 - BETA2**step)
        decay = WEIGHT_DECAY if decays[i // RUN] else 0.0
        params[i] -= rate * (m[i] / (math.sqrt(v[i]) + EPS) + decay * params[i])


@njit(parallel=True)
def wrong_sign(params, grads, m, v, decays, rate, step):
    for i in prange(params.shape[0]):
        g = grads[i]
        m[i] = BETA1 * m[i] + (1 - BETA1) * g
        v[i] = BETA2 * v[i] + (1 - BETA2) * g * g
        mhat, vhat = m[i] / (1 - BETA1**step), v[i] / (1 - BETA2**step)
        decay = WEIGHT_DECAY if decays[i // RUN] else 0.0
        params[i] += rate * (mhat / (math.sqrt(vhat) + EPS) + decay * params[i])


@njit(parallel=True)
def whole_run_in_each_iteration(params, grads, m, v, decays, rate, step):
    """Each iteration updates all parameters of its run."""
    for i in prange(params.shape[0]):
        run = i // RUN
        for j in range(run * RUN, (run + 1) * RUN):
            m[j] = BETA1 * m[j] + (1 - BETA1) * grads[j]
            v[j] = BETA2 * v[j] + (1 - BETA2) * grads[j] ** 2
            mhat, vhat = m[j] / (1 - BETA1**step), v[j] / (1 - BETA2**step)
            decay = WEIGHT_DECAY if decays[run] else 0.0
            params[j] -= rate * (mhat / (math.sqrt(vhat) + EPS) + decay * params[j])


@njit(parallel=True)
def does_not_store_m_and_v(params, grads, m, v, decays, rate, step):
    for i in prange(params.shape[0]):
        g = grads[i]
        m_new = BETA1 * m[i] + (1 - BETA1) * g
        v_new = BETA2 * v[i] + (1 - BETA2) * g * g
        mhat, vhat = m_new / (1 - BETA1**step), v_new / (1 - BETA2**step)
        decay = WEIGHT_DECAY if decays[i // RUN] else 0.0
        params[i] -= rate * (mhat / (math.sqrt(vhat) + EPS) + decay * params[i])


WRONG = (
    (no_bias_correction, ["runs=1, step=1: params[0] is", "all elements of params are wrong"]),
    (
        decay_in_the_gradient,
        ["runs=3, step=1: params[4] is", "4 of 12 elements are wrong", "from params[4]"],
    ),
    (a_decay_for_each_parameter, ["iteration 1 of prange reads decays[1], which is out of bounds", "must be 0 to 0"]),
    (all_decay, ["runs=1, step=1: params[0] is", "all elements of params are wrong"]),
    (stores_corrected_m_and_v, ["runs=1, step=1: m[0] is", "all elements of m are wrong"]),
    (wrong_sign, ["runs=1, step=1: params[0] is", "all elements of params are wrong"]),
    (whole_run_in_each_iteration, ["a race: iteration 0 of prange writes m[0] and iteration 1 of prange", "one owner"]),
    (does_not_store_m_and_v, ["m[0] is 0, but should be", "all elements of m are wrong"]),
)
