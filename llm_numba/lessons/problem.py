"""What a kernel has to compute, and a check that it does. Used for the rungs of a ladder and for a learner's answer."""

import linecache
import math
import threading
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_numba.lessons.faults import faults
from llm_numba.lessons.tracing import Trace, simulate, simulate_cpu
from llm_numba.util.cli import UserError

ALIGNMENT, GUARD = 64, 256  # bytes; guard bytes before and after an array reveal out-of-bounds writes of compiled code
SEED = 20190214
LIBRARIES = [Path(spec.origin).parent for name in ("numba", "numba_cuda", "llm_numba") if (spec := find_spec(name))]


class Problem(NamedTuple):
    """oracle: computes the expected results in NumPy, with the kernel's arguments; llm_numba.oracle has those of the
        model's ops.
    inputs: inputs(rng, **sizes) -> the arguments by name, in the order of the signature. Arrays that are written (=)
        start as NaN (`garbage`); arrays that are accumulated into (+=) do not.
    writes: the names of the output arrays. An argument named "scratch" may also change and is not compared.
    sizes: the sizes to check, awkward ones among them, such as 1, 3, 97, 257.
    device: "cpu", or "cuda" in the simulator.
    tolerance: the largest error, relative to the largest element of the expected result.
    """

    oracle: Callable
    inputs: Callable[..., dict[str, Any]]
    writes: tuple[str, ...]
    sizes: tuple[dict[str, int], ...]
    device: str = "cpu"
    tolerance: float = 1e-5


def garbage(*shape: int) -> np.ndarray:
    """An array of NaN, for outputs that must be overwritten."""
    return np.full(shape, np.nan, np.float32)


