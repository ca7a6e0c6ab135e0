"""Tensor maps: how TMA finds a box of a matrix in global memory. See hopper.py.

A map is 128 bytes that the driver encodes. Kernels get its address in device memory. Each is made once and kept, so a
step makes its maps in its first run, which is not captured in a CUDA graph (memory.capture).
"""

import functools

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import SIMULATED, stream

BOX_COLUMNS = 64  # 128 bytes, the widest box that TMA can swizzle
NBYTES, MAPS_PER_BUFFER = 128, 1024


def tensor_map(array, rows: int) -> int:
    """The address of a tensor map for boxes of `rows` x BOX_COLUMNS elements of a bf16 array.

    array: (R, C), or (B, R, C), whose boxes do not reach from one of the B matrices into the next; rows of whole 16
    bytes; rows is at most 256
    """
    if SIMULATED:
        from llm_numba.cuda.hopper_simulated import simulated_map

        return simulated_map(array, rows)
    return _device_map(address_of(array), array.shape, rows)


def address_of(array) -> int:
    """The address of an array's first element in device memory; the host's in the simulator."""
    if SIMULATED:
        from llm_numba.cuda.hopper_simulated import memory_of

        return memory_of(array).ctypes.data
    return array.__cuda_array_interface__["data"][0]


@functools.cache
def _device_map(address: int, shape: tuple[int, ...], rows: int) -> int:
    slot = _slots[0]
    _slots[0] += 1
    buffer = _buffer(slot // MAPS_PER_BUFFER)
    place = buffer[slot % MAPS_PER_BUFFER]
    place.copy_to_device(_encode(address, shape, rows), stream=stream())
    stream().synchronize()
    return place.__cuda_array_interface__["data"][0]


_slots = [0]  # maps made so far


@functools.cache
def _buffer(index: int):
    return cuda.device_array((MAPS_PER_BUFFER, NBYTES), np.uint8)


def _encode(address: int, shape: tuple[int, ...], rows: int) -> np.ndarray:
    """The 128 bytes of the map. Sizes and strides go from the fastest dimension to the slowest."""
    from cuda.bindings import driver

    sizes = [driver.cuuint64_t(size) for size in reversed(shape)]
    strides = [driver.cuuint64_t(2 * int(np.prod(shape[axis:]))) for axis in range(len(shape) - 1, 0, -1)]
    box = [driver.cuuint32_t(size) for size in (BOX_COLUMNS, rows, 1)[: len(shape)]]
    error, encoded = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        len(shape),
        address,
        sizes,
        strides,
        box,
        [driver.cuuint32_t(1)] * len(shape),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if error:
        raise RuntimeError(f"no tensor map for boxes of {rows} rows of {shape} at {address:#x}: {error!r}")
    return np.array([int(word) for word in encoded.opaque], np.uint64).view(np.uint8)
