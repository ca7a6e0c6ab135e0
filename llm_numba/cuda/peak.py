"""The measured peak of this GPU, which is the 100% of a "share of peak", and the timing of ops."""

import functools
import itertools
import time
from collections.abc import Callable

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import (
    SIMULATED,
    THREADS,
    block_sum,
    compute_capability,
    driver_result,
    float32,
    int32,
    kernel,
    sized,
    stream,
    uint32,
)
from llm_numba.cuda.memory import allocate, available_memory, view, zero

BLOCKS = 4  # of THREADS threads per SM: resident on every GPU
CHAINS, UNROLLED = 8, 16
FMA_REPEATS, MMA_REPEATS, WGMMA_REPEATS = 2500, 40000, 7000
WGMMA_SHARED, SUMS = (64 + 256) * 64 * 2, 64 * 256 // 128  # bytes of the operands; sums of a thread
TRIES = 8
EACH = sized(8, 2)  # elements per thread, all in flight at once
STREAM_FLOATS = 1 << 28  # 1 GiB per array, many times the L2 cache of any GPU
L2_FLOATS = 1 << 26  # 256 MiB: more than the L2 cache of any GPU


@kernel
def fma_kernel(out, factor, term, repeats):
    """out = the results of independent chains of multiply-adds, repeats * UNROLLED in each.

    Grid: BLOCKS per SM; block: THREADS; a thread owns CHAINS registers and an element of out.
    Moves: out.
    """
    chains = cuda.local.array(CHAINS, float32)
    for j in range(CHAINS):
        chains[j] = float32(j)
    for _ in range(repeats):
        for _ in range(UNROLLED):
            for j in range(CHAINS):
                chains[j] = chains[j] * factor + term
    total = float32(0)
    for j in range(CHAINS):
        total += chains[j]
    out[cuda.grid(1)] = total


