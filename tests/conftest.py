"""Fixtures of all tests: the ops of the device under test, and memory that tells what an op should not have touched."""

import os

os.environ["NUMBA_NUM_THREADS"] = "4"  # read when Numba is imported; tests choose fewer
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # there may be fewer cores than threads

import importlib
import inspect
import math
from types import SimpleNamespace

import numba
import numpy as np
import pytest

from llm_numba.ops import CONTRACT, WRITES, get_ops

ALIGNMENT = 64
GUARD = 256  # bytes before and after each array
MOST_INTERPRETED = 256  # numbers in an activation that plain Python may work on in a test


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="the backend whose ops are tested")


def pytest_configure(config):
    config.addinivalue_line("markers", "compiled: says nothing, or takes too long, under NUMBA_DISABLE_JIT=1")
    if numba.config.DISABLE_JIT:  # NumPy's own scalars warn of each NaN that a test is about
        config.addinivalue_line("filterwarnings", "ignore:invalid value:RuntimeWarning")


def pytest_collection_modifyitems(config, items):
    """Under NUMBA_DISABLE_JIT=1 keep what plain Python can do in a moment."""
    if numba.config.DISABLE_JIT:

        def is_slow(item):
            shape = item.callspec.params.get("shape", ()) if hasattr(item, "callspec") else ()
            return item.get_closest_marker("compiled") or math.prod(shape) > MOST_INTERPRETED

        config.hook.pytest_deselected(items=[item for item in items if is_slow(item)])
        items[:] = [item for item in items if not is_slow(item)]


@pytest.fixture(scope="session")
def ops(request):
    """The device's ops, each made to check that it changes only what it may, and their scratch sizes."""
    device = request.config.getoption("--device")
    found = {name: only_writes_what_it_may(name, op) for name, op in vars(get_ops(device)).items() if name in WRITES}
    for file in CONTRACT:
        module = importlib.import_module(f"llm_numba.{device}.{file}")
        found |= {name: value for name, value in vars(module).items() if name == f"{file}_scratch_size"}
    return SimpleNamespace(**found)


def only_writes_what_it_may(name, op):
    """The op, followed by a check that every array is unchanged that is neither a destination nor scratch."""
    signature = inspect.signature(op)

    def run(*args):
        arrays = {k: x for k, x in signature.bind(*args).arguments.items() if isinstance(x, np.ndarray)}
        writes = [arrays[k] for k in (*WRITES[name], "scratch") if k in arrays]
        reads = {k: x for k, x in arrays.items() if not any(x is y for y in writes)}
        before = {k: x.tobytes() for k, x in reads.items()}
        op(*args)
        changed = [k for k, x in reads.items() if x.tobytes() != before[k]]
        assert not changed, f"{name} changed its input {', '.join(changed)}"

    return run


@pytest.fixture
def rng():
    return np.random.default_rng(20190214)


@pytest.fixture
def place():
    """A function that copies values into memory of their own, as float32 unless told otherwise.

    The copy is aligned like the arena's tensors and stands between guards: bytes that read as NaN, and that must be
    the same when the test ends.
    """
    guards = []

    def copy(values, dtype=np.float32):
        values = np.asarray(values, dtype)
        memory = np.full(ALIGNMENT + GUARD + values.nbytes + GUARD, 0xFF, np.uint8)
        start = GUARD + -(memory.ctypes.data + GUARD) % ALIGNMENT
        array = memory[start : start + values.nbytes].view(dtype).reshape(values.shape)
        array[...] = values
        guards.append((values.shape, memory[:start], memory[start + values.nbytes :]))
        return array

    yield copy
    for shape, before, after in guards:
        assert (before == 0xFF).all(), f"something was written before an array of shape {shape}"
        assert (after == 0xFF).all(), f"something was written after an array of shape {shape}"


@pytest.fixture
def garbage(place):
    """A function that makes an array whose content must not matter: all NaN, between guards."""
    return lambda *shape: place(np.full(shape, np.nan))


@pytest.fixture
def assert_same_bits():
    """A function that runs `run`, which returns arrays, on 1, 2, 3 and 4 threads and compares the arrays' bytes."""

    def check(run):
        try:
            results = []
            for threads in (1, 2, 3, 4):
                numba.set_num_threads(threads)
                results.append([x.tobytes() for x in run()])
        finally:
            numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
        for threads, result in zip((2, 3, 4), results[1:], strict=True):
            for i, (got, expected) in enumerate(zip(result, results[0], strict=True)):
                assert got == expected, f"result {i} on {threads} threads differs from that on one"

    return check