def normal(rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def arguments(problem: Problem, sizes: dict) -> dict[str, Any]:
    return problem.inputs(np.random.default_rng(SEED), **sizes)


def expected_results(problem: Problem, given: dict) -> dict[str, np.ndarray]:
    """The outputs that the oracle computes from the arguments in float64."""
    wide = {k: x.astype(np.float64) if is_float(x) else np.copy(x) if is_array(x) else x for k, x in given.items()}
    problem.oracle(*wide.values())
    return {name: wide[name] for name in problem.writes}


def is_array(x) -> bool:
    return isinstance(x, np.ndarray)


def is_float(x) -> bool:
    return is_array(x) and x.dtype.kind == "f"


def find_error(function: Callable, problem: Problem, recorded: bool | None = None) -> str | None:
    """A message about the function's first error; None if it is correct at all sizes.

    recorded: also run a CPU function as plain Python, before the compiled one, to find races and indices out of bounds.
    CUDA kernels always run this way, in the simulator.
    """
    for sizes in problem.sizes:
        given = arguments(problem, sizes)
        expected = expected_results(problem, given)
        error = None
        if problem.device == "cuda" or recorded:
            error = error_in_recording(function, problem, given, expected)
        if error is None and problem.device == "cpu":
            error = error_in_results(run_guarded(function, given, problem), given, expected, problem, None)
        if error:
            return f"with {', '.join(f'{name}={size}' for name, size in sizes.items())}: {error}"
    return None


def error_in_recording(function: Callable, problem: Problem, given: dict, expected: dict) -> str | None:
    try:
        trace = (simulate if problem.device == "cuda" else simulate_cpu)(function, **given)
    except NotImplementedError as error:
        return f"the function is unfinished: write your code at {location_of(error)}"
    except UserError:
        raise
    except Exception as error:  # any error of the learner's code
        text = str(error).partition(": ")[2] if str(error).startswith("tid=") else str(error)
        return f"it raises {type(error).__name__}: {text or 'no message'}, at {location_of(error)}"
    return next(iter(faults(trace)), None) or error_in_results(trace.results, given, expected, problem, trace)


def location_of(error: Exception) -> str:
    """The innermost line of the traceback that is not in a library."""
    frames = traceback.extract_tb(error.__traceback__)
    learners = [frame for frame in frames if not is_library(frame.filename)]
    frame = (learners or frames)[-1]
    text = linecache.getline(frame.filename, frame.lineno).strip()
    return f"line {frame.lineno}: `{text}`"


def is_library(file: str) -> bool:
    return file == threading.__file__ or any(Path(file).is_relative_to(folder) for folder in LIBRARIES)


def run_guarded(function: Callable, given: dict, problem: Problem) -> dict | str:
    """Run the compiled function on copies of the arguments, and return them; a message if it writes outside one of the
    arrays or raises."""
    guards, placed = {}, {}
    for name, x in given.items():
        placed[name] = x
        if is_array(x):
            block = np.full(ALIGNMENT + GUARD + x.nbytes + GUARD, 0xFF, np.uint8)
            start = GUARD + -(block.ctypes.data + GUARD) % ALIGNMENT
            placed[name] = block[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
            placed[name][...] = x
            guards[name] = block[:start], block[start + x.nbytes :]
    try:
        function(*placed.values())
    except NotImplementedError:
        return f"the function is unfinished: {getattr(function, '__name__', 'it')} raises NotImplementedError"
    except Exception as error:  # any error of the learner's code; Numba's messages have many lines
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"it raises {type(error).__name__}: {' '.join(lines[:6])}"
    for name, (before, after) in guards.items():
        if not ((before == 0xFF).all() and (after == 0xFF).all()):
            side = "after the end" if (before == 0xFF).all() else "before the start"
            return f"it writes {side} of {name}, which has shape {given[name].shape}"
    return placed


def error_in_results(
    results: dict | str, given: dict, expected: dict, problem: Problem, trace: Trace | None
) -> str | None:
    if isinstance(results, str):
        return results
    for name, x in given.items():
        if is_array(x) and name not in (*problem.writes, "scratch") and results[name].tobytes() != x.tobytes():
            index = tuple(np.argwhere(results[name] != x)[0])
            return f"it changes its input {name}, at {element(name, index)}"
    for name, right in expected.items():
        if error := difference(name, results[name], right, problem.tolerance, trace):
            return error
    return None


def difference(name: str, got: np.ndarray, right: np.ndarray, tolerance: float, trace: Trace | None) -> str | None:
    """A message about the first wrong element and about which others are wrong; None if all are right."""
    got = np.asarray(got, np.float64)
    allowed = tolerance * max(np.abs(right[np.isfinite(right)]).max(initial=0.0), 1e-30)
    with np.errstate(invalid="ignore"):
        wrong = ~((np.abs(got - right) <= allowed) | (got == right) | (np.isnan(got) & np.isnan(right)))
    if not wrong.any():
        return None
    index = tuple(int(i) for i in np.argwhere(wrong)[0])
    value = got[index]
    text = f"{element(name, index)} is {value:.6g}, but should be {right[index]:.6g}"
    if math.isnan(value):
        text = f"{element(name, index)} is nan, but should be {right[index]:.6g}"
        if trace and not any(a.array == name and a.kind != "read" and a.index == index for a in trace.accesses):
            text = f"{element(name, index)} is never written, but should be {right[index]:.6g}"
    return f"{text}; {which_wrong(name, wrong)}"


def element(name: str, index: tuple) -> str:
    return f"{name}[{', '.join(str(int(i)) for i in index)}]"


def which_wrong(name: str, wrong: np.ndarray) -> str:
    """How many elements are wrong, and what their indices have in common."""
    if wrong.all():
        return f"all elements of {name} are wrong" if wrong.size > 1 else f"it is the only element of {name}"
    text = f"{wrong.sum()} of {wrong.size} elements are wrong"
    indices = np.argwhere(wrong)
    for axis, size in enumerate(wrong.shape):
        first, last = indices[:, axis].min(), indices[:, axis].max()
        if wrong.ndim > 1 and first == last and size > 1 and len(indices) > 1:
            text += f", all of them in {name}[{', '.join(str(first) if a == axis else ':' for a in range(wrong.ndim))}]"
        elif wrong.ndim == 1 and len(indices) > 1 and last - first + 1 == len(indices):
            text += f", from {name}[{first}] to {name}[{last}]"
    return text


def largest_error(function: Callable, problem: Problem, sizes: dict) -> float:
    """The largest error of a correct function, relative to the largest element of each output."""
    given = arguments(problem, sizes)
    expected = expected_results(problem, given)
    results = simulate(function, **given).results if problem.device == "cuda" else run_guarded(function, given, problem)
    return max(
        float(np.nan_to_num(np.abs(results[k] - right)).max() / max(np.abs(right).max(), 1e-30))
        for k, right in expected.items()
    )
