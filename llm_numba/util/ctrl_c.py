"""Ctrl-C ends a command with one line and exit status 130, from its first import to its last line.

Loaded before everything else, so it imports next to nothing.
"""

import os
import signal

STATUS = 128 + signal.SIGINT
LINE = "stopped by Ctrl-C"


def exit_at_once() -> None:
    """While modules are loaded: an exception could come up anywhere, also where Python can only print it."""
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, interrupt):  # a background job ignores Ctrl-C
        signal.signal(signal.SIGINT, leave)


def raise_interrupt() -> None:
    """While a command runs: KeyboardInterrupt, so that it removes its temporary files; the second Ctrl-C exits."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, interrupt)


def interrupt(number, frame) -> None:
    """Exit at once inside Numba: LLVM calls back into Python, and an exception raised there is lost."""
    signal.signal(signal.SIGINT, leave)
    while frame:
        if frame.f_globals.get("__name__", "").startswith(("numba.", "llvmlite.")):
            leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def leave(number=None, frame=None) -> None:
    """Print the line and end the process, without what could be interrupted again."""
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        os.write(2, f"{LINE}\n".encode())
    except OSError:  # standard error is closed or full
        pass
    os._exit(STATUS)
