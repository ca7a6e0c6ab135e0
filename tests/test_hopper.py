"""The instructions of Hopper: on a GPU, and in the simulator, whose checks must find each part of a kernel that is
left out."""

import numpy as np
import pytest

pytest.importorskip("numba_cuda")
from numba import cuda

from llm_numba.cuda import hopper, memory, tensor_cores
from llm_numba.cuda.hopper import (
    clear,
    descriptor,
    dynamic_shared,
    fence_mbarrier_init,
    fence_proxy_async,
    inlined,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    named_barrier,
    pack,
    settle,
    stmatrix,
    tensor_map_acquire,
    tma_commit,
    tma_load_2d,
    tma_store_2d,
    tma_store_wait_read,
    wgmma,
    wgmma_rs,
    wgmma_wait,
)
from llm_numba.cuda.jit import SIMULATED, compute_capability, float32, kernel, uint32, unrolled, with_shared
from llm_numba.cuda.tensor_maps import tensor_map

pytestmark = pytest.mark.gpu
ROWS, COLUMNS, DEPTH = 48, 56, 72  # of out; along K two boxes of 64, the last one mostly outside
A, B, OUT, FULL, EMPTY, NBYTES = 0, 8192, 16384, 24576, 24584, 24592
(
    NOTHING,
    SYNCTHREADS,
    WAIT_FOR_FULL,
    WAIT_FOR_EMPTY,
    WAIT_FOR_PRODUCT,
    ARRIVAL,
    NAMED_BARRIER,
    PROXY_FENCE,
    WAIT_FOR_STORE,
    EXTRA_ARRIVAL,
) = range(10)


@inlined
def store_columns(i, sums, out, row, lane):
    """16 columns of the result, as bf16, to a swizzled box."""
    j, chunk = 8 * i, 2 * i + (lane >> 4)
    v, w = pack(sums[j], sums[j + 1]), pack(sums[j + 2], sums[j + 3])
    x, y = pack(sums[j + 4], sums[j + 5]), pack(sums[j + 6], sums[j + 7])
    stmatrix(out + row * 128 + ((chunk ^ (row & 7)) << 4), (v, w, x, y))


def make_product(a_transposed, b_transposed, from_registers, missing):
    @kernel(launch_bounds=(256, 1))
    def product(a_map, b_map, out_map):
        """out = a @ b.T. The second warpgroup loads 64 of K at a time into the same tiles, the first multiplies."""
        shared, thread = dynamic_shared(), cuda.threadIdx.x
        full, empty = shared + FULL, shared + EMPTY
        if thread == 0:
            mbarrier_init(full, 1)
            mbarrier_init(empty, 1)
            fence_mbarrier_init()
        if missing != SYNCTHREADS:
            cuda.syncthreads()
        if thread >= 128:
            if thread == 128:
                tensor_map_acquire(a_map)
                tensor_map_acquire(b_map)
                for step in range(2):
                    if missing != WAIT_FOR_EMPTY:
                        mbarrier_wait(empty, 1 - step)
                    mbarrier_arrive_expect_tx(full, 16384)
                    k = step * 64
                    tma_load_2d(shared + A, a_map, full, 0 if a_transposed else k, k if a_transposed else 0)
                    tma_load_2d(shared + B, b_map, full, 0 if b_transposed else k, k if b_transposed else 0)
        else:
            lane, row = thread & 31, (thread >> 5) * 16 + (thread & 15)
            sums = cuda.local.array(32, float32)
            clear(sums, 32)
            a, b = descriptor(shared + A, 16), descriptor(shared + B, 16)
            for step in range(2):
                if missing != WAIT_FOR_FULL or thread < 96:
                    mbarrier_wait(full, step)
                if missing == WAIT_FOR_PRODUCT and thread == 0:
                    mbarrier_arrive(empty)
                wgmma(sums, a, b, step, 64, 64, 64, a_transposed, b_transposed)
                wgmma_wait(0)
                settle(sums, 32)
                if missing != WAIT_FOR_PRODUCT and missing != ARRIVAL and thread == 0:
                    mbarrier_arrive(empty)
                    if missing == EXTRA_ARRIVAL:
                        mbarrier_arrive(empty)
            if from_registers:  # out = (a @ b.T) @ the second part of b, transposed
                fragments = cuda.local.array(16, uint32)
                for i in range(16):
                    fragments[i] = pack(sums[2 * i], sums[2 * i + 1])
                wgmma_rs(sums, fragments, b, 0, 64, 64, b_transposed)
                wgmma_wait(0)
                settle(sums, 32)
            unrolled(4, store_columns, (sums, shared + OUT, row, lane))
            if missing != PROXY_FENCE:
                fence_proxy_async()
            if missing != NAMED_BARRIER:
                named_barrier(1, 128)
            if thread == 0:
                tensor_map_acquire(out_map)
                tma_store_2d(out_map, shared + OUT, 0, 0)
                tma_commit()
                if missing != WAIT_FOR_STORE:
                    tma_store_wait_read(0)
            named_barrier(1, 128)
            unrolled(1, store_columns, (sums, shared + OUT, row, lane))  # into the box that was stored

    return product


