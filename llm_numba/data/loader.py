"""Spans of token shards -> batches: deterministic, streamed from disk, and resumed exactly where they stopped."""

from collections.abc import Sequence

import numpy as np

from llm_numba.data.shards import Span, open_shard, stamp
from llm_numba.util.cli import UserError


class Loader:
    """Yields the windows of `spans`, each exactly once per epoch, B at a time.

    A window is T + 1 tokens: T inputs and, shifted by one, T targets. The next window of a span begins T tokens later,
    so a span of n tokens has (n - 1) // T windows. Batches continue across spans and epochs; no window is dropped.
    Without `shuffle`, row b of batch i is window i * B + b. With it, the spans, and the windows within each, come in an
    order that depends only on (seed, epoch, span). Shards are memory-mapped, and only the current span's order is in
    memory. Errors: fewer tokens than one window; `flag` is where the tokens came from.
    """

    def __init__(self, spans: Sequence[Span], B: int, T: int, seed: int, shuffle: bool, flag: str = "--data"):
        longest = max((span.stop - span.start for span in spans), default=0)
        if longest <= T:
            needed = f"one window needs {T + 1} (T + 1): give more text or a smaller --sequence-length"
            raise UserError(f"{flag}: {longest} tokens in a row, but {needed}")
        self.B, self.T, self.seed, self.shuffle = B, T, seed, shuffle
        self.spans = [span for span in spans if span.stop - span.start > T]
        self.counts = np.array([(span.stop - span.start - 1) // T for span in self.spans])
        self.windows_per_epoch = int(self.counts.sum())
        self._stamps = {span.path: stamp(span.path) for span in self.spans}
        self._seek(0, 0)

    def next_batch(self, tokens: np.ndarray, targets: np.ndarray) -> list[Span]:
        """tokens =, targets = the next B windows, both (B, T) int32. Returns where the windows are.

        Errors: a shard that has changed since the loader was created.
        """
        windows = []
        self._check()
        for b in range(self.B):
            start = self._span.start + int(self._windows[self._next]) * self.T
            window = self._shard[start : start + self.T + 1]
            tokens[b], targets[b] = window[:-1], window[1:]
            windows.append(Span(self._span.path, start, start + self.T + 1))
            self._next += 1
            if self._next == len(self._windows):
                self._seek(*self._position())
        return windows

    def state(self) -> dict:
        """The position as JSON types: the epoch, and the number of windows already used in it."""
        epoch, window = self._position()
        return {"epoch": epoch, "window": window}

    def restore(self, state: dict) -> None:
        """Continue from another loader's `state`, for the same spans, T and seed. Errors: an impossible position."""
        match state:
            case {"epoch": int(epoch), "window": int(window)} if epoch >= 0 and 0 <= window < self.windows_per_epoch:
                self._seek(epoch, window)
            case _:
                expected = f"an epoch has {self.windows_per_epoch} windows: resume with the same --data and "
                raise UserError(f"the stored position in the data is {state}, but {expected}--sequence-length")

    def _position(self) -> tuple[int, int]:
        window = self._before + self._next
        return self._epoch + window // self.windows_per_epoch, window % self.windows_per_epoch

    def _seek(self, epoch: int, window: int) -> None:
        """Make `window` of `epoch` the next one: open its span, and compute the order of the span's windows."""
        order = self._order(len(self.spans), epoch, 0)
        ends = np.cumsum(self.counts[order])
        place = int(np.searchsorted(ends, window, side="right"))
        index = int(order[place])
        self._epoch, self._before = epoch, int(ends[place] - self.counts[index])
        self._next = window - self._before
        self._span = self.spans[index]
        self._check()
        self._shard = open_shard(self._span.path)
        self._windows = self._order(int(self.counts[index]), epoch, 1 + index)

    def _check(self) -> None:
        if stamp(self._span.path) != self._stamps[self._span.path]:
            todo = "restore the file, and --resume the run from its last checkpoint"
            raise UserError(f"{self._span.path}: changed while the run was reading it: {todo}")

    def _order(self, count: int, epoch: int, purpose: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(count)
        return np.random.default_rng([self.seed, epoch, purpose]).permutation(count)
