"""The plain matmul and attention, by the tests of the fast ones; and the fast ones by them."""

from types import SimpleNamespace

import numpy as np
import pytest
import test_attention
import test_matmul
from reference import assert_close, matmul_forward, sum_error

pytestmark = pytest.mark.compiled
MATMULS = [(1, 1, 1, 1), (2, 3, 5, 1), (1, 7, 64, 96), (1, 67, 385, 97), (3, 17, 97, 257)]
ATTENTIONS = [(1, 1, 1, 1), (2, 3, 5, 1), (2, 17, 3, 3), (2, 97, 2, 64), (1, 257, 1, 3)]


@pytest.fixture
def plain(ops):
    from llm_numba.cpu import plain

    mine = {name.removesuffix("_v1"): op for name, op in vars(plain).items() if name.endswith("_v1")}
    assert len(mine) == 4
    return SimpleNamespace(**vars(ops) | mine)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", MATMULS)
def test_plain_matmul(plain, rng, place, garbage, shape, with_bias):
    test_matmul.check_forward(plain, rng, place, garbage, shape, with_bias)
    test_matmul.test_backward(plain, rng, place, garbage, shape, with_bias)


@pytest.mark.parametrize("shape", ATTENTIONS)
def test_plain_attention(plain, rng, place, garbage, shape):
    test_attention.test_forward(plain, rng, place, garbage, shape, 1.0, "weights", "float32")
    test_attention.test_backward(plain, rng, place, garbage, shape, "weights", "float32")


@pytest.mark.parametrize("shape", [(1, 256, 768, 2304), (4, 64, 257, 385)])
def test_fast_and_plain_differ_by_rounding(ops, plain, rng, place, garbage, shape):
    B, T, C, OC = shape
    inp, weight, bias, _ = (place(x) for x in test_matmul.make(rng, *shape))
    fast, slow = garbage(B, T, OC), garbage(B, T, OC)
    scratch = garbage(ops.matmul_scratch_size(B * T, C, OC))
    ops.matmul_forward(fast, inp, weight, bias, scratch)
    plain.matmul_forward(slow, inp, weight, bias, scratch)
    magnitude = matmul_forward(np.abs(inp), np.abs(weight), np.abs(bias))
    assert_close("fast", fast, slow.astype(np.float64), 2 * sum_error(magnitude, C))
