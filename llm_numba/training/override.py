"""--use OP=MODULE:NAME: a function of your own in the place of an op, and how the two compare.

The function has the op's signature and its contract. MODULE is a module's name or a .py file.
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
from types import ModuleType, SimpleNamespace

import numpy as np

from llm_numba.ops import CONTRACT, WRITES
from llm_numba.util.cli import UserError


def split(value: str) -> tuple[str, str, str]:
    """(op, module, name) of OP=MODULE:NAME. Errors: it has another form, or there is no such op."""
    op, _, place = value.partition("=")
    module, _, name = place.rpartition(":")
    if not (op and module and name):
        raise UserError(f"--use {value}: expected OP=MODULE:NAME, such as matmul_forward=lessons.matmul_cpu:v3")
    if op not in WRITES:
        near = (difflib.get_close_matches(op, WRITES, 1) or ["matmul_forward"])[0]
        raise UserError(f"--use {value}: there is no op {op}; did you mean {near}?")
    return op, module, name


def borrow(ops: SimpleNamespace, values: Iterable[str], interpret: Iterable[str] = ()) -> SimpleNamespace:
    """The ops with these functions in their places, as plain Python where `interpret` names the op or its layer.

    Errors: UserError for a module that cannot be loaded, a function that it has not, or one of another signature.
    """
    found = {}
    for value in values:
        op, module, name = split(value)
        function = getattr(load(module, value), name, None)
        if not callable(function):
            raise UserError(f"--use {value}: {module} has no function {name}")
        expected, got = parameters_of(getattr(ops, op)), parameters_of(function)
        if len(expected) != len(got):
            raise UserError(
                f"--use {value}: expected a function of {', '.join(expected)}, as {op} is; it has {', '.join(got)}"
            )
        layer = next(file for file, names in CONTRACT.items() if op in names)
        plain = op in interpret or layer in interpret
        found[op] = getattr(function, "py_func", function) if plain else function
    return SimpleNamespace(**{**vars(ops), **found})


def load(module: str, value: str) -> ModuleType:
    try:
        if not module.endswith(".py"):
            return importlib.import_module(module)
        path = Path(module).resolve()
        # a name of its own, by which Numba finds the module again when it reads a compiled function from disk
        name = f"own_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded
    except Exception as error:  # whatever a learner's file may raise
        raise UserError(f"--use {value}: {module} cannot be loaded ({type(error).__name__}: {error})") from error


def parameters_of(function: Callable) -> list[str]:
    return list(inspect.signature(getattr(function, "py_func", function)).parameters)


def beside(ops: SimpleNamespace, own: SimpleNamespace, values: Iterable[str], step: Callable) -> list[str]:
    """A line for each borrowed op: how long it takes in a step, and how far it is off, beside the op of `ops`.

    step: runs the ops that it is given, on a batch that is in place. Each call is made twice, first by the op itself,
    on copies of what it writes.
    """
    names = {split(value)[0]: value for value in values}
    seconds = {op: np.zeros(2) for op in names}
    errors = {op: [0.0] for op in names}

    def compared(op):
        original, mine = getattr(ops, op), getattr(own, op)
        written = [i for i, name in enumerate(parameters_of(original)) if name in WRITES[op]]

        def call(*arguments):
            copies = [copy(ops, x) if i in written and x is not None else x for i, x in enumerate(arguments)]
            for i, (function, given) in enumerate(((original, copies), (mine, arguments))):
                result = next(given[w] for w in written if given[w] is not None).reshape(-1)[:1]
                ops.to_host(result)  # a card is idle by then
                start = time.perf_counter()
                function(*given)
                ops.to_host(result)
                seconds[op][i] += time.perf_counter() - start
            errors[op] += [distance(ops, arguments[i], copies[i]) for i in written if arguments[i] is not None]

        return call

    for _ in range(2):  # in the first, what is not compiled yet is compiled
        for taken in seconds.values():
            taken[:] = 0
        step(SimpleNamespace(**{**vars(own), **{op: compared(op) for op in names}}))
    return [
        f"--use {value}: {seconds[op][1] * 1e3:.4g} ms a step, {op} itself {seconds[op][0] * 1e3:.4g} ms; they differ "
        f"by at most {max(errors[op]):.1e} of a tensor's largest number"
        if seconds[op].any()
        else f"--use {value}: used; not compared with {op}, which forward and backward do not call"
        for op, value in names.items()
    ]


def copy(ops, tensor):
    other = ops.view(ops.allocate(tensor.size * tensor.dtype.itemsize), 0, tensor.shape, tensor.dtype.name)
    ops.copy(other, tensor)
    return other


def distance(ops, mine, theirs) -> float:
    """The largest |mine - theirs| in the largest |theirs|; infinite where only one is a number."""
    mine, theirs = (np.array(ops.to_host(x)).astype(np.float64) for x in (mine, theirs))
    off = np.abs(mine - theirs)[~((mine == theirs) | (np.isnan(mine) & np.isnan(theirs)))]
    largest = np.abs(theirs[np.isfinite(theirs)]).max(initial=0.0)
    return float(np.nan_to_num(off, nan=np.inf).max() / (largest or 1.0)) if off.size else 0.0
