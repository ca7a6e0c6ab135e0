"""A kernel that uses every instruction of llm_numba.cuda.hopper: each must assemble."""

from assembling import array
from numba import cuda
from numba.cuda.types import float32, int64, uint32

from llm_numba.cuda.hopper import (
    EVICT_FIRST,
    add_float,
    add_float2,
    add_float4,
    bulk_load,
    clear,
    clear_flag,
    descriptor,
    divide,
    dynamic_shared,
    fence_mbarrier_init,
    fence_proxy_async,
    forget,
    inlined,
    keep,
    ldmatrix,
    load_constant_16_bytes,
    load_constant_pair,
    load_float,
    load_float4,
    load_shared_float2,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    named_barrier,
    opaque,
    pack,
    remainder,
    setmaxnreg_dec,
    setmaxnreg_inc,
    settle,
    shuffle_xor,
    stmatrix,
    store_flag,
    store_float,
    store_float4,
    store_shared_16_bytes,
    sync_warp,
    tensor_map_acquire,
    tma_commit,
    tma_load_2d,
    tma_load_3d,
    tma_load_3d_hint,
    tma_prefetch_2d,
    tma_store_2d,
    tma_store_3d,
    tma_store_3d_hint,
    tma_store_wait_read,
    uniform,
    unpack,
    wait_flag,
    wgmma,
    wgmma_open,
    wgmma_rs,
    wgmma_rs_open,
    wgmma_wait,
)
from llm_numba.cuda.jit import kernel, unrolled


@inlined
def write_sum(i, out, sums):
    out[i * 128 + cuda.threadIdx.x] = sums[i]


@kernel(launch_bounds=(256, 1))
def every_instruction(out, tensor_map, memory):
    shared = dynamic_shared()
    sums, scores = cuda.local.array(32, float32), cuda.local.array(64, float32)
    a = cuda.local.array(32, uint32)
    warpgroup = uniform(cuda.threadIdx.x >> 7)
    if warpgroup == 0:
        setmaxnreg_dec(24)
        if cuda.threadIdx.x == 0:
            tensor_map_acquire(tensor_map)
            mbarrier_init(shared, 1)
            fence_mbarrier_init()
            mbarrier_arrive_expect_tx(shared, 8192)
            mbarrier_arrive(shared)
            tma_load_2d(shared, tensor_map, shared, 1, 2)
            tma_load_3d(shared, tensor_map, shared, 1, 2, 3)
            tma_load_3d_hint(shared, tensor_map, shared, 1, 2, 3, EVICT_FIRST)
            bulk_load(shared, memory, 128, shared)
            tma_prefetch_2d(tensor_map, 1, 2)
    else:
        setmaxnreg_inc(240)
        clear(sums, 32)
        mbarrier_wait(shared, 0)
        tile, other = descriptor(shared, 16), descriptor(shared + 8192, 8192)
        wgmma_open(scores, tile, tile, 0, 64, 128, 64, 0, 0)
        wgmma(scores, tile, other, 1, 64, 128, 64, 1, 1)
        wgmma_wait(0)
        settle(scores, 64)
        for i in range(32):
            a[i] = pack(scores[2 * i], scores[2 * i + 1])
        wgmma_rs_open(sums, a, other, 1, 64, 64, 1)
        wgmma_rs(sums, a, other, 1, 64, 64, 1)
        wgmma_wait(0)
        settle(sums, 32)
        settle(a, 32)
        unrolled(32, write_sum, (out, sums))
        forget(sums, 32)

        stmatrix(shared, ldmatrix(shared))
        store_shared_16_bytes(shared, ldmatrix(shared))
        store_float(memory, load_shared_float2(shared)[1])
        fence_proxy_async()
        named_barrier(1, 128)
        sync_warp()
        tma_store_2d(tensor_map, shared, 1, 2)
        tma_store_3d(tensor_map, shared, 1, 2, 3)
        tma_store_3d_hint(tensor_map, shared, 1, 2, 3, EVICT_FIRST)
        tma_commit()
        tma_store_wait_read(0)

        store_float(keep(memory), load_float(memory))
        store_float4(memory, load_float4(memory))
        add_float(memory, sums[0])
        add_float2(memory, sums[0], sums[1])
        add_float4(memory, load_float4(memory))
        clear_flag(memory)
        store_flag(memory, 1)
        wait_flag(memory, 1)
        low, high = unpack(load_constant_pair(memory) ^ load_constant_16_bytes(memory)[0])
        out[remainder(opaque(5), 3) + divide(7, 2)] = shuffle_xor(low + high, 1)


def cases():
    signature = (array("f1"), int64, int64)
    contains = ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "SYNCS", "STSM")
    return [dict(kernel=every_instruction, signature=signature, bf16="hopper", contains=contains)]
