"""GPU memory for the arena: allocation, views, copies; and CUDA graphs, which replay the launches of a step."""

import functools
import itertools
from collections.abc import Callable

import numpy as np
from ml_dtypes import bfloat16
from numba import cuda

from llm_numba.cuda.jit import SIMULATED, THREADS, blocks_for, driver_result, kernel, sized, stream
from llm_numba.util import host

DRIVER_RESERVE = 512 * 2**20  # bytes; the driver loads kernels there
ITEMS = sized(8, 256)  # elements per thread


def allocate(nbytes: int):
    """nbytes of zeros (uint8) on the GPU."""
    if SIMULATED:
        return cuda.to_device(np.zeros(nbytes, np.uint8))
    memory = cuda.device_array(nbytes, np.uint8)
    zero(memory)
    return memory


def view(memory, offset: int, shape: tuple[int, ...], dtype: str):
    """The bytes of memory from offset on as an array of this shape and dtype; bfloat16 is stored as uint16."""
    dtype = storage_dtype(dtype)
    return memory[offset : offset + int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)


def storage_dtype(dtype: str) -> np.dtype:
    """The dtype of the arrays that hold tensors of this dtype: uint16 for bfloat16."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


@kernel
def zero_kernel(x):
    """x (n,) = 0. Grid: n / (ITEMS * THREADS); block: THREADS; a thread owns ITEMS elements, THREADS apart."""
    first = cuda.blockIdx.x * ITEMS * THREADS + cuda.threadIdx.x
    for i in range(first, min(first + ITEMS * THREADS, x.shape[0]), THREADS):
        x[i] = 0


@kernel
def copy_kernel(out, inp):
    """out (n,) = inp (n,). Grid, block and thread as in zero_kernel."""
    first = cuda.blockIdx.x * ITEMS * THREADS + cuda.threadIdx.x
    for i in range(first, min(first + ITEMS * THREADS, out.shape[0]), THREADS):
        out[i] = inp[i]


def zero(tensor) -> None:
    """tensor = 0."""
    zero_kernel[blocks_for(tensor.size, ITEMS * THREADS), THREADS, stream()](tensor.reshape(-1))


def copy(out, inp) -> None:
    """out = inp; both have the same shape and dtype."""
    copy_kernel[blocks_for(out.size, ITEMS * THREADS), THREADS, stream()](out.reshape(-1), inp.reshape(-1))


def to_device(tensor, host) -> None:
    """tensor = host, an array or a number of any precision.

    CUDA has read `host` when this returns, as it is not page-locked; the tensor gets it in the order of the stream.
    """
    values = np.broadcast_to(np.asarray(host), tensor.shape)
    values = values.astype(bfloat16).view(np.uint16) if tensor.dtype == np.uint16 else values.astype(tensor.dtype)
    tensor.copy_to_device(np.ascontiguousarray(values), stream=stream())


def to_host(tensor) -> np.ndarray:
    """A copy of tensor as a NumPy array; bf16 becomes float32."""
    values = tensor.copy_to_host(stream=stream())
    synchronise()
    return values.view(bfloat16).astype(np.float32) if values.dtype == np.uint16 else values


def reader(tensor) -> Callable[[], Callable[[], np.ndarray]]:
    """A function that starts to copy tensor to the host, and returns a function that waits for the copy and returns it.

    A kernel writes to memory of the host, which takes less time than a copy by the driver. Only the last two copies are
    kept.
    """
    if SIMULATED:
        return lambda: functools.partial(np.copy, tensor.copy_to_host())
    buffers = itertools.cycle([cuda.mapped_array(tensor.size, tensor.dtype) for _ in range(2)])

    def start():
        values, copied = next(buffers), cuda.event()
        copy_kernel[blocks_for(tensor.size, ITEMS * THREADS), THREADS, stream()](values, tensor.reshape(-1))
        copied.record(stream())

        def wait():
            copied.synchronize()
            return values.reshape(tensor.shape)

        return wait

    return start


def synchronise() -> None:
    """Wait until all launches and copies so far have finished."""
    if not SIMULATED:
        stream().synchronize()


def capture(function: Callable[[], None]) -> Callable[[], None]:
    """A function that does the same as `function`, with the same arrays each time, by one launch of a CUDA graph.

    The first call runs `function` itself, which compiles its kernels; the second captures its launches in a graph;
    later calls launch the graph. `function` must not allocate or synchronise. The simulator has no graphs.
    """
    if SIMULATED:
        return function
    from cuda.bindings import driver

    check = functools.partial(driver_result, what="capturing a CUDA graph")

    def captured():
        handle = stream().handle
        with cuda.defer_cleanup():  # freeing memory would invalidate the capture
            check(driver.cuStreamBeginCapture(handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
            try:
                function()
            finally:
                graph = check(driver.cuStreamEndCapture(handle))
        executable = check(driver.cuGraphInstantiate(graph, 0))
        check(driver.cuGraphDestroy(graph))
        return lambda: check(driver.cuGraphLaunch(executable, handle))

    calls = [function]

    def run():
        calls[0]()
        if len(calls) == 1:
            calls.insert(0, capture_and_run)

    def capture_and_run():
        calls[0] = captured()
        calls[0]()

    return run


def available_memory() -> int:
    """Bytes that can be allocated on the GPU, less DRIVER_RESERVE."""
    if SIMULATED:
        return host.available_memory()
    return max(0, cuda.current_context().get_memory_info().free - DRIVER_RESERVE)


def set_threads(threads: int) -> None:
    """Does nothing: each kernel chooses its own number of threads."""


def describe_device() -> str:
    """The device, for the log."""
    if SIMULATED:
        return "in Numba's CUDA simulator, one Python thread per CUDA thread: a step of nano takes many seconds"
    gpu = cuda.get_current_device()
    major, minor = gpu.compute_capability
    return f"on {gpu.name}, compute capability {major}.{minor}"
