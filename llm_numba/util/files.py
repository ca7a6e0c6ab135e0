"""Atomic writes, and sizes in bytes as text."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:  # llm-numba doctor runs without NumPy
    import numpy as np

from llm_numba.util.cli import UserError


def write_whole(path: Path, *parts: "bytes | np.ndarray") -> None:
    """Write a file: all of its parts, or nothing. Errors: the folder cannot be written, the disk is full."""
    with writing_whole(path) as file:
        for part in parts:
            file.write(part if isinstance(part, bytes) else part.data)


@contextmanager
def writing_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which replaces `path` when the block ends without an error; errors as for write_whole."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def format_bytes(nbytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    size, units = float(nbytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"
