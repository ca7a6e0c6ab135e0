import numpy as np
import pytest
import test_gelu
from comparing import SHAPES, assert_close, by_oracle, stored, sum_error

# (B, T, C, OC): the common shapes with several widths, then sizes around the CPU's block sizes (tiles of 6 x 64, blocks
# of 96, 384, 528 and 3072, another path for fewer than 8 rows)
CASES = [(*shape, OC) for shape in SHAPES for OC in (1, 5, 97)]
CASES += [(1, 7, 64, 96), (1, 8, 64, 96), (2, 33, 128, 192), (1, 67, 385, 97), (1, 65, 257, 385), (5, 97, 3, 257)]
CASES += [(1, 3, 769, 64), (3, 129, 17, 6), (1, 1, 257, 257), (1, 535, 5, 7), (1, 9, 2, 3079)]
# around a GPU's: tiles of 128 (16 in the simulator), split-K
CASES += [(1, 1025, 33, 65), (1, 1, 97, 2), (1, 17, 3, 5), (1, 2, 3, 33)]
# tensor cores need widths that are multiples of 8; tiles of 128 x 256, steps of 32
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
# with GELU: the CPU adds a pass, a GPU's tensor cores another end of each tile
GELU_CASES = [(1, 1, 1, 1), (2, 3, 5, 1), (1, 7, 64, 96), (2, 33, 128, 192), (1, 67, 385, 97), (1, 17, 3, 5)]
STEEPEST = 1.13  # the largest derivative of GELU


def make(rng, B, T, C, OC, dtype="float32"):
    """inp, weight, bias and dout, with values that dtype represents exactly."""
    inp, weight, bias, dout = ((B, T, C), (OC, C), (OC,), (B, T, OC))
    return [rng.standard_normal(shape).astype(dtype).astype(np.float32) for shape in (inp, weight, bias, dout)]


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
    inp, weight, bias, _ = (place(x, dtype) for x in make(rng, *shape, dtype))
    arguments = place(np.full((B, T, OC), np.nan), dtype), inp, weight, bias if with_bias else None
    scratch = garbage(ops.matmul_forward_scratch(*arguments))
    expected = by_oracle("matmul_forward", *arguments, None)
    ops.matmul_forward(*arguments, scratch)
    magnitude = np.abs(inp).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    if with_bias:
        magnitude += np.abs(bias).astype(np.float64)
    assert_close("out", arguments[0], expected, stored(dtype, expected, sum_error(magnitude, C)))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", CASES)
