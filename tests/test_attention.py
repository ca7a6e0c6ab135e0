import math

import numpy as np
import pytest
from comparing import ROUNDING, TINY, UNIT, assert_close, by_oracle, stored, sum_error

from llm_numba import oracle
from llm_numba.util.cli import UserError

# (B, T, NH, HS): head sizes below, at and above a tile's width; T around its multiples and beyond the block sizes
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 1),
    (1, 5, 2, 3),
    (3, 2, 1, 16),
    (2, 17, 3, 3),
    (1, 7, 2, 64),
    (1, 64, 2, 16),
    (1, 65, 3, 1),
    (2, 97, 2, 64),
    (1, 49, 1, 97),
    (1, 17, 1, 128),
    (1, 257, 1, 3),
    (1, 129, 5, 16),
    (1, 193, 2, 64),
    (1, 500, 1, 5),
]
GROUPED = [(1, 7, 6, 5), (2, 3, 6, 1), (1, 2, 6, 16), (2, 97, 6, 16), (1, 500, 6, 3), (1, 129, 6, 65)]
# with as many kv heads as query heads, and with fewer
CASES = [(shape, shape[2]) for shape in SHAPES] + [(shape, NKV) for shape in GROUPED for NKV in (1, 2, 3, 6)]


def make(rng, B, T, NH, HS, NKV, spread=1.0, dtype="float32"):
    """qkv and dout, with values that dtype represents exactly."""
    qkv = spread * rng.standard_normal((B, T, (NH + 2 * NKV) * HS))
    return [x.astype(dtype).astype(np.float32) for x in (qkv, rng.standard_normal((B, T, NH * HS)))]


def nothing_yet(place, dtype, *shape):
    """An array of this dtype whose content must not matter."""
    return place(np.full(shape, np.nan), dtype)


def exact(qkv, NH, NKV):
    """(out, lse, weights) in float64."""
    B, T, channels = qkv.shape
    HS = channels // (NH + 2 * NKV)
    out, lse = by_oracle("attention_forward", np.empty((B, T, NH * HS)), np.empty((B, NH, T)), qkv, NH, NKV, None)
    return out, lse, by_oracle("attention_weights", np.empty((B, NH, T, T)), lse, qkv, NH, NKV)


# The errors below have the oracle's grouped shapes: q and out (B, NKV, NH // NKV, T, HS), k and v (B, NKV, 1, T, HS),
# weights and scores (B, NKV, NH // NKV, T, T).


def by_group(x, NKV):
    """lse or weights, (B, NH, ...), in a grouped shape."""
    return x.reshape(len(x), NKV, -1, *x.shape[2:])


def magnitudes(qkv, NH, NKV):
    """The absolute values of q, k and v in float64."""
    return [np.abs(x) for x in oracle.queries_keys_values(qkv.astype(np.float64), NH, NKV)]


def scores_and_error(qkv, NH, NKV):
    """The scores of each query, -inf in its future, and their errors."""
    q, k, _ = oracle.queries_keys_values(qkv.astype(np.float64), NH, NKV)
    HS = q.shape[-1]
    return oracle.scores(q, k), sum_error(np.abs(q) @ np.abs(k).swapaxes(-1, -2) / math.sqrt(HS), HS + 1)


def forward_errors(qkv, weights, lse, NH, NKV):
    """The errors of the weights during the forward, and of lse.

    e**score multiplies the error of a score, and that of the row's largest score, which is subtracted; the subtraction
    and e**x lose a unit each of the distance to the largest; e**x loses two units, the division one. All T terms of the
    sum are positive: four standard deviations are 4 sqrt(T) units.
    """
    weights, lse = by_group(weights, NKV), by_group(lse, NKV)
    T = weights.shape[-1]
    past = np.tri(T, dtype=bool)
    scores, score_error = scores_and_error(qkv, NH, NKV)
    top = scores.max(axis=-1, keepdims=True)
    distance = np.where(past, top - scores, 0)
    # the terms of the sum have errors too: on average, weighted with the weights
    relative = score_error + 2 * UNIT * distance
    average = (weights * relative).sum(axis=-1, keepdims=True)
    error = weights * (relative + average + UNIT * (4 + 4 * math.sqrt(T))) + TINY * past
    # the error of a log is the relative error of the sum; storing lse loses a unit
    largest = np.where(past, score_error, 0).max(axis=-1)
    return error, largest + UNIT * (np.abs(lse) + 2 * np.abs(top[..., 0]) + 8 + 4 * math.sqrt(T))


