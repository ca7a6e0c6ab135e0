"""What a kernel has to compute, and whether it does: the same for the rungs of a ladder and for a learner's answer."""

import linecache
import math
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llm_numba.lessons.faults import faults
from llm_numba.lessons.tracing import Trace, simulate, simulate_cpu
from llm_numba.util.cli import UserError

ALIGNMENT, GUARD = 64, 256  # bytes; those before and after an array show that a compiled function went beyond it
SEED = 20190214


class Problem(NamedTuple):
    """oracle: the right answer in NumPy, with the arguments of the kernel, best one of llm_numba.oracle.
    inputs: inputs(rng, **sizes) -> the arguments by name, in the order of the signature; arrays that are written are
        full of NaN (`garbage`), those that accumulate are not.
    writes: the names of the arrays that are written; an argument "scratch" may change too, and is not compared.
    sizes: those at which it is checked; the awkward ones are among them, such as 1, 3, 97, 257.
    device: "cpu" or "cuda", in the simulator.
    tolerance: the largest error, in shares of the largest number of the right answer.
    """

    oracle: Callable
    inputs: Callable[..., dict[str, Any]]
    writes: tuple[str, ...]
    sizes: tuple[dict[str, int], ...]
    device: str = "cpu"
    tolerance: float = 1e-5


def garbage(*shape: int) -> np.ndarray:
    """An array whose content must not matter."""
    return np.full(shape, np.nan, np.float32)


def normal(rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def arguments(problem: Problem, sizes: dict) -> dict[str, Any]:
    return problem.inputs(np.random.default_rng(SEED), **sizes)


def right_answer(problem: Problem, given: dict) -> dict[str, np.ndarray]:
    """What the oracle makes of the arguments in float64."""
    wide = {k: x.astype(np.float64) if is_float(x) else np.copy(x) if is_array(x) else x for k, x in given.items()}
    problem.oracle(*wide.values())
    return {name: wide[name] for name in problem.writes}


def is_array(x) -> bool:
    return isinstance(x, np.ndarray)


def is_float(x) -> bool:
    return is_array(x) and x.dtype.kind == "f"


def mistake(function: Callable, problem: Problem, recorded: bool | None = None) -> str | None:
    """The first thing that is wrong with the function, in words; None where it is right at all sizes.

    recorded: run it so that races and indices out of bounds are seen, as plain Python: always in the simulator, for the
    CPU where it is asked for, before the compiled function is run.
    """
    for sizes in problem.sizes:
        given = arguments(problem, sizes)
        expected = right_answer(problem, given)
        words = None
        if problem.device == "cuda" or recorded:
            words = mistake_in_recording(function, problem, given, expected)
        if words is None and problem.device == "cpu":
            words = mistake_in_results(run_guarded(function, given, problem), given, expected, problem, None)
        if words:
            return f"with {', '.join(f'{name}={size}' for name, size in sizes.items())}: {words}"
    return None


def mistake_in_recording(function: Callable, problem: Problem, given: dict, expected: dict) -> str | None:
    try:
        trace = (simulate if problem.device == "cuda" else simulate_cpu)(function, **given)
    except NotImplementedError as error:
        return f"the hole is still there: write your code at {place_of(error)}"
    except UserError:  # the simulator is missing or turned off
        raise
    except Exception as error:  # whatever a learner's program may raise
        text = str(error).partition(": ")[2] if str(error).startswith("tid=") else str(error)
        return f"it stops with {type(error).__name__}: {text or 'no message'}, at {place_of(error)}"
    return next(iter(faults(trace)), None) or mistake_in_results(trace.results, given, expected, problem, trace)


def place_of(error: Exception) -> str:
    """The last line of the program, not of the libraries, that an exception went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(part in f.filename for part in ("numba", "threading.py"))]
    frame = (own or frames)[-1]
    text = linecache.getline(frame.filename, frame.lineno).strip()
    return f"line {frame.lineno}: `{text}`"


def run_guarded(function: Callable, given: dict, problem: Problem) -> dict | str:
    """The arguments after the compiled function has run on them; words where it wrote beyond one of them or failed."""
    memory, placed = {}, {}
    for name, x in given.items():
        placed[name] = x
        if is_array(x):
            block = np.full(ALIGNMENT + GUARD + x.nbytes + GUARD, 0xFF, np.uint8)
            start = GUARD + -(block.ctypes.data + GUARD) % ALIGNMENT
            placed[name] = block[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
            placed[name][...] = x
            memory[name] = block[:start], block[start + x.nbytes :]
    try:
        function(*placed.values())
    except NotImplementedError:
        return f"the hole is still there, in {getattr(function, '__name__', 'the function')}"
    except Exception as error:  # whatever a learner's program may raise; Numba's own messages have many lines
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"it stops with {type(error).__name__}: {' '.join(lines[:6])}"
    for name, (before, after) in memory.items():
        if not ((before == 0xFF).all() and (after == 0xFF).all()):
            side = "after the end" if (before == 0xFF).all() else "before the start"
            return f"it writes {side} of {name}, of shape {given[name].shape}"
    return placed


def mistake_in_results(
    results: dict | str, given: dict, expected: dict, problem: Problem, trace: Trace | None
) -> str | None:
    if isinstance(results, str):
        return results
    for name, x in given.items():
        if is_array(x) and name not in (*problem.writes, "scratch") and results[name].tobytes() != x.tobytes():
            index = tuple(np.argwhere(results[name] != x)[0])
            return f"it changes its input {name}, at {element(name, index)}"
    for name, right in expected.items():
        if words := difference(name, results[name], right, problem.tolerance, trace):
            return words
    return None


def difference(name: str, got: np.ndarray, right: np.ndarray, tolerance: float, trace: Trace | None) -> str | None:
    """Words on the first element that is wrong, and on where the others are; None where none is."""
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
            text = f"nothing is ever written to {element(name, index)}, which should be {right[index]:.6g}"
    return f"{text}; {where_wrong(name, wrong)}"


def element(name: str, index: tuple) -> str:
    return f"{name}[{', '.join(str(int(i)) for i in index)}]"


def where_wrong(name: str, wrong: np.ndarray) -> str:
    """How many elements are wrong, and what their indices have in common."""
    if wrong.all():
        return f"all of {name} is wrong" if wrong.size > 1 else f"it is the only element of {name}"
    text = f"{wrong.sum()} of {wrong.size} elements are wrong"
    indices = np.argwhere(wrong)
    for axis, size in enumerate(wrong.shape):
        first, last = indices[:, axis].min(), indices[:, axis].max()
        if wrong.ndim > 1 and first == last and size > 1 and len(indices) > 1:
            text += f", all of them at {name}[{', '.join(str(first) if a == axis else ':' for a in range(wrong.ndim))}]"
        elif wrong.ndim == 1 and len(indices) > 1 and last - first + 1 == len(indices):
            text += f", those from {name}[{first}] to {name}[{last}]"
    return text


def largest_error(function: Callable, problem: Problem, sizes: dict) -> float:
    """The largest error of a right function, in shares of the largest number of what it writes."""
    given = arguments(problem, sizes)
    expected = right_answer(problem, given)
    results = simulate(function, **given).results if problem.device == "cuda" else run_guarded(function, given, problem)
    return max(
        float(np.nan_to_num(np.abs(results[k] - right)).max() / max(np.abs(right).max(), 1e-30))
        for k, right in expected.items()
    )
