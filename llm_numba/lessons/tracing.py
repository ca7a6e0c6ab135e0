"""What each thread of a kernel reads and writes, in program order: recorded in Numba's simulator.

    trace = simulate(layernorm_forward_v1, out=out, mean=mean, rstd=rstd, inp=inp, weight=weight, bias=bias)

The threads of a block take turns, each up to its next barrier, so that a run is the same every time. A function of the
CPU is recorded in the same way, run as plain Python: each iteration of its `prange` then stands for a thread.
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
    """One element that one thread reads or writes.

    launch: which kernel, or which prange; epoch: how many barriers the thread has passed; lane: the thread's number in
    its block; offset: bytes from the array's start; site: which instruction of the program.
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


class Trace:
    """accesses: all of them, in the order in which they happened; faults: what went wrong on the way, in words;
    results: the arguments afterwards, by name; arrays: shape and dtype of each array, by name."""

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
    """An index that an array does not have."""


class Stopped(Exception):
    """In a thread whose block ends because another one's program failed."""


class Traced(np.ndarray):
    """An array that records which of its elements are read and written."""

    origin: Origin | None = None

    def __array_finalize__(self, other):
        self.origin = getattr(other, "origin", None)

    def __getitem__(self, index):
        touch(self, index, "read")
        return np.ndarray.__getitem__(self, index)

    def __setitem__(self, index, value):
        touch(self, index, "write")
        np.ndarray.__setitem__(self, index, value)


def traced(array: np.ndarray, space: str, name: str) -> Traced:
    """The array itself, seen as one that records."""
    view = array.view(Traced)
    view.origin = Origin(space, name, array.__array_interface__["data"][0], array.nbytes)
    if _recorder:
        _recorder.trace.arrays.setdefault(name, (space, array.shape, array.dtype))
    return view


