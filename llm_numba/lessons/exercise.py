"""Exercises that check themselves: a file with a specification, an unfinished function, and the expected results.

exercise.show("layernorm_mean")  # the specification, an example, and the memory accesses of your code so far
exercise.check("layernorm_mean")  # check the function in the file
exercise.check("layernorm_mean", my_function)  # check a function defined in the notebook
llm-numba lessons check my_file.py
"""

import inspect
import linecache
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from llm_numba.lessons import FOLDER
from llm_numba.lessons.problem import Problem, arguments, expected_results, find_error, is_array
from llm_numba.lessons.tracing import Trace, require_numba_cuda, simulate, simulate_cpu
from llm_numba.training.override import load
from llm_numba.util.cli import UserError

SHOWN = 12  # elements of an array that an example prints


class Exercise(NamedTuple):
    """function: the name of the unfinished function. example: the sizes that `show` uses; small ones.
    launch: for a kernel, launch(function, *arguments); a CPU function is called with the arguments.
    array: the array whose accesses `show` draws, if any.
    """

    function: str
    problem: Problem
    example: dict[str, int]
    launch: Callable | None = None
    array: str = ""


def open_file(name: str) -> tuple[ModuleType, Exercise]:
    """An exercise by name, or by the path of your own file, read from disk now."""
    path = Path(name) if name.endswith(".py") else FOLDER / "exercises" / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (FOLDER / "exercises").glob("*.py")))
        raise UserError(f"{name}: there is no such exercise; there are: {known}")
    linecache.checkcache(str(path.resolve()))
    try:
        module = load(str(path.resolve()), str(path))
    except UserError as error:
        if isinstance(error.__cause__, ImportError):
            require_numba_cuda()
        cause = error.__cause__
        raise UserError(f"{path}: cannot be loaded ({type(cause).__name__}: {cause})") from cause
    found = getattr(module, "EXERCISE", None)
    if not isinstance(found, Exercise):
        raise UserError(f"{path}: is not an exercise, because it does not define EXERCISE")
    if not callable(getattr(module, found.function, None)):
        raise UserError(f"{path}: must define the function {found.function}")
    return module, found


def bound(found: Exercise, function: Callable) -> Callable:
    """The function, or a kernel's launch, as a function of the problem's arguments."""
    if found.launch is None:
        return function
    return lambda *args: found.launch(function, *args)


def check(name: str, function: Callable | None = None) -> bool:
    """Check the exercise's function, or `function`; print the first error, and return whether it is correct."""
    module, found = open_file(name)
    error = judge(found, function or getattr(module, found.function))
    if error:
        print(f"{found.function}: not yet. {error[0].upper()}{error[1:]}.")
    else:
        print(f"{found.function}: correct at all {len(found.problem.sizes)} shapes. Well done!")
    return error is None


def judge(found: Exercise, function: Callable) -> str | None:
    """A message about the first error of an answer; None if it is correct."""
    return find_error(bound(found, function), found.problem, recorded=found.launch is None)


def show(name: str, function: Callable | None = None) -> Trace | None:
    """Show the specification, the function, an example with its expected results and, once the function runs, a
    picture of its memory accesses."""
    from llm_numba.lessons import pictures

    module, found = open_file(name)
    pictures.text(inspect.cleandoc(module.__doc__ or ""))
    pictures.source(function or getattr(module, found.function))
    given = arguments(found.problem, found.example)
    print("For example, with")
    for key, x in given.items():
        if key not in found.problem.writes or not np.isnan(np.asarray(x, float)).all():
            print(f"  {key} = {excerpt(x)}")
    for key, expected in expected_results(found.problem, given).items():
        print(f"the expected {key} is {excerpt(expected)}")
    try:
        run = simulate if found.problem.device == "cuda" else simulate_cpu
        trace = run(bound(found, function or getattr(module, found.function)), **given)
    except Exception:  # an unfinished function, or any error of the learner's code; `check` reports it
        return None
    if found.array and trace.accesses:
        pictures.show(pictures.draw_warp(trace, found.array))
    return trace


def excerpt(x) -> str:
    """An argument as text; the first elements of an array."""
    if not is_array(x):
        return str(x)
    elements = np.array2string(x.reshape(-1)[:SHOWN], precision=3, suppress_small=True, max_line_width=100)
    more = "" if x.size <= SHOWN else " ..."
    return f"{elements}{more}, shape {x.shape}"