def run(rng, a_transposed=0, b_transposed=0, from_registers=0, missing=NOTHING):
    """(out, a @ b.T in float64) of the kernel."""
    values = [rng.standard_normal(shape).astype("bfloat16") for shape in ((ROWS, DEPTH), (COLUMNS, DEPTH))]
    a, b = (
        cuda.to_device(np.ascontiguousarray(x.T if transposed else x).view(np.uint16))
        for x, transposed in zip(values, (a_transposed, b_transposed), strict=True)
    )
    out = cuda.to_device(np.full((ROWS, COLUMNS), 0xFFFF, np.uint16))
    launch = with_shared(make_product(a_transposed, b_transposed, from_registers, missing), 1, 256, NBYTES)
    launch(tensor_map(a, 64), tensor_map(b, 64), tensor_map(out, 64))
    a, b = (x.astype(np.float64) for x in values)
    expected = a @ b.T
    if from_registers:
        expected = expected[:, : DEPTH - 64].astype("bfloat16").astype(np.float64) @ b[:, 64:].T
    return memory.to_host(out), expected


@pytest.fixture(autouse=True)
def needs_hopper(device):
    if device == "cpu" or not SIMULATED and compute_capability()[0] != 9:
        pytest.skip("needs compute capability 9, real or simulated")


def test_the_simulator_has_every_instruction():
    if not SIMULATED:
        pytest.skip("in the simulator")
    instructions = type(tensor_cores.mma)
    own = {name for name, x in vars(hopper).items() if name not in vars(tensor_cores)}
    assert not [name for name in own if isinstance(getattr(hopper, name), instructions)]


@pytest.mark.parametrize("b_transposed", [0, 1])
@pytest.mark.parametrize("a_transposed", [0, 1])
def test_product(rng, a_transposed, b_transposed):
    out, expected = run(rng, a_transposed, b_transposed)
    np.testing.assert_allclose(out, expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("b_transposed", [0, 1])
def test_product_from_registers(rng, b_transposed):
    out, expected = run(rng, b_transposed=b_transposed, from_registers=1)
    np.testing.assert_allclose(out, expected, rtol=2**-7, atol=0.1)


FOUND = {
    SYNCTHREADS: "warp . does not know that there is an mbarrier",
    WAIT_FOR_FULL: "race: warp 4 writes what wgmma of warpgroup 0 may still read",
    WAIT_FOR_EMPTY: "race: warp 4 writes what TMA for mbarrier 0 may still write",
    WAIT_FOR_PRODUCT: "race: warp 4 writes what wgmma of warpgroup 0 may still read",
    ARRIVAL: "deadlock: .*mbarrier 24584",
    NAMED_BARRIER: "race: warp . writes what warp 0 may still read",
    PROXY_FENCE: "TMA or wgmma reads what thread .* stored without fence_proxy_async",
    WAIT_FOR_STORE: "race: warp 0 writes what warp 0 may still read",
    EXTRA_ARRIVAL: "deadlock",
}


@pytest.mark.parametrize("missing", FOUND)
def test_simulator_finds_what_is_missing(rng, missing):
    if not SIMULATED:
        pytest.skip("a GPU computes something wrong, or nothing")
    with pytest.raises(Exception, match=FOUND[missing]):
        run(rng, missing=missing)
