"""Spans of token shards -> batches: deterministic, streamed from the disk, and restored exactly where it stopped."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llm_numba.data.shards import Span, open_shard
from llm_numba.util.cli import UserError


class Loader:
    """Deals the windows of `spans`, each exactly once an epoch, B at a time, epoch after epoch.

    A window is T + 1 tokens: T inputs and, one further, their T targets; the next one in the span begins T further, so
    a span of n tokens has (n - 1) // T windows. A batch goes over the ends of spans and epochs; nothing is dropped.
    Without `shuffle` row b of batch i is window i * B + b. With it the spans, and the windows inside each, come in an
    order that only (seed, epoch, span) decide. Shards are mapped, and only the current span's order is in memory.
    Errors: not one window; `flag` is the flag that the tokens came from.
    """

    def __init__(self, spans: Sequence[Span], B: int, T: int, seed: int, shuffle: bool, flag: str = "--data"):
        longest = max((span.stop - span.start for span in spans), default=0)
        if longest <= T:
            raise UserError(
                f"{flag}: {longest} tokens in a row, but one window needs {T + 1} (T + 1): "
                "give more text or a smaller --sequence-length"
            )
        self.B, self.T, self.seed, self.shuffle = B, T, seed, shuffle
        self.spans = [span for span in spans if span.stop - span.start > T]
        self.counts = np.array([(span.stop - span.start - 1) // T for span in self.spans])
        self.windows_per_epoch = int(self.counts.sum())
        self._stamps = {span.path: stamp(span.path) for span in self.spans}
        self._seek(0, 0)

    def next_batch(self, tokens: np.ndarray, targets: np.ndarray) -> list[Span]:
        """tokens =, targets = the next B windows; both (B, T) int32. Returns where they lie.

        Errors: a shard that is no longer what it was when the loader was made.
        """
        windows = []
        self._check(self._span.path)
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
        """The position: the epoch, and the number of its windows that were dealt. JSON-able."""
        epoch, window = self._position()
        return {"epoch": epoch, "window": window}

    def restore(self, state: dict) -> None:
        """Go on as the loader with the same spans, T and seed did from `state`. Errors: not a position of this data."""
        epoch, window = (state.get(name) for name in ("epoch", "window"))
        if type(epoch) is not int or type(window) is not int or epoch < 0 or not 0 <= window < self.windows_per_epoch:
            raise UserError(
                f"the stored position in the data is {state}, but an epoch has {self.windows_per_epoch} windows: "
                "resume with the same --data and --sequence-length"
            )
        self._seek(epoch, window)

    def _position(self) -> tuple[int, int]:
        window = self._before + self._next
        return self._epoch + window // self.windows_per_epoch, window % self.windows_per_epoch

    def _seek(self, epoch: int, window: int) -> None:
        """Make `window` of `epoch` the next one: open its span and put the span's windows in this epoch's order."""
        order = self._order(len(self.spans), epoch, 0)
        ends = np.cumsum(self.counts[order])
        place = int(np.searchsorted(ends, window, side="right"))
        index = int(order[place])
        self._epoch, self._before = epoch, int(ends[place] - self.counts[index])
        self._next = window - self._before
        self._span = self.spans[index]
        self._check(self._span.path)
        self._shard = open_shard(self._span.path)
        self._windows = self._order(int(self.counts[index]), epoch, 1 + index)

    def _check(self, path: Path) -> None:
        if stamp(path) != self._stamps[path]:
            raise UserError(
                f"{path}: was changed while the run was reading it: put back what it was, and --resume the run "
                "from its last checkpoint"
            )

    def _order(self, count: int, epoch: int, purpose: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(count)
        return np.random.default_rng([self.seed, epoch, purpose]).permutation(count)


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is replaced, written or cut off; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
