"""Records what each thread of a kernel reads and writes, in program order, in Numba's simulator.

    trace = simulate(layernorm_forward_v1, out=out, mean=mean, rstd=rstd, inp=inp, weight=weight, bias=bias)

The threads of a block run one at a time, each to its next barrier, so a run is deterministic. A CPU function is
recorded the same way, as plain Python: each iteration of its `prange` counts as a thread.
"""

import contextlib
import functools
import linecache
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from types import CodeType
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import config

from llm_numba.util.cli import UserError, install


class Access(NamedTuple):
    """One access to one element by one thread.

    launch: which kernel launch or prange loop. epoch: how many barriers the thread has passed. lane: the thread's index
    in its block. offset: bytes from the start of the array. site: the instruction in the program. first: whether the
    element is the first of those that the thread accesses at once.
    """

    launch: int
    block: tuple
    thread: tuple
    lane: int
    epoch: int
    space: str  # "global" or "shared"
    array: str
    kind: str  # "read", "write" or "atomic"
    index: tuple
    offset: int
    nbytes: int
    site: tuple
    line: tuple[str, int]
    first: bool = True


class Trace:
    """accesses: in the order in which they happened. faults: messages about errors during the run. results: the
    arguments after the run, by name. arrays: (space, shape, dtype) of each array, by name."""

    def __init__(self):
        self.accesses: list[Access] = []
        self.faults: list[str] = []
        self.results: dict[str, Any] = {}
        self.arrays: dict[str, tuple] = {}


class Origin(NamedTuple):
    space: str
    name: str
    address: int
    nbytes: int


class OutOfBounds(IndexError):
    """An index is out of bounds."""


class Stopped(Exception):
    """Ends a thread after another thread of its block has failed."""


class Traced(np.ndarray):
    """An array that records reads and writes of its elements."""

    origin: Origin | None = None

    def __array_finalize__(self, other):
        self.origin = getattr(other, "origin", None)

    def __getitem__(self, index):
        record(self, index, "read")
        return np.ndarray.__getitem__(self, index)

    def __setitem__(self, index, value):
        record(self, index, "write")
        np.ndarray.__setitem__(self, index, value)


def traced(array: np.ndarray, space: str, name: str) -> Traced:
    """A view of the array that records."""
    view = array.view(Traced)
    view.origin = Origin(space, name, array.__array_interface__["data"][0], array.nbytes)
    if _recorder:
        _recorder.trace.arrays.setdefault(name, (space, array.shape, array.dtype))
    return view


