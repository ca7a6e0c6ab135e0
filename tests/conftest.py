"""Shared fixtures: the ops of the device under test, and guarded memory that shows what an op should not write."""

import os

os.environ["NUMBA_NUM_THREADS"] = "4"  # Numba reads it on import; tests may use fewer
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # more threads than cores

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
MOST_INTERPRETED = 256  # elements of an activation in a test that runs as plain Python
DEVICES = ("cpu", "cudasim", "cuda")
FAULT_FILES = {"test_faults", "test_untrusted", "test_survival"}
SLOW_FILES = {
    *("test_assembled", "test_bench", "test_bf16", "test_override", "test_compilation", "test_debugging"),
    *("test_devices", "test_eval", "test_huggingface", "test_lessons", "test_lessons_tools", "test_llmc"),
    *("test_plain_python", "test_replay", "test_vectors", "test_weights"),
}
QUICK_SIMULATED = 16  # elements of an activation in a quick test in the simulator


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu,cudasim", help="devices to test, separated by commas (default: cpu,cudasim)"
    )


def pytest_configure(config):
    unknown = set(devices(config)) - set(DEVICES)
    if unknown or {"cuda", "cudasim"} <= set(devices(config)):
        raise pytest.UsageError(
            f"--device {config.getoption('--device')}: expected some of {', '.join(DEVICES)}; cuda and cudasim need "
            "separate runs"
        )
    os.environ["DEVICE_OF_PROGRAMS"] = "cuda" if "cuda" in devices(config) else "cpu"
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1" if "cudasim" in devices(config) else "0"
    if os.environ.get("NUMBA_DISABLE_JIT") == "1":  # NumPy scalars warn about NaN
        config.addinivalue_line("filterwarnings", "ignore:invalid value:RuntimeWarning")


def devices(config) -> list[str]:
    return config.getoption("--device").split(",")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices(metafunc.config), scope="session")


def is_quick(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    large = parameters.get("device") == "cudasim" and math.prod(parameters.get("shape", ())) > QUICK_SIMULATED
    return not (large or item.path.stem in SLOW_FILES | FAULT_FILES or item.get_closest_marker("slow"))


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    """Mark tests as quick or faults. Deselect what the device does not have, and what plain Python or the simulator is
    too slow for."""
    for item in items:
        if item.path.stem in FAULT_FILES:
            item.add_marker("faults")
        if is_quick(item):
            item.add_marker("quick")

    def is_excluded(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("device") == "cpu" and item.get_closest_marker("gpu"):
            return True
        large = math.prod(parameters.get("shape", ())) > MOST_INTERPRETED
        if parameters.get("device") == "cudasim":
            return large or item.get_closest_marker("compiled") or item.get_closest_marker("real")
        return os.environ.get("NUMBA_DISABLE_JIT") == "1" and (large or item.get_closest_marker("compiled"))

    excluded = {item for item in items if is_excluded(item)}
    config.hook.pytest_deselected(items=excluded)
    items[:] = [item for item in items if item not in excluded]


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
    """The allocation that an array is a view of, guards included."""
    while array.base is not None:
        array = array.base
    return array


def on_device(op):
    """The op on device copies of its arrays, guards included; the results are copied back."""
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
    """The op, followed by a check that no array changed except destinations and scratch."""
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
    """The dtype of parameters and activations."""
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(20190214)


@pytest.fixture
def place():
    """A function that copies values into newly allocated memory, as float32 by default.

    The copy is aligned like the arena's tensors. Guard bytes before and after it read as NaN and must be unchanged when
    the test ends.
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
        assert (before == 0xFF).all(), f"an op wrote before the start of an array of shape {shape}"
        assert (after == 0xFF).all(), f"an op wrote past the end of an array of shape {shape}"


@pytest.fixture
def garbage(place):
    """A function that makes a guarded array full of NaN, for outputs whose previous content must not matter."""
    return lambda *shape: place(np.full(shape, np.nan))


@pytest.fixture
def assert_same_bits(device):
    """A function that calls `run` on 1, 2, 3 and 4 CPU threads, or four times on a GPU, and compares the bytes of the
    arrays that it returns."""

    def check(run):
        results = []
        for times in (1, 2, 3, 4):
            if device == "cpu":
                numba.set_num_threads(times)
            results.append([x.tobytes() for x in run()])
        for times, result in zip((2, 3, 4), results[1:], strict=True):
            for i, (got, expected) in enumerate(zip(result, results[0], strict=True)):
                what = f"on {times} threads" if device == "cpu" else f"of run {times}"
                assert got == expected, f"result {i} {what} differs from the first run's"

    import numba

    yield check
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
