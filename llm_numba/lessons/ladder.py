"""A ladder: functions that compute the same, each by one idea more than the one before, the last as the model has it.

    LADDER = Ladder("layernorm_forward", PROBLEM, (layernorm_forward_v1, layernorm_forward_v2, layernorm_forward), ...)

A ladder stands at the end of a file of lessons/rungs, and is found there by `ladders`.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from llm_numba.lessons import FOLDER
from llm_numba.lessons.counting import total
from llm_numba.lessons.problem import Problem, arguments, largest_error, mistake
from llm_numba.lessons.tracing import Trace, simulate
from llm_numba.training.override import load
from llm_numba.util.cli import UserError


class Ladder(NamedTuple):
    """name: of the op, as it stands in the tables. rungs: functions of one signature, destinations first.
    timed, quick: the sizes at which it is timed, and those in the tests; for CUDA, `timed` is for a card.
    flops, nbytes: of these sizes by keyword, what a run computes or has to move: give the one that is the limit.
    dtype: of `peak_flops`, with flops; pattern: of `peak_bandwidth`, with nbytes. vendors: functions of the same
    signature, such as NumPy's, that are timed beside it. torch: the op of llm_numba.bench that PyTorch does, in this
    dtype, with the same sizes by keyword.
    counted: the sizes at which the accesses of a CUDA ladder are counted.
    """

    name: str
    problem: Problem
    rungs: tuple[Callable, ...]
    timed: dict[str, int]
    quick: dict[str, int]
    flops: Callable[..., int] | None = None
    nbytes: Callable[..., int] | None = None
    dtype: str = "float32"
    pattern: str = "copy"
    vendors: tuple[Callable, ...] = ()
    torch: str = ""
    counted: dict[str, int] | None = None


class Wrong(AssertionError):
    """A rung of ours does not compute what it should."""


def check(ladder: Ladder) -> None:
    """Hold every rung against the float64 oracle at every size, in the simulator with an eye on races too, and print
    how far it is off. Errors: Wrong, with words on the first mistake."""
    sizes = ladder.problem.sizes[-1]
    print(f"{ladder.name}, at {len(ladder.problem.sizes)} shapes, the last of them {in_words(sizes)}:")
    for rung in ladder.rungs:
        words = mistake(rung, ladder.problem)
        if words:
            raise Wrong(f"{title(rung)}: {words}")
        print(f"  {title(rung)}: right; off by {largest_error(rung, ladder.problem, sizes):.1e} of the largest number")


def in_words(sizes: dict) -> str:
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())


def title(rung: Callable) -> str:
    """How a rung is called in tables: its name, and for the one that the model uses its module."""
    module = getattr(rung, "__module__", "")
    return f"{rung.__name__} ({module})" if module.startswith("llm_numba.") else rung.__name__


def trace_of(rung: Callable, ladder: Ladder) -> Trace:
    """What a rung of a CUDA ladder reads and writes at the sizes at which it is counted."""
    return simulate(rung, **arguments(ladder.problem, ladder.counted or ladder.problem.sizes[-1]))


def counts(ladder: Ladder) -> dict[str, dict[str, int]]:
    """The accesses of each rung of a CUDA ladder, in the simulator, by the rung's title."""
    return {title(rung): total(trace_of(rung, ladder)) for rung in ladder.rungs}


def rung_files() -> list[Path]:
    if not FOLDER.is_dir():
        raise UserError(f"{FOLDER}: there are no lessons here: run this in a checkout of llm_numba")
    return sorted((FOLDER / "rungs").glob("[!_]*.py"))


def ladders(file: Path) -> list[Ladder]:
    """The ladders of a file of rungs."""
    return ladders_in(load(str(file), str(file)))


def ladders_in(module: ModuleType) -> list[Ladder]:
    return [value for value in vars(module).values() if isinstance(value, Ladder)]


def file_of(ladder: Ladder) -> str:
    return inspect.getsourcefile(ladder.problem.inputs)
