"""llm_numba: GPT-2 training in Python that Numba compiles."""

import sys
from importlib.machinery import PathFinder

__version__ = "0.1.0"


class _OwnCudaFinder:
    """Finds llm_numba.cuda. numba-cuda redirects the import of every module with "numba.cuda" in its name, which ours
    has, and would not come to an end."""

    @staticmethod
    def find_spec(name, path, target=None):
        if not name.startswith("llm_numba.cuda"):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec


sys.meta_path.insert(0, _OwnCudaFinder)
