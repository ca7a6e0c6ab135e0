"""How every command starts and ends: its parser, its streams, Ctrl-C, and errors as one line."""

import argparse
import contextlib
import io
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from llm_numba.util import ctrl_c

BROKEN_PIPE = 128 + 13  # SIGPIPE; the exit status of a program whose reader has gone
FAILED = 2

EXTRAS = {  # extra of pyproject.toml -> the modules that it installs; "": those that the package itself depends on
    "cublas": ("nvmath",),
    "cuda": ("cuda", "numba_cuda", "numba.cuda"),
    "download": ("huggingface_hub", "pooch", "requests"),
    "lessons": ("IPython", "ipykernel", "jupytext", "nbclient", "numba_cuda"),
    "tensorboard": ("tensorboardX",), "trackio": ("trackio",), "wandb": ("wandb",),
    "": ("filelock", "llvmlite", "matplotlib", "ml_dtypes", "numba", "numpy", "platformdirs", "psutil", "rustbpe",
         "safetensors", "tiktoken", "tqdm"),
}  # fmt: skip
DISTRIBUTIONS = {  # other names
    "cuda": "cuda-bindings", "numba_cuda": "numba-cuda", "numba.cuda": "numba-cuda", "nvmath": "nvmath-python",
}  # fmt: skip


class UserError(Exception):
    """A mistake, or a state of the machine, that the user can fix.

    The message is one line: which flag, file or value; what was expected; what to do.
    """


class Parser(argparse.ArgumentParser):
    """Raises a UserError for a bad command line."""

    def error(self, message):
        raise UserError(" ".join(message.removeprefix("argument ").split()) + " (see --help)")

    def number(self, flag: str, default: float, help: str, least: float = 0, most: float = math.inf, **options) -> None:
        """Add a flag that takes a number from `least` to `most`, an integer if the default is one."""
        kind, allowed = type(default), f"at least {least}" if most == math.inf else f"from {least} to {most}"

        def parse(text: str) -> float:
            with contextlib.suppress(ValueError):
                if least <= kind(text) <= most:
                    return kind(text)
            raise UserError(f"{flag} {text}: must be {'an integer' if kind is int else 'a number'}, {allowed}")

        self.add_argument(flag, type=parse, default=default, help=f"{help} (default: {default})", **options)


def command(name: str, *arguments) -> str:
    """A command as one types it: command("train", "--resume", "my run") -> llm-numba train --resume 'my run'."""
    return shlex.join(["llm-numba", name, *map(str, arguments)])


def install(extra: str = "") -> str:
    """The command, to be run in the clone, that installs the package with an extra of pyproject.toml."""
    return f'pip install -e ".[{extra}]"' if extra else "pip install -e ."


def not_installed(module: str) -> str | None:
    """Why a module cannot be imported and how to install it; None for one that llm_numba does not use."""
    parts = module.split(".")
    for name in (".".join(parts[:n]) for n in range(len(parts), 0, -1)):  # numba.cuda before numba
        for extra, modules in EXTRAS.items():
            if name in modules:
                return f"{DISTRIBUTIONS.get(name, name)} is not installed: {install(extra)}"


def note(text: str) -> None:
    """Print a line on standard error, if it can be written."""
    try:
        print(text, file=sys.stderr)
    except OSError:
        discard(sys.stderr)


def exit_with(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit; every `__main__` block calls this.

    Exit status: that of `main` (None: 0); 2 after a UserError, or if standard output cannot be written; 130 after
    Ctrl-C; 141 if standard output is a pipe without a reader.
    """
    prepare_streams()
    ctrl_c.raise_interrupt()
    try:
        try:
            status = main()
        except SystemExit as finished:  # argparse, after --help
            status = finished.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        _write_failure()  # flushes what has been printed
        ctrl_c.leave()
    except BrokenPipeError:
        status = BROKEN_PIPE
    except Exception as error:  # also whatever reading damaged bytes may raise
        message = _explanation(error)
        if message is None:
            raise
        note(f"error: {message}")
        status = FAILED
    if _write_failure():
        discard(sys.stdout)
    ctrl_c.exit_at_once()
    sys.exit(status)


def prepare_streams() -> None:
    """Give each closed stream a file, so that no other file gets its number; print what an encoding lacks escaped."""
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            flags = os.O_RDWR if name == "stderr" else os.O_RDONLY  # a write to standard output then fails
            setattr(sys, name, open(os.open(os.devnull, flags), mode, encoding="utf-8"))
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard(stream) -> None:
    """From now on, throw away what is written to `stream`, and what is in its buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _write_failure(text: str = "") -> OSError | None:
    """The error of writing to standard output, where there is one."""
    try:
        print(end=text, flush=True)
    except OSError as error:
        return error


def _explanation(error: Exception) -> str | None:
    """The line to print for an error that the user can fix; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return not_installed(error.name or "")
    if isinstance(error, OSError) and not error.filename and (failure := _write_failure("\n")):
        return f"standard output cannot be written ({failure.strerror})"
    if any(Path(frame.filename).name == "caching.py" for frame in traceback.extract_tb(error.__traceback__)):
        folder, reason = sys.modules["numba"].config.CACHE_DIR, str(error).partition("\n")[0]
        return (
            f"{folder}: the compiled functions there cannot be used ({type(error).__name__}: {reason}): delete that "
            "folder, or set NUMBA_CACHE_DIR to one that you may write"
        )
