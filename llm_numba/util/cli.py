"""One way to tell a user what went wrong: one line, and a non-zero exit."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CTRL_C = 128 + signal.SIGINT  # the exit status


class UserError(Exception):
    """A mistake or a state of the machine that the user can mend.

    The message is one line: which flag, file or value; what was expected; what to do.
    """


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors, of one line like all others."""

    def error(self, message):
        raise UserError(" ".join(message.removeprefix("argument ").split()) + " (see --help)")


def quiet_ctrl_c() -> None:
    """Let Ctrl-C end the process with one line from now until `exit_with`: while modules are loaded, an exception would
    come up anywhere in them."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a script's background process has none
        signal.signal(signal.SIGINT, _leave)


@contextmanager
def ctrl_c_at_once() -> Iterator[None]:
    """The same for a block, in which Python calls back from C, where a KeyboardInterrupt would be lost."""
    before = signal.getsignal(signal.SIGINT)
    quiet_ctrl_c()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number, frame) -> None:
    os.write(2, b"stopped by Ctrl-C\n")
    os._exit(CTRL_C)


def exit_with(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and leave the process; what the user can mend is told without a traceback.

    Exit status: main's own (None is 0), 2 after a UserError, 130 after Ctrl-C, 141 where who read the output has gone.
    """
    try:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(CTRL_C)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed at exit
        sys.exit(128 + 13)
    except Exception as error:  # whatever comes of reading damaged bytes
        if not any(Path(frame.filename).name == "caching.py" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        folder, reason = sys.modules["numba"].config.CACHE_DIR, str(error).partition("\n")[0]
        print(
            f"error: {folder}: the compiled functions there cannot be used ({type(error).__name__}: {reason}): delete "
            "that folder, or set NUMBA_CACHE_DIR to one that you may write",
            file=sys.stderr,
        )
        sys.exit(2)
