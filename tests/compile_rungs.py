"""Compile the kernels that the CUDA rungs of the lessons and the solutions of the exercises launch, without a GPU.

Runs in a process without the simulator. Prints a line for each rung; the exit status is 1 if one does not compile.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

from numba import cuda
from numba.cuda import dispatcher
from numba.cuda.compiler import compile as compile_kernel

from llm_numba.lessons import FOLDER
from llm_numba.lessons.exercise import bound, open_file
from llm_numba.lessons.ladder import ladders, rung_files, title
from llm_numba.lessons.problem import arguments
from llm_numba.training.override import load

CAPABILITY = (8, 0)
ANSWERS = Path(__file__).parent / "exercises"
compiled = []


def compile_only(kernel, configuration):
    """Replaces kernel[blocks, threads]: compiles for the types of the arguments and runs nothing."""

    def launch(*args):
        types = tuple(kernel.typeof_pyval(arg) for arg in args)
        ptx, _ = compile_kernel(kernel.py_func, types, cc=CAPABILITY, device=False, abi="numba")
        assert ".entry" in ptx
        compiled.append(kernel.py_func.__name__)

    return launch


def tasks():
    """(what, function, problem) of every CUDA rung in lessons/ and every CUDA solution."""
    for file in rung_files():
        for ladder in ladders(file):
            for rung in ladder.rungs:
                if ladder.problem.device == "cuda" and not rung.__module__.startswith("llm_numba."):
                    yield f"{file.name}: {title(rung)}", rung, ladder.problem
    for file in sorted((FOLDER / "exercises").glob("*.py")):
        _, found = open_file(file.stem)
        if found.problem.device == "cuda":
            solution = load(str(ANSWERS / file.name), file.name).solution
            yield f"{file.name}: solution", bound(found, solution), found.problem


def main() -> int:
    # Numba asks for the GPU when a kernel calls a device function, and so does the choice of variants
    gpu = SimpleNamespace(compute_capability=CAPABILITY, id=0)
    cuda.get_current_device = dispatcher.get_current_device = lambda: gpu
    dispatcher.CUDADispatcher.__getitem__ = compile_only
    cuda.stream = lambda: 0
    wrong = 0
    for what, function, problem in tasks():
        compiled.clear()
        try:
            function(*arguments(problem, problem.sizes[-1]).values())
            print(f"{what}: {', '.join(compiled) or 'launches nothing'}")
            wrong += not compiled
        except Exception as error:  # from the compiler
            print(f"{what}: {type(error).__name__}: {error}")
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