class Recorder:
    """The recording that goes on; there is one at most. For the CPU, `position` is what a thread of CUDA has itself."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.contexts: list = []
        self.shared: dict = {}
        self.position = None
        self.loops = 0

    def who(self):
        """(launch, block, thread, lane, epoch) of whoever runs now; None outside of a kernel."""
        thread = threading.current_thread()
        if hasattr(thread, "epoch"):
            if thread.quiet:
                return None
            place = thread.blockIdx, thread.threadIdx
            return self.launch(), tuple(place[0]), tuple(place[1]), thread.thread_id, thread.epoch
        return self.position

    def launch(self) -> int:
        from numba.cuda.simulator import kernel

        context = kernel._get_kernel_context()
        if not self.contexts or self.contexts[-1] is not context:
            self.contexts.append(context)
        return len(self.contexts) - 1


_recorder: Recorder | None = None


def touch(array: Traced, index, kind: str) -> None:
    """Record an access, after a look at whether the array has such an element."""
    if _recorder is None or array.origin is None or (who := _recorder.who()) is None:
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
    elif kind == "read":
        return  # a part of the array, whose elements are read later
    else:
        part = np.ndarray.__getitem__(array, index)
        first = address(part) - address(array)
        elements = [
            (i, first + sum(a * s for a, s in zip(i, part.strides, strict=True))) for i in np.ndindex(part.shape)
        ]
    start = address(array) - array.origin.address
    for element, offset in elements:
        if 0 <= start + offset < array.origin.nbytes:  # not what NumPy has computed from it
            access = Access(
                *who, array.origin.space, array.origin.name, kind, element, start + offset, array.itemsize, site, line
            )
            _recorder.trace.accesses.append(access)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def out_of_bounds(array: Traced, key: tuple, axis: int, kind: str, who: tuple, line: tuple) -> str:
    name, written = array.origin.name, ", ".join(str(int(i)) for i in key)
    text = f"{name_of_thread(who[1], who[2])} {kind}s {name}[{written}], which is out of bounds: "
    if axis >= array.ndim:
        return text + f"{name} has {array.ndim} axes only, {at_line(line)}"
    side = "the index" if array.ndim == 1 else f"the index of axis {axis}"
    bounds = f"{name} has shape {tuple(map(int, array.shape))}, so {side} must be 0 to {array.shape[axis] - 1}"
    return f"{text}{bounds}, {at_line(line)}"


def name_of_thread(block: tuple, thread: tuple) -> str:
    """A thread in words; only as many coordinates as it takes."""
    if not block:
        return f"iteration {thread[0]} of prange" if thread else "the program outside of prange"

    def short(point):
        kept = point[: max((i + 1 for i, x in enumerate(point) if x), default=1)]
        return str(kept[0]) if len(kept) == 1 else str(tuple(kept))

    return f"thread {short(thread)} of block {short(block)}"


def at_line(line: tuple[str, int]) -> str:
    """A line of a program in words."""
    text = linecache.getline(*line).strip()
    return f"line {line[1]}: `{text}`" if text else f"line {line[1]}"


_foreign: dict[CodeType, bool] = {}  # whether code is neither the simulator's nor the recording's


def where() -> tuple[tuple, tuple[str, int]]:
    """(the instruction of the program that runs, with those that called its function; its line)."""
    frame, site, line = sys._getframe(2), [], None
    while frame is not None and frame.f_code not in ENTRIES:
        code = frame.f_code
        if code not in _foreign:
            name = code.co_filename.replace("\\", "/")
            _foreign[code] = "/cuda/simulator/" not in name and name != __file__ and "/contextlib" not in name
        if _foreign[code]:
            site.append((code, place_in(code, frame.f_lasti)))
            line = line or (code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return tuple(site), line or ("", 0)


@functools.cache
def positions(code: CodeType) -> list[tuple]:
    return list(code.co_positions())


def place_in(code: CodeType, instruction: int) -> tuple:
    """Lines and columns of an instruction: its number itself changes when the interpreter specialises it."""
    return positions(code)[instruction // 2]


def simulate(function: Callable, **arguments) -> Trace:
    """Run `function(*arguments)`, which launches CUDA kernels, on copies of the arrays, and record what these do.

    An index out of bounds ends the run and becomes a fault; so do barriers that not all threads of a block come to. Any
    other exception is the caller's. Errors: UserError if the simulator is missing or off.
    """
    if find_spec("numba_cuda") is None:
        raise UserError(f"the lessons need the simulator of numba-cuda, which is not installed: {install('lessons')}")
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    if not config.ENABLE_CUDASIM:
        raise UserError(
            "the lessons run kernels in Numba's simulator: import llm_numba.lessons before numba.cuda, and "
            "leave NUMBA_ENABLE_CUDASIM alone or set it to 1"
        )
    with recording() as recorder, simulator_that_records(recorder):
        trace = recorder.trace
        copies = {k: np.array(x) if isinstance(x, np.ndarray) else x for k, x in arguments.items()}
        given = [FakeCUDAArray(traced(x, "global", k)) if isinstance(x, np.ndarray) else x for k, x in copies.items()]
        try:
            function(*given)
        except OutOfBounds as error:
            trace.faults.append(str(error).partition(": ")[2])  # the simulator has put the thread's number before it
        trace.results = copies
    return trace


def simulate_cpu(function: Callable, **arguments) -> Trace:
    """The same for a function of the CPU: as plain Python, in which each iteration of `prange` is a thread.

    Only what the function itself reads and writes, element by element, is seen: not what a function that it calls does.
    """
    function = getattr(function, "py_func", function)
    with recording() as recorder:
        recorder.position = (0, (), (), 0, 0)

        def iterations(*bounds):
            if recorder.position[2]:  # within another: one iteration of that one
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
    assert _recorder is None, "two recordings at once"
    _recorder = Recorder(Trace())
    try:
        yield _recorder
    finally:
        _recorder = None


@contextlib.contextmanager
def simulator_that_records(recorder: Recorder):
    """Numba's simulator with threads that take turns, shared memory that records, and atomics that count as one."""
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
        patch(kernel.BlockManager, "run", take_turns)
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
    """A block's array of a line that asks for one; all NaN, where it can be, as shared memory starts with anything."""
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
    """The simulator's atomic operation, recorded as one access and not as the reads and writes that it is made of."""

    def atomic(self, array, *arguments):
        thread = threading.current_thread()
        plain = getattr(array, "_item", array)
        plain = getattr(plain, "_ary", plain)
        index = arguments[0] if len(arguments) > 1 and original.__name__ != "compare_and_swap" else (0,) * plain.ndim
        if isinstance(plain, Traced):
            touch(plain, index, "atomic")
        thread.quiet = True
        try:
            return original(self, array, *arguments)
        finally:
            thread.quiet = False

    return atomic


def take_turns(manager, grid_point, *args) -> None:
    """In place of BlockManager.run: the block's threads one after the other, each until its next barrier."""
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
        fault = uneven(threads, live)
        if fault and fault not in _recorder.trace.faults:
            _recorder.trace.faults.append(fault)


def wait_at_barrier(thread) -> None:
    """In place of BlockThread.syncthreads."""
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
    """A lock that somebody holds: whoever wants it waits until it is released."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def uneven(threads, live) -> str:
    """Words where some threads of a block wait at a barrier that others never come to, or wait at another one."""
    if not live:
        return ""
    first = live[0]
    place = name_of_thread(tuple(first.blockIdx), tuple(first.threadIdx))
    gone = next((thread for thread in threads if thread.done), None)
    other = next((thread for thread in live if thread.barrier[0] != first.barrier[0]), None)
    absent = gone or other
    if absent is None:
        return ""
    who = f"thread {tuple(absent.threadIdx)}" if any(tuple(absent.threadIdx)[1:]) else f"thread {absent.threadIdx.x}"
    does = "has ended" if gone else f"waits at another one, {at_line(other.barrier[1])}"
    return (
        f"{place} waits at syncthreads, {at_line(first.barrier[1])}, and {who} of its block {does}: every thread of a "
        "block must come to every barrier"
    )


# where the program ends and what runs it begins
ENTRIES = {call.__code__, *(code for code in take_turns.__code__.co_consts if isinstance(code, CodeType))}
