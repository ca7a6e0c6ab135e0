import numpy as np
import pytest
from comparing import SHAPES, UNIT, assert_close, by_oracle, stored, sum_error

# more channels than one block of a GPU handles; more tokens than a block reads at a time
LARGE = [(1, 2, 1025), (3, 1031, 3)]


def make(rng, B, T, C, V):
    """tokens below V, wte, wpe with one position more than is used, dout."""
    tokens = rng.integers(0, V, (B, T), dtype=np.int32)
    wte, wpe, dout = rng.standard_normal((V, C)), rng.standard_normal((T + 1, C)), rng.standard_normal((B, T, C))
    return tokens, wte.astype(np.float32), wpe.astype(np.float32), dout.astype(np.float32)


def check_forward(ops, place, tokens, wte, wpe, dtype="float32"):
    out = place(np.full((*tokens.shape, wte.shape[1]), np.nan), dtype)
    arguments = out, place(tokens, np.int32), place(wte, dtype), place(wpe, dtype)
    expected = by_oracle("encoder_forward", *arguments)
    ops.encoder_forward(*arguments)
    assert_close("out", out, expected, stored(dtype, expected, UNIT * np.abs(expected)))  # one addition


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_forward(ops, rng, place, shape):
    tokens, wte, wpe, _ = make(rng, *shape, V=7)
    check_forward(ops, place, tokens, wte, wpe)


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_forward_at(ops, rng, place, shape, dtype):
    """From a position on; a token below 0 counts as 0."""
    tokens, wte, wpe, _ = make(rng, *shape, V=7)
    tokens[0, 0] = -1
    before = rng.standard_normal((5, shape[2])).astype(np.float32)  # not read
    out = place(np.full((*tokens.shape, wte.shape[1]), np.nan), dtype)
    tables = place(wte, dtype), place(np.concatenate([before, wpe]), dtype)
    arguments = out, place(tokens, np.int32), *tables, place([5], np.int32)
    expected = by_oracle("encoder_forward_at", *arguments)
    ops.encoder_forward_at(*arguments)
    assert_close("out", out, expected, stored(dtype, expected, UNIT * np.abs(expected)))


def check_backward(ops, rng, place, garbage, tokens, wte, wpe, dout, dtype="float32"):
    before = [rng.standard_normal(x.shape).astype(np.float32) for x in (wte, wpe)]
    arguments = place(before[0]), place(before[1]), place(dout, dtype), place(tokens, np.int32)
    expected = by_oracle("encoder_backward", *arguments, None)
    magnitudes = by_oracle("encoder_backward", *map(np.abs, before), np.abs(dout), tokens, None)
    ops.encoder_backward(*arguments, garbage(ops.encoder_backward_scratch(*arguments)))
    B, T = tokens.shape
    for i, (name, terms) in enumerate((("dwte", B * T), ("dwpe", B))):
        assert_close(name, arguments[i], expected[i], sum_error(magnitudes[i], terms))
    return *arguments[:2], before


@pytest.mark.parametrize("V", [1, 7, 300], ids="V{}".format)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_backward(ops, rng, place, garbage, shape, V):
    tokens, wte, wpe, dout = make(rng, *shape, V)
    dwte, dwpe, before = check_backward(ops, rng, place, garbage, tokens, wte, wpe, dout)
    # rows of tokens and positions that do not occur keep their bits
    absent = np.setdiff1d(np.arange(V), tokens)
    assert np.array_equal(dwte[absent], before[0][absent])
    assert np.array_equal(dwpe[shape[1] :], before[1][shape[1] :])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 2, 17), (2, 17, 97), (3, 1031, 3), (2, 3, 40)])
def test_bf16(ops, rng, place, garbage, shape):
    tokens, *arrays = make(rng, *shape, V=7)
    wte, wpe, dout = (x.astype("bfloat16").astype(np.float32) for x in arrays)
    check_forward(ops, place, tokens, wte, wpe, "bfloat16")
    check_backward(ops, rng, place, garbage, tokens, wte, wpe, dout, "bfloat16")


@pytest.mark.compiled
def test_threads_do_not_change_the_bits(ops, rng, place, garbage, assert_same_bits):
    B, T, C = 3, 97, 257
    tokens, wte, wpe, dout = make(rng, B, T, C, V=5)
    tokens, wte, wpe, dout = place(tokens, np.int32), place(wte), place(wpe), place(dout)

    def run():
        out, dwte, dwpe = garbage(B, T, C), place(wte), place(wpe)
        ops.encoder_forward(out, tokens, wte, wpe)
        arguments = dwte, dwpe, dout, tokens
        ops.encoder_backward(*arguments, garbage(ops.encoder_backward_scratch(*arguments)))
        return out, dwte, dwpe

    assert_same_bits(run)
