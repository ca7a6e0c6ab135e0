"""Where llm_numba keeps what it can make again: tokenised text, compiled functions."""

import os
from pathlib import Path

import platformdirs

from llm_numba.util.cli import UserError


def cache_folder() -> Path:
    """Where these are kept: $LLM_NUMBA_CACHE, else the platform's cache folder of the user; made if missing."""
    chosen = os.environ.get("LLM_NUMBA_CACHE")
    folder = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("llm_numba")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be used as the cache folder ({error.strerror}): set LLM_NUMBA_CACHE to one you may write"
        ) from error
    return folder
