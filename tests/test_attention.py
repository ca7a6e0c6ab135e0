import math

import ml_dtypes  # noqa: F401  NumPy knows "bfloat16" from it
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

from llm_numba.util.cli import UserError

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
ROUNDING = {"float32": 0, "bfloat16": 2**-8}  # of a number, what storing it loses at most beyond float32


def kept_shape(kept, B, NH, T):
    return (B, NH, T, T) if kept == "weights" else (B, NH, T)


def make(rng, B, T, NH, HS, spread=1.0, dtype="float32"):
    qkv, dout = spread * rng.standard_normal((B, T, 3 * NH * HS)), rng.standard_normal((B, T, NH * HS))
    return [x.astype(dtype).astype(np.float32) for x in (qkv, dout)]


def nothing_yet(place, dtype, *shape):
    """An array of this dtype whose content must not matter."""
    return place(np.full(shape, np.nan), dtype)


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


def check_forward(out, att, qkv, NH, dtype="float32"):
    expected_out, expected_att = attention_forward(qkv, NH)
    error = att_error(qkv, expected_att, NH)
    if att.ndim == 4:
        assert_close("att", att, expected_att, error)
    else:
        assert_close("att", att, *log_sum_exp(qkv, NH)[:2])
    error = error + ROUNDING[dtype] * expected_att  # tensor cores take the weights as bf16
    v = np.abs(split_heads(qkv[..., -out.shape[-1] :].astype(np.float64), NH))
    error = join_heads(error @ v + sum_error(expected_att @ v, out.shape[1]))
    assert_close("out", out.astype(np.float32), expected_out, error + ROUNDING[dtype] * (np.abs(expected_out) + error))


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("spread", [1.0, 8.0], ids="spread{}".format)
@pytest.mark.parametrize("shape", CASES)
def test_forward(ops, rng, place, garbage, shape, spread, kept, dtype):
    B, T, NH, HS = shape
    qkv, _ = make(rng, *shape, spread, dtype)
    out, att = nothing_yet(place, dtype, B, T, NH * HS), garbage(*kept_shape(kept, B, NH, T))
    ops.attention_forward(out, att, place(qkv, dtype), NH, garbage(ops.attention_scratch_size(B, T, NH * HS, NH)))
    check_forward(out, att, qkv, NH, dtype)
    if kept == "weights":
        assert (np.triu(att, 1) == 0).all()


@pytest.mark.parametrize("kept", KEPT)
def test_the_first_token_sees_only_itself(ops, rng, place, garbage, kept):
    qkv, _ = make(rng, 2, 3, 1, 16)
    out, att = garbage(2, 3, 16), garbage(*kept_shape(kept, 2, 1, 3))
    ops.attention_forward(out, att, place(qkv), 1, garbage(ops.attention_scratch_size(2, 3, 16, 1)))
    if kept == "weights":
        assert (att[:, :, 0, 0] == 1).all()
    else:  # its own score; what 17 roundings of a sum of 16 products may lose
        q, k = qkv[:, 0, :16].astype(np.float64), qkv[:, 0, 16:32]
        error = sum_error((np.abs(q) * np.abs(k)).sum(axis=-1, keepdims=True) / 4, 17)
        assert_close("att", att[:, :, 0], (q * k).sum(axis=-1, keepdims=True) / 4, error)
    assert np.array_equal(out[:, 0], qkv[:, 0, 32:])


@pytest.mark.gpu
def test_a_gpu_says_which_heads_are_too_large(ops, garbage):
    out, att, qkv, scratch = garbage(1, 1, 258), garbage(1, 2, 1), garbage(1, 1, 3 * 258), garbage(2)
    calls = {
        "attention_forward": (out, att, qkv, 2, scratch),
        "attention_backward": (garbage(1, 1, 3 * 258), out, out, att, qkv, 2, scratch),
        "attention_cached_forward": (out, garbage(1, 1, 2, 258), qkv, np.zeros(1, np.int32), 2),
    }
    for op, arguments in calls.items():
        with pytest.raises(UserError, match="num_heads 2 splits 258 channels into heads of 129, .* up to 128"):
            getattr(ops, op)(*arguments)


