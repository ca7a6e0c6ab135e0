"""The cache folder: tokenised text, data sets and compiled functions, all of which can be made again."""

import contextlib
import hashlib
import os
import shutil
import time
from pathlib import Path

import platformdirs

from llm_numba.util.cli import UserError

PACKAGE = Path(__file__).parents[1]
UNUSED_AFTER = 30 * 24 * 3600  # seconds after which compiled code of another version is deleted


def cache_folder() -> Path:
    """$LLM_NUMBA_CACHE, or else the user's cache folder on this platform. The folder is created if it is missing."""
    chosen = os.environ.get("LLM_NUMBA_CACHE")
    folder = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("llm_numba")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be used as the cache folder ({error.strerror}); set LLM_NUMBA_CACHE to a writable folder"
        ) from error
    return folder


def compiled_code_folder() -> Path:
    """The folder for the functions that Numba compiles. Its name is a hash of every .py file of the package: Numba
    notices a change in a function's own file, but not in another file from which it inlined a function.

    Each use updates the folder's modification time. Folders unused for 30 days are deleted.
    """
    digest = hashlib.sha256()
    for source in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{source.relative_to(PACKAGE)}\0".encode() + source.read_bytes() + b"\0")
    folder = cache_folder() / f"numba-{digest.hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    os.utime(folder)
    for other in folder.parent.glob("numba-*"):
        with contextlib.suppress(OSError):  # another process may delete it at the same time
            if time.time() - other.stat().st_mtime > UNUSED_AFTER:
                shutil.rmtree(other, ignore_errors=True)
    return folder
