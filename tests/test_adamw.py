import numpy as np
import pytest
from reference import UNIT, adamw_update, assert_close

SETTINGS = dict(learning_rate=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=7, grad_scale=0.25)


def make(rng, shape):
    """param, grad, m, v in the middle of a training."""
    param, grad, m = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    return param, grad, m, np.square(rng.standard_normal(shape)).astype(np.float32)


def update(ops, place, param, grad, m, v, learning_rate, beta1, beta2, eps, weight_decay, step, grad_scale):
    """Run the op on arrays in place, and its scalars as it wants them."""
    rate, scale, count = place([learning_rate]), place([grad_scale]), place([step], np.int32)
    ops.adamw_update(param, grad, m, v, rate, beta1, beta2, eps, weight_decay, count, scale)


def check(ops, place, arrays, **settings):
    # what the op gets as float32, the reference gets with the same rounding
    settings = SETTINGS | settings
    for name in ("learning_rate", "grad_scale"):
        settings[name] = float(np.float32(settings[name]))
    before = [x.astype(np.float64) for x in arrays]
    param, grad, m, v = (place(x) for x in arrays)
    update(ops, place, param, grad, m, v, **settings)
    expected_param, expected_m, expected_v = adamw_update(*before, *settings.values())
    # m: two products, the betas' own rounding, the scaling of the gradient, a sum. v: the same with a square
    beta1, beta2 = settings["beta1"], settings["beta2"]
    scaled = np.abs(before[1] * settings["grad_scale"])
    m_error = 4 * UNIT * (beta1 * np.abs(before[2]) + (1 - beta1) * scaled)
    assert_close("m", m, expected_m, m_error)
    assert_close("v", v, expected_v, 6 * UNIT * expected_v)
    # param: m's error, half of v's and eight operations in the quotient, two in the decay, one for the difference
    correction = 1 - beta1 ** settings["step"]
    denominator = np.sqrt(expected_v / (1 - beta2 ** settings["step"])) + settings["eps"]
    quotient_error = (m_error + 11 * UNIT * np.abs(expected_m)) / correction / denominator
    decay_error = 3 * UNIT * settings["weight_decay"] * np.abs(before[0])
    error = settings["learning_rate"] * (quotient_error + decay_error) + UNIT * np.abs(expected_param)
    assert_close("param", param, expected_param, error)
    return param, m, v


# a block of the CPU's is 16384 parameters
@pytest.mark.parametrize("shape", [(1,), (3,), (17,), (257,), (5, 97), (2, 3, 17), (1, 16384), (16385,), (3, 97, 257)])
def test_update(ops, rng, place, shape):
    check(ops, place, make(rng, shape))


@pytest.mark.parametrize(
    "settings",
    [
        dict(step=1),
        dict(step=100_000),
        dict(weight_decay=0.0),
        dict(learning_rate=0.0),
        dict(grad_scale=1.0),
        dict(grad_scale=0.0),
        dict(beta1=0.0),
        dict(beta2=0.999),
        dict(eps=1e-2),
    ],
    ids=str,
)
def test_settings(ops, rng, place, settings):
    check(ops, place, make(rng, (97,)), **settings)


def test_first_step_moves_by_the_learning_rate(ops, rng, place):
    """At step 1, from m = v = 0, mhat / sqrt(vhat) is the gradient's sign."""
    param, grad, _, _ = (place(x) for x in make(rng, (257,)))
    m, v, before = place(np.zeros(257)), place(np.zeros(257)), param.copy()
    settings = SETTINGS | dict(step=1, weight_decay=0.0, eps=0.0, learning_rate=0.5)
    update(ops, place, param, grad, m, v, **settings)
    assert_close("param", param, before - 0.5 * np.sign(grad), 8 * UNIT * (np.abs(before) + 0.5))


def test_decay_is_decoupled(ops, place):
    """Without a gradient the decay shrinks a parameter by learning_rate * weight_decay, and touches no moment."""
    param, grad, m, v = place([2.0, -3.0]), place([0.0, 0.0]), place([0.0, 0.0]), place([0.0, 0.0])
    update(ops, place, param, grad, m, v, **SETTINGS | dict(learning_rate=0.5, weight_decay=0.25))
    assert np.array_equal(param, np.float32([2.0, -3.0]) * np.float32(1 - 0.5 * 0.25))
    assert not m.any() and not v.any()


def test_many_steps(ops, rng, place):
    """Twenty steps down a parabola, compared after the last one: each step may add its own error."""
    start = rng.standard_normal(97).astype(np.float32)
    param, m, v = place(start), place(np.zeros(97)), place(np.zeros(97))
    reference = start.astype(np.float64), np.zeros(97), np.zeros(97)
    rate, scale = float(np.float32(SETTINGS["learning_rate"])), SETTINGS["grad_scale"]
    for step in range(1, 21):
        settings = SETTINGS | dict(step=step, learning_rate=rate, grad_scale=scale)
        grad = (2 * start + step).astype(np.float32)
        update(ops, place, param, place(grad), m, v, **settings)
        reference = adamw_update(reference[0], grad, *reference[1:], *settings.values())
    assert_close("param", param, reference[0], 20 * 2 * UNIT * (np.abs(start) + 20 * rate))
    assert_close("m", m, reference[1], 20 * 4 * UNIT * np.abs(reference[1]).max())
    assert_close("v", v, reference[2], 20 * 6 * UNIT * reference[2])


def test_nan_gradient_touches_its_parameter_only(ops, rng, place):
    param, grad, m, v = (place(x) for x in make(rng, (97,)))
    grad[50] = np.nan
    update(ops, place, param, grad, m, v, **SETTINGS)
    for x in (param, m, v):
        assert np.array_equal(np.isnan(x), np.isnan(grad))


@pytest.mark.compiled
def test_threads_do_not_change_the_bits(ops, rng, place, assert_same_bits):
    arrays = make(rng, (100_003,))

    def run():
        param, grad, m, v = (place(x) for x in arrays)
        update(ops, place, param, grad, m, v, **SETTINGS)
        return param, m, v

    assert_same_bits(run)
