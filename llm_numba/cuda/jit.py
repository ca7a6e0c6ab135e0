"""How every kernel is compiled and launched, and the small device functions that several of them use.

A bf16 tensor is an array of uint16, the upper half of a float32's bits: Numba has no such type of its own that works in
every kind of memory. A kernel reads it with `to_float`, computes in float32 and writes
it with `to_storage`. For float32 tensors both functions do nothing, so one kernel serves both.

With NUMBA_ENABLE_CUDASIM=1, Numba runs the kernels as plain Python, with one thread of the operating system for each of
CUDA's. What that simulator does not know is replaced at the end of this file, and nowhere else; what it is too slow for
is made smaller by `sized`.
"""

import functools
from collections.abc import Callable

import numpy as np
from numba import config, cuda

from llm_numba.util.cache import compiled_code_folder

float32, int32, int64, uint16, uint32 = np.float32, np.int32, np.int64, np.uint16, np.uint32
SIMULATED = bool(config.ENABLE_CUDASIM)
WARP = 32
ALL_LANES = 0xFFFFFFFF
MOST_SHARED = 48 * 1024  # bytes of shared memory that a block may have without asking


def sized(real: int, simulated: int) -> int:
    """A size that the compiler sees as a constant: that of the real thing, or one the simulator gets through."""
    return simulated if SIMULATED else real


THREADS = sized(256, 32)  # a block's, where a kernel does not need another number


def kernel(function: Callable | None = None, **options):
    """@cuda.jit, kept on disk for the next start; options (such as launch_bounds) that the simulator refuses are for
    the compiler only."""
    if function is None:
        return functools.partial(kernel, **options)
    return cuda.jit(function) if SIMULATED else cuda.jit(cache=True, **options)(function)


def device(function: Callable):
    """A function that kernels call."""
    return cuda.jit(device=True)(function)


@functools.cache
def stream():
    """The one stream on which everything happens, in order. It can be captured as a graph, unlike CUDA's default."""
    return 0 if SIMULATED else cuda.stream()


