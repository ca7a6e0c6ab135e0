import math

import numpy as np
import pytest
from reference import (
    TINY,
    UNIT,
    assert_close,
    attention_backward,
    attention_forward,
    finite_difference,
    join_heads,
    split_heads,
    sum_error,
)

# (B, T, NH, HS): head sizes below, at and above a tile's width, T around its multiples, and beyond flash.py's blocks
CASES = [
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


KEPT = ["weights", "lse"]  # what the forward leaves for the backward


def kept_shape(kept, B, NH, T):
    return (B, NH, T, T) if kept == "weights" else (B, NH, T)


def make(rng, B, T, NH, HS, spread=1.0):
    qkv, dout = spread * rng.standard_normal((B, T, 3 * NH * HS)), rng.standard_normal((B, T, NH * HS))
    return qkv.astype(np.float32), dout.astype(np.float32)


def att_error(qkv, att, NH):
    """What att may lose: e**score multiplies the scores' errors, those of the row's largest twice (its own, and as what
    is subtracted); the subtraction and e** lose a unit each of the distance to the largest; e** two, the sum of T
    positive terms its root, four deviations, the division one."""
    q, k, _ = (split_heads(x.astype(np.float64), NH) for x in np.split(qkv, 3, axis=-1))
    T, HS = q.shape[-2:]
    past = np.tril(np.ones((T, T), bool))
    score_error = sum_error(np.abs(q) @ np.abs(k).swapaxes(-1, -2) / math.sqrt(HS), HS + 1)
    scores = np.where(past, q @ k.swapaxes(-1, -2) / math.sqrt(HS), -np.inf)
    distance = np.where(past, scores.max(axis=-1, keepdims=True) - scores, 0)
    # the terms of the sum err as well: on average, weighted with att
    relative = score_error + 2 * UNIT * distance
    return att * (relative + (att * relative).sum(axis=-1, keepdims=True) + UNIT * (4 + 4 * math.sqrt(T))) + TINY * past


def log_sum_exp(qkv, NH):
    """(the log-sum-exp of each query's scores, what it may lose, the scores, what these may lose), in float64."""
    q, k, _ = (split_heads(x.astype(np.float64), NH) for x in np.split(qkv, 3, axis=-1))
    T, HS = q.shape[-2:]
    past = np.tril(np.ones((T, T), bool))
    scores = np.where(past, q @ k.swapaxes(-1, -2) / math.sqrt(HS), -np.inf)
    score_error = np.where(past, sum_error(np.abs(q) @ np.abs(k).swapaxes(-1, -2) / math.sqrt(HS), HS + 1), 0)
    top = scores.max(axis=-1, keepdims=True)
    lse = (top + np.log(np.exp(scores - top).sum(axis=-1, keepdims=True)))[..., 0]
    # the sum's relative error is the log's: the largest score's own, of e** and of T terms; a unit when it is stored
    error = score_error.max(axis=-1) + UNIT * (np.abs(lse) + 2 * np.abs(top[..., 0]) + 8 + 4 * math.sqrt(T))
    return lse, error, scores, score_error


def check_forward(out, att, qkv, NH):
    expected_out, expected_att = attention_forward(qkv, NH)
    error = att_error(qkv, expected_att, NH)
    if att.ndim == 4:
        assert_close("att", att, expected_att, error)
    else:
        assert_close("att", att, *log_sum_exp(qkv, NH)[:2])
    v = np.abs(split_heads(qkv[..., -out.shape[-1] :].astype(np.float64), NH))
    assert_close("out", out, expected_out, join_heads(error @ v + sum_error(expected_att @ v, out.shape[1])))


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("spread", [1.0, 8.0], ids="spread{}".format)
@pytest.mark.parametrize("shape", CASES)
def test_forward(ops, rng, place, garbage, shape, spread, kept):
    B, T, NH, HS = shape
    qkv, _ = make(rng, *shape, spread)
    out, att = garbage(B, T, NH * HS), garbage(*kept_shape(kept, B, NH, T))
    ops.attention_forward(out, att, place(qkv), NH, garbage(ops.attention_scratch_size(T, HS)))
    check_forward(out, att, qkv, NH)
    if kept == "weights":
        assert (np.triu(att, 1) == 0).all()


def test_the_first_token_sees_only_itself(ops, rng, place, garbage):
    qkv, _ = make(rng, 2, 3, 1, 16)
    out, att = garbage(2, 3, 16), garbage(2, 1, 3, 3)
    ops.attention_forward(out, att, place(qkv), 1, garbage(ops.attention_scratch_size(3, 16)))
    assert (att[:, :, 0, 0] == 1).all()
    assert np.array_equal(out[:, 0], qkv[:, 0, 32:])


def check_backward(ops, place, garbage, qkv, dout, NH, expected, kept):
    B, T, C = dout.shape
    HS = C // NH
    out, att = attention_forward(qkv, NH)
    dqkv, scratch = garbage(B, T, 3 * C), garbage(ops.attention_scratch_size(T, HS))
    lse, lse_error, scores, score_error = log_sum_exp(qkv, NH)
    left = att if kept == "weights" else lse
    ops.attention_backward(dqkv, place(dout), place(out), place(left), place(qkv), NH, scratch)

    # the same sums with absolute values; att and out have lost a unit each when they were stored
    q, k, v = (np.abs(split_heads(x.astype(np.float64), NH)) for x in np.split(qkv, 3, axis=-1))
    dy, y = np.abs(split_heads(dout.astype(np.float64), NH)), np.abs(split_heads(out, NH))
    dscores = att * (dy @ v.swapaxes(-1, -2) + (dy * y).sum(axis=-1, keepdims=True)) / math.sqrt(HS)
    error = sum_error(dscores, HS + 4)
    # weights that are made again as e**(score - lse) have lost what these have, and e** 3e-7, five units
    finite = np.where(np.isfinite(scores), np.abs(scores), 0)
    again = score_error + UNIT * (2 * finite + 2 * np.abs(lse)[..., None] + 8) if kept == "lse" else np.zeros_like(att)
    error = error + again * dscores
    errors = (
        error @ k + sum_error(dscores @ k, T),
        error.swapaxes(-1, -2) @ q + sum_error(dscores.swapaxes(-1, -2) @ q, T),
        sum_error(att.swapaxes(-1, -2) @ dy, T) + (again * att).swapaxes(-1, -2) @ dy,
    )
    for i, name in enumerate(("dq", "dk", "dv")):
        part = slice(i * C, (i + 1) * C)
        assert_close(name, dqkv[..., part], expected[..., part], join_heads(errors[i]) + TINY)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("shape", CASES)
def test_backward(ops, rng, place, garbage, shape, kept):
    qkv, dout = make(rng, *shape)
    NH = shape[2]
    check_backward(ops, place, garbage, qkv, dout, NH, attention_backward(dout, qkv, NH), kept)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 4, 2, 3), (2, 2, 1, 4)])
