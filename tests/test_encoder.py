import ml_dtypes  # noqa: F401  NumPy knows "bfloat16" from it
import numpy as np
import pytest
from reference import SHAPES, UNIT, assert_close, encoder_backward, encoder_forward, finite_difference, sum_error

# more channels than a GPU gives to a block; more tokens than a block looks at, at a time
LARGE = [(1, 2, 1025), (3, 1031, 3)]
ROUNDING = {"float32": 0, "bfloat16": 2**-8}  # of a number, what storing it loses at most beyond float32


def make(rng, B, T, C, V):
    """Tokens out of V, embeddings, one position more than is used, a gradient."""
    tokens = rng.integers(0, V, (B, T), dtype=np.int32)
    wte, wpe, dout = rng.standard_normal((V, C)), rng.standard_normal((T + 1, C)), rng.standard_normal((B, T, C))
    return tokens, wte.astype(np.float32), wpe.astype(np.float32), dout.astype(np.float32)


def check_forward(ops, place, tokens, wte, wpe, dtype="float32"):
    out = place(np.full((*tokens.shape, wte.shape[1]), np.nan), dtype)
    ops.encoder_forward(out, place(tokens, np.int32), place(wte, dtype), place(wpe, dtype))
    expected = encoder_forward(tokens, wte, wpe)
    # one addition, and as bf16 the rounding to it
    assert_close("out", out.astype(np.float32), expected, (UNIT + ROUNDING[dtype]) * np.abs(expected))


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_forward(ops, rng, place, shape):
    tokens, wte, wpe, _ = make(rng, *shape, V=7)
    check_forward(ops, place, tokens, wte, wpe)


def check_backward(ops, rng, place, tokens, wte, wpe, dout, expected, dtype="float32"):
    before = [rng.standard_normal(x.shape).astype(np.float32) for x in (wte, wpe)]
    dwte, dwpe = place(before[0]), place(before[1])
    ops.encoder_backward(dwte, dwpe, place(dout, dtype), place(tokens, np.int32))
    magnitudes = encoder_backward(np.abs(dout), tokens, wte, wpe)
    B, T = tokens.shape
    for name, got, was, gradient, magnitude, n in zip(
        ("dwte", "dwpe"), (dwte, dwpe), before, expected, magnitudes, (B * T, B), strict=True
    ):
        assert_close(name, got, was + gradient, sum_error(magnitude + np.abs(was), n))
    return dwte, dwpe, before


@pytest.mark.parametrize("V", [1, 7, 300], ids="V{}".format)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_backward(ops, rng, place, shape, V):
    tokens, wte, wpe, dout = make(rng, *shape, V)
    expected = encoder_backward(dout, tokens, wte, wpe)
    dwte, dwpe, before = check_backward(ops, rng, place, tokens, wte, wpe, dout, expected)
    # what no token and no position stands for keeps its bits
    absent = np.setdiff1d(np.arange(V), tokens)
    assert np.array_equal(dwte[absent], before[0][absent])
    assert np.array_equal(dwpe[shape[1] :], before[1][shape[1] :])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 2, 17), (2, 17, 97), (3, 1031, 3)])
def test_bf16(ops, rng, place, shape):
    tokens, *arrays = make(rng, *shape, V=7)
    wte, wpe, dout = (x.astype("bfloat16").astype(np.float32) for x in arrays)
    check_forward(ops, place, tokens, wte, wpe, "bfloat16")
    expected = encoder_backward(dout, tokens, wte, wpe)
    check_backward(ops, rng, place, tokens, wte, wpe, dout, expected, "bfloat16")


def test_finite_differences(ops, rng, place):
    tokens, wte, wpe, dout = make(rng, 2, 3, 5, V=4)
    numeric = (
        finite_difference(lambda x: encoder_forward(tokens, x, wpe), wte, dout),
        finite_difference(lambda x: encoder_forward(tokens, wte, x), wpe, dout),
    )
    for name, got, expected in zip(("dwte", "dwpe"), encoder_backward(dout, tokens, wte, wpe), numeric, strict=True):
        assert_close(name, got, expected, 1e-8)
    check_backward(ops, rng, place, tokens, wte, wpe, dout, numeric)


@pytest.mark.compiled
def test_threads_do_not_change_the_bits(ops, rng, place, garbage, assert_same_bits):
    B, T, C = 3, 97, 257
    tokens, wte, wpe, dout = make(rng, B, T, C, V=5)
    tokens, wte, wpe, dout = place(tokens, np.int32), place(wte), place(wpe), place(dout)

    def run():
        out, dwte, dwpe = garbage(B, T, C), place(wte), place(wpe)
        ops.encoder_forward(out, tokens, wte, wpe)
        ops.encoder_backward(dwte, dwpe, dout, tokens)
        return out, dwte, dwpe

    assert_same_bits(run)
