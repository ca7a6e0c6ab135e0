"""The GPU's side of the arena: memory, views of it, and what the GPU's ops need beside their results."""

from collections.abc import Callable

import numpy as np
from ml_dtypes import bfloat16
from numba import cuda

from llm_numba.cuda.jit import SIMULATED, THREADS, blocks_for, kernel, sized, stream
from llm_numba.util import host

LEFT_TO_THE_DRIVER = 512 * 2**20
ITEMS = sized(8, 256)  # numbers of a thread


def allocate(nbytes: int):
    """nbytes of zeros (uint8) on the device."""
    if SIMULATED:
        return cuda.to_device(np.zeros(nbytes, np.uint8))
    memory = cuda.device_array(nbytes, np.uint8)
    zero(memory)
    return memory


def view(memory, offset: int, shape: tuple[int, ...], dtype: str):
    """The bytes of memory from offset on as an array of this shape and dtype; bfloat16 as its bits, in uint16."""
    dtype = storage_dtype(dtype)
    return memory[offset : offset + int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)


def storage_dtype(dtype: str) -> np.dtype:
    """The dtype of the arrays that hold tensors of this dtype: bfloat16 is stored as its bits, in uint16."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


@kernel
def zero_kernel(x):
    """x (n,) = 0. Grid: a block for ITEMS * THREADS numbers; block: THREADS; a thread owns every THREADS-th of them."""
    first = cuda.blockIdx.x * ITEMS * THREADS + cuda.threadIdx.x
    for i in range(first, min(first + ITEMS * THREADS, x.shape[0]), THREADS):
        x[i] = 0


@kernel
def copy_kernel(out, inp):
    """out (n,) = inp (n,). Grid, block and a thread's numbers as in zero_kernel."""
    first = cuda.blockIdx.x * ITEMS * THREADS + cuda.threadIdx.x
    for i in range(first, min(first + ITEMS * THREADS, out.shape[0]), THREADS):
        out[i] = inp[i]


def zero(tensor) -> None:
    """tensor = 0."""
    zero_kernel[blocks_for(tensor.size, ITEMS * THREADS), THREADS, stream()](tensor.reshape(-1))


def copy(out, inp) -> None:
    """out = inp, of one shape and dtype."""
    copy_kernel[blocks_for(out.size, ITEMS * THREADS), THREADS, stream()](out.reshape(-1), inp.reshape(-1))


def to_device(tensor, host) -> None:
    """tensor = host, an array or a number, which may come in another precision."""
    values = np.broadcast_to(np.asarray(host), tensor.shape)
    values = values.astype(bfloat16).view(np.uint16) if tensor.dtype == np.uint16 else values.astype(tensor.dtype)
    tensor.copy_to_device(np.ascontiguousarray(values), stream=stream())
    synchronise()


def to_host(tensor) -> np.ndarray:
    """A copy of tensor as a NumPy array; bf16 as float32."""
    values = tensor.copy_to_host(stream=stream())
    synchronise()
    return values.view(bfloat16).astype(np.float32) if values.dtype == np.uint16 else values


def synchronise() -> None:
    """Wait until all that was asked for is done."""
    if not SIMULATED:
        stream().synchronize()


def capture(function: Callable[[], None]) -> Callable[[], None]:
    """A function that does what `function` does, each time with the same arrays, by one launch of a CUDA graph.

    The first call runs `function` as it is, which compiles what has to be compiled; the second records its launches,
    and from then on they are replayed. So it must allocate nothing and wait for nothing. The simulator has no graphs.
    """
    if SIMULATED:
        return function
    from cuda.bindings import driver

    def check(result):
        error, *values = result
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"recording the CUDA graph failed: {error.name}")
        return values[0] if values else None

    def record():
        handle = stream().handle
        with cuda.defer_cleanup():  # freeing memory would break the recording
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
            calls.insert(0, record_and_run)

    def record_and_run():
        calls[0] = record()
        calls[0]()

    return run


def available_memory() -> int:
    """Bytes of the card that can be allocated; a little is left to the driver, which loads the kernels there."""
    if SIMULATED:
        return host.available_memory()
    return max(0, cuda.current_context().get_memory_info().free - LEFT_TO_THE_DRIVER)


def set_threads(threads: int) -> None:
    """Nothing to choose: a GPU's threads are the kernels' own."""


def describe_device() -> str:
    """What computes, in words, for the log."""
    if SIMULATED:
        return "in Numba's CUDA simulator: a thread of a kernel is one of Python's, a step of nano takes many seconds"
    card = cuda.get_current_device()
    major, minor = card.compute_capability
    return f"on {card.name}, compute capability {major}.{minor}"
