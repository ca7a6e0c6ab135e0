import ml_dtypes  # noqa: F401 (gives NumPy a dtype "bfloat16")
import numpy as np
import pytest
from reference import SHAPES, assert_close, finite_difference, matmul_backward, matmul_forward, sum_error

# (B, T, C, OC): the activations' shapes with a few widths; then the sizes at which the CPU's blocks begin and end
# (tiles of 6 x 64, blocks of 96, 384, 528 and 3072, another way for fewer than 8 rows)
CASES = [(*shape, OC) for shape in SHAPES for OC in (1, 5, 97)]
CASES += [(1, 7, 64, 96), (1, 8, 64, 96), (2, 33, 128, 192), (1, 67, 385, 97), (1, 65, 257, 385), (5, 97, 3, 257)]
CASES += [(1, 3, 769, 64), (3, 129, 17, 6), (1, 1, 257, 257), (1, 535, 5, 7), (1, 9, 2, 3079)]
# and those of a GPU, and of its simulation: tiles of 128 (16), long sums in parts
CASES += [(1, 1025, 33, 65), (1, 1, 97, 2), (1, 17, 3, 5), (1, 2, 3, 33)]
# tensor cores take widths that are multiples of 8, in tiles of 128 x 256, in steps of 32
BF16_CASES = [
    (1, 1, 1, 1),
    (1, 3, 5, 7),
    (1, 1, 97, 2),
    (1, 1, 8, 8),
    (1, 3, 8, 8),
    (1, 2, 8, 16),
    (2, 33, 97, 65),
    (1, 257, 72, 8),
]
BF16_CASES += [(1, 97, 136, 264), (1, 129, 128, 256), (1, 128, 32, 520), (3, 129, 40, 24), (1, 1, 264, 1032)]
BF16_CASES += [(1, 1025, 96, 136), (4, 1031, 24, 264), (1, 257, 257, 385)]
HALF_STEP = 2.0**-8  # a number is within this of the nearest bf16, which has 8 significant bits, as part of it


def make(rng, B, T, C, OC, dtype="float32"):
    """Numbers that dtype can hold."""
    inp, weight, bias, dout = ((B, T, C), (OC, C), (OC,), (B, T, OC))
    return [rng.standard_normal(shape).astype(dtype).astype(np.float32) for shape in (inp, weight, bias, dout)]


