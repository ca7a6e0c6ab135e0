import itertools

import ml_dtypes
import numpy as np
import pytest
from comparing import UNIT, assert_close, by_oracle

SETTINGS = dict(learning_rate=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=7, grad_scale=0.25)
RUN = 64  # parameters that share one weight decay flag
compiled, real = pytest.mark.compiled, pytest.mark.real


def make(rng, n):
    """params, grads, m, v and decays as they are in the middle of training."""
    params, grads, m = (rng.standard_normal(n).astype(np.float32) for _ in range(3))
    return params, grads, m, np.square(rng.standard_normal(n)).astype(np.float32), np.arange(n // RUN) % 3 != 1


def arguments(params, grads, m, v, decays, master=None, seed=0, **settings):
    """The op's arguments; scalars as small arrays where it expects them."""
    s = SETTINGS | settings
    rate, scale, step = np.float32([s["learning_rate"]]), np.float32([s["grad_scale"]]), np.int32([s["step"]])
    betas_and_decay = s["beta1"], s["beta2"], s["eps"], s["weight_decay"]
    return params, master, grads, m, v, np.uint8(decays), rate, *betas_and_decay, step, np.int32([seed]), scale


def update(ops, place, *arrays, **settings):
    """Run the op on arrays that are in place."""
    params, master, grads, m, v, *rest = arguments(*arrays, **settings)
    rest = [place(x, x.dtype) if isinstance(x, np.ndarray) else x for x in rest]
    ops.adamw_update(params, master, grads, m, v, *rest)


def expect(params, grads, m, v, decays, **settings):
    """What update makes of params, m and v, and the errors allowed in float32."""
    s = SETTINGS | settings
    rate, scale = float(np.float32(s["learning_rate"])), float(np.float32(s["grad_scale"]))
    beta1, beta2, eps, weight_decay, step = s["beta1"], s["beta2"], s["eps"], s["weight_decay"], s["step"]
    expected = by_oracle("adamw_update", *arguments(params, grads, m, v, decays, **settings))
    expected = [expected[0], *expected[-2:]]  # without master
    expected_params, expected_m, expected_v = expected
    # m: two products, the rounding of the betas, the scaling of the gradient, a sum. v: the same with a square
    m_error = 4 * UNIT * (beta1 * np.abs(m.astype(np.float64)) + (1 - beta1) * np.abs(grads * np.float64(scale)))
    # params: m's error, half of v's, eight operations in the quotient and, if the corrections are computed in float32,
    # five more for mhat and half of that for vhat; two in the decay, one for the difference
    denominator = np.sqrt(expected_v / (1 - beta2**step)) + eps
    quotient_error = (m_error + 19 * UNIT * np.abs(expected_m)) / (1 - beta1**step) / denominator
    error = rate * (quotient_error + 3 * UNIT * weight_decay * np.abs(params)) + UNIT * np.abs(expected_params)
    return expected, (error, m_error, 6 * UNIT * expected_v)


def assert_all_close(got, expected, errors):
    for name, *numbers in zip(("params", "m", "v"), got, expected, errors, strict=True):
        assert_close(name, *numbers)


def check(ops, place, arrays, **settings):
    params, grads, m, v = (place(x) for x in arrays[:4])
    update(ops, place, params, grads, m, v, arrays[4], **settings)
    assert_all_close((params, m, v), *expect(*arrays, **settings))


# the CPU's blocks have 16384 parameters
@pytest.mark.parametrize(
    "n", [64, 128, 192, 320] + [pytest.param(n, marks=compiled) for n in (16384, 16384 + 64, 97 * 257 * 64)]
)
def test_update(ops, rng, place, n):
    check(ops, place, make(rng, n))


@pytest.mark.parametrize(
    "settings",
    [
        dict(step=1),
        dict(step=2),
        dict(step=100_000),
        dict(weight_decay=0.0),
        dict(learning_rate=0.0),
        dict(grad_scale=1.0),
        dict(grad_scale=0.0),
        dict(beta1=0.0),
        dict(beta2=0.0),
        dict(beta2=0.999),
        dict(beta2=0.9999, step=1),
        dict(eps=1e-2),
    ],
    ids=str,
)
def test_settings(ops, rng, place, settings):
    check(ops, place, make(rng, 128), **settings)


def test_first_step_moves_by_the_learning_rate(ops, rng, place):
    """At step 1, from m = v = 0, mhat / sqrt(vhat) is the gradient's sign."""
    params, grads, m, v, decays = make(rng, 320)
    params, grads, m, v = place(params), place(grads), place(0 * m), place(0 * v)
    before = params.copy()
    update(ops, place, params, grads, m, v, decays, step=1, weight_decay=0.0, eps=0.0, learning_rate=0.5)
    assert_close("params", params, before - 0.5 * np.sign(grads), 8 * UNIT * (np.abs(before) + 0.5))


def test_decay_is_decoupled(ops, place):
    """Without a gradient, decay shrinks a parameter by learning_rate * weight_decay and leaves the moments alone; the
    parameters of a run without decay stay as they are."""
    before = np.repeat(np.float32([2.0, -3.0, 5.0, -7.0]), RUN)
    params, grads, m, v = place(before), place(0 * before), place(0 * before), place(0 * before)
    update(ops, place, params, grads, m, v, [1, 0, 0, 1], learning_rate=0.5, weight_decay=0.25)
    assert np.array_equal(params, before * np.repeat(np.float32([0.875, 1, 1, 0.875]), RUN))
    assert not m.any() and not v.any()


def test_many_steps(ops, rng, place):
    """Ten steps, compared after the last one: each step may add its own error."""
    start, decays = rng.standard_normal(64).astype(np.float32), [1]
    params, m, v = place(start), place(np.zeros(64)), place(np.zeros(64))
    right = start.astype(np.float64), np.zeros(64), np.zeros(64)
    rate = float(np.float32(SETTINGS["learning_rate"]))
    for step in range(1, 11):
        grads = (2 * start + step).astype(np.float32)
        update(ops, place, params, place(grads), m, v, decays, step=step)
        right, _ = expect(right[0], grads, *right[1:], decays, step=step)
    assert_close("params", params, right[0], 10 * 2 * UNIT * (np.abs(start) + 10 * rate))
    assert_close("m", m, right[1], 10 * 4 * UNIT * np.abs(right[1]).max())
    assert_close("v", v, right[2], 10 * 6 * UNIT * right[2])


def test_nan_gradient_touches_its_parameter_only(ops, rng, place):
    params, grads, m, v, decays = make(rng, 128)
    grads[50] = np.nan
    params, grads, m, v = (place(x) for x in (params, grads, m, v))
    update(ops, place, params, grads, m, v, decays)
    for x in (params, m, v):
        assert np.array_equal(np.isnan(x), np.isnan(grads))


# --- clipping and padding


def on_every_kind(test):
    """float32; bf16 with and without float32 master weights, on devices that have it."""
    return pytest.mark.parametrize(
        "kind", ["float32", *(pytest.param(kind, marks=pytest.mark.gpu) for kind in ("bfloat16", "master"))]
    )(test)


@pytest.fixture
def places(place, kind):
    """A function that places params and returns (params, master) of this kind."""

    def places(params):
        dtype = "float32" if kind == "float32" else "bfloat16"
        return place(params, dtype), place(params) if kind == "master" else None

    return places


@on_every_kind
def test_a_negative_scale_skips_the_update(ops, rng, place, places):
    *arrays, decays = make(rng, 192)
    params, master = places(arrays[0])
    grads, m, v = (place(x) for x in arrays[1:])
    written = [x for x in (params, master, m, v) if x is not None]
    before = [x.tobytes() for x in written]
    update(ops, place, params, grads, m, v, decays, master=master, grad_scale=-1.0)
    assert [x.tobytes() for x in written] == before
    update(ops, place, params, grads, m, v, decays, master=master, grad_scale=0.0)
    assert all(x.tobytes() != y for x, y in zip(written, before, strict=True))


@on_every_kind
def test_padding_stays_zero(ops, rng, place, places):
    """All bits of the padding, step after step, with and without weight decay."""
    *arrays, decays = make(rng, 192)
    padding = np.arange(192) % RUN > 40
    params, grads, m, v = (np.where(padding, 0, x) for x in arrays)
    (params, master), grads, m, v = places(params), place(grads), place(m), place(v)
    for step in range(1, 4):
        update(ops, place, params, grads, m, v, decays, master=master, step=step, seed=step)
    for x in (params, master, m, v):
        if x is not None:
            assert not x[padding].view(np.uint8).any()
            assert (x[~padding] != 0).all()


# --- bf16


@pytest.mark.gpu
def test_master_weights_are_updated_and_rounded_to_params(ops, rng, place):
    """The master weights equal a float32 run's bit for bit; params become the nearest bf16, whatever they were."""
    arrays = make(rng, 192)
    params, master = place(np.zeros(192), "bfloat16"), place(arrays[0])
    plain, grads, m, v = (place(x) for x in arrays[:4])
    m32, v32 = place(m), place(v)
    update(ops, place, params, grads, m, v, arrays[4], master=master)
    update(ops, place, plain, grads, m32, v32, arrays[4])
    for got, expected in ((master, plain), (m, m32), (v, v32)):
        assert got.tobytes() == expected.tobytes()
    assert params.tobytes() == master.astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.gpu
def test_master_weights_halfway_round_to_the_even_bf16(ops, place):
    unit = 2.0**-7  # from 1 to the next bf16
    master = place(np.repeat([1 + unit / 2, 1 + 1.5 * unit], 32))
    params = place(np.zeros(64), "bfloat16")
    zeros = place(np.zeros(64))
    update(ops, place, params, zeros, place(zeros), place(zeros), [0], master=master)
    assert np.array_equal(params.astype(np.float32), np.repeat([1, 1 + 2 * unit], 32))


def rounded(ops, place, params, move, **settings):
    """bf16 params moved by -move and rounded, as float32. At step 1, without eps and decay, an update moves each
    parameter by the learning rate against the sign of its gradient."""
    n = len(params)
    params, grads, m, v = place(params, "bfloat16"), place(np.ones(n)), place(np.zeros(n)), place(np.zeros(n))
    settings = dict(step=1, weight_decay=0.0, eps=0.0, learning_rate=move) | settings
    update(ops, place, params, grads, m, v, np.zeros(n // RUN), **settings)
    return params.astype(np.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [320, pytest.param(1 << 16, marks=real)])
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_stochastic_rounding_is_unbiased(ops, place, n, value):
    """Above 1, bf16 values are 2**-7 apart, below 1 2**-8. A value a quarter of the way from one to the next becomes
    the next in a quarter of n independent cases; four standard deviations are 4 sqrt(n / 4 * 3 / 4)."""
    for apart, share in ((2**-7, 0.25), (2**-7, 0.75), (-(2**-8), 0.25)):
        got = rounded(ops, place, np.full(n, value), -share * apart * value, seed=1)
        changed = got == value * (1 + apart)
        assert (changed | (got == value)).all()
        assert abs(changed.sum() - share * n) <= 4 * np.sqrt(n * share * (1 - share))


@pytest.mark.gpu
def test_stochastic_rounding_depends_on_index_step_and_seed_alone(ops, place):
    """Two independent patterns of 320 values that round either way agree in half of the places; four standard
    deviations are 36."""

    def pattern(**settings):
        beta = dict(beta1=0.0, beta2=0.0)  # so that every step makes the same move
        return rounded(ops, place, np.full(320, 1.0), -0.5 * 2**-7, **beta, **settings)

    first = pattern(seed=1, step=1)
    assert pattern(seed=1, step=1).tobytes() == first.tobytes()
    others = [pattern(seed=1, step=2), pattern(seed=2, step=1), pattern(seed=-1, step=1)]
    others += [np.roll(first, shift) for shift in (1, 2, 32, 64)]
    for x, y in itertools.combinations([first, *others], 2):
        assert abs((x == y).sum() - 160) <= 36


@pytest.mark.gpu
def test_bf16_update_is_the_float32_update_rounded(ops, rng, place):
    """Rounded to one of the two bf16 values around the float32 result, less than 2**-7 of it away."""
    arrays = make(rng, 320)
    params = place(arrays[0], "bfloat16")
    start = params.astype(np.float32)
    _, grads, m, v = (place(x) for x in arrays[:4])
    update(ops, place, params, grads, m, v, arrays[4], seed=5)
    (expected, *moments), (error, *errors) = expect(start, *arrays[1:])
    assert_all_close(
        (params.astype(np.float32), m, v), (expected, *moments), (error + 2**-7 * np.abs(expected), *errors)
    )


@pytest.mark.gpu
def test_exact_bf16_values_stay(ops, rng, place):
    """Values that bf16 represents exactly do not change, including the smallest, the largest and signed zeros."""
    values = rng.standard_normal(128)
    values[:5] = [0.0, -0.0, 3.3895e38, -3.3895e38, 1e-40]
    start = place(values, "bfloat16").astype(np.float32)
    assert rounded(ops, place, values, 0.0, seed=3).tobytes() == start.tobytes()


@pytest.mark.gpu
def test_infinity_and_nan_survive_the_rounding(ops, place):
    assert (rounded(ops, place, np.ones(128), np.inf, seed=3) == -np.inf).all()
    assert (rounded(ops, place, np.ones(128), -np.inf, seed=3) == np.inf).all()
    nan = np.uint32(0x7FFFFFFF).view(np.float32)  # a GPU's NaN, which a carry would turn into -0
    assert np.isnan(rounded(ops, place, np.ones(128), nan, seed=3)).all()


@pytest.mark.compiled
@on_every_kind
def test_the_same_bits_again(ops, rng, place, places, assert_same_bits):
    *arrays, decays = make(rng, 100_032)

    def run():
        params, master = places(arrays[0])
        grads, m, v = (place(x) for x in arrays[1:])
        update(ops, place, params, grads, m, v, decays, master=master, seed=7)
        return params, m, v

    assert_same_bits(run)
