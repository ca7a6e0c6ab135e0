"""Exercises that grade themselves: a file with a specification, a function with a hole, and what it has to compute.

exercise.show("layernorm_mean")  # the specification, an example, and what the threads touch so far
exercise.check("layernorm_mean")  # the function as it stands in the file
exercise.check("layernorm_mean", my_function)  # one that was written in the notebook
python -m llm_numba.lessons check my_file.py
"""

import inspect
import linecache
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from llm_numba.lessons import FOLDER
from llm_numba.lessons.problem import Problem, arguments, is_array, mistake, right_answer
from llm_numba.lessons.tracing import Trace, simulate, simulate_cpu
from llm_numba.training.override import load
from llm_numba.util.cli import UserError

OF_AN_ARRAY = 12  # numbers that an example shows


class Exercise(NamedTuple):
    """function: the name of the one with the hole. example: the sizes that `show` shows; small ones.
    launch: launch(function, *arguments), for a kernel; a function of the CPU is called with the arguments.
    array: which one the picture of `show` is about, if there is one.
    """

    function: str
    problem: Problem
    example: dict[str, int]
    launch: Callable | None = None
    array: str = ""


def open_file(name: str) -> tuple[ModuleType, Exercise]:
    """An exercise by its name, or by the path of somebody's own file, as it stands on disk now."""
    path = Path(name) if name.endswith(".py") else FOLDER / "exercises" / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (FOLDER / "exercises").glob("*.py")))
        raise UserError(f"{name}: there is no such exercise; there are: {known}")
    linecache.checkcache(str(path.resolve()))
    module = load(str(path.resolve()), str(path))
    found = getattr(module, "EXERCISE", None)
    if not isinstance(found, Exercise):
        raise UserError(f"{path}: is not an exercise: EXERCISE, which says what to compute, is missing")
    if not callable(getattr(module, found.function, None)):
        raise UserError(f"{path}: has no function {found.function}, which the exercise asks for")
    return module, found


def bound(found: Exercise, function: Callable) -> Callable:
    """The function, or for a kernel its launch, to be called with the problem's arguments."""
    if found.launch is None:
        return function
    return lambda *args: found.launch(function, *args)


def check(name: str, function: Callable | None = None) -> bool:
    """Say whether the exercise's function, or this one, is right, and if not, what is wrong; returns whether."""
    module, found = open_file(name)
    words = judge(found, function or getattr(module, found.function))
    if words:
        print(f"{found.function}: not yet. {words[0].upper()}{words[1:]}.")
    else:
        print(f"{found.function}: right, at all {len(found.problem.sizes)} shapes. Well done!")
    return words is None


def judge(found: Exercise, function: Callable) -> str | None:
    """What is wrong with an answer, in words; None where it is right."""
    return mistake(bound(found, function), found.problem, recorded=found.launch is None)


def show(name: str, function: Callable | None = None) -> Trace | None:
    """The specification, the function as it stands, an example with its right answer, and, once the function runs, a
    picture of what its threads touch."""
    from llm_numba.lessons import pictures

    module, found = open_file(name)
    pictures.text(inspect.cleandoc(module.__doc__ or ""))
    pictures.source(function or getattr(module, found.function))
    given = arguments(found.problem, found.example)
    print("For example, with")
    for key, x in given.items():
        if key not in found.problem.writes or not np.isnan(np.asarray(x, float)).all():
            print(f"  {key} = {some(x)}")
    for key, right in right_answer(found.problem, given).items():
        print(f"it should make {key} = {some(right)}")
    try:
        run = simulate if found.problem.device == "cuda" else simulate_cpu
        trace = run(bound(found, function or getattr(module, found.function)), **given)
    except Exception:  # the hole, or whatever a learner's program may raise; check says what
        return None
    if found.array and trace.accesses:
        pictures.show(pictures.draw_warp(trace, found.array))
    return trace


def some(x) -> str:
    """An argument in a few numbers."""
    if not is_array(x):
        return str(x)
    numbers = np.array2string(x.reshape(-1)[:OF_AN_ARRAY], precision=3, suppress_small=True, max_line_width=100)
    more = "" if x.size <= OF_AN_ARRAY else " and so on"
    return f"{numbers}{more}, shape {x.shape}"
