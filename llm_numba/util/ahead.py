"""Produce items before they are needed."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def ahead(items: Iterable, most: int) -> Iterator:
    """The items, which a thread produces in advance, from now on and at most `most` of them."""
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1)
    waiting = deque(pool.submit(next, iterator, end) for _ in range(most))

    def rest():
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item
        pool.shutdown()

    return rest()
