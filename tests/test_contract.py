"""The CPU's files and their twins: the same names, the same signatures, and what the contract says of them."""

import importlib
import inspect

import pytest

from llm_numba.ops import BACKEND, CONTRACT

FILES = sorted(CONTRACT.keys() | BACKEND.keys())


def functions(package, file):
    """name -> parameters, of what the contract and the rest of the program ask of a file; and its sizes of scratch."""
    module = importlib.import_module(f"llm_numba.{package}.{file}")
    asked = {*CONTRACT.get(file, ()), *BACKEND.get(file, ())} | {n for n in vars(module) if n == f"{file}_scratch_size"}
    found = {name: getattr(module, name) for name in asked}
    return {name: inspect.signature(getattr(f, "py_func", f)) for name, f in found.items()}


@pytest.mark.parametrize("file", FILES)
def test_twins_have_the_same_signatures(file):
    ours, theirs = functions("cpu", file), functions("cuda", file)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert list(ours[name].parameters) == list(theirs[name].parameters), name


@pytest.mark.parametrize("file", CONTRACT)
def test_what_an_op_writes_are_its_parameters(file):
    for name, signature in functions("cpu", file).items():
        written = CONTRACT[file].get(name, ())
        assert set(written) <= signature.parameters.keys(), name
        first = list(signature.parameters)[: len(written)]
        assert name == "adamw_update" or set(written) == set(first), f"{name} does not have its destinations first"
