"""A ladder: functions that compute the same result, each with one more idea. The last one is the model's own op.

    LADDER = Ladder("layernorm_forward", PROBLEM, (layernorm_forward_v1, layernorm_forward_v2, layernorm_forward), ...)

Ladders are defined at the end of the files in lessons/rungs; `ladders` finds them there.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llm_numba.lessons import FOLDER
from llm_numba.lessons.counting import total
from llm_numba.lessons.problem import Problem, arguments, find_error, largest_error
from llm_numba.lessons.tracing import Trace, simulate
from llm_numba.training.override import load
from llm_numba.util.cli import UserError


class Ladder(NamedTuple):
    """name: the op's name in the tables. rungs: functions with the same signature, outputs first.
    timed, quick: the sizes for timing, and those used in the tests; `timed` of a CUDA ladder is for a GPU.
    flops, nbytes: called with the sizes by keyword; the flops of a run, or the bytes that it has to move. Give the one
    that limits the op.
    dtype: argument of `peak_flops`, used with flops. pattern: key of `peak_bandwidth`, used with nbytes.
    vendors: functions of other libraries with the same signature, such as NumPy's, timed as well.
    torch: the op of llm_numba.bench that PyTorch runs for comparison, in this dtype and at these sizes.
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


class WrongResult(AssertionError):
    """A rung does not compute the expected result."""


def check(ladder: Ladder) -> None:
    """Compare every rung with the float64 oracle at every size and print its largest error. CUDA rungs run in the
    simulator, which also finds races. Errors: WrongResult, with a message about the first error."""
    sizes = ladder.problem.sizes[-1]
    print(f"{ladder.name}, at {len(ladder.problem.sizes)} shapes, the last one {format_sizes(sizes)}:")
    for rung in ladder.rungs:
        error = find_error(rung, ladder.problem)
        if error:
            raise WrongResult(f"{title(rung)}: {error}")
        relative = largest_error(rung, ladder.problem, sizes)
        print(f"  {title(rung)}: correct; largest error {relative:.1e}, relative to the largest element")


def format_sizes(sizes: dict) -> str:
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())


def title(rung: Callable) -> str:
    """The name of a rung in tables; for the model's own op, with its module."""
    module = getattr(rung, "__module__", "")
    return f"{rung.__name__} ({module})" if module.startswith("llm_numba.") else rung.__name__


def trace_of(rung: Callable, ladder: Ladder) -> Trace:
    """The recorded accesses of a CUDA rung, at the ladder's `counted` sizes."""
    return simulate(rung, **arguments(ladder.problem, ladder.counted or ladder.problem.sizes[-1]))


def counts(ladder: Ladder) -> dict[str, dict[str, int]]:
    """The access counts of each rung of a CUDA ladder, by the rung's title."""
    return {title(rung): total(trace_of(rung, ladder)) for rung in ladder.rungs}


def rung_files() -> list[Path]:
    if not FOLDER.is_dir():
        raise UserError(f"{FOLDER}: no lessons found; run this in a checkout of llm_numba")
    return sorted((FOLDER / "rungs").glob("[!_]*.py"))


def ladders(file: Path) -> list[Ladder]:
    """The ladders that a file of rungs defines."""
    return [value for value in vars(load(str(file), str(file))).values() if isinstance(value, Ladder)]


def file_of(ladder: Ladder) -> str:
    return inspect.getsourcefile(ladder.problem.inputs)