if not SIMULATED:
    from llm_numba.cuda import hopper
    from llm_numba.cuda.tensor_cores import mma, pack

    @kernel
    def wgmma_kernel(out, repeats):
        """out = an element of the sum of `repeats` products of 64 x 64 and 64 x 256 matrices, in shared memory.

        Grid: one block per SM; block: THREADS, two warpgroups with a sum each, of which a thread holds SUMS elements.
        Moves: out.
        """
        thread, shared = uint32(cuda.threadIdx.x), hopper.dynamic_shared()
        for i in range(thread, WGMMA_SHARED // 16, THREADS):
            x = float32(1) + float32((i * 7919) % 1024) / float32(1024)  # as above, no zeros
            plus, minus = pack(x, -x), pack(-x, x)
            hopper.store_shared_16_bytes(uint32(shared + 16 * i), (plus, minus, minus, plus))
        hopper.fence_proxy_async()
        cuda.syncthreads()
        sums = cuda.local.array(SUMS, float32)
        hopper.clear(sums, SUMS)
        a, b = hopper.descriptor(shared, 0), hopper.descriptor(uint32(shared + 64 * 64 * 2), 0)
        count = uint32(0)
        while count < repeats:
            hopper.wgmma(sums, a, b, uint32(1), 64, 256, 64, 0, 0)
            hopper.wgmma_wait(1)
            count = hopper.opaque(uint32(count + 1))
        hopper.wgmma_wait(0)
        hopper.settle(sums, SUMS)
        out[cuda.grid(1)] = sums[0] + sums[SUMS - 1]

    @kernel
    def mma_kernel(out, repeats):
        """out = four sums of products of 16 x 16 and 16 x 8 matrices, repeats products in each.

        Grid: BLOCKS per SM; block: THREADS; a warp owns the four sums, a thread an element of out.
        Moves: out.
        """
        x = float32(1) + float32(cuda.threadIdx.x) / float32(THREADS)  # zeros would draw less power and run faster
        zero, one, two, three = float32(0), float32(1), float32(2), float32(3)
        plus, minus = pack(x, -x), pack(-x, x)
        a = (plus, minus, minus, plus)
        c0, c1 = (zero, zero, zero, zero), (one, one, one, one)  # equal sums would be computed only once
        c2, c3 = (two, two, two, two), (three, three, three, three)
        for _ in range(repeats):
            c0 = mma(c0, a, plus, minus)
            c1 = mma(c1, a, plus, minus)
            c2 = mma(c2, a, plus, minus)
            c3 = mma(c3, a, plus, minus)
        out[cuda.grid(1)] = c0[0] + c1[1] + c2[2] + c3[3]


def peak_flops(dtype: str = "float32") -> float | None:
    """The peak of multiply-adds over all SMs, two flops each, in flops per second; None in the simulator. Takes 0.1 s.

    dtype: "float32" for the CUDA cores; "bfloat16" for the tensor cores, with wgmma on Hopper (compute capability 9.0),
    elsewhere with mma.sync, which reaches only about three quarters of that on Hopper. The best of several tries,
    because other work can only slow a try down.
    """
    if SIMULATED:
        return None
    multiprocessors = cuda.get_current_device().MULTIPROCESSOR_COUNT
    blocks = BLOCKS * multiprocessors
    out = cuda.device_array(blocks * THREADS, np.float32)
    if dtype == "float32":
        flops = 2.0 * out.size * FMA_REPEATS * UNROLLED * CHAINS

        def run():
            fma_kernel[blocks, THREADS, stream()](out, float32(0.999), float32(0.001), int32(FMA_REPEATS))
    elif compute_capability()[0] == 9:
        flops = 2.0 * multiprocessors * (THREADS // 128) * WGMMA_REPEATS * 64 * 256 * 64

        def run():
            wgmma_kernel[multiprocessors, THREADS, stream(), WGMMA_SHARED](out, uint32(WGMMA_REPEATS))
    else:
        flops = 2.0 * (out.size // 32) * MMA_REPEATS * 4 * 16 * 8 * 16

        def run():
            mma_kernel[blocks, THREADS, stream()](out, int32(MMA_REPEATS))

    run()
    return flops / min(elapsed(run) for _ in range(TRIES))


@kernel
def stream_read(x, y, z):
    """z[block] = the sum of a block of x.

    Grid: n / (THREADS * EACH); block: THREADS; a thread owns EACH elements, THREADS apart.
    """
    shared = cuda.shared.array(THREADS, float32)
    first = cuda.blockIdx.x * THREADS * EACH + cuda.threadIdx.x
    total = float32(0)
    for k in range(EACH):
        total += x[first + k * THREADS]
    total = block_sum(total, shared)
    if cuda.threadIdx.x == 0:
        z[cuda.blockIdx.x] = total


@kernel
def stream_copy(x, y, z):
    """z = x. Grid, block and thread as in stream_read."""
    first = cuda.blockIdx.x * THREADS * EACH + cuda.threadIdx.x
    elements = cuda.local.array(EACH, float32)
    for k in range(EACH):
        elements[k] = x[first + k * THREADS]
    for k in range(EACH):
        z[first + k * THREADS] = elements[k]


@kernel
def stream_add(x, y, z):
    """z = x + y. Grid, block and thread as in stream_read."""
    first = cuda.blockIdx.x * THREADS * EACH + cuda.threadIdx.x
    elements = cuda.local.array(EACH, float32)
    for k in range(EACH):
        elements[k] = x[first + k * THREADS] + y[first + k * THREADS]
    for k in range(EACH):
        z[first + k * THREADS] = elements[k]


@kernel
def stream_update(x, y, z):
    """x += 1, in place. Grid, block and thread as in stream_read."""
    first = cuda.blockIdx.x * THREADS * EACH + cuda.threadIdx.x
    elements = cuda.local.array(EACH, float32)
    for k in range(EACH):
        elements[k] = x[first + k * THREADS] + float32(1)
    for k in range(EACH):
        x[first + k * THREADS] = elements[k]


STREAMS = {"read": (stream_read, 1), "copy": (stream_copy, 2), "add": (stream_add, 3), "update": (stream_update, 2)}


def peak_bandwidth(floats: int = STREAM_FLOATS) -> dict[str, float]:
    """The bandwidth of GPU memory in bytes per second, by access pattern; {} in the simulator. Takes a few tenths of 1
    s.

    "read": x; "copy": z = x; "add": z = x + y; "update": x in place. The arrays have `floats` elements, or fewer if
    memory is short. Each byte read or written counts once, as in STREAM. The best of several interleaved tries.
    Source: McCalpin 1995, "Memory Bandwidth and Machine Balance in Current High Performance Computers"
    """
    if SIMULATED:
        return {}
    per_block = THREADS * EACH
    blocks = min(floats, available_memory() // 16) // per_block  # three arrays of float32, and some memory left
    floats = blocks * per_block
    arrays = [view(allocate(4 * floats), 0, (floats,), "float32") for _ in range(3)]
    best = dict.fromkeys(STREAMS, float("inf"))
    for again in range(6):
        for name, (pattern, _) in STREAMS.items():
            launch = functools.partial(pattern[blocks, THREADS, stream()], *arrays)
            if again:
                best[name] = min(best[name], elapsed(launch))
            else:
                launch()  # compiles
    return {name: 4 * floats * moved / best[name] for name, (_, moved) in STREAMS.items()}


def elapsed(run: Callable) -> float:
    """The seconds that the GPU spends on what `run` launches on `stream`."""
    start, end = cuda.event(), cuda.event()
    start.record(stream())
    run()
    end.record(stream())
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def timed(run: Callable) -> float:
    """The seconds that the GPU spends on what `run` launches, with a cold L2 cache.

    Writing other memory first evicts the data from L2. It also takes longer than the launches of `run`, so the GPU does
    not wait for them.
    """
    if SIMULATED:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    for _ in range(4):
        zero(_other_memory())
    return elapsed(run)


def timeline() -> tuple[Callable[[int], None], Callable[[], list[float]]]:
    """(mark, seconds): mark(i), for i = 0, 1, ..., marks the end of what was launched before, also in a graph;
    seconds() returns the seconds from each mark to the next, in the last run."""
    from cuda.bindings import driver

    events = []

    def mark(i):
        if i == len(events):
            events.append(cuda.event())
        capturing = driver_result(driver.cuStreamIsCapturing(stream().handle), "asking a stream")
        flags = driver.CUevent_record_flags
        flag = flags.CU_EVENT_RECORD_EXTERNAL if capturing else flags.CU_EVENT_RECORD_DEFAULT
        event = driver.CUevent(int(events[i].handle))
        driver_result(driver.cuEventRecordWithFlags(event, stream().handle, flag), "recording an event")

    def seconds():
        events[-1].synchronize()
        return [1e-3 * first.elapsed_time(second) for first, second in itertools.pairwise(events)]

    return mark, seconds


@functools.cache
def _other_memory():
    return cuda.device_array(L2_FLOATS, np.float32)
