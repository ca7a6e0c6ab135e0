import ml_dtypes  # noqa: F401  NumPy knows "bfloat16" from it
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

# more channels than a GPU gives to one warp; more rows than it has pieces of them
LARGE = [(1, 1, 2049), (1, 3, 1025), (3, 601, 5)]


def make(rng, B, T, C, centre=0.0):
    """An input around `centre`, weight, bias, a gradient."""
    inp, dout = centre + rng.standard_normal((B, T, C)), rng.standard_normal((B, T, C))
    weight, bias = rng.standard_normal(C), rng.standard_normal(C)
    return [x.astype(np.float32) for x in (inp, weight, bias, dout)]


def stored(dtype, expected, error):
    """The error, and what it loses to be stored: a bf16 is within 2**-8 of the number."""
    return error if dtype == "float32" else error + 2**-8 * (np.abs(expected) + error)


def check_forward(ops, place, garbage, inp, weight, bias, dtype="float32"):
    B, T, C = inp.shape
    out, mean, rstd = place(np.full(inp.shape, np.nan), dtype), garbage(B, T), garbage(B, T)
    ops.layernorm_forward(out, mean, rstd, *(place(x, dtype) for x in (inp, weight, bias)))
    expected_out, expected_mean, expected_rstd = layernorm_forward(inp, weight, bias)

    mean_error = sum_error(np.abs(inp).mean(axis=-1), C)
    # the variance is a sum of squares; to it the mean's error adds only its own square
    rstd_error = sum_error(expected_rstd, C) + mean_error**2 * expected_rstd**3
    assert_close("mean", mean, expected_mean, mean_error)
    assert_close("rstd", rstd, expected_rstd, rstd_error)
    # out = (inp - mean) * rstd * weight + bias: the errors of both factors, and one for each of four operations
    scaled = np.abs(expected_out - bias)
    error = np.abs(weight) * (expected_rstd * mean_error)[..., None] + scaled * (rstd_error / expected_rstd)[..., None]
    error += 4 * UNIT * (scaled + np.abs(bias))
    assert_close("out", out.astype(np.float32), expected_out, stored(dtype, expected_out, error))


@pytest.mark.parametrize("centre", [0.0, 100.0], ids="centre{}".format)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_forward(ops, rng, place, garbage, shape, centre):
    inp, weight, bias, _ = make(rng, *shape, centre)
    check_forward(ops, place, garbage, inp, weight, bias)


def check_backward(ops, rng, place, garbage, inp, weight, bias, dout, expected, dtype="float32"):
    B, T, C = inp.shape
    _, mean, rstd = layernorm_forward(inp, weight, bias)
    before = [rng.standard_normal(x.shape).astype(np.float32) for x in (inp, weight, bias)]
    before[0] = before[0].astype(dtype).astype(np.float32)
    dinp, dweight, dbias = place(before[0], dtype), place(before[1]), place(before[2])
    scratch = garbage(ops.layernorm_scratch_size(C))
    activations = (place(x, dtype) for x in (dout, inp, weight))
    ops.layernorm_backward(dinp, dweight, dbias, *activations, place(mean), place(rstd), scratch, True)

    # the absolute values of all terms: inp - mean loses as much as its terms are large
    norm = (np.abs(inp) + np.abs(mean)[..., None]) * rstd[..., None]
    dnorm = np.abs(dout * weight)
    terms = dnorm + dnorm.mean(axis=-1, keepdims=True) + norm * (dnorm * norm).mean(axis=-1, keepdims=True)
    # dinp: a sum over C and about twelve more operations
    errors = (
        sum_error(terms * rstd[..., None] + np.abs(before[0]), C + 8),
        sum_error((np.abs(dout) * norm).sum(axis=(0, 1)) + np.abs(before[1]), B * T + 1),
        sum_error(np.abs(dout).sum(axis=(0, 1)) + np.abs(before[2]), B * T),
    )
    expected = [was + gradient for was, gradient in zip(before, expected, strict=True)]
    assert_close("dinp", dinp.astype(np.float32), expected[0], stored(dtype, expected[0], errors[0]))
    assert_close("dweight", dweight, expected[1], errors[1])
    assert_close("dbias", dbias, expected[2], errors[2])

    # not accumulating: whatever was there is forgotten, but for the residual stream's gradient
    dinp, dweight, dbias = place(before[0], dtype), place(np.full(C, np.nan)), place(np.full(C, np.nan))
    activations = (place(x, dtype) for x in (dout, inp, weight))
    ops.layernorm_backward(dinp, dweight, dbias, *activations, place(mean), place(rstd), scratch, False)
    assert_close("dinp", dinp.astype(np.float32), expected[0], stored(dtype, expected[0], errors[0]))
    assert_close("dweight =", dweight, expected[1] - before[1], errors[1])
    assert_close("dbias =", dbias, expected[2] - before[2], errors[2])


@pytest.mark.parametrize("centre", [0.0, 100.0], ids="centre{}".format)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_backward(ops, rng, place, garbage, shape, centre):
    inp, weight, bias, dout = make(rng, *shape, centre)
    expected = layernorm_backward(dout, inp, weight, bias)
    check_backward(ops, rng, place, garbage, inp, weight, bias, dout, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 97), (2, 17, 97), (1, 3, 1025)])
def test_bf16(ops, rng, place, garbage, shape):
    inp, weight, bias, dout = (x.astype("bfloat16").astype(np.float32) for x in make(rng, *shape, centre=3.0))
    check_forward(ops, place, garbage, inp, weight, bias, "bfloat16")
    expected = layernorm_backward(dout, inp, weight, bias)
    check_backward(ops, rng, place, garbage, inp, weight, bias, dout, expected, "bfloat16")


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
    ops.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, scratch, True)
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
        ops.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, scratch, True)
        return out, mean, rstd, dinp, dweight, dbias

    assert_same_bits(run)