def store_error(expected, dtype):
    return HALF_STEP * np.abs(expected) if dtype == "bfloat16" else 0


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", CASES)
def test_forward(ops, rng, place, garbage, shape, with_bias):
    check_forward(ops, rng, place, garbage, shape, with_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", BF16_CASES)
def test_bf16_forward(ops, rng, place, garbage, shape, with_bias):
    check_forward(ops, rng, place, garbage, shape, with_bias, "bfloat16")


def check_forward(ops, rng, place, garbage, shape, with_bias, dtype="float32"):
    B, T, C, OC = shape
    inp, weight, bias, _ = make(rng, *shape, dtype)
    bias = bias if with_bias else None
    out, scratch = place(np.full((B, T, OC), np.nan), dtype), garbage(ops.matmul_scratch_size(B * T, C, OC))
    ops.matmul_forward(out, place(inp, dtype), place(weight, dtype), place(bias, dtype) if with_bias else None, scratch)
    expected = matmul_forward(inp, weight, bias)
    magnitude = matmul_forward(np.abs(inp), np.abs(weight), np.abs(bias) if with_bias else None)
    assert_close("out", out, expected, sum_error(magnitude, C) + store_error(expected, dtype))


def check_backward(ops, rng, place, garbage, inp, weight, dout, expected, dtype="float32"):
    """`expected` are the gradients of inp, weight and bias; that of the bias is None where there is no bias."""
    (B, T, C), OC = inp.shape, len(weight)
    dinp, scratch = place(np.full((B, T, C), np.nan), dtype), garbage(ops.matmul_scratch_size(B * T, C, OC))
    before = [rng.standard_normal(shape).astype(np.float32) for shape in ((OC, C), OC)]
    dweight, dbias = place(before[0]), place(before[1]) if expected[2] is not None else None
    inputs = (place(x, dtype) for x in (dout, inp, weight))
    inputs = list(inputs)
    ops.matmul_backward(dinp, dweight, dbias, *inputs, scratch, True)
    magnitudes = matmul_backward(np.abs(dout), np.abs(inp), np.abs(weight))
    assert_close("dinp", dinp, expected[0], sum_error(magnitudes[0], OC) + store_error(expected[0], dtype))
    assert_close("dweight", dweight, before[0] + expected[1], sum_error(magnitudes[1] + np.abs(before[0]), B * T))
    if dbias is not None:
        assert_close("dbias", dbias, before[1] + expected[2], sum_error(magnitudes[2] + np.abs(before[1]), B * T))

    # not accumulating: whatever was there is forgotten
    again, dweight = place(np.full((B, T, C), np.nan), dtype), place(np.full((OC, C), np.nan))
    dbias = place(np.full(OC, np.nan)) if dbias is not None else None
    ops.matmul_backward(again, dweight, dbias, *inputs, scratch, False)
    assert np.array_equal(again, dinp)
    assert_close("dweight =", dweight, expected[1], sum_error(magnitudes[1], B * T))
    if dbias is not None:
        assert_close("dbias =", dbias, expected[2], sum_error(magnitudes[2], B * T))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", CASES)
def test_backward(ops, rng, place, garbage, shape, with_bias):
    inp, weight, _, dout = make(rng, *shape)
    dinp, dweight, dbias = matmul_backward(dout, inp, weight)
    expected = dinp, dweight, dbias if with_bias else None
    check_backward(ops, rng, place, garbage, inp, weight, dout, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", BF16_CASES)
def test_bf16_backward(ops, rng, place, garbage, shape):
    inp, weight, _, dout = make(rng, *shape, "bfloat16")
    check_backward(ops, rng, place, garbage, inp, weight, dout, matmul_backward(dout, inp, weight), "bfloat16")


@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (2, 5, 3, 7)])
def test_finite_differences(ops, rng, place, garbage, shape):
    inp, weight, bias, dout = make(rng, *shape)
    numeric = (
        finite_difference(lambda x: matmul_forward(x, weight, bias), inp, dout),
        finite_difference(lambda x: matmul_forward(inp, x, bias), weight, dout),
        finite_difference(lambda x: matmul_forward(inp, weight, x), bias, dout),
    )
    for name, got, expected in zip(
        ("dinp", "dweight", "dbias"), matmul_backward(dout, inp, weight), numeric, strict=True
    ):
        assert_close(name, got, expected, 1e-8)
    check_backward(ops, rng, place, garbage, inp, weight, dout, numeric)


def test_identity_is_exact(ops, rng, place, garbage):
    """Times the identity nothing is rounded: each number has to arrive where it belongs, bit for bit."""
    B, T, C = 1, 17, 97
    inp = place(rng.standard_normal((B, T, C)))
    out, identity, zero = garbage(B, T, C), place(np.eye(C)), place(np.zeros(C))
    ops.matmul_forward(out, inp, identity, zero, garbage(ops.matmul_scratch_size(B * T, C, C)))
    assert np.array_equal(out, inp)


@pytest.mark.parametrize("rows", [3, 17])
def test_nan_stays_in_its_row(ops, rng, place, garbage, rows):
    C, OC = 97, 65
    inp, weight, bias, dout = (place(x) for x in make(rng, 1, rows, C, OC))
    inp[0, 1, 96] = np.nan
    out, dinp, scratch = garbage(1, rows, OC), garbage(1, rows, C), garbage(ops.matmul_scratch_size(rows, C, OC))
    ops.matmul_forward(out, inp, weight, bias, scratch)
    assert np.isnan(out[0, 1]).all() and np.isfinite(np.delete(out[0], 1, axis=0)).all()
    dweight, dbias = place(np.zeros((OC, C))), place(np.zeros(OC))
    ops.matmul_backward(dinp, dweight, dbias, dout, inp, weight, scratch, True)
    assert np.isfinite(dinp).all() and np.isfinite(dbias).all()
    assert np.isnan(dweight[:, 96]).all() and np.isfinite(dweight[:, :96]).all()


@pytest.mark.compiled
@pytest.mark.parametrize("shape", [(1, 1, 257, 385), (3, 97, 257, 385)])
def test_threads_do_not_change_the_bits(ops, rng, place, garbage, assert_same_bits, shape):
    B, T, C, OC = shape
    inp, weight, bias, dout = (place(x) for x in make(rng, *shape))

    def run():
        out, dinp, dweight, dbias = garbage(B, T, OC), garbage(B, T, C), place(weight), place(bias)
        scratch = garbage(ops.matmul_scratch_size(B * T, C, OC))
        ops.matmul_forward(out, inp, weight, bias, scratch)
        ops.matmul_backward(dinp, dweight, dbias, dout, inp, weight, scratch, True)
        return out, dinp, dweight, dbias

    assert_same_bits(run)