class Recorder:
    """The state of the current recording. On the CPU, `position` plays the role of a CUDA thread's indices."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.contexts: list = []
        self.shared: dict = {}
        self.position = None
        self.loops = 0

    def current_thread(self):
        """(launch, block, thread, lane, epoch) of the running thread; None outside a kernel."""
        thread = threading.current_thread()
        if hasattr(thread, "epoch"):
            if thread.quiet:
                return None
            return self.launch(), tuple(thread.blockIdx), tuple(thread.threadIdx), thread.thread_id, thread.epoch
        return self.position

    def launch(self) -> int:
        from numba.cuda.simulator import kernel

        context = kernel._get_kernel_context()
        if not self.contexts or self.contexts[-1] is not context:
            self.contexts.append(context)
        return len(self.contexts) - 1


_recorder: Recorder | None = None


def record(array: Traced, index, kind: str) -> None:
    """Record an access. Errors: OutOfBounds if the array has no such element."""
    if _recorder is None or array.origin is None or (who := _recorder.current_thread()) is None:
        return
    key = index if isinstance(index, tuple) else (index,)
    whole = all(isinstance(i, int | np.integer) for i in key)
    site, line = where()
    if whole:
        for axis, i in enumerate(key):
            if axis >= array.ndim or not 0 <= i < array.shape[axis]:
                raise OutOfBounds(out_of_bounds(array, key, axis, kind, who, line))
    if whole and len(key) == array.ndim:
        elements = [(tuple(map(int, key)), sum(int(i) * s for i, s in zip(key, array.strides, strict=True)))]
    elif not any(isinstance(i, slice) for i in key) and len(key) == array.ndim:  # several elements at once
        elements = [
            (tuple(map(int, i)), sum(int(a) * s for a, s in zip(i, array.strides, strict=True)))
            for i in np.broadcast(*key)
        ]
    elif kind == "read":
        return  # a view; its elements are read later
    else:
        view = np.ndarray.__getitem__(array, index)
        first = address(view) - address(array)
        elements = [
            (i, first + sum(a * s for a, s in zip(i, view.strides, strict=True))) for i in np.ndindex(view.shape)
        ]
    start = address(array) - array.origin.address
    for n, (element, offset) in enumerate(elements):
        if 0 <= start + offset < array.origin.nbytes:  # not the result of a NumPy operation
            access = Access(
                *who, array.origin.space, array.origin.name, kind, element, start + offset, array.itemsize, site, line,
                n == 0,
            )  # fmt: skip
            _recorder.trace.accesses.append(access)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def out_of_bounds(array: Traced, key: tuple, axis: int, kind: str, who: tuple, line: tuple) -> str:
    name, written = array.origin.name, ", ".join(str(int(i)) for i in key)
    text = f"{name_of_thread(who[1], who[2])} {kind}s {name}[{written}], which is out of bounds: "
    if axis >= array.ndim:
        return text + f"{name} has only {array.ndim} axes, {at_line(line)}"
    side = "the index" if array.ndim == 1 else f"the index of axis {axis}"
    bounds = f"{name} has shape {tuple(map(int, array.shape))}, so {side} must be 0 to {array.shape[axis] - 1}"
    return f"{text}{bounds}, {at_line(line)}"


def name_of_thread(block: tuple, thread: tuple) -> str:
    """A thread's name, without trailing zero coordinates."""
    if not block:
        return f"iteration {thread[0]} of prange" if thread else "the program outside prange"

    def short(point):
        kept = point[: max((i + 1 for i, x in enumerate(point) if x), default=1)]
        return str(kept[0]) if len(kept) == 1 else str(tuple(kept))

    return f"thread {short(thread)} of block {short(block)}"


def at_line(line: tuple[str, int]) -> str:
    """A line number and its source."""
    text = linecache.getline(*line).strip()
    return f"line {line[1]}: `{text}`" if text else f"line {line[1]}"


_is_program: dict[CodeType, bool] = {}  # False for code of the simulator and of this file


