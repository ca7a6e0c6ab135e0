"""llm_numba: LLM training in Python, compiled by Numba."""

import sys
from importlib.machinery import PathFinder

from llm_numba.util import ctrl_c

if sys.argv[:1] == ["-m"]:  # `python -m llm_numba...`, before its module is loaded
    ctrl_c.exit_at_once()

__version__ = "0.1.0"


class _OwnCudaFinder:
    """Finds llm_numba.cuda. numba-cuda redirects every import with "numba.cuda" in its name, which ours has, and would
    recurse without end."""

    @staticmethod
    def find_spec(name, path, target=None):
        if not name.startswith("llm_numba.cuda"):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec


sys.meta_path.insert(0, _OwnCudaFinder)
