"""Every variant of matmul on its own, against the interface that cuda/matmul.py describes."""

import numpy as np
import pytest
import test_matmul
from comparing import ROUNDING

from llm_numba.cuda import variants

pytestmark = pytest.mark.gpu
FEW_ROWS = [
    (1, 7, 8, 3),
    (2, 8, 8, 2),
    (1, 2, 257, 97),
    (1, 16, 97, 257),
    (1, 3, 768, 9),
    (2, 8, 3072, 97),
    (1, 1, 6400, 9),
]
STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}  # as the device code sees them


@pytest.fixture
def forced():
    """A function that makes a variant run, or skips the test if it cannot."""

    def force(name, dtype, shape):
        B, T, C, OC = shape
        if reason := variants.reason_against("matmul", name, STORED[dtype], B * T, C, OC):
            pytest.skip(f"{name}: {reason}")
        variants.force({"matmul": name})

    yield force
    variants.force({})


@pytest.mark.parametrize("shape", [*test_matmul.BF16_CASES, (1, 1000, 200, 328), (1, 2, 1024, 96), *FEW_ROWS])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", variants.FAMILIES["matmul"])
def test_results(ops, rng, place, garbage, monkeypatch, forced, name, dtype, shape):
    forced(name, dtype, shape)
    if name == "tf32":  # rounds no bf16 value, so that the errors left are those of float32 sums
        make = test_matmul.make
        monkeypatch.setattr(test_matmul, "make", lambda rng, *sizes: make(rng, *sizes[:4], "bfloat16"))
    for with_bias in True, False:
        test_matmul.check_forward(ops, rng, place, garbage, shape, with_bias, dtype)
        test_matmul.check_gelu_forward(ops, rng, place, garbage, shape, with_bias, dtype)
        test_matmul.check_backward(ops, rng, place, garbage, shape, with_bias, dtype)
        test_matmul.check_gelu_backward(ops, rng, place, garbage, shape, with_bias, dtype)


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (1, 257, 776, 136)])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", variants.FAMILIES["matmul"])
def test_bits(ops, rng, place, garbage, assert_same_bits, forced, name, dtype, shape):
    """The same on every run; GELU is that of `gelu_forward`, which --recompute runs, except in NVIDIA's library."""
    forced(name, dtype, shape)
    B, T, C, OC = shape
    inp, weight, bias, dout = (place(x, dtype) for x in test_matmul.make(rng, *shape, dtype))
    again = place(np.full((B, T, OC), np.nan), dtype)

    def run():
        out, pre, dpre = (place(np.full((B, T, n), np.nan), dtype) for n in (OC, OC, C))
        forward = out, pre, inp, weight, bias
        ops.matmul_gelu_forward(*forward, garbage(ops.matmul_gelu_forward_scratch(*forward)))
        ops.gelu_forward(again, pre)
        assert again.tobytes() == out.tobytes() or name == "cublas"
        backward = dpre, garbage(OC, C), garbage(OC), dout, inp, weight, inp
        ops.gelu_matmul_backward(*backward, garbage(ops.gelu_matmul_backward_scratch(*backward, False)), False)
        return out, pre, *backward[:3]

    assert_same_bits(run)


@pytest.mark.real
def test_tf32_rounds_to_nearest(ops, rng, place, garbage, forced):
    """Products with the identity return the operand, rounded to 10 bits of mantissa: forward, dinp and dweight."""
    C = 136
    forced("tf32", "float32", (1, C, C, C))
    x, identity = place(rng.standard_normal((1, C, C))), place(np.eye(C))
    rounded = ((x.view(np.uint32) + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)
    out, dinp, dweight = garbage(1, C, C), garbage(1, C, C), garbage(C, C)
    ops.matmul_forward(out, x, identity, None, garbage(ops.matmul_forward_scratch(out, x, identity, None)))
    assert np.array_equal(out, rounded) and not np.array_equal(out, x)
    arguments = dinp, dweight, None, x, identity.reshape(1, C, C), identity
    ops.matmul_backward(*arguments, garbage(ops.matmul_backward_scratch(*arguments, False)), False)
    assert np.array_equal(dinp, rounded) and np.array_equal(dweight, rounded[0].T)