def recomputed_error(qkv, lse, NH, NKV):
    """The relative error of weights recomputed as e**(score - lse); e**x itself loses up to five units."""
    scores, score_error = scores_and_error(qkv, NH, NKV)
    finite = np.where(np.isfinite(scores), np.abs(scores), 0)
    return score_error + UNIT * (2 * finite + 2 * np.abs(by_group(lse, NKV))[..., None] + 8)


def check_forward(ops, place, garbage, qkv, NH, NKV, dtype="float32"):
    expected_out, expected_lse, weights = exact(qkv, NH, NKV)
    out, lse = nothing_yet(place, dtype, *expected_out.shape), garbage(*expected_lse.shape)
    arguments = out, lse, place(qkv, dtype), NH, NKV
    ops.attention_forward(*arguments, garbage(ops.attention_forward_scratch(*arguments)))
    error, lse_error = forward_errors(qkv, weights, expected_lse, NH, NKV)
    assert_close("lse", lse, expected_lse, lse_error.reshape(lse.shape))
    error += ROUNDING[dtype] * by_group(weights, NKV)  # tensor cores take the weights as bf16
    v = magnitudes(qkv, NH, NKV)[2]
    error = error @ v + sum_error(by_group(weights, NKV) @ v, out.shape[1])
    expected = oracle.grouped(expected_out, NH, NKV)
    assert_close("out", oracle.grouped(out, NH, NKV), expected, stored(dtype, expected, error))


@pytest.mark.parametrize("spread", [1.0, 8.0], ids="spread{}".format)
@pytest.mark.parametrize("shape, NKV", CASES)
def test_forward(ops, rng, place, garbage, shape, NKV, spread, dtype):
    qkv, _ = make(rng, *shape, NKV, spread, dtype)
    check_forward(ops, place, garbage, qkv, shape[2], NKV, dtype)


def test_the_first_token_attends_only_to_itself(ops, rng, place, garbage):
    qkv, _ = make(rng, 2, 3, 1, 16, 1)
    out, lse = garbage(2, 3, 16), garbage(2, 1, 3)
    arguments = out, lse, place(qkv), 1, 1
    ops.attention_forward(*arguments, garbage(ops.attention_forward_scratch(*arguments)))
    # lse is the score; what 17 roundings of a sum of 16 products may lose
    q, k = qkv[:, 0, :16].astype(np.float64), qkv[:, 0, 16:32]
    error = sum_error((np.abs(q) * np.abs(k)).sum(axis=-1, keepdims=True) / 4, 17)
    assert_close("lse", lse[:, :, 0], (q * k).sum(axis=-1, keepdims=True) / 4, error)
    assert np.array_equal(out[:, 0], qkv[:, 0, 32:])


@pytest.mark.gpu
def test_a_gpu_names_heads_that_are_too_large(ops, garbage):
    out, lse, qkv, scratch = garbage(1, 1, 258), garbage(1, 2, 1), garbage(1, 1, 3 * 258), garbage(2)
    calls = {
        "attention_forward": (out, lse, qkv, 2, 2, scratch),
        "attention_backward": (garbage(1, 1, 3 * 258), out, out, lse, qkv, 2, 2, scratch),
        "attention_cached_forward": (out, garbage(1, 1, 2, 258), qkv, np.zeros(1, np.int32), 2, 2),
    }
    for op, arguments in calls.items():
        with pytest.raises(UserError, match="num_heads 2 splits 258 channels into heads of 129, .* up to 128"):
            getattr(ops, op)(*arguments)


