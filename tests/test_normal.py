"""Normally distributed numbers drawn on all cores are those that one core draws."""

from types import SimpleNamespace

import numpy as np
import pytest

from llm_numba.util import normal

SEGMENT = 1 << 12


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(normal, "SEGMENT", SEGMENT)


def both(seed, skipped, shape):
    """(what one core draws, what all draw), each after `skipped` numbers, and the states of the two generators."""
    one, all_cores = (np.random.default_rng(seed) for _ in range(2))
    for rng in one, all_cores:
        rng.standard_normal(skipped, np.float32)
    drawn = one.standard_normal(shape, np.float32), normal.standard_normal(all_cores, shape)
    return *drawn, one.bit_generator.state, all_cores.bit_generator.state


@pytest.mark.parametrize("skipped", [0, 1, 2])  # with half a number left, and without
@pytest.mark.parametrize("shape", [(0,), (5,), (2 * SEGMENT - 1,), (2 * SEGMENT,), (3, 7, 5 * SEGMENT // 3)], ids=str)
def test_the_bits_of_one_core(shape, skipped):
    for seed in range(3):
        one, all_cores, state, state_of_all = both(seed, skipped, shape)
        assert one.tobytes() == all_cores.tobytes() and one.shape == all_cores.shape
        assert state == state_of_all


def test_segments_join(monkeypatch):
    """One core draws less than a segment at the end, and a few numbers in between."""
    drawn, rng = [], np.random.default_rng(1)

    def draw(dtype, out=None):
        drawn.append(1 if out is None else out.size)
        return rng.standard_normal(dtype=dtype, out=out)

    watched = SimpleNamespace(bit_generator=rng.bit_generator, standard_normal=draw)
    normal.standard_normal(watched, (200 * SEGMENT,))
    assert len(drawn) < 20 and sum(drawn) < 8 * SEGMENT


@pytest.mark.parametrize("name, value", [("OVERLAP", 0), ("STEPS", 0)])
def test_one_core_goes_on_where_segments_do_not_join(monkeypatch, name, value):
    monkeypatch.setattr(normal, name, value)
    one, all_cores, state, state_of_all = both(7, 1, (9 * SEGMENT,))
    assert one.tobytes() == all_cores.tobytes() and state == state_of_all
