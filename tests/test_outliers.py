"""The z-score agrees with the standard library's statistics, and its window survives odd values and JSON."""

import json
import math
import random
import statistics

import numpy as np
import pytest

from llm_numba.training.outliers import WINDOW, limit, z_score


def filled(seed=0):
    numbers, history = random.Random(seed), []
    for _ in range(WINDOW):
        assert math.isnan(z_score(history, numbers.gauss(4.2, 0.3)))
    return history


def test_agrees_with_the_statistics_module():
    history, numbers = filled(), random.Random(1)
    for _ in range(257):
        value = numbers.gauss(4.0, 0.5)
        window = [*history[1:], value]
        expected = (value - statistics.fmean(window)) / statistics.pstdev(window)
        # value - mean cancels: its error is an ulp of 4, that is 4e-16, beside a deviation of about 0.5
        assert z_score(history, value) == pytest.approx(expected, rel=1e-12, abs=1e-14)
        assert history == window


def test_the_window_is_llm_c_s():
    assert WINDOW == 128


def test_a_spike_is_seen_from_the_first_full_window_on():
    history = [1.0] * (WINDOW - 1)
    assert math.isnan(z_score(history, 1.0))
    # 127 equal values and another one: its distance is sqrt(WINDOW - 1), the largest there is
    assert z_score(history, 9.0) == pytest.approx(math.sqrt(WINDOW - 1), rel=1e-14)
    assert len(history) == WINDOW


def test_equal_values_have_no_deviation():
    history = [0.1] * WINDOW  # 0.1 is no binary fraction: a rounded mean would make a tiny deviation, and z of any size
    assert z_score(history, 0.1) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stays_out(value):
    history = [1.0, 2.0]
    assert math.isnan(z_score(history, value)) and history == [1.0, 2.0]
    history = filled()
    before = list(history)
    assert z_score(history, value) == math.inf and history == before


def test_the_window_goes_through_json():
    history = filled()
    z_score(history, np.float32(4.1))
    restored = json.loads(json.dumps(history))
    assert restored == history
    assert z_score(restored, 5.3) == z_score(history, 5.3)


@pytest.mark.parametrize("z", [0.5, 2.0, 5.0, 11.0])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.3])
def test_the_limit_is_where_the_score_is_reached(z, noise):
    """A little above it the score is above z, a little below it is not."""
    rng = np.random.default_rng(0)
    history = list(5 + noise * rng.standard_normal(WINDOW))
    bound = limit(history, z)
    assert z_score(history[:], bound * (1 + 1e-9)) > z
    assert z_score(history[:], bound * (1 - 1e-9)) <= z


def test_what_equals_all_others_is_within_the_limit():
    for value in (0.1, 1 / 3, 5.4321, 1e-7, 0.0):
        assert value <= limit([value] * WINDOW, 1.0)


def test_without_a_window_or_a_score_there_is_no_limit():
    full = list(range(WINDOW))
    assert limit(full[1:], 3.0) == math.inf
    assert limit(full, 0.0) == math.inf
    assert limit(full, 12.0) == math.inf  # no value can lie so far out
    assert limit(full, 3.0) < math.inf