def check_backward(ops, place, garbage, qkv, dout, NH, NKV, dtype="float32"):
    out, lse, weights = exact(qkv, NH, NKV)
    dqkv = nothing_yet(place, dtype, *qkv.shape)
    inputs = place(dout, dtype), place(out, dtype), place(lse), place(qkv, dtype), NH, NKV
    expected = by_oracle("attention_backward", np.empty(qkv.shape), dout, out, lse, qkv, NH, NKV, None)
    ops.attention_backward(dqkv, *inputs, garbage(ops.attention_backward_scratch(dqkv, *inputs)))

    # the same sums with absolute values; out has lost a unit when it was stored
    q, k, v = magnitudes(qkv, NH, NKV)
    p, (T, HS), G = by_group(weights, NKV), q.shape[-2:], NH // NKV
    dy, y = (np.abs(oracle.grouped(x.astype(np.float64), NH, NKV)) for x in (dout, out))
    dscores = p * (dy @ v.swapaxes(-1, -2) + (dy * y).sum(axis=-1, keepdims=True)) / math.sqrt(HS)
    # in bf16, out is rounded, and tensor cores take the weights and the gradients of the scores rounded
    relative = recomputed_error(qkv, lse, NH, NKV) + ROUNDING[dtype]
    error = sum_error(dscores, HS + 4) + (relative + ROUNDING[dtype]) * dscores

    def over_queries(x, y):
        """The sum over all queries of a group."""
        return (x.swapaxes(-1, -2) @ y).sum(axis=2, keepdims=True)

    errors = (
        error @ k + sum_error(dscores @ k, T),
        over_queries(error, q) + sum_error(over_queries(dscores, q), G * T),
        over_queries(relative * p, dy) + sum_error(over_queries(p, dy), G * T),
    )
    parts = (oracle.queries_keys_values(x, NH, NKV) for x in (dqkv, expected))
    for name, got, right, error in zip(("dq", "dk", "dv"), *parts, errors, strict=True):
        assert_close(name, got, right, stored(dtype, right, error) + TINY)


@pytest.mark.parametrize("shape, NKV", CASES)
def test_backward(ops, rng, place, garbage, shape, NKV, dtype):
    qkv, dout = make(rng, *shape, NKV, dtype=dtype)
    check_backward(ops, place, garbage, qkv, dout, shape[2], NKV, dtype)


@pytest.mark.parametrize("shape", [(1, 3, 1, 4), (1, 3, 1, 64)])
def test_backward_with_very_negative_scores(ops, rng, place, garbage, shape, dtype):
    """A tile has rows for queries that do not exist. Their scores of 0 would give weights of e**800."""
    C = shape[2] * shape[3]
    qkv, dout = make(rng, *shape, 1)
    qkv[..., :C] += 40 * shape[3] ** -0.25
    qkv[..., C : 2 * C] -= 40 * shape[3] ** -0.25
    qkv, dout = (x.astype(dtype).astype(np.float32) for x in (qkv, dout))
    check_backward(ops, place, garbage, qkv, dout, 1, 1, dtype)


@pytest.mark.parametrize("shape, NKV", CASES)
def test_weights(ops, rng, place, garbage, shape, NKV, dtype):
    B, T, NH, HS = shape
    qkv, _ = make(rng, *shape, NKV, dtype=dtype)
    _, lse, expected = exact(qkv, NH, NKV)
    weights = garbage(B, NH, T, T)
    ops.attention_weights(weights, place(lse), place(qkv, dtype), NH, NKV)
    error = by_group(expected, NKV) * recomputed_error(qkv, lse, NH, NKV) + TINY
    assert_close("weights", weights, expected, error.reshape(expected.shape))
    assert (np.triu(weights, 1) == 0).all()


