import math

import numpy as np
import pytest
from comparing import SHAPES, TINY, UNIT, assert_close, by_oracle, stored

# in the simulator NumPy warns about each NaN and infinity
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

DLOSS = 0.125


def make(rng, B, T, V, padding=0, spread=3.0):
    """Logits, NaN in the padding columns, and targets; the first target is the last column."""
    logits = np.full((B, T, V + padding), np.nan, np.float32)
    logits[..., :V] = spread * rng.standard_normal((B, T, V))
    targets = rng.integers(0, V, (B, T), dtype=np.int32)
    targets[0, 0] = V - 1
    return logits, targets


def rounded(logits, dtype):
    return logits.astype(dtype).astype(np.float32)


def softmax_error(logits, V):
    """The relative error of e**(x - top) / total for each logit.

    x - top loses a unit of |x - top|, and so does n ln 2 inside e**x; e**x loses two units, the division and the
    product with dloss one each. All terms of the total are positive: their errors average, and V additions add four
    standard deviations, 4 sqrt(V) units.
    """
    distance = np.abs(logits[..., :V] - logits[..., :V].max(axis=-1, keepdims=True)).astype(np.float64)
    average = np.average(distance, axis=-1, weights=np.exp(-distance), keepdims=True) if V > 1 else 0
    return UNIT * (2 * distance + 2 * average + 6 + 4 * np.sqrt(V))


def check(ops, place, garbage, logits, targets, V, dtype="float32"):
    B, T, _ = logits.shape
    got, losses = place(logits, dtype), garbage(B, T)
    arguments = got, losses, place(targets, np.int32), DLOSS, V, True
    expected_dlogits, expected_losses = by_oracle("fused_classifier", *arguments)
    ops.fused_classifier(*arguments)
    relative = softmax_error(logits, V)
    at_target = np.take_along_axis(relative, targets[..., None], axis=-1)[..., 0]
    # the error of a log is the relative error of its argument, and a rounding
    assert_close("losses", losses, expected_losses, at_target + 2 * UNIT * np.abs(expected_losses))
    onehot = targets[..., None] == np.arange(V)
    probabilities = expected_dlogits[..., :V] / DLOSS + onehot
    error = DLOSS * (relative * probabilities + UNIT * onehot) + TINY
    expected = expected_dlogits[..., :V]
    assert_close("dlogits", got[..., :V], expected, stored(dtype, expected, error))
    assert (got[..., V:] == 0).all()


# in the simulator a thread handles several chunks of the longest row
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 97)])
@pytest.mark.parametrize("padding", [0, 31], ids="padding{}".format)
def test_losses_and_dlogits(ops, rng, place, garbage, shape, padding, dtype):
    V = shape[2]
    logits, targets = make(rng, *shape, padding)
    check(ops, place, garbage, rounded(logits, dtype), targets, V, dtype)


@pytest.mark.compiled
def test_vocabulary_of_gpt2(ops, rng, place, garbage, dtype):
    V = 50257
    logits, targets = make(rng, 1, 2, V, padding=47)
    check(ops, place, garbage, rounded(logits, dtype), targets, V, dtype)


@pytest.mark.parametrize("spread", [0.0, 30.0, 1e4], ids="spread{}".format)
@pytest.mark.parametrize("centre", [0.0, 1e4, -1e4], ids="centre{}".format)
def test_large_logits(ops, rng, place, garbage, centre, spread):
    """e**x overflows from 89 on, so only differences from the largest logit may be used."""
    logits, targets = make(rng, 2, 3, 17, 3, spread)
    logits += np.float32(centre)
    check(ops, place, garbage, logits, targets, 17)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 17), (2, 17, 257)])
def test_loss_alone_leaves_the_logits(ops, rng, place, garbage, shape):
    B, T, V = shape
    logits, targets = make(rng, B, T, V, padding=5)
    got, losses, full_losses = place(logits), garbage(B, T), garbage(B, T)
    ops.fused_classifier(got, losses, place(targets, np.int32), DLOSS, V, False)
    assert got.tobytes() == logits.tobytes()
    ops.fused_classifier(got, full_losses, place(targets, np.int32), DLOSS, V, True)
    assert np.array_equal(losses, full_losses)
    assert got.tobytes() != logits.tobytes()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("column", [0, 3, 50, 96])
def test_nan_logit_makes_the_loss_nan(ops, rng, place, garbage, column, sign, dtype):
    logits, targets = make(rng, 2, 2, 97, padding=3)
    logits[1, 0, column] = np.copysign(np.nan, sign)
    got, losses = place(logits, dtype), garbage(2, 2)
    losses[...] = 0
    ops.fused_classifier(got, losses, place(targets, np.int32), DLOSS, 97, True)
    assert np.array_equal(np.isnan(losses), [[False, False], [True, False]])
    got = got.astype(np.float32)
    assert np.isnan(got[1, 0, :97]).all()
    assert np.isfinite(np.delete(got.reshape(4, -1), 2, axis=0)).all()


def test_infinite_logits(ops, place, garbage):
    """A logit of -inf has probability 0; one of +inf makes the loss NaN."""
    logits = place([[[0.0, -np.inf, 0.0], [0.0, np.inf, 0.0]]])
    losses = garbage(1, 2)
    ops.fused_classifier(logits, losses, place([[0, 0]], np.int32), DLOSS, 3, True)
    assert_close("loss", losses[0, :1], [np.log(2)], 4 * UNIT)
    assert np.isnan(losses[0, 1])


@pytest.mark.compiled
def test_threads_do_not_change_the_bits(ops, rng, place, garbage, assert_same_bits):
    logits, targets = make(rng, 3, 17, 257, padding=127)
    targets = place(targets, np.int32)

    def run():
        got, losses = place(logits), garbage(3, 17)
        ops.fused_classifier(got, losses, targets, DLOSS, 257, True)
        return got, losses

    assert_same_bits(run)


# --- add_mean


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 17), (1, 256), (5, 257), (16, 1024)])
def test_mean_of_the_losses_is_added(ops, rng, place, shape):
    losses = np.square(rng.standard_normal(shape)).astype(np.float32)
    loss = place([2.5], np.float64)
    mean = math.fsum(losses.reshape(-1)) / losses.size
    for times in (1, 2):
        ops.add_mean(loss, place(losses), 0.3)
        # float64 sums: four standard deviations of a random walk of n steps, and some roundings of the sum
        assert abs(loss[0] - (2.5 + times * 0.3 * mean)) <= 2.0**-53 * (4 * math.sqrt(losses.size) * mean + 10)


@pytest.mark.parametrize("where", [0, 100, 256])
def test_one_nan_loss_makes_the_mean_nan(ops, place, where):
    losses, loss = place(np.ones((1, 257))), place([0.0], np.float64)
    losses[0, where] = np.nan
    ops.add_mean(loss, losses, 1.0)
    assert np.isnan(loss[0])


@pytest.mark.compiled
def test_the_mean_has_the_same_bits_again(ops, rng, place, assert_same_bits):
    losses = place(np.square(rng.standard_normal((16, 1024))))

    def run():
        loss = place([0.0], np.float64)
        ops.add_mean(loss, losses, 1.0)
        return [loss]

    assert_same_bits(run)
