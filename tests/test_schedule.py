"""The learning rate follows the formulas, joins its phases without a jump, and ends where it should."""

import math

import pytest

from llm_numba.training.schedule import SCHEDULES, learning_rate

PEAK = 3e-4


def curve(schedule, steps, warmup, final_fraction=0.1):
    return [learning_rate(step, steps, PEAK, schedule, warmup, final_fraction) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps, warmup", [(97, 3), (257, 97), (10, 9), (3, 1), (97, 96)])
def test_warm_up_is_a_line_to_the_peak(schedule, steps, warmup):
    rates = curve(schedule, steps, warmup)
    assert rates[:warmup] == [PEAK * (step + 1) / warmup for step in range(warmup)]
    assert rates[warmup] == pytest.approx(PEAK, rel=1e-15)  # the first step after it is at the peak as well


@pytest.mark.parametrize("final_fraction", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("steps, warmup", [(1, 0), (3, 1), (97, 0), (257, 97), (97, 97), (10, 9)])
def test_end(steps, warmup, final_fraction):
    for schedule in "cosine", "linear", "wsd":
        for step in steps, steps + 3:
            end = learning_rate(step, steps, PEAK, schedule, warmup, final_fraction)
            assert end == pytest.approx(final_fraction * PEAK, rel=1e-15, abs=0)
    assert learning_rate(steps, steps, PEAK, "constant", warmup, final_fraction) == PEAK


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps, warmup", [(1000, 0), (1000, 97), (1000, 900), (97, 3)])
def test_it_falls_after_the_warm_up_and_never_jumps(schedule, steps, warmup):
    rates = curve(schedule, steps, warmup)[warmup:]
    falls = [before - after for before, after in zip(rates, rates[1:], strict=False)]
    assert all(fall >= 0 for fall in falls)
    # the steepest place of each: the middle of a cosine (pi/2 times a line's), the start of 1 - sqrt
    n = min(steps - warmup, 0.2 * steps) if schedule == "wsd" else steps - warmup
    steepest = {"cosine": math.pi / 2 / n, "linear": 1 / n, "constant": 0, "wsd": math.sqrt(1 / n)}[schedule]
    assert max(falls) <= 0.9 * PEAK * steepest * (1 + 1e-9)


def test_points_by_hand():
    middle = learning_rate(60, 100, 1.0, "cosine", 20, 0.1)  # half-way down: (1 + 0.1) / 2
    assert middle == pytest.approx(0.55, rel=1e-14)
    assert learning_rate(40, 100, 1.0, "cosine", 20, 0.0) == pytest.approx((1 + math.sqrt(0.5)) / 2, rel=1e-14)
    assert learning_rate(40, 100, 1.0, "linear", 20, 0.1) == pytest.approx(1 - 0.9 / 4, rel=1e-14)
    assert learning_rate(80, 100, 1.0, "wsd", 20, 0.1) == 1.0  # stable for 80% of the run
    assert learning_rate(85, 100, 1.0, "wsd", 20, 0.1) == pytest.approx(0.55, rel=1e-14)  # 1 - sqrt(1/4)
    assert learning_rate(99, 100, 1.0, "constant", 20, 0.1) == 1.0
