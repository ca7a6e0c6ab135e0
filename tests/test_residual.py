import numpy as np
import pytest
from reference import SHAPES, UNIT, assert_close, finite_difference


@pytest.mark.parametrize("shape", SHAPES)
def test_forward(ops, rng, place, garbage, shape):
    inp1, inp2 = place(rng.standard_normal(shape)), place(rng.standard_normal(shape))
    out = garbage(*shape)
    ops.residual_forward(out, inp1, inp2)
    expected = inp1.astype(np.float64) + inp2
    assert_close("out", out, expected, UNIT * np.abs(expected))  # one addition


@pytest.mark.parametrize("shape", SHAPES)
def test_backward(ops, rng, place, garbage, shape):
    dout, dinp = place(rng.standard_normal(shape)), garbage(*shape)
    ops.residual_backward(dinp, dout)
    assert np.array_equal(dinp, dout)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (2, 17, 97)])
def test_backward_in_place(ops, rng, place, shape):
    dout = place(rng.standard_normal(shape))
    before = dout.copy()
    ops.residual_backward(dout, dout)
    assert np.array_equal(dout, before)
    ops.residual_backward(dout[:], dout)  # another view of the same memory
    assert np.array_equal(dout, before)


def test_finite_differences(ops, rng, place, garbage):
    inp1, inp2, dout = (rng.standard_normal((2, 3, 5)).astype(np.float32) for _ in range(3))
    dinp = garbage(2, 3, 5)
    ops.residual_backward(dinp, place(dout))
    assert_close("dinp of inp1", dinp, finite_difference(lambda x: x + inp2, inp1, dout), 1e-8)
    assert_close("dinp of inp2", dinp, finite_difference(lambda x: inp1 + x, inp2, dout), 1e-8)


def test_nan_stays_where_it_is(ops, rng, place, garbage):
    inp1, inp2 = place(rng.standard_normal((1, 3, 97))), place(rng.standard_normal((1, 3, 97)))
    inp1[0, 1, 5] = inp2[0, 2, 96] = np.nan
    out = garbage(1, 3, 97)
    ops.residual_forward(out, inp1, inp2)
    assert np.array_equal(np.isnan(out), np.isnan(inp1) | np.isnan(inp2))


@pytest.mark.compiled
def test_threads_do_not_change_the_bits(ops, rng, place, garbage, assert_same_bits):
    inp1, inp2 = place(rng.standard_normal((3, 17, 257))), place(rng.standard_normal((3, 17, 257)))

    def run():
        out, dinp = garbage(3, 17, 257), garbage(3, 17, 257)
        ops.residual_forward(out, inp1, inp2)
        ops.residual_backward(dinp, inp1)
        return out, dinp

    assert_same_bits(run)
