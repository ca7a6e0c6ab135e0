"""--use OP=MODULE:NAME: run your function in place of an op, and compare the two.

The function has the op's signature and follows its contract. If it needs scratch, NAME_scratch beside it says how much.
MODULE is the name of a module or the path of a .py file.
"""

import difflib
import importlib
import importlib.util
import inspect
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import numpy as np

from llm_numba.ops import CONTRACT, WRITES, Ops
from llm_numba.util.cli import UserError

REPEATS = 5  # timings of each op, of which the median counts


def split(value: str) -> tuple[str, str, str]:
    """(op, module, name) of OP=MODULE:NAME. Errors: another form, no such op, or a file that is not Python."""
    op, _, place = value.partition("=")
    module, _, name = place.rpartition(":")
    problem = None
    if not (op and module and name):
        example = "matmul_forward=my_kernels.py:my_matmul"
        problem = f"expected OP=MODULE:NAME, such as {example}; OP is one of {', '.join(WRITES)}"
    elif op not in WRITES:
        near = (difflib.get_close_matches(op, WRITES, 1) or ["matmul_forward"])[0]
        problem = f"there is no op {op}; did you mean {near}?"
    elif Path(module).exists() and not module.endswith(".py"):
        problem = f"{module} is not a .py file; give one, or the name of a module"
    if problem:
        raise UserError(f"--use {value}: {problem}")
    return op, module, name


def override(ops: Ops, values: Iterable[str], interpret: Iterable[str] = ()) -> Ops:
    """The ops with these functions in their places, as plain Python if `interpret` names the op or its layer.

    Errors: UserError for a module that cannot be loaded, a function that it does not have, or another signature.
    """
    found = {}
    for value in values:
        op, module, name = split(value)
        loaded = load(module, value)
        function = getattr(loaded, name, None)
        if not callable(function):
            raise UserError(f"--use {value}: {module} has no function {name}")
        expected, got = parameters_of(getattr(ops, op)), parameters_of(function)
        if len(expected) != len(got):
            problem = f"expected a function with the parameters of {op} ({', '.join(expected)}); it has"
            raise UserError(f"--use {value}: {problem} {', '.join(got)}")
        layer = next(file for file, names in CONTRACT.items() if op in names)
        found[op] = getattr(function, "py_func", function) if {op, layer} & {*interpret} else function
        if hasattr(loaded, f"{name}_scratch"):
            found[f"{op}_scratch"] = getattr(loaded, f"{name}_scratch")
    return ops.replace(**found)


def load(module: str, value: str) -> ModuleType:
    """The module. Errors: UserError, whatever a file of the user raises."""
    try:
        if not module.endswith(".py"):
            return importlib.import_module(module)
        path = Path(module).resolve()
        # a unique name, by which Numba finds the module again when it loads a compiled function from disk
        name = f"own_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader  # every .py file has them
        sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded
    except Exception as error:
        raise UserError(f"--use {value}: {module} cannot be loaded ({type(error).__name__}: {error})") from error


def parameters_of(function: Callable) -> list[str]:
    return list(inspect.signature(getattr(function, "py_func", function)).parameters)


def compare(ops: Ops, own: Ops, values: Iterable[str], step: Callable[[Ops], None], say: Callable[[str], None]) -> None:
    """Say for each replaced op the time of both in a step, median and range, and how much their results differ.

    step: runs the ops that it is given, on a batch that is in place. Each call is made twice, first by the production
    op, on copies of what it writes.
    """
    names = {split(value)[0]: value for value in values}
    runs, errors = [], dict.fromkeys(names, 0.0)

    def compared(op, mine):
        original = getattr(ops, op)
        written = [i for i, name in enumerate(parameters_of(original)) if name in WRITES[op]]

        def call(*arguments):
            outputs = [i for i in written if arguments[i] is not None]
            copies = [copy(ops, x) if i in outputs else x for i, x in enumerate(arguments)]
            for i, (function, given) in enumerate(((original, copies), (mine, arguments))):
                result = given[outputs[0]].reshape(-1)[:1]
                ops.to_host(result)  # waits for a GPU
                start = time.perf_counter()
                function(*given)
                ops.to_host(result)
                runs[-1][op][i] += time.perf_counter() - start
            errors[op] = max(errors[op], *(distance(ops, arguments[i], copies[i]) for i in outputs))

        return call

    both = own.wrap(compared, names)
    for _ in range(1 + REPEATS):
        runs.append({op: np.zeros(2) for op in names})  # seconds of the production op and of mine
        step(both)
    for op, value in names.items():
        ms = np.array([run[op] for run in runs[1:]]) * 1e3  # the first run compiles
        if not ms.any():
            say(f"--use {value}: used, but not compared: forward and backward do not call {op}")
            continue
        (theirs, mine), low, high = np.median(ms, axis=0), ms.min(axis=0), ms.max(axis=0)
        say(
            f"--use {value}: {mine:.4g} ms a step ({low[1]:.4g} to {high[1]:.4g}), production {op} {theirs:.4g} ms "
            f"({low[0]:.4g} to {high[0]:.4g}), medians of {REPEATS}; largest difference {errors[op]:.1e} of a tensor's "
            "largest element"
        )


def copy(ops: Ops, tensor):
    other = ops.view(ops.allocate(tensor.size * tensor.dtype.itemsize), 0, tensor.shape, tensor.dtype.name)
    ops.copy(other, tensor)
    return other


def distance(ops: Ops, result, expected) -> float:
    """The largest |result - expected| relative to the largest |expected|; infinite if only one of two is a number."""
    result, expected = (np.array(ops.to_host(x)).astype(np.float64) for x in (result, expected))
    same = (result == expected) | (np.isnan(result) & np.isnan(expected))
    difference = np.abs(result - expected)[~same]
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    return float(np.nan_to_num(difference, nan=np.inf).max() / (largest or 1.0)) if difference.size else 0.0
