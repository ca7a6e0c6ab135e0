"""Paths on the command line -> files of text or token shards."""

import glob
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from llm_numba.data.shards import open_shard
from llm_numba.util.cli import UserError


def find_files(patterns: Sequence[str], flag: str = "--data") -> list[Path]:
    """The files that `patterns` name, sorted, without duplicates: all token shards (`*.bin`) of one type, or all text.

    A pattern is a file, a folder or a glob (`*`, `?`, `[...]`; `**` matches any folders). A folder means all its shards
    and text files, subfolders included, except hidden ones (a name that begins with a dot). As in git, a file is text
    if its first 8000 bytes contain no zero byte. Empty files in folders and globs are skipped.
    Errors, with `flag` and the value: nothing found; an empty file; shards and text, or uint16 and uint32 shards,
    together.
    """
    found = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        folder = pattern and path.is_dir()  # "" is not the working folder
        try:
            if folder:
                files = _walk(path, lambda name: not name.startswith("."))
            else:
                files = [path] if path.is_file() else map(Path, glob.iglob(str(path), recursive=True))
            files = [file for file in files if file.is_file() and file.stat().st_size]
            if folder:
                files = [file for file in files if is_shard(file) or np.fromfile(file, np.uint8, 8000).all()]
        except OSError as error:
            raise UserError(f"{flag} {pattern}: {error.filename}: {error.strerror}") from error
        if not files:
            problem = "the file is empty" if path.is_file() else "no text and no .bin shard found"
            raise UserError(f"{flag} {pattern}: {problem}: give a file, a folder or a glob")
        for file in files:
            found.setdefault(file.resolve(), file.absolute())
    files = sorted(found.values())
    check_one_kind(files, flag)
    return files


def check_one_kind(files: list[Path], flag: str) -> None:
    """Raise a UserError for shards and text together, or for shards of two types: their tokens differ in meaning."""
    kinds = {f"{open_shard(file).dtype} shards" if is_shard(file) else "text": file for file in files}
    if len(kinds) > 1:
        found = " and ".join(f"{kind} ({file})" for kind, file in kinds.items())
        raise UserError(f"{flag}: found {found}: give files of one kind, for example by a glob such as *.bin")


def standard_library_files() -> list[Path]:
    """The sources of Python's standard library, sorted: about 10 MB of text that every installation has.

    Left out: tests, installed packages, and files that are empty or not UTF-8.
    """
    root = Path(sysconfig.get_path("stdlib"))
    others = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = []
    for file in sorted(_walk(root, lambda name: name not in others)):
        with suppress(UnicodeDecodeError):
            if file.suffix == ".py" and file.is_file() and file.read_bytes().decode():
                files.append(file)
    if not files:
        raise UserError(f"{root}: this Python has no sources of its standard library: give text with --data")
    return files


def is_shard(path: Path) -> bool:
    return path.suffix == ".bin"


def _walk(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """The files in `folder` and its subfolders; `wanted` decides by the name of a file or folder."""
    for parent, folders, names in os.walk(folder):
        folders[:] = filter(wanted, folders)
        yield from (Path(parent, name) for name in filter(wanted, names))
