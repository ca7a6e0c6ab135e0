"""Two changes to Numba's cache of compiled code on disk, so that several processes share it."""

import hashlib
from collections.abc import Callable

import numba_cuda
from filelock import FileLock
from numba.cuda.core import caching


def share_between_processes() -> None:
    """Use the functions below instead of Numba's."""
    save = caching.IndexDataCacheFile.save

    def save_alone(self, key, data):
        """Without the lock, two processes that save code of one function at the same time may mix up its files."""
        with FileLock(f"{self._index_path}.lock"):
            save(self, key, data)

    caching.IndexDataCacheFile.save = save_alone
    caching.Cache._index_key = index_key


def index_key(self, signature, codegen) -> tuple:
    """What a function's compiled code depends on beside its source. Numba pickles the values of its closure; a pickled
    device function differs from process to process, so that the code would never be found again."""
    code = hashlib.sha256(self._py_func.__code__.co_code).hexdigest()
    return signature, codegen.magic_tuple(), numba_cuda.__version__, code, constants_of(self._py_func)


def constants_of(function: Callable) -> tuple:
    """The values in the closure of a function; for a function among them, its name and the values in its closure."""
    cells = getattr(getattr(function, "py_func", function), "__closure__", None) or ()
    values = [cell.cell_contents for cell in cells]
    return tuple((x.__qualname__, constants_of(x)) if callable(x) else x for x in values)
