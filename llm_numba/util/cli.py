"""How every command starts and ends: its parser, its streams, Ctrl-C, and errors as one line."""

import argparse
import io
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from llm_numba.util import ctrl_c

BROKEN_PIPE = 128 + 13  # SIGPIPE; the exit status of a program whose reader has gone
FAILED = 2

# module -> the extra of pyproject.toml that installs it; "" for what the package itself depends on
EXTRAS = {
    **dict.fromkeys(("cuda", "numba_cuda", "numba.cuda"), "cuda"),
    **dict.fromkeys(("huggingface_hub", "pooch", "requests"), "download"),
    **dict.fromkeys(("IPython", "ipykernel", "jupytext", "nbclient"), "lessons"),
    **{"tensorboardX": "tensorboard", "trackio": "trackio", "wandb": "wandb"},
    **dict.fromkeys(("filelock", "llvmlite", "matplotlib", "ml_dtypes", "numba", "numpy", "platformdirs"), ""),
    **dict.fromkeys(("psutil", "rustbpe", "safetensors", "tiktoken", "tqdm"), ""),
}
DISTRIBUTIONS = {"cuda": "cuda-bindings", "numba_cuda": "numba-cuda", "numba.cuda": "numba-cuda"}  # other names


class UserError(Exception):
    """A mistake, or a state of the machine, that the user can fix.

    The message is one line: which flag, file or value; what was expected; what to do.
    """


class Parser(argparse.ArgumentParser):
    """Raises a UserError for a bad command line."""

    def error(self, message):
        raise UserError(" ".join(message.removeprefix("argument ").split()) + " (see --help)")


def command(name: str, *arguments) -> str:
    """A command as one types it: command("train", "--resume", "my run") -> llm-numba train --resume 'my run'."""
    return shlex.join(["llm-numba", name, *map(str, arguments)])


def install(extra: str = "") -> str:
    """The command, to be run in the clone, that installs the package with an extra of pyproject.toml."""
    return f'pip install -e ".[{extra}]"' if extra else "pip install -e ."


def not_installed(module: str) -> str | None:
    """Why a module cannot be imported and how to install it; None for one that llm_numba does not use."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]  # numba.cuda before numba
    known = next((name for name in names if name in EXTRAS), None)
    return known and f"{DISTRIBUTIONS.get(known, known)} is not installed: {install(EXTRAS[known])}"


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
    except UserError as error:
        status = _failed(str(error))
    except KeyboardInterrupt:
        _write_failure()  # flushes what has been printed
        ctrl_c.leave()
    except ModuleNotFoundError as error:
        hint = not_installed(error.name or "")
        if not hint:
            raise
        status = _failed(hint)
    except BrokenPipeError:
        status = BROKEN_PIPE
    except Exception as error:  # also whatever reading damaged bytes may raise
        status = _failed(_output_failure(error) or _cache_failure(error))
        if status is None:
            raise
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


def _failed(message: str | None) -> int | None:
    if message:
        note(f"error: {message}")
        return FAILED


def _write_failure(text: str = "") -> OSError | None:
    """The error of writing to standard output, where there is one."""
    try:
        print(end=text, flush=True)
    except OSError as error:
        return error


def _output_failure(error: Exception) -> str | None:
    if isinstance(error, OSError) and not error.filename and (failure := _write_failure("\n")):
        return f"standard output cannot be written ({failure.strerror})"


def _cache_failure(error: Exception) -> str | None:
    """What to do if reading a compiled function failed."""
    if any(Path(frame.filename).name == "caching.py" for frame in traceback.extract_tb(error.__traceback__)):
        folder, reason = sys.modules["numba"].config.CACHE_DIR, str(error).partition("\n")[0]
        return (
            f"{folder}: the compiled functions there cannot be used ({type(error).__name__}: {reason}): delete that "
            "folder, or set NUMBA_CACHE_DIR to one that you may write"
        )
