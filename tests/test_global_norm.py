import math

import numpy as np
import pytest


def norm_squared(ops, place, garbage, grads):
    out, grads = place([np.nan], np.float64), place(grads)
    ops.global_norm_squared(out, grads, garbage(ops.global_norm_squared_scratch(out, grads)))
    return out[0]


# the CPU's blocks have 16384 elements
@pytest.mark.parametrize(
    "n",
    [1, 2, 3, 17, 257, pytest.param(16383, marks=pytest.mark.compiled)]
    + [pytest.param(n, marks=pytest.mark.compiled) for n in (16384, 16385, 40001)],
)
def test_sum_of_squares(ops, rng, place, garbage, n):
    grads = rng.standard_normal(n).astype(np.float32)
    expected = math.fsum(float(x) ** 2 for x in grads)
    # float64 sums of exact squares: four standard deviations of a random walk of n steps
    assert abs(norm_squared(ops, place, garbage, grads) - expected) <= 4 * math.sqrt(n) * 2.0**-53 * expected


@pytest.mark.parametrize("n", [1153, pytest.param(17_000_003, marks=[pytest.mark.compiled, pytest.mark.real])])
def test_more_sums_than_the_last_block_has_threads(ops, place, garbage, n):
    assert norm_squared(ops, place, garbage, np.full(n, 2, np.float32)) == 4 * n


def test_no_overflow_and_no_underflow(ops, place, garbage):
    """The squares of these overflow or underflow in float32."""
    for x in (1e30, 1e-30):
        expected = 3 * float(np.float32(x)) ** 2
        assert norm_squared(ops, place, garbage, [x, -x, x]) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 100, 256])
def test_not_finite(ops, rng, place, garbage, where, value):
    grads = rng.standard_normal(257)
    grads[where] = value
    assert not np.isfinite(norm_squared(ops, place, garbage, grads))


@pytest.mark.compiled
def test_threads_do_not_change_the_bits(ops, rng, place, garbage, assert_same_bits):
    grads = place(rng.standard_normal(100_003))

    def run():
        return [norm_squared(ops, place, garbage, grads)]

    assert_same_bits(run)


# --- clip

INF = np.inf


def scale_of(ops, place, garbage, loss, norm_squared, limits, highest):
    grad_scale = garbage(1)
    loss, norm_squared, limits = (place(x, np.float64) for x in ([loss], [norm_squared], limits))
    ops.clip(grad_scale, loss, norm_squared, limits, highest)
    return grad_scale[0]


@pytest.mark.parametrize(
    "norm_squared, highest, expected",
    [
        (9.0, 1.0, 1 / 3),
        (1e-60, 1e-31, 0.1),  # the square underflows in float32
        (1e60, 1.0, 1e-30),
        (0.25, 1.0, 1.0),
        (4.0, 2.0, 1.0),
        (0.0, 1.0, 1.0),
        (9.0, 0.0, 1.0),
    ],
)
def test_clip(ops, place, garbage, norm_squared, highest, expected):
    # two roundings in float64 vanish when the result is rounded to float32
    got = scale_of(ops, place, garbage, 3.0, norm_squared, [INF, INF], highest)
    assert got == np.float32(expected)


@pytest.mark.parametrize("highest", [0.0, 1.0])
@pytest.mark.parametrize(
    "loss, norm_squared, limits",
    [
        (4.0, 9.0, [3.9, INF]),
        (4.0, 9.0, [INF, 2.9]),
        (np.nan, 9.0, [INF, INF]),
        (4.0, np.nan, [INF, INF]),
        (INF, 9.0, [INF, INF]),
        (-INF, 9.0, [INF, INF]),
        (4.0, INF, [INF, INF]),
    ],
    ids=str,
)
def test_an_update_is_skipped(ops, place, garbage, loss, norm_squared, limits, highest):
    assert scale_of(ops, place, garbage, loss, norm_squared, limits, highest) == -1


def test_at_its_limit_is_within_it(ops, place, garbage):
    assert scale_of(ops, place, garbage, 4.0, 9.0, [4.0, 3.0], 0.0) == 1
