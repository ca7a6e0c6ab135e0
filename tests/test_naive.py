"""The naive ops pass the tests of the fast ones."""

from types import SimpleNamespace

import pytest
import test_attention
import test_matmul

MATMULS = [(1, 1, 1, 1), (2, 3, 5, 1), (1, 7, 64, 96), (1, 67, 385, 97), (3, 17, 97, 257)]
ATTENTIONS = [(1, 1, 1, 1), (2, 3, 5, 1), (2, 17, 3, 3), (2, 97, 2, 64), (1, 257, 1, 3)]
ATTENTIONS = [(shape, shape[2]) for shape in ATTENTIONS] + [((1, 7, 6, 5), NKV) for NKV in (1, 2, 3)]


@pytest.fixture
def naive():
    from llm_numba.cpu import naive

    names = "matmul_forward", "matmul_backward", "attention_forward", "attention_backward"
    found = {name: getattr(naive, name) for name in names}
    return SimpleNamespace(**found, **{f"{name}_scratch": lambda *arguments: 0 for name in names})


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", MATMULS)
def test_matmul_forward_and_backward(naive, rng, place, garbage, shape, with_bias):
    test_matmul.check_forward(naive, rng, place, garbage, shape, with_bias)
    test_matmul.check_backward(naive, rng, place, garbage, shape, with_bias)


@pytest.mark.parametrize("shape, NKV", ATTENTIONS)
def test_attention_forward_and_backward(naive, rng, place, garbage, shape, NKV):
    qkv, dout = test_attention.make(rng, *shape, NKV)
    test_attention.check_forward(naive, place, garbage, qkv, shape[2], NKV)
    test_attention.check_backward(naive, place, garbage, qkv, dout, shape[2], NKV)
