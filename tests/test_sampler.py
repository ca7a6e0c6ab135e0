"""The token that is drawn, beside one drawn by NumPy."""

import numpy as np
import pytest

VOCABULARY = [1, 7, pytest.param(50257, marks=pytest.mark.real)]
CHOICES = [(1, 0, 1), (0.8, 0, 0.95), (3, 0, 0.5), (1, 0, 0), (0.5, 3, 1), (2, 4, 0.6), (1, 1000, 0.9), (1e-3, 5, 1)]


def choose(logits, temperature, top_k, top_p, rng):
    """As the op is defined, with the random number that `rng` gives next."""
    order = np.argsort(-logits, kind="stable")
    order = order[: top_k or None]
    p = np.exp((logits[order] - logits[order[0]]) / temperature)
    p /= p.sum()
    if top_p < 1:
        kept = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        order, p = order[:kept], p[:kept] / p[:kept].sum()
    return rng.choice(order, p=p)


@pytest.fixture
def draw(ops, place, dtype):
    """A function that draws from logits with a random number. The columns behind V and the other rows are huge."""

    def call(logits, u, temperature=1.0, top_k=0, top_p=1.0, T=3, start=2):
        V = len(logits)
        rows, uniforms = np.full((1, T, V + 3), 99.0), np.full(start + T + 1, 0.5)
        rows[0, -1, :V], uniforms[-2] = logits, u
        token, position = place([[7]], np.int32), place([start], np.int32)
        choice = place([temperature, top_k, top_p], np.float64)
        arguments = token, position, place(rows, dtype), place(uniforms, np.float64), choice, V
        ops.sample_token(*arguments, place(np.full(ops.sample_token_scratch(*arguments), np.nan)))
        assert position == start + T
        return token.item()

    return call


@pytest.mark.slow  # in the simulator
@pytest.mark.parametrize("V", VOCABULARY)
@pytest.mark.parametrize("temperature, top_k, top_p", CHOICES)
def test_drawn(draw, rng, dtype, temperature, top_k, top_p, V):
    """Logits of which many are equal, and in large vocabularies also logits that differ."""
    for seed in range(1 if V < 10 else 6):
        logits = 3 * rng.standard_normal(V) if seed % 2 else rng.integers(-3, 0, V)
        logits = (logits - 50).astype(dtype).astype(np.float64)
        expected = choose(logits, temperature, top_k, top_p, np.random.default_rng(seed))
        assert draw(logits, np.random.default_rng(seed).random(), temperature, top_k, top_p) == expected, seed


@pytest.mark.parametrize("V", VOCABULARY)
def test_the_likeliest(draw, rng, dtype, V):
    logits = rng.permutation(V) / 8
    assert draw(logits, 0.5, temperature=0) == logits.astype(dtype).argmax()


def test_the_first_of_equals(draw):
    assert draw([1, 2, 0, 2, 2], 0.5, temperature=0) == 1
    assert draw([-3] * 17, 0.9, temperature=0) == 0


@pytest.mark.parametrize("u, token", [(0, 3), (0.05, 3), (0.15, 4), (0.85, 11), (0.95, 12), (1 - 2**-53, 12)])
def test_equal_tokens_in_their_order(draw, u, token):
    """Tokens 3 to 12 take a tenth of the whole each, the others nothing."""
    logits = np.full(20, -200.0)
    logits[3:13] = 5
    assert draw(logits, u) == token


@pytest.mark.parametrize("top_k, top_p, last", [(3, 1, 2), (0, 0.5, 3), (0, 0.51, 4), (6, 0.5, 2), (8, 1, 7)])
def test_the_last_that_may_be_drawn(draw, top_k, top_p, last):
    """Of eight equal tokens."""
    assert draw([1] * 8, 1 - 2**-53, 1, top_k, top_p) == last


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(draw, bad, temperature):
    logits = np.zeros(20)
    logits[17] = bad
    assert draw(logits, 0.5, temperature) == -1