def blocks_for(n: int, per_block: int = THREADS) -> int:
    """How many blocks of per_block it takes to cover n things."""
    return -(-n // per_block)


def with_shared(kernel, grid, block, nbytes: int) -> Callable:
    """kernel[grid, block, stream()] with nbytes of dynamic shared memory. The driver refuses a block more than
    MOST_SHARED of it unless the kernel has asked, which Numba does not."""

    def launch(*args):
        if nbytes > MOST_SHARED:
            _allow_shared(kernel, tuple(kernel.typeof_pyval(arg) for arg in args), nbytes)
        kernel[grid, block, stream(), nbytes](*args)

    return launch


@functools.cache
def _allow_shared(kernel, types: tuple, nbytes: int) -> None:
    """Compile the kernel for these types and tell the driver what it may take."""
    from cuda.bindings import driver

    compiled = kernel.compile(types)
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    kernel_on_card = driver.CUkernel(int(compiled._codelibrary.get_cufunc().handle))
    card = driver.CUdevice(cuda.get_current_device().id)
    (error,) = driver.cuKernelSetAttribute(limit, nbytes, kernel_on_card, card)
    if error:
        raise RuntimeError(f"a block of this card cannot have {nbytes} bytes of shared memory: {error!r}")


def is_compiled() -> bool:
    """Whether Numba compiles the kernels, or simulates them."""
    return not SIMULATED


def nothing_compiled() -> bool:
    """Whether a second process would help to compile; it would only wait for the same card."""
    return False


if not SIMULATED:
    config.CACHE_DIR = config.CACHE_DIR or str(compiled_code_folder())
    config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # the last kernels of a step are small, and tests are

    from llvmlite import ir
    from numba.cuda import cgutils, types
    from numba.cuda.extending import intrinsic
    from numba.cuda.typing import signature

    I16, I32, F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()

    @intrinsic
    def to_float(typingctx, number):
        """float32 <- a number of a float32 or of a bf16 tensor."""

        def codegen(context, builder, sig, args):
            if number != types.uint16:
                return args[0]
            return builder.bitcast(builder.shl(builder.zext(args[0], I32), ir.Constant(I32, 16)), F32)

        return signature(types.float32, number), codegen

    @intrinsic
    def to_storage(typingctx, number, tensor):
        """What stands for number (float32) in the tensor: itself, or the nearest bf16, to even where two are near."""
        is_bf16 = tensor.dtype == types.uint16

        def codegen(context, builder, sig, args):
            if not is_bf16:
                return args[0]
            convert = ir.FunctionType(I16, [F32])
            return builder.asm(convert, "cvt.rn.bf16.f32 $0, $1;", "=h,f", [args[0]], False)

        return signature(types.uint16 if is_bf16 else types.float32, types.float32, tensor), codegen

    @intrinsic
    def exp2(typingctx, number):
        """2**number in one instruction: within 2**-22.5 of it, and 0 below 2**-126."""

        def codegen(context, builder, sig, args):
            return builder.asm(ir.FunctionType(F32, [F32]), "ex2.approx.ftz.f32 $0, $1;", "=f,f", args, False)

        return signature(types.float32, types.float32), codegen

    @intrinsic
    def load_float4(typingctx, tile, row, column):
        """Four neighbours in a row of a float32 tile in shared memory, read at once; column is a multiple of four.

        They must lie at a multiple of 16 bytes, and do where all of a kernel's shared arrays have such sizes.
        """

        def codegen(context, builder, sig, args):
            array = context.make_array(tile)(context, builder, args[0])
            strides = cgutils.unpack_tuple(builder, array.strides)
            offset = builder.add(builder.mul(args[1], strides[0]), builder.mul(args[2], strides[1]))
            first = builder.gep(builder.bitcast(array.data, ir.IntType(8).as_pointer()), [offset])
            vector = builder.load(builder.bitcast(first, ir.VectorType(F32, 4).as_pointer()), align=16)
            return cgutils.pack_array(builder, [builder.extract_element(vector, ir.Constant(I32, i)) for i in range(4)])

        return signature(types.UniTuple(types.float32, 4), tile, types.int64, types.int64), codegen

    @device
    def warp_sum(number):
        """The sum over the 32 threads of a warp, to each of them."""
        number += cuda.shfl_xor_sync(ALL_LANES, number, 16)
        number += cuda.shfl_xor_sync(ALL_LANES, number, 8)
        number += cuda.shfl_xor_sync(ALL_LANES, number, 4)
        number += cuda.shfl_xor_sync(ALL_LANES, number, 2)
        number += cuda.shfl_xor_sync(ALL_LANES, number, 1)
        return number

    @device
    def warp_max(number):
        """The largest number of the 32 threads of a warp, to each of them; a NaN may be passed over."""
        number = max(number, cuda.shfl_xor_sync(ALL_LANES, number, 16))
        number = max(number, cuda.shfl_xor_sync(ALL_LANES, number, 8))
        number = max(number, cuda.shfl_xor_sync(ALL_LANES, number, 4))
        number = max(number, cuda.shfl_xor_sync(ALL_LANES, number, 2))
        number = max(number, cuda.shfl_xor_sync(ALL_LANES, number, 1))
        return number

    @device
    def block_sum(number, shared):
        """The sum over the threads of a block, to each of them, always in the same order.

        shared: an array in shared memory of the block's size; every thread of the block must come here.
        """
        warp, lane = cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP
        number = warp_sum(number)
        if lane == 0:
            shared[warp] = number
        cuda.syncthreads()
        number = shared[lane] if lane < cuda.blockDim.x // WARP else shared.dtype.type(0)
        number = warp_sum(number)
        cuda.syncthreads()
        return number

    @device
    def block_max(number, shared):
        """The largest number of the threads of a block, to each of them; see `block_sum`."""
        warp, lane = cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP
        number = warp_max(number)
        if lane == 0:
            shared[warp] = number
        cuda.syncthreads()
        number = warp_max(shared[min(lane, cuda.blockDim.x // WARP - 1)])
        cuda.syncthreads()
        return number

else:
    import sys
    import warnings

    from ml_dtypes import bfloat16
    from numba.cuda.simulator import kernelapi

    config.CUDA_WARN_ON_IMPLICIT_COPY = 0
    warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)  # as compiled: inf, and not a word

    def to_float(number):
        return uint16(number).view(bfloat16).astype(float32) if isinstance(number, uint16) else float32(number)

    def to_storage(number, tensor):
        return float32(number).astype(bfloat16).view(uint16) if tensor.dtype == uint16 else float32(number)

    def exp2(number):
        return np.exp2(number)

    def load_float4(tile, row, column):
        return tile[row, column : column + 4]

    def _shared_array(self, shape, dtype, alignment=None):
        """An array for each line that asks for one, as the simulator's own function has it, which in some versions
        knows no alignment; here there is none to keep."""
        caller = sys._getframe(1)
        line = caller.f_code.co_filename, caller.f_lineno
        if line not in self._allocations:
            self._allocations.setdefault(line, np.empty(shape, dtype))  # whichever thread comes first
        return self._allocations[line]

    kernelapi.FakeCUDAShared.array = _shared_array

    @device
    def _over_block(number, shared, combine):
        """In place of the warps' shuffles every thread goes through the numbers of all."""
        shared[cuda.threadIdx.x] = number
        cuda.syncthreads()
        numbers = [shared[i] for i in range(cuda.blockDim.x)]
        cuda.syncthreads()
        return functools.reduce(combine, numbers)

    @device
    def block_sum(number, shared):
        return _over_block(number, shared, lambda a, b: a + b)

    @device
    def block_max(number, shared):
        return _over_block(number, shared, max)
