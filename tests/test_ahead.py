"""Items that a thread produces before they are needed."""

import time

import pytest

from llm_numba.util.ahead import ahead


def test_the_same_items_in_order():
    assert list(ahead(range(10), 3)) == list(range(10))
    assert list(ahead([], 2)) == []


def test_at_most_some_are_made_in_advance():
    made = []

    def items():
        for i in range(6):
            made.append(i)
            yield i

    found = ahead(items(), 2)
    deadline = time.monotonic() + 10
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made == [0, 1]  # without a request
    assert next(found) == 0
    assert len(made) <= 3
    assert list(found) == [1, 2, 3, 4, 5]


def test_an_error_comes_where_the_item_would():
    def items():
        yield 1
        raise ValueError("broken")

    found = ahead(items(), 4)
    assert next(found) == 1
    with pytest.raises(ValueError, match="broken"):
        next(found)
