import numpy as np
import pytest
from comparing import SHAPES, UNIT, assert_close, by_oracle, stored, sum_error

# more channels than one warp of a GPU handles; more rows than the backward has pieces
LARGE = [(1, 1, 2049), (1, 3, 1025), (3, 601, 5)]


def make(rng, B, T, C, centre=0.0):
    """inp around `centre`, weight, bias and dout."""
    inp, dout = centre + rng.standard_normal((B, T, C)), rng.standard_normal((B, T, C))
    weight, bias = rng.standard_normal(C), rng.standard_normal(C)
    return [x.astype(np.float32) for x in (inp, weight, bias, dout)]


def check_forward(ops, place, garbage, inp, weight, bias, dtype="float32"):
    B, T, C = inp.shape
    out, mean, rstd = place(np.full(inp.shape, np.nan), dtype), garbage(B, T), garbage(B, T)
    arguments = out, mean, rstd, *(place(x, dtype) for x in (inp, weight, bias))
    expected_out, expected_mean, expected_rstd = by_oracle("layernorm_forward", *arguments)
    ops.layernorm_forward(*arguments)

    mean_error = sum_error(np.abs(inp).mean(axis=-1), C)
    # the variance is a sum of squares; the mean's error adds only its own square to it
    rstd_error = sum_error(expected_rstd, C) + mean_error**2 * expected_rstd**3
    assert_close("mean", mean, expected_mean, mean_error)
    assert_close("rstd", rstd, expected_rstd, rstd_error)
    # out = (inp - mean) * rstd * weight + bias: the errors of both factors, and a rounding for each of four operations
    scaled = np.abs(expected_out - bias)
    error = np.abs(weight) * (expected_rstd * mean_error)[..., None] + scaled * (rstd_error / expected_rstd)[..., None]
    error += 4 * UNIT * (scaled + np.abs(bias))
    assert_close("out", out, expected_out, stored(dtype, expected_out, error))


@pytest.mark.parametrize("centre", [0.0, 100.0], ids="centre{}".format)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_forward(ops, rng, place, garbage, shape, centre):
    inp, weight, bias, _ = make(rng, *shape, centre)
    check_forward(ops, place, garbage, inp, weight, bias)


def check_backward(ops, rng, place, garbage, inp, weight, bias, dout, dtype="float32"):
    B, T, C = inp.shape
    _, mean, rstd = by_oracle(
        "layernorm_forward", *(np.empty(size) for size in ((B, T, C), (B, T), (B, T))), inp, weight, bias
    )
    inputs = *(place(x, dtype) for x in (dout, inp, weight)), place(mean), place(rstd)

    # the sums of the absolute values of all terms; inp - mean loses in proportion to the size of both
    norm = (np.abs(inp) + np.abs(mean)[..., None]) * rstd[..., None]
    dnorm = np.abs(dout * weight)
    terms = dnorm + dnorm.mean(axis=-1, keepdims=True) + norm * (dnorm * norm).mean(axis=-1, keepdims=True)
    for accumulate in True, False:  # dinp, the gradient of the residual stream, always accumulates
        dinp = place(rng.standard_normal(inp.shape), dtype)
        dweight, dbias = (place(rng.standard_normal(C) if accumulate else np.full(C, np.nan)) for _ in range(2))
        gradients = dinp, dweight, dbias
        was = [np.nan_to_num(np.abs(x.astype(np.float64))) for x in gradients]
        scratch = garbage(ops.layernorm_backward_scratch(*gradients, *inputs, accumulate))
        expected = by_oracle("layernorm_backward", *gradients, *inputs, None, accumulate)
        ops.layernorm_backward(*gradients, *inputs, scratch, accumulate)
        # dinp: a sum over C and about twelve more operations
        error = sum_error(terms * rstd[..., None] + was[0], C + 8)
        assert_close("dinp", dinp, expected[0], stored(dtype, expected[0], error))
        error = sum_error((np.abs(dout) * norm).sum(axis=(0, 1)) + was[1], B * T + 1)
        assert_close(f"dweight, accumulate={accumulate}", dweight, expected[1], error)
        error = sum_error(np.abs(dout).sum(axis=(0, 1)) + was[2], B * T)
        assert_close(f"dbias, accumulate={accumulate}", dbias, expected[2], error)


@pytest.mark.parametrize("centre", [0.0, 100.0], ids="centre{}".format)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_backward(ops, rng, place, garbage, shape, centre):
    check_backward(ops, rng, place, garbage, *make(rng, *shape, centre))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 97), (2, 17, 97), (1, 3, 1025), (2, 3, 40), (1, 5, 12)])
def test_bf16(ops, rng, place, garbage, shape):
    inp, weight, bias, dout = (x.astype("bfloat16").astype(np.float32) for x in make(rng, *shape, centre=3.0))
    check_forward(ops, place, garbage, inp, weight, bias, "bfloat16")
    check_backward(ops, rng, place, garbage, inp, weight, bias, dout, "bfloat16")


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
    arguments = dinp, dweight, dbias, dout, inp, weight, mean, rstd
    ops.layernorm_backward(*arguments, garbage(ops.layernorm_backward_scratch(*arguments, True)), True)
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
        arguments = place(inp), place(weight), place(bias), dout, inp, weight, mean, rstd
        ops.layernorm_backward(*arguments, garbage(ops.layernorm_backward_scratch(*arguments, True)), True)
        return out, mean, rstd, *arguments[:3]

    assert_same_bits(run)