def check_backward(ops, place, garbage, qkv, dout, NH, expected, kept, dtype="float32"):
    B, T, C = dout.shape
    HS = C // NH
    out, att = attention_forward(qkv, NH)
    dqkv, scratch = nothing_yet(place, dtype, B, T, 3 * C), garbage(ops.attention_scratch_size(B, T, C, NH))
    lse, lse_error, scores, score_error = log_sum_exp(qkv, NH)
    left = att if kept == "weights" else lse
    inputs = [place(x, dtype) for x in (dout, out)] + [place(left), place(qkv, dtype)]
    ops.attention_backward(dqkv, *inputs, NH, scratch)

    # the same sums with absolute values; att and out have lost a unit each when they were stored
    q, k, v = (np.abs(split_heads(x.astype(np.float64), NH)) for x in np.split(qkv, 3, axis=-1))
    dy, y = np.abs(split_heads(dout.astype(np.float64), NH)), np.abs(split_heads(out, NH))
    dscores = att * (dy @ v.swapaxes(-1, -2) + (dy * y).sum(axis=-1, keepdims=True)) / math.sqrt(HS)
    error = sum_error(dscores, HS + 4)
    # weights that are made again as e**(score - lse) have lost what these have, and e** 3e-7, five units
    finite = np.where(np.isfinite(scores), np.abs(scores), 0)
    again = score_error + UNIT * (2 * finite + 2 * np.abs(lse)[..., None] + 8) if kept == "lse" else np.zeros_like(att)
    # in bf16, out is rounded, and tensor cores take the weights and the scores' gradients rounded
    again = again + ROUNDING[dtype]
    error = error + (again + ROUNDING[dtype]) * dscores
    errors = (
        error @ k + sum_error(dscores @ k, T),
        error.swapaxes(-1, -2) @ q + sum_error(dscores.swapaxes(-1, -2) @ q, T),
        sum_error(att.swapaxes(-1, -2) @ dy, T) + (again * att).swapaxes(-1, -2) @ dy,
    )
    for i, name in enumerate(("dq", "dk", "dv")):
        part = slice(i * C, (i + 1) * C)
        wanted, error = expected[..., part], join_heads(errors[i])
        error = error + ROUNDING[dtype] * (np.abs(wanted) + error) + TINY
        assert_close(name, dqkv[..., part].astype(np.float32), wanted, error)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("shape", CASES)
def test_backward(ops, rng, place, garbage, shape, kept, dtype):
    qkv, dout = make(rng, *shape, dtype=dtype)
    NH = shape[2]
    check_backward(ops, place, garbage, qkv, dout, NH, attention_backward(dout, qkv, NH), kept, dtype)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("shape", [(1, 3, 1, 4), (1, 3, 1, 64)])
def test_backward_where_all_scores_are_very_negative(ops, rng, place, garbage, shape, kept, dtype):
    """The scores of queries that are not there, zeros, would be e**800 weights; all three tokens are in one tile."""
    C = shape[2] * shape[3]
    qkv, dout = make(rng, *shape)
    qkv[..., :C] += 40 * shape[3] ** -0.25
    qkv[..., C : 2 * C] -= 40 * shape[3] ** -0.25
    qkv, dout = (x.astype(dtype).astype(np.float32) for x in (qkv, dout))
    check_backward(ops, place, garbage, qkv, dout, 1, attention_backward(dout, qkv, 1), kept, dtype)


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
    ops.attention_forward(out, att, place(qkv), 2, garbage(ops.attention_scratch_size(2, 17, 32, 2)))
    assert np.isnan(out[1, 5:, :16]).all()
    assert np.isfinite(out[0]).all() and np.isfinite(out[1, :5]).all() and np.isfinite(out[1, :, 16:]).all()


STEPS = [(1,), (3,), (1, 1, 1), (5, 1, 2)]
LONG_STEPS = [(17, 1), (1, 64, 2), (3, 300, 1, 2)]  # the last beyond what a block of a GPU takes at a time
STEPS += [pytest.param(steps, marks=pytest.mark.compiled) for steps in LONG_STEPS]
HEADS = [(1, 1), (2, 3)] + [pytest.param(*head, marks=pytest.mark.real) for head in ((3, 16), (1, 97), (1, 128))]


@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("NH, HS", HEADS)
def test_cached_forward(ops, rng, place, NH, HS, steps, dtype):
    """A sequence fed in pieces attends as it does all at once, and fills the cache up to where it is."""
    B, C, total = 2, NH * HS, sum(steps)
    qkv, _ = make(rng, B, total, NH, HS, dtype=dtype)
    expected, att = attention_forward(qkv, NH)
    v = np.abs(split_heads(qkv[..., 2 * C :].astype(np.float64), NH))
    error = join_heads(att_error(qkv, att, NH) @ v + sum_error(att @ v, total))
    error += ROUNDING[dtype] * (np.abs(expected) + error)
    cache = nothing_yet(place, dtype, B, total + 2, 2, C)
    position = 0
    for T in steps:
        end = position + T
        out = nothing_yet(place, dtype, B, T, C)
        ops.attention_cached_forward(out, cache, place(qkv[:, position:end], dtype), place([position], np.int32), NH)
        assert_close("out", out.astype(np.float32), expected[:, position:end], error[:, position:end])
        assert np.array_equal(cache[:, :end].reshape(B, end, 2 * C).astype(np.float32), qkv[:, :end, C:])
        assert np.isnan(cache[:, end:].astype(np.float32)).all()
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
        scratch = garbage(ops.attention_scratch_size(B, T, C, NH))
        ops.attention_forward(out, att, qkv, NH, scratch)
        ops.attention_backward(dqkv, dout, out, att, qkv, NH, scratch)
        cached, cache = garbage(B, T, C), garbage(B, T, 2, C)
        ops.attention_cached_forward(cached, cache, qkv, place([0], np.int32), NH)
        return out, att, dqkv, cached, cache

    assert_same_bits(run)
