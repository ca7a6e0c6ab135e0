"""Signals during training: the run ends after its step, with a checkpoint."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def finish_step_on_signals() -> Iterator[list[int]]:
    """A list that gets the number of the first SIGINT, SIGTERM or SIGHUP; a second signal raises KeyboardInterrupt."""
    received = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        numbers.append(signal.SIGHUP)

    def receive(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        with suppress(OSError):  # the terminal may be gone
            print(f"\n{signal.Signals(number).name}: stopping after this step; again to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