def test_backward(ops, rng, place, garbage, shape, with_bias):
    check_backward(ops, rng, place, garbage, shape, with_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", BF16_CASES)
def test_bf16_backward(ops, rng, place, garbage, shape):
    check_backward(ops, rng, place, garbage, shape, True, "bfloat16")


def check_backward(ops, rng, place, garbage, shape, with_bias, dtype="float32", pre=None):
    """matmul_backward, or gelu_matmul_backward if there is a pre; any inp will do, as only pre goes through GELU."""
    op, others = ("matmul_backward", ()) if pre is None else ("gelu_matmul_backward", (place(pre, dtype),))
    B, T, C, OC = shape
    inp, weight, _, dout = (place(x, dtype) for x in make(rng, *shape, dtype))
    wide = [np.abs(x).astype(np.float64) for x in (dout, inp, weight)]
    magnitudes = [np.empty((B, T, C)), np.empty((OC, C)), np.empty(OC)]
    by_oracle_magnitudes = by_oracle("matmul_backward", *magnitudes, *wide, None, False)
    for accumulate in True, False:  # if False, whatever was there is overwritten
        before = [rng.standard_normal(size) if accumulate else np.full(size, np.nan) for size in ((OC, C), OC)]
        dweight, dbias = (place(x) for x in before)
        dinp = place(np.full((B, T, C), np.nan), dtype)
        gradients = dinp, dweight, dbias if with_bias else None
        arguments = *gradients, dout, inp, weight, *others
        scratch = garbage(getattr(ops, f"{op}_scratch")(*arguments, accumulate))
        expected = by_oracle(op, *arguments, None, accumulate)
        input_error = sum_error(by_oracle_magnitudes[0], OC)
        if pre is not None:
            product = dout.astype(np.float64) @ weight.astype(np.float64)
            slope_error = test_gelu.slope_error(pre.astype(np.float64))
            input_error = STEEPEST * stored(dtype, product, input_error) + np.abs(product) * slope_error
        errors = [
            stored(dtype, expected[0], input_error),
            *(
                sum_error(magnitude + (np.abs(was) if accumulate else 0), B * T)
                for magnitude, was in zip(by_oracle_magnitudes[1:], (dweight, dbias), strict=True)
            ),
        ]
        getattr(ops, op)(*arguments, scratch, accumulate)
        for name, got, right, error in zip(("dinp", "dweight", "dbias"), gradients, expected, errors, strict=True):
            if got is not None:
                assert_close(f"{name}, accumulate={accumulate}", got, right, error)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", GELU_CASES)
def test_gelu_forward(ops, rng, place, garbage, shape, with_bias):
    check_gelu_forward(ops, rng, place, garbage, shape, with_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", BF16_CASES)
def test_bf16_gelu_forward(ops, rng, place, garbage, shape):
    check_gelu_forward(ops, rng, place, garbage, shape, True, "bfloat16")


def check_gelu_forward(ops, rng, place, garbage, shape, with_bias, dtype="float32"):
    B, T, C, OC = shape
    inp, weight, bias, _ = (place(x, dtype) for x in make(rng, *shape, dtype))
    out, pre = (place(np.full((B, T, OC), np.nan), dtype) for _ in range(2))
    arguments = out, pre, inp, weight, bias if with_bias else None
    scratch = garbage(ops.matmul_gelu_forward_scratch(*arguments))
    expected_out, expected_pre = by_oracle("matmul_gelu_forward", *arguments, None)
    ops.matmul_gelu_forward(*arguments, scratch)
    magnitude = np.abs(inp).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    magnitude += np.abs(bias).astype(np.float64) if with_bias else 0
    error = stored(dtype, expected_pre, sum_error(magnitude, C))
    assert_close("pre", pre, expected_pre, error)
    error = STEEPEST * error + test_gelu.forward_error(expected_pre)
    assert_close("out", out, expected_out, stored(dtype, expected_out, error))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", GELU_CASES)
def test_gelu_backward(ops, rng, place, garbage, shape, with_bias):
    check_gelu_backward(ops, rng, place, garbage, shape, with_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", BF16_CASES)
def test_bf16_gelu_backward(ops, rng, place, garbage, shape):
    check_gelu_backward(ops, rng, place, garbage, shape, True, "bfloat16")


def check_gelu_backward(ops, rng, place, garbage, shape, with_bias, dtype="float32"):
    pre = (3 * rng.standard_normal(shape[:3])).astype(dtype)
    check_backward(ops, rng, place, garbage, shape, with_bias, dtype, pre)


def test_identity_is_exact(ops, rng, place, garbage):
    """A product with the identity rounds nothing: out equals inp bit for bit."""
    B, T, C = 1, 17, 97
    arguments = garbage(B, T, C), place(rng.standard_normal((B, T, C))), place(np.eye(C)), place(np.zeros(C))
    ops.matmul_forward(*arguments, garbage(ops.matmul_forward_scratch(*arguments)))
    assert np.array_equal(*arguments[:2])


@pytest.mark.parametrize("rows", [3, 17])
def test_nan_stays_in_its_row(ops, rng, place, garbage, rows):
    C, OC = 97, 65
    inp, weight, bias, dout = (place(x) for x in make(rng, 1, rows, C, OC))
    inp[0, 1, 96] = np.nan
    out, dinp = garbage(1, rows, OC), garbage(1, rows, C)
    ops.matmul_forward(out, inp, weight, bias, garbage(ops.matmul_forward_scratch(out, inp, weight, bias)))
    assert np.isnan(out[0, 1]).all() and np.isfinite(np.delete(out[0], 1, axis=0)).all()
    dweight, dbias = place(np.zeros((OC, C))), place(np.zeros(OC))
    arguments = dinp, dweight, dbias, dout, inp, weight
    ops.matmul_backward(*arguments, garbage(ops.matmul_backward_scratch(*arguments, True)), True)
    assert np.isfinite(dinp).all() and np.isfinite(dbias).all()
    assert np.isnan(dweight[:, 96]).all() and np.isfinite(dweight[:, :96]).all()


@pytest.mark.compiled
@pytest.mark.parametrize("shape", [(1, 1, 257, 385), (3, 97, 257, 385)])
def test_threads_do_not_change_the_bits(ops, rng, place, garbage, assert_same_bits, shape):
    B, T, C, OC = shape
    inp, weight, bias, dout = (place(x) for x in make(rng, *shape))

    def run():
        forward = garbage(B, T, OC), inp, weight, bias
        ops.matmul_forward(*forward, garbage(ops.matmul_forward_scratch(*forward)))
        with_gelu = garbage(B, T, OC), garbage(B, T, OC), inp, weight, bias
        ops.matmul_gelu_forward(*with_gelu, garbage(ops.matmul_gelu_forward_scratch(*with_gelu)))
        backward = garbage(B, T, C), place(weight), place(bias), dout, inp, weight
        ops.matmul_backward(*backward, garbage(ops.matmul_backward_scratch(*backward, True)), True)
        through_gelu = garbage(B, T, C), place(weight), place(bias), dout, inp, weight, inp
        ops.gelu_matmul_backward(*through_gelu, garbage(ops.gelu_matmul_backward_scratch(*through_gelu, True)), True)
        return forward[0], *with_gelu[:2], *backward[:3], *through_gelu[:3]

    assert_same_bits(run)