def where() -> tuple[tuple, tuple[str, int]]:
    """(the running instruction of the program, with its call stack; its line)."""
    frame, site, line = sys._getframe(2), [], None
    while frame is not None and frame.f_code not in ENTRIES:
        code = frame.f_code
        if code not in _is_program:
            name = code.co_filename.replace("\\", "/")
            _is_program[code] = "/cuda/simulator/" not in name and name != __file__ and "/contextlib" not in name
        if _is_program[code]:
            site.append((code, position_of(code, frame.f_lasti)))
            line = line or (code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return tuple(site), line or ("", 0)


@functools.cache
def positions(code: CodeType) -> list[tuple]:
    return list(code.co_positions())


def position_of(code: CodeType, instruction: int) -> tuple:
    """Line and column of an instruction. Its index changes when the interpreter specialises the code."""
    return positions(code)[instruction // 2]


def require_numba_cuda() -> None:
    """Errors: UserError if numba-cuda, which contains the simulator, is not installed."""
    if find_spec("numba_cuda") is None:
        raise UserError(f"numba-cuda, which simulates the CUDA kernels, is not installed: {install('lessons')}")


def simulate(function: Callable, **arguments) -> Trace:
    """Run `function(*arguments)`, which launches CUDA kernels, on copies of the arrays, and record the accesses.

    An index out of bounds ends the run and is recorded as a fault; so is a barrier that some threads of a block do not
    reach. Other exceptions propagate. Errors: UserError if numba-cuda is missing or the CUDA simulator is off.
    """
    require_numba_cuda()
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    if not config.ENABLE_CUDASIM:
        raise UserError(
            "the lessons run kernels in Numba's simulator: import llm_numba.lessons before numba.cuda, and "
            "unset NUMBA_ENABLE_CUDASIM or set it to 1"
        )
    with recording() as recorder, simulator_that_records(recorder):
        trace = recorder.trace
        copies = {k: np.array(x) if isinstance(x, np.ndarray) else x for k, x in arguments.items()}
        given = [FakeCUDAArray(traced(x, "global", k)) if isinstance(x, np.ndarray) else x for k, x in copies.items()]
        try:
            function(*given)
        except OutOfBounds as error:
            trace.faults.append(str(error).partition(": ")[2])  # the simulator prepends the thread
        trace.results = copies
    return trace


def simulate_cpu(function: Callable, **arguments) -> Trace:
    """The same for a CPU function: run as plain Python, with each iteration of `prange` as a thread.

    Only element accesses in the function itself are recorded, not those in functions that it calls.
    """
    function = getattr(function, "py_func", function)
    with recording() as recorder:
        recorder.position = (0, (), (), 0, 0)

        def iterations(*bounds):
            if recorder.position[2]:  # nested: part of the outer iteration
                yield from range(*bounds)
                return
            recorder.loops += 1
            for lane, i in enumerate(range(*bounds)):
                recorder.position = (recorder.loops, (), (i,), lane, 0)
                yield i
            recorder.loops += 1
            recorder.position = (recorder.loops, (), (), 0, 0)

        names = [name for name, value in function.__globals__.items() if value is numba.prange]
        function.__globals__.update(dict.fromkeys(names, iterations))
        trace = recorder.trace
        copies = {k: np.array(x) if isinstance(x, np.ndarray) else x for k, x in arguments.items()}
        given = [traced(x, "global", k) if isinstance(x, np.ndarray) else x for k, x in copies.items()]
        try:
            with np.errstate(all="ignore"):
                call(function, given)
        except OutOfBounds as error:
            trace.faults.append(str(error))
        finally:
            function.__globals__.update(dict.fromkeys(names, numba.prange))
        trace.results = copies
    return trace


def call(function: Callable, arguments: list) -> None:
    function(*arguments)


@contextlib.contextmanager
def recording():
    global _recorder
    assert _recorder is None, "recordings cannot be nested"
    _recorder = Recorder(Trace())
    try:
        yield _recorder
    finally:
        _recorder = None


@contextlib.contextmanager
def simulator_that_records(recorder: Recorder):
    """Patch Numba's simulator: threads run one at a time, shared memory records, and an atomic counts as one access."""
    from numba.cuda.simulator import kernel, kernelapi
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    def getitem(self, index):
        value = self._ary[index]
        return FakeCUDAArray(value, self.stream) if isinstance(value, np.ndarray) and value.ndim else value

    def shared_array(self, shape, dtype, alignment=None):
        return shared(recorder, shape, dtype, sys._getframe(1))

    atomics = {name: f for name, f in vars(kernelapi.FakeCUDAAtomic).items() if not name.startswith("__")}
    with contextlib.ExitStack() as stack:
        patch = lambda owner, name, value: stack.enter_context(patched(owner, name, value))  # noqa: E731
        patch(kernel.BlockManager, "run", run_block)
        patch(kernel.BlockThread, "syncthreads", wait_at_barrier)
        patch(FakeCUDAArray, "__getitem__", getitem)
        patch(kernelapi.FakeCUDAShared, "array", shared_array)
        for name, function in atomics.items():
            patch(kernelapi.FakeCUDAAtomic, name, one_atomic(function))
        yield


@contextlib.contextmanager
def patched(owner, name: str, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def shared(recorder: Recorder, shape, dtype, caller) -> Traced:
    """The block's shared array for this line of the program. It starts as NaN, since shared memory is uninitialised."""
    from numba.cuda import types
    from numba.cuda.np import numpy_support

    dtype = np.dtype(numpy_support.as_dtype(dtype) if isinstance(dtype, types.Type) else dtype)
    launch, block = recorder.launch(), tuple(threading.current_thread().blockIdx)
    key = launch, block, caller.f_code.co_filename, caller.f_lineno
    if key not in recorder.shared:
        size = recorder.contexts[-1].shared._dynshared_size // dtype.itemsize if shape == 0 else shape
        fresh = np.full(size, np.nan if dtype.kind == "f" else 0, dtype)
        text = linecache.getline(key[2], key[3])
        name = text.partition("=")[0].strip() if "=" in text else "shared"
        recorder.shared[key] = traced(fresh, "shared", name if name.isidentifier() else "shared")
    return recorder.shared[key]


def one_atomic(original: Callable) -> Callable:
    """The simulator's atomic operation, recorded as one access instead of a read and a write."""

    def atomic(self, array, *arguments):
        thread = threading.current_thread()
        target = getattr(array, "_item", array)
        target = getattr(target, "_ary", target)
        index = arguments[0] if len(arguments) > 1 and original.__name__ != "compare_and_swap" else (0,) * target.ndim
        if isinstance(target, Traced):
            record(target, index, "atomic")
        thread.quiet = True
        try:
            return original(self, array, *arguments)
        finally:
            thread.quiet = False

    return atomic


def run_block(manager, grid_point, *args) -> None:
    """Replaces BlockManager.run: run the block's threads one after the other, each to its next barrier."""
    from numba.cuda.simulator.kernel import BlockThread

    back = locked()
    threads = []
    for point in np.ndindex(*manager._block_dim):

        def target():
            thread = threading.current_thread()
            thread.turn.acquire()
            try:
                if not thread.abort:
                    manager._f(*args)
            finally:
                thread.done = True
                back.release()

        thread = BlockThread(target, manager, grid_point, point, manager._debug)
        thread.turn, thread.back, thread.done = locked(), back, False
        thread.epoch, thread.quiet, thread.barrier = 0, False, None
        threads.append(thread)
    threads.sort(key=lambda thread: thread.thread_id)
    for thread in threads:
        thread.start()
    live = threads
    while live:
        for thread in live:
            thread.turn.release()
            back.acquire()
            if thread.done:
                thread.join()
            if thread.exception:
                stop(threads)
                raise thread.exception[0].with_traceback(thread.exception[1])
        live = [thread for thread in threads if not thread.done]
        fault = divergent_barrier(threads, live)
        if fault and fault not in _recorder.trace.faults:
            _recorder.trace.faults.append(fault)


def wait_at_barrier(thread) -> None:
    """Replaces BlockThread.syncthreads."""
    thread.barrier = where()
    thread.back.release()
    thread.turn.acquire()
    if thread.abort:
        raise Stopped
    thread.epoch += 1


def stop(threads) -> None:
    for thread in threads:
        thread.abort = True
        if not thread.done:
            thread.turn.release()
            thread.back.acquire()
        thread.join()


def locked():
    """A lock that is already held."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def divergent_barrier(threads, live) -> str:
    """A message if some threads of a block wait at a barrier that others do not reach; else empty."""
    if not live:
        return ""
    first = live[0]
    waiting = name_of_thread(tuple(first.blockIdx), tuple(first.threadIdx))
    gone = next((thread for thread in threads if thread.done), None)
    other = next((thread for thread in live if thread.barrier[0] != first.barrier[0]), None)
    absent = gone or other
    if absent is None:
        return ""
    who = f"thread {tuple(absent.threadIdx)}" if any(tuple(absent.threadIdx)[1:]) else f"thread {absent.threadIdx.x}"
    does = "has ended" if gone else f"waits at another barrier, {at_line(other.barrier[1])}"
    return (
        f"{waiting} waits at syncthreads, {at_line(first.barrier[1])}, and {who} of its block {does}: every thread "
        "of a block must reach every barrier"
    )


# the call stack of a program ends here
ENTRIES = {call.__code__, *(code for code in run_block.__code__.co_consts if isinstance(code, CodeType))}
