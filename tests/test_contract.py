"""The twins on the CPU and the GPU have the same names and signatures, and these agree with the contract."""

import importlib
import inspect

import pytest

from llm_numba.ops import BACKEND, CONTRACT

FILES = sorted(CONTRACT.keys() | BACKEND.keys())


def parameters(package, file, name):
    function = getattr(importlib.import_module(f"llm_numba.{package}.{file}"), name)
    return list(inspect.signature(getattr(function, "py_func", function)).parameters)


@pytest.mark.parametrize("file", FILES)
def test_twins_have_the_same_signatures(file):
    for name in (*CONTRACT.get(file, ()), *BACKEND.get(file, ())):
        assert parameters("cpu", file, name) == parameters("cuda", file, name), name


@pytest.mark.parametrize("file", CONTRACT)
def test_an_op_writes_its_first_parameters(file):
    for name, written in CONTRACT[file].items():
        found = parameters("cpu", file, name)
        assert set(written) <= set(found), name
        assert name == "adamw_update" or set(written) == set(found[: len(written)]), f"{name}: destinations come first"


@pytest.mark.parametrize("package", ["cpu", "cuda"])
@pytest.mark.parametrize("file", CONTRACT)
def test_an_op_declares_its_scratch(package, file):
    """<op>_scratch takes the parameters of the op, without scratch."""
    for name in CONTRACT[file]:
        found = parameters(package, file, name)
        if "scratch" in found:
            found.remove("scratch")
            assert parameters(package, file, f"{name}_scratch") == found
