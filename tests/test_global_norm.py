import math

import numpy as np
import pytest


def norm_squared(ops, place, garbage, grads):
    grads = place(grads)
    out = place([np.nan], np.float64)
    ops.global_norm_squared(out, grads, garbage(ops.global_norm_scratch_size(grads.size)))
    return out[0]


# a block of the CPU's is 16384 numbers
@pytest.mark.parametrize(
    "n",
    [1, 2, 3, 17, 257, pytest.param(16383, marks=pytest.mark.compiled)]
    + [pytest.param(n, marks=pytest.mark.compiled) for n in (16384, 16385, 40001)],
)
def test_sum_of_squares(ops, rng, place, garbage, n):
    grads = rng.standard_normal(n).astype(np.float32)
    expected = math.fsum(float(x) ** 2 for x in grads)
    # float64 sums of exact squares: four deviations of a walk of n steps
    assert abs(norm_squared(ops, place, garbage, grads) - expected) <= 4 * math.sqrt(n) * 2.0**-53 * expected


def test_no_overflow_and_no_underflow(ops, place, garbage):
    """The squares of these are beyond what float32 can hold."""
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