def test_nan_reaches_the_future_only(ops, rng, place, garbage):
    qkv, _ = make(rng, 2, 17, 2, 16, 2)
    qkv[1, 5, 32] = np.nan  # token 5's key of the first head
    out = garbage(2, 17, 32)
    arguments = out, garbage(2, 2, 17), place(qkv), 2, 2
    ops.attention_forward(*arguments, garbage(ops.attention_forward_scratch(*arguments)))
    assert np.isnan(out[1, 5:, :16]).all()
    assert np.isfinite(out[0]).all() and np.isfinite(out[1, :5]).all() and np.isfinite(out[1, :, 16:]).all()


STEPS = [(1,), (3,), (1, 1, 1), (5, 1, 2)]
LONG_STEPS = [(17, 1), (1, 64, 2), (3, 300, 1, 2)]  # the last is longer than a GPU block's chunk of keys
STEPS += [pytest.param(steps, marks=pytest.mark.compiled) for steps in LONG_STEPS]
HEADS = [(1, 1, 1), (2, 3, 2), (6, 2, 2)]
HEADS += [pytest.param(*heads, marks=pytest.mark.real) for heads in ((3, 16, 3), (1, 97, 1), (1, 128, 1), (6, 64, 3))]


@pytest.mark.slow  # in the simulator
@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("NH, HS, NKV", HEADS)
def test_cached_forward(ops, rng, place, NH, HS, NKV, steps, dtype):
    """A sequence fed in steps gives the same as all at once, and fills the cache up to its last token."""
    B, C, KV, total = 2, NH * HS, NKV * HS, sum(steps)
    qkv, _ = make(rng, B, total, NH, HS, NKV, dtype=dtype)
    expected, lse, weights = exact(qkv, NH, NKV)
    v = magnitudes(qkv, NH, NKV)[2]
    error = forward_errors(qkv, weights, lse, NH, NKV)[0] @ v + sum_error(by_group(weights, NKV) @ v, total)
    error = stored(dtype, oracle.grouped(expected, NH, NKV), error).transpose(0, 3, 1, 2, 4).reshape(expected.shape)
    cache = nothing_yet(place, dtype, B, total + 2, 2, KV)
    position = 0
    for T in steps:
        end = position + T
        out, new = nothing_yet(place, dtype, B, T, C), place(qkv[:, position:end], dtype)
        ops.attention_cached_forward(out, cache, new, place([position], np.int32), NH, NKV)
        assert_close("out", out, expected[:, position:end], error[:, position:end])
        assert np.array_equal(cache[:, :end].reshape(B, end, 2 * KV).astype(np.float32), qkv[:, :end, C:])
        assert np.isnan(cache[:, end:].astype(np.float32)).all()
        position = end


@pytest.mark.compiled
@pytest.mark.parametrize(
    "shape, NKV", [((1, 97, 5, 16), 5), ((2, 65, 3, 97), 3), ((1, 97, 6, 16), 2), ((2, 65, 6, 3), 1)]
)
def test_threads_do_not_change_the_bits(ops, rng, place, garbage, assert_same_bits, shape, NKV):
    B, T, NH, HS = shape
    C = NH * HS
    qkv, dout = (place(x) for x in make(rng, *shape, NKV))

    def run():
        out, lse, dqkv, weights = garbage(B, T, C), garbage(B, NH, T), garbage(*qkv.shape), garbage(B, NH, T, T)
        forward = out, lse, qkv, NH, NKV
        ops.attention_forward(*forward, garbage(ops.attention_forward_scratch(*forward)))
        backward = dqkv, dout, out, lse, qkv, NH, NKV
        ops.attention_backward(*backward, garbage(ops.attention_backward_scratch(*backward)))
        ops.attention_weights(weights, lse, qkv, NH, NKV)
        cached, cache = garbage(B, T, C), garbage(B, T, 2, NKV * HS)
        ops.attention_cached_forward(cached, cache, qkv, place([0], np.int32), NH, NKV)
        return out, lse, dqkv, weights, cached, cache

    assert_same_bits(run)
