"""Fixtures of all tests: the ops of the device under test, and memory that tells what an op should not have touched."""

import os

os.environ["NUMBA_NUM_THREADS"] = "4"  # read when Numba is imported; tests choose fewer
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # there may be fewer cores than threads

import functools
import importlib
import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest

from llm_numba.ops import CONTRACT, WRITES

ALIGNMENT = 64
GUARD = 256  # bytes before and after each array
MOST_INTERPRETED = 256  # numbers in an activation that plain Python may work on in a test
DEVICES = ("cpu", "cudasim", "cuda")


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu,cudasim", help="the backends whose ops are tested, separated by commas (cpu,cudasim)"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "compiled: says nothing, or takes too long, under NUMBA_DISABLE_JIT=1")
    config.addinivalue_line("markers", "gpu: for a GPU, real or simulated")
    config.addinivalue_line("markers", "real: says nothing, or takes too long, in the simulator")
    unknown = set(devices(config)) - set(DEVICES)
    if unknown or {"cuda", "cudasim"} <= set(devices(config)):
        raise pytest.UsageError(f"--device {config.getoption('--device')}: expected some of {', '.join(DEVICES)}, "
                                "but cuda and cudasim, which one process cannot have both, only apart")  # fmt: skip
    os.environ["DEVICE_OF_PROGRAMS"] = "cuda" if "cuda" in devices(config) else "cpu"
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1" if "cudasim" in devices(config) else "0"
    if os.environ.get("NUMBA_DISABLE_JIT") == "1":  # NumPy's own scalars warn of each NaN that a test is about
        config.addinivalue_line("filterwarnings", "ignore:invalid value:RuntimeWarning")


def devices(config) -> list[str]:
    return config.getoption("--device").split(",")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices(metafunc.config), scope="session")


def pytest_collection_modifyitems(config, items):
    """Keep what the device has, and under NUMBA_DISABLE_JIT=1 and in the simulator what Python can do in a moment."""

    def is_not_for_it(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("device") == "cpu" and item.get_closest_marker("gpu"):
            return True
        large = math.prod(parameters.get("shape", ())) > MOST_INTERPRETED
        if parameters.get("device") == "cudasim":
            return large or item.get_closest_marker("compiled") or item.get_closest_marker("real")
        return os.environ.get("NUMBA_DISABLE_JIT") == "1" and (large or item.get_closest_marker("compiled"))

    left_out = {item for item in items if is_not_for_it(item)}
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def ops(device):
    """The device's ops on arrays in host memory, each with a check that it changes nothing else than it may, and the
    functions for their scratch sizes."""
    found = {}
    package = "cpu" if device == "cpu" else "cuda"
    for file in CONTRACT:
        module = importlib.import_module(f"llm_numba.{package}.{file}")
        for name in CONTRACT[file]:
            op = getattr(module, name)
            found[name] = only_writes_what_it_may(name, op if package == "cpu" else on_device(op))
            if scratch := getattr(module, f"{name}_scratch", None):
                found[f"{name}_scratch"] = lambda *args, scratch=scratch: scratch(*map(as_on_device, args))
    return SimpleNamespace(**found)


def as_on_device(x):
    """A bf16 array as the arena has it: the device code sees uint16."""
    return x.view(np.uint16) if isinstance(x, np.ndarray) and x.dtype.name == "bfloat16" else x


def root_of(array):
    """The memory that an array is a view of: guards and all."""
    while array.base is not None:
        array = array.base
    return array


def on_device(op):
    """The op on copies of its arrays, guards and all, in the device's memory; then what they have become."""
    from numba import cuda

    from llm_numba.cuda import memory

    @functools.wraps(op)
    def run(*args):
        roots = {id(root_of(x)): root_of(x) for x in args if isinstance(x, np.ndarray)}
        copies = {key: cuda.to_device(root) for key, root in roots.items()}

        def copy_of(x):
            if not isinstance(x, np.ndarray):
                return x
            offset = x.ctypes.data - root_of(x).ctypes.data
            return memory.view(copies[id(root_of(x))], offset, x.shape, x.dtype.name)

        op(*(copy_of(x) for x in args))
        for key, root in roots.items():
            root[...] = memory.to_host(copies[key])

    return run


def only_writes_what_it_may(name, op):
    """The op, followed by a check that every array is unchanged that is neither a destination nor scratch."""
    signature = inspect.signature(op)

    @functools.wraps(op)
    def run(*args):
        arrays = {k: x for k, x in signature.bind(*args).arguments.items() if isinstance(x, np.ndarray)}
        writes = [arrays[k] for k in (*WRITES[name], "scratch") if k in arrays]
        reads = {k: x for k, x in arrays.items() if not any(x is y for y in writes)}
        before = {k: x.tobytes() for k, x in reads.items()}
        op(*args)
        changed = [k for k, x in reads.items() if x.tobytes() != before[k]]
        assert not changed, f"{name} changed its input {', '.join(changed)}"

    return run


@pytest.fixture(params=["float32", pytest.param("bfloat16", marks=pytest.mark.gpu)])
def dtype(request):
    """The precision of parameters and activations."""
    return request.param


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
def assert_same_bits(device):
    """A function that runs `run`, which returns arrays, on 1, 2, 3 and 4 threads of the CPU, or a few times on a GPU,
    and compares the arrays' bytes."""

    def check(run):
        results = []
        for times in (1, 2, 3, 4):
            if device == "cpu":
                numba.set_num_threads(times)
            results.append([x.tobytes() for x in run()])
        for times, result in zip((2, 3, 4), results[1:], strict=True):
            for i, (got, expected) in enumerate(zip(result, results[0], strict=True)):
                what = f"on {times} threads" if device == "cpu" else f"of run {times}"
                assert got == expected, f"result {i} {what} differs from that of the first"

    import numba

    yield check
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