def test_finite_differences(ops, rng, place, garbage, shape, kept):
    qkv, dout = make(rng, *shape)
    NH = shape[2]
    numeric = finite_difference(lambda x: attention_forward(x, NH)[0], qkv, dout)
    assert_close("dqkv", attention_backward(dout, qkv, NH), numeric, 1e-8)
    check_backward(ops, place, garbage, qkv, dout, NH, numeric, kept)


@pytest.mark.parametrize("kept", KEPT)
def test_nan_reaches_the_future_only(ops, rng, place, garbage, kept):
    qkv, _ = make(rng, 2, 17, 2, 16)
    qkv[1, 5, 32] = np.nan  # the first head's key of token 5
    out, att = garbage(2, 17, 32), garbage(*kept_shape(kept, 2, 2, 17))
    ops.attention_forward(out, att, place(qkv), 2, garbage(ops.attention_scratch_size(17, 16)))
    assert np.isnan(out[1, 5:, :16]).all()
    assert np.isfinite(out[0]).all() and np.isfinite(out[1, :5]).all() and np.isfinite(out[1, :, 16:]).all()


@pytest.mark.parametrize("steps", [(1,), (3,), (1, 1, 1), (5, 1, 1, 3), (17, 1), (1, 64, 2)], ids=str)
@pytest.mark.parametrize("NH, HS", [(1, 1), (2, 3), (3, 16), (1, 97)])
def test_cached_forward(ops, rng, place, garbage, NH, HS, steps):
    """A sequence fed in pieces attends as it does all at once, and fills the cache up to where it is."""
    B, C, total = 2, NH * HS, sum(steps)
    qkv, _ = make(rng, B, total, NH, HS)
    expected, att = attention_forward(qkv, NH)
    v = np.abs(split_heads(qkv[..., 2 * C :].astype(np.float64), NH))
    error = join_heads(att_error(qkv, att, NH) @ v + sum_error(att @ v, total))
    cache = garbage(B, total + 2, 2, C)
    position = 0
    for T in steps:
        end = position + T
        out = garbage(B, T, C)
        ops.attention_cached_forward(out, cache, place(qkv[:, position:end]), position, NH)
        assert_close("out", out, expected[:, position:end], error[:, position:end])
        assert np.array_equal(cache[:, :end].reshape(B, end, 2 * C), qkv[:, :end, C:])
        assert np.isnan(cache[:, end:]).all()
        position = end


@pytest.mark.compiled
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("shape", [(1, 97, 5, 16), (2, 65, 3, 97)])
def test_threads_do_not_change_the_bits(ops, rng, place, garbage, assert_same_bits, shape, kept):
    B, T, NH, HS = shape
    C = NH * HS
    qkv, dout = (place(x) for x in make(rng, *shape))

    def run():
        out, att, dqkv = garbage(B, T, C), garbage(*kept_shape(kept, B, NH, T)), garbage(B, T, 3 * C)
        scratch = garbage(ops.attention_scratch_size(T, HS))
        ops.attention_forward(out, att, qkv, NH, scratch)
        ops.attention_backward(dqkv, dout, out, att, qkv, NH, scratch)
        cached, cache = garbage(B, T, C), garbage(B, T, 2, C)
        ops.attention_cached_forward(cached, cache, qkv, 0, NH)
        return out, att, dqkv, cached, cache

    assert_same_bits(run)
