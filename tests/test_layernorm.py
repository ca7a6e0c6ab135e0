import numpy as np
import pytest
from reference import (
    SHAPES,
    UNIT,
    assert_close,
    finite_difference,
    layernorm_backward,
    layernorm_forward,
    sum_error,
)


def make(rng, B, T, C, centre=0.0):
    """An input around `centre`, weight, bias, a gradient."""
    inp, dout = centre + rng.standard_normal((B, T, C)), rng.standard_normal((B, T, C))
    weight, bias = rng.standard_normal(C), rng.standard_normal(C)
    return [x.astype(np.float32) for x in (inp, weight, bias, dout)]


@pytest.mark.parametrize("centre", [0.0, 100.0], ids="centre{}".format)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(ops, rng, place, garbage, shape, centre):
    B, T, C = shape
    inp, weight, bias, _ = make(rng, *shape, centre)
    out, mean, rstd = garbage(*shape), garbage(B, T), garbage(B, T)
    ops.layernorm_forward(out, mean, rstd, place(inp), place(weight), place(bias))
    expected_out, expected_mean, expected_rstd = layernorm_forward(inp, weight, bias)

    mean_error = sum_error(np.abs(inp).mean(axis=-1), C)
    # the variance is a sum of squares; to it the mean's error adds only its own square
    rstd_error = sum_error(expected_rstd, C) + mean_error**2 * expected_rstd**3
    assert_close("mean", mean, expected_mean, mean_error)
    assert_close("rstd", rstd, expected_rstd, rstd_error)
    # out = (inp - mean) * rstd * weight + bias: the errors of both factors, and one for each of four operations
    scaled = np.abs(expected_out - bias)
    error = np.abs(weight) * (expected_rstd * mean_error)[..., None] + scaled * (rstd_error / expected_rstd)[..., None]
    assert_close("out", out, expected_out, error + 4 * UNIT * (scaled + np.abs(bias)))


def check_backward(ops, rng, place, garbage, inp, weight, bias, dout, expected):
    B, T, C = inp.shape
    _, mean, rstd = layernorm_forward(inp, weight, bias)
    before = [rng.standard_normal(x.shape).astype(np.float32) for x in (inp, weight, bias)]
    got = [place(x) for x in before]
    scratch = garbage(ops.layernorm_scratch_size(C))
    ops.layernorm_backward(*got, place(dout), place(inp), place(weight), place(mean), place(rstd), scratch)

    # the absolute values of all terms: inp - mean loses as much as its terms are large
    norm = (np.abs(inp) + np.abs(mean)[..., None]) * rstd[..., None]
    dnorm = np.abs(dout * weight)
    dinp = dnorm + dnorm.mean(axis=-1, keepdims=True) + norm * (dnorm * norm).mean(axis=-1, keepdims=True)
    # dinp: a sum over C and about twelve more operations
    errors = (
        sum_error(dinp * rstd[..., None] + np.abs(before[0]), C + 8),
        sum_error((np.abs(dout) * norm).sum(axis=(0, 1)) + np.abs(before[1]), B * T + 1),
        sum_error(np.abs(dout).sum(axis=(0, 1)) + np.abs(before[2]), B * T),
    )
    for name, x, was, gradient, error in zip(("dinp", "dweight", "dbias"), got, before, expected, errors, strict=True):
        assert_close(name, x, was + gradient, error)


@pytest.mark.parametrize("centre", [0.0, 100.0], ids="centre{}".format)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(ops, rng, place, garbage, shape, centre):
    inp, weight, bias, dout = make(rng, *shape, centre)
    expected = layernorm_backward(dout, inp, weight, bias)
    check_backward(ops, rng, place, garbage, inp, weight, bias, dout, expected)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 3, 5)])
def test_finite_differences(ops, rng, place, garbage, shape):
    inp, weight, bias, dout = make(rng, *shape)
    numeric = (
        finite_difference(lambda x: layernorm_forward(x, weight, bias)[0], inp, dout),
        finite_difference(lambda x: layernorm_forward(inp, x, bias)[0], weight, dout),
        finite_difference(lambda x: layernorm_forward(inp, weight, x)[0], bias, dout),
    )
    analytic = layernorm_backward(dout, inp, weight, bias)
    for name, got, expected in zip(("dinp", "dweight", "dbias"), analytic, numeric, strict=True):
        assert_close(name, got, expected, 1e-7)  # the third derivative of a row's normalisation reaches some hundreds
    check_backward(ops, rng, place, garbage, inp, weight, bias, dout, numeric)


def test_nan_stays_in_its_row(ops, rng, place, garbage):
    B, T, C = 2, 2, 97
    inp, weight, bias, dout = (place(x) for x in make(rng, B, T, C))
    inp[0, 1, 96] = np.nan
    out, mean, rstd = garbage(B, T, C), garbage(B, T), garbage(B, T)
    ops.layernorm_forward(out, mean, rstd, inp, weight, bias)
    for x in (out, mean[..., None], rstd[..., None]):
        assert np.isnan(x[0, 1]).all()
        assert np.isfinite(np.delete(x.reshape(4, -1), 1, axis=0)).all()
    dinp, dweight, dbias = place(np.zeros((B, T, C))), place(np.zeros(C)), place(np.zeros(C))
    scratch = garbage(ops.layernorm_scratch_size(C))
    ops.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, scratch)
    assert np.isnan(dinp[0, 1]).all() and np.isfinite(np.delete(dinp.reshape(4, -1), 1, axis=0)).all()
    assert np.isnan(dweight).all() and np.isfinite(dbias).all()


@pytest.mark.compiled
@pytest.mark.parametrize("shape", [(1, 3, 257), (3, 97, 257), (2, 257, 17)])
def test_threads_do_not_change_the_bits(ops, rng, place, garbage, assert_same_bits, shape):
    B, T, C = shape
    inp, weight, bias, dout = (place(x) for x in make(rng, B, T, C))

    def run():
        out, mean, rstd = garbage(B, T, C), garbage(B, T), garbage(B, T)
        ops.layernorm_forward(out, mean, rstd, inp, weight, bias)
        dinp, dweight, dbias = place(inp), place(weight), place(bias)
        scratch = garbage(ops.layernorm_scratch_size(C))
        ops.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, scratch)
        return out, mean, rstd, dinp, dweight, dbias

    assert_same_bits(run)
