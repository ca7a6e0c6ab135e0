import ml_dtypes
import numpy as np
import pytest
from comparing import SHAPES, UNIT, assert_close, stored


def add_and_normalise(ops, place, garbage, inp1, inp2, dtype="float32"):
    """What the op writes, (residual, out, mean, rstd), and the weights it was given."""
    B, T, C = inp1.shape
    weight, bias = (place(np.linspace(-2, 3, C) + add, dtype) for add in (0.0, 0.5))
    residual, out = (place(np.full((B, T, C), np.nan), dtype) for _ in range(2))
    made = residual, out, garbage(B, T), garbage(B, T)
    ops.residual_layernorm_forward(*made, inp1, inp2, weight, bias)
    return made, (weight, bias)


def check_forward(ops, place, garbage, inp1, inp2, dtype="float32"):
    """out, mean and rstd are the LayerNorm of the stored sum, bit for bit; the LayerNorm has its own tests."""
    (residual, *normalised), weights = add_and_normalise(ops, place, garbage, inp1, inp2, dtype)
    B, T, C = inp1.shape
    expected = place(np.full((B, T, C), np.nan), dtype), garbage(B, T), garbage(B, T)
    ops.layernorm_forward(*expected, residual, *weights)
    for name, got, wanted in zip(("out", "mean", "rstd"), normalised, expected, strict=True):
        assert got.tobytes() == wanted.tobytes(), name
    return residual


@pytest.mark.parametrize("shape", SHAPES)
def test_forward(ops, rng, place, garbage, shape):
    inp1, inp2 = place(rng.standard_normal(shape)), place(rng.standard_normal(shape))
    residual = check_forward(ops, place, garbage, inp1, inp2)
    expected = inp1.astype(np.float64) + inp2
    assert_close("residual", residual, expected, UNIT * np.abs(expected))  # one addition


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


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 2, 17), (2, 17, 97), (2, 3, 40)])
def test_bf16(ops, rng, place, garbage, shape):
    """The sum of two bf16 is computed in float32 and rounded to the nearest bf16; a gradient keeps its bits."""
    inp1, inp2 = (place(rng.standard_normal(shape), "bfloat16") for _ in range(2))
    dinp = place(np.full(shape, np.nan), "bfloat16")
    residual = check_forward(ops, place, garbage, inp1, inp2, "bfloat16")
    expected = inp1.astype(np.float64) + inp2.astype(np.float64)
    assert_close("residual", residual, expected, stored("bfloat16", expected, UNIT * np.abs(expected)))
    ops.residual_backward(dinp, inp1)
    assert dinp.tobytes() == inp1.tobytes()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # from the simulator
def test_bf16_overflows_to_infinity_and_keeps_nan(ops, place, garbage):
    largest = float(ml_dtypes.finfo("bfloat16").max)
    inp1 = place([[[largest, -largest, np.inf, -np.inf, np.nan, np.inf, largest]]], "bfloat16")
    inp2 = place([[[largest, -largest, 1.0, 1.0, 1.0, -np.inf, 1.0]]], "bfloat16")
    (residual, *_), _ = add_and_normalise(ops, place, garbage, inp1, inp2, "bfloat16")
    expected = [np.inf, -np.inf, np.inf, -np.inf, np.nan, np.nan, largest]
    assert np.array_equal(residual[0, 0].astype(np.float64), expected, equal_nan=True)


def test_a_gpu_copies_nothing_onto_itself(device):
    if device == "cpu":
        pytest.skip("the CPU compares addresses, which test_backward_in_place checks")
    from llm_numba.cuda.residual import residual_backward

    tensor = object()
    residual_backward(tensor, tensor)


def test_nan_stays_in_its_row(ops, rng, place, garbage):
    inp1, inp2 = place(rng.standard_normal((1, 3, 97))), place(rng.standard_normal((1, 3, 97)))
    inp1[0, 1, 5] = inp2[0, 2, 96] = np.nan
    (residual, out, mean, rstd), _ = add_and_normalise(ops, place, garbage, inp1, inp2)
    assert np.array_equal(np.isnan(residual), np.isnan(inp1) | np.isnan(inp2))
    for x in (out, mean[..., None], rstd[..., None]):
        assert np.isfinite(x[0, 0]).all() and np.isnan(x[0, 1:]).all()


@pytest.mark.compiled
def test_threads_do_not_change_the_bits(ops, rng, place, garbage, assert_same_bits):
    inp1, inp2 = place(rng.standard_normal((3, 17, 257))), place(rng.standard_normal((3, 17, 257)))

    def run():
        made, _ = add_and_normalise(ops, place, garbage, inp1, inp2)
        dinp = garbage(3, 17, 257)
        ops.residual_backward(dinp, inp1)
        return *made, dinp

    assert_same_bits(run)
