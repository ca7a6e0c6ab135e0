import math

import numpy as np
import pytest
from comparing import SHAPES, TINY, UNIT, assert_close, by_oracle, stored

# near tanh = -1 the oracle's 1 + tanh keeps an absolute error of float64's unit
TANH_ERROR = 2 * 2.0**-53


def make(rng, *shape):
    """inp, mostly in [-9, 9], and dout."""
    return (3 * rng.standard_normal(shape)).astype(np.float32), rng.standard_normal(shape).astype(np.float32)


def parts(inp):
    """In float64, for the tolerances: |2u|, sigmoid(2u), d(2u)/dinp."""
    x = inp.astype(np.float64)
    double_u = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return np.abs(double_u), np.exp(-np.logaddexp(0, -double_u)), 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)


def sigmoid_error(inp):
    """The relative error of sigmoid(2u): 2u takes four operations, and e**-2u multiplies its relative error by |2u|;
    e**x itself loses up to three units, the sum one and the division two."""
    double_u, sigmoid, _ = parts(inp)
    return UNIT * ((1 - sigmoid) * (4 * double_u + 4) + 3)


def forward_error(inp):
    """The error of GELU."""
    return np.abs(inp) * ((sigmoid_error(inp) + UNIT) * parts(inp)[1] + TANH_ERROR) + TINY


def slope_error(inp):
    """The error of GELU'(x) = s + x s (1 - s) d2u: 1 - s loses a unit of s if s is near 1; ten more operations."""
    _, s, d2u = parts(inp)
    relative = sigmoid_error(inp)
    second = np.abs(inp) * s * d2u
    error = s * relative + second * (1 - s) * (2 * relative + 8 * UNIT) + second * s * relative + 4 * UNIT * s
    return error + TANH_ERROR * (1 + np.abs(inp) * d2u)


def check_forward(ops, place, inp, dtype="float32"):
    out = place(np.full(inp.shape, np.nan), dtype)
    arguments = out, place(inp, dtype)
    expected = by_oracle("gelu_forward", *arguments)
    ops.gelu_forward(*arguments)
    assert_close("out", out, expected, stored(dtype, expected, forward_error(inp)))


def check_backward(ops, place, inp, dout, dtype="float32"):
    dinp = place(np.full(inp.shape, np.nan), dtype)
    arguments = dinp, place(inp, dtype), place(dout, dtype)
    expected = by_oracle("gelu_backward", *arguments)
    ops.gelu_backward(*arguments)
    assert_close("dinp", dinp, expected, stored(dtype, expected, np.abs(dout) * slope_error(inp) + TINY))


@pytest.mark.parametrize("shape", [*SHAPES, (97,)])
def test_forward(ops, rng, place, shape):
    check_forward(ops, place, make(rng, *shape)[0])


@pytest.mark.parametrize("shape", [*SHAPES, (97,)])
def test_backward(ops, rng, place, shape):
    check_backward(ops, place, *make(rng, *shape))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 2, 17), (2, 17, 97)])
def test_bf16(ops, rng, place, shape):
    inp, dout = (x.astype("bfloat16").astype(np.float32) for x in make(rng, *shape))
    check_forward(ops, place, inp, "bfloat16")
    check_backward(ops, place, inp, dout, "bfloat16")


def test_whole_range(ops, place):
    """Zeros, tiny and large numbers of both signs, and where the exponential is clamped (about -10) and beyond."""
    inp = np.concatenate([np.linspace(-14, 14, 97), [0.0, -0.0, 1e-45, -1e-30, 1e-8, 50, -50, 1e4, -1e4]])
    inp = inp.astype(np.float32)
    check_forward(ops, place, inp)
    dout = np.ones_like(inp)
    check_backward(ops, place, inp[:-2], dout[:-2])


def test_nan_stays_where_it_is(ops, rng, place, garbage):
    inp, dout = (place(x) for x in make(rng, 1, 3, 97))
    inp[0, 1, 3] = inp[0, 2, 96] = np.nan
    out, dinp = garbage(1, 3, 97), garbage(1, 3, 97)
    ops.gelu_forward(out, inp)
    ops.gelu_backward(dinp, inp, dout)
    assert np.array_equal(np.isnan(out), np.isnan(inp))
    assert np.array_equal(np.isnan(dinp), np.isnan(inp))


def test_infinite_input(ops, place, garbage):
    out = garbage(1, 1, 1)
    ops.gelu_forward(out, place([[[np.inf]]]))
    assert out[0, 0, 0] == np.inf


@pytest.mark.compiled
def test_threads_do_not_change_the_bits(ops, rng, place, garbage, assert_same_bits):
    inp, dout = (place(x) for x in make(rng, 3, 17, 257))

    def run():
        out, dinp = garbage(3, 17, 257), garbage(3, 17, 257)
        ops.gelu_forward(out, inp)
        ops.gelu_backward(dinp, inp, dout)
        return out, dinp

    assert_same_bits(run)
