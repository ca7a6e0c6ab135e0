"""The solution of the exercise, and wrong answers with what `check` has to say of each."""

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
def not_corrected(params, grads, m, v, decays, rate, step):
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
def corrected_in_place(params, grads, m, v, decays, rate, step):
    for i in prange(params.shape[0]):
        g = grads[i]
        m[i] = (BETA1 * m[i] + (1 - BETA1) * g) / (1 - BETA1**step)
        v[i] = (BETA2 * v[i] + (1 - BETA2) * g * g) / (1 - BETA2**step)
        decay = WEIGHT_DECAY if decays[i // RUN] else 0.0
        params[i] -= rate * (m[i] / (math.sqrt(v[i]) + EPS) + decay * params[i])


@njit(parallel=True)
def uphill(params, grads, m, v, decays, rate, step):
    for i in prange(params.shape[0]):
        g = grads[i]
        m[i] = BETA1 * m[i] + (1 - BETA1) * g
        v[i] = BETA2 * v[i] + (1 - BETA2) * g * g
        mhat, vhat = m[i] / (1 - BETA1**step), v[i] / (1 - BETA2**step)
        decay = WEIGHT_DECAY if decays[i // RUN] else 0.0
        params[i] += rate * (mhat / (math.sqrt(vhat) + EPS) + decay * params[i])


@njit(parallel=True)
def a_run_each(params, grads, m, v, decays, rate, step):
    """The whole run, by each of its parameters' iterations."""
    for i in prange(params.shape[0]):
        run = i // RUN
        for j in range(run * RUN, (run + 1) * RUN):
            m[j] = BETA1 * m[j] + (1 - BETA1) * grads[j]
            v[j] = BETA2 * v[j] + (1 - BETA2) * grads[j] ** 2
            mhat, vhat = m[j] / (1 - BETA1**step), v[j] / (1 - BETA2**step)
            decay = WEIGHT_DECAY if decays[run] else 0.0
            params[j] -= rate * (mhat / (math.sqrt(vhat) + EPS) + decay * params[j])


@njit(parallel=True)
def keeps_nothing(params, grads, m, v, decays, rate, step):
    for i in prange(params.shape[0]):
        g = grads[i]
        m_new = BETA1 * m[i] + (1 - BETA1) * g
        v_new = BETA2 * v[i] + (1 - BETA2) * g * g
        mhat, vhat = m_new / (1 - BETA1**step), v_new / (1 - BETA2**step)
        decay = WEIGHT_DECAY if decays[i // RUN] else 0.0
        params[i] -= rate * (mhat / (math.sqrt(vhat) + EPS) + decay * params[i])


WRONG = (
    (not_corrected, ["runs=1, step=1: params[0] is", "all of params is wrong"]),
    (
        decay_in_the_gradient,
        ["runs=3, step=1: params[4] is", "4 of 12 elements are wrong", "from params[4]"],
    ),
    (a_decay_for_each_parameter, ["iteration 1 of prange reads decays[1], which is out of bounds", "must be 0 to 0"]),
    (all_decay, ["runs=1, step=1: params[0] is", "all of params is wrong"]),
    (corrected_in_place, ["runs=1, step=1: m[0] is", "all of m is wrong"]),
    (uphill, ["runs=1, step=1: params[0] is", "all of params is wrong"]),
    (a_run_each, ["a race: iteration 0 of prange writes m[0] and iteration 1 of prange", "one owner"]),
    (keeps_nothing, ["m[0] is 0, but should be", "all of m is wrong"]),
)
