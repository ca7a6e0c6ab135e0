"""How kernels are compiled and launched, and the small device functions that several of them use.

A bf16 tensor is an array of uint16, the upper halves of float32 bit patterns: Numba has no bf16 type that works in
every kind of memory. A kernel reads an element with `to_float`, computes in float32 and writes with `to_storage`. For
float32 tensors both functions do nothing, so one kernel serves both precisions.

With NUMBA_ENABLE_CUDASIM=1, Numba runs the kernels as plain Python, one operating system thread per CUDA thread. The
end of this file replaces what that simulator does not support; `sized` shrinks what would take it too long.
"""

import functools
import operator
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import config, cuda

from llm_numba.util.cache import compiled_code_folder
from llm_numba.util.host import usable_cpus

float32, int32, int64, uint16, uint32 = np.float32, np.int32, np.int64, np.uint16, np.uint32
SIMULATED = bool(config.ENABLE_CUDASIM)
WARP = 32
ALL_LANES = 0xFFFFFFFF
# the layers and ops that take longest to compile
SLOWEST = [{"attention_forward"}, {"attention_backward"}, {"matmul_gelu_forward"}, {"gelu_matmul_backward"}]
SLOWEST += [{"matmul_forward"}, {"matmul_backward"}, {"layernorm", "residual"}]
MEMORY_OF_A_PROCESS = 2**30  # bytes on the GPU, at most
DEFAULT_SHARED = 48 * 1024  # bytes of dynamic shared memory that a kernel may use without the attribute


def sized(real: int, simulated: int) -> int:
    """A compile-time size: `real` on a GPU, `simulated` (much smaller) in the simulator."""
    return simulated if SIMULATED else real


THREADS = sized(256, 32)  # threads per block, unless a kernel needs another number


def kernel(function: Callable | None = None, **options):
    """@cuda.jit with a cache on disk. The simulator ignores the options, such as launch_bounds."""
    if function is None:
        return functools.partial(kernel, **options)
    return cuda.jit(function) if SIMULATED else cuda.jit(cache=True, **options)(function)


def device(function: Callable):
    """A device function: one that kernels call."""
    return cuda.jit(device=True)(function)


def inlined(function: Callable):
    """A device function that is always inlined, so that the local arrays it gets stay in registers.

    The simulator calls it as it is: `cuda` means something in it only if it is in the kernel's file.
    """
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


def literal(kind) -> int:
    """The value of a constant argument of an intrinsic: a literal, or a global or closure variable."""
    from numba.cuda.core.errors import RequireLiteralValue

    if not hasattr(kind, "literal_value"):
        raise RequireLiteralValue(kind)
    return int(kind.literal_value)


@functools.cache
def stream():
    """The stream of every launch and copy. Unlike CUDA's default stream, it can be captured in a graph."""
    return 0 if SIMULATED else cuda.stream()


@functools.cache
def compute_capability() -> tuple[int, int]:
    """Of the GPU; (0, 0) in the simulator."""
    return (0, 0) if SIMULATED else cuda.get_current_device().compute_capability


def blocks_for(n: int, per_block: int = THREADS) -> int:
    """How many blocks of per_block elements cover n elements: n / per_block, rounded up."""
    return -(-n // per_block)


def with_shared(kernel, grid, block, nbytes: int) -> Callable:
    """kernel[grid, block, stream()] with nbytes of dynamic shared memory.

    Above DEFAULT_SHARED the driver requires an attribute of the kernel, which Numba does not set.
    """

    def launch(*args):
        if nbytes > DEFAULT_SHARED and not SIMULATED:
            _allow_shared(kernel, tuple(kernel.typeof_pyval(arg) for arg in args), nbytes)
        kernel[grid, block, stream(), nbytes](*args)

    return launch


@functools.cache
def _allow_shared(kernel, types: tuple, nbytes: int) -> None:
    """Compile the kernel for these types and set its limit of dynamic shared memory."""
    from cuda.bindings import driver

    compiled = kernel.compile(types)
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    function = driver.CUkernel(int(compiled._codelibrary.get_cufunc().handle))
    gpu = driver.CUdevice(cuda.get_current_device().id)
    driver_result(driver.cuKernelSetAttribute(limit, nbytes, function, gpu), f"{nbytes} bytes of shared memory")


def driver_result(answer: tuple, what: str):
    """The value that a function of cuda.bindings.driver returned after its error code. Errors: RuntimeError."""
    error, *values = answer
    if error:
        raise RuntimeError(f"{what}: the CUDA driver returned {error.name}")
    return values[0] if values else None


def is_compiled() -> bool:
    """Whether Numba compiles the kernels, rather than simulating them."""
    return not SIMULATED


def shares() -> list[set[str]]:
    """The layers or ops that other processes should compile while this one compiles the rest, as many as have a core
    and memory on the GPU; [] if the disk holds a compiled kernel that is not in memory.py, or in the simulator."""
    found = [] if SIMULATED else Path(config.CACHE_DIR).glob("cuda_*/*.nbi")
    if SIMULATED or not all(index.name.startswith("memory.") for index in found):
        return []
    most = min(len(usable_cpus()) - 1, cuda.current_context().get_memory_info().free // MEMORY_OF_A_PROCESS)
    return [set().union(*SLOWEST[i::most]) for i in range(min(most, len(SLOWEST)))]


if not SIMULATED:
    config.CACHE_DIR = config.CACHE_DIR or str(compiled_code_folder())
    config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # some kernels of a step, and most tests, use few blocks
    from llvmlite import ir
    from numba.cuda import cgutils, types
    from numba.cuda.extending import intrinsic
    from numba.cuda.typing import signature

    from llm_numba.cuda import compiled_code

    compiled_code.share_between_processes()
    I16, I32, F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()

    @intrinsic
    def to_float(typingctx, x):
        """float32 <- an element of a float32 or bf16 tensor."""

        def codegen(context, builder, sig, args):
            if x != types.uint16:
                return args[0]
            return builder.bitcast(builder.shl(builder.zext(args[0], I32), ir.Constant(I32, 16)), F32)

        return signature(types.float32, x), codegen

    @intrinsic
    def to_storage(typingctx, x, tensor):
        """x (float32) as an element of the tensor: itself, or rounded to bf16 (to nearest, ties to even)."""
        is_bf16 = tensor.dtype == types.uint16

        def codegen(context, builder, sig, args):
            if not is_bf16:
                return args[0]
            convert = ir.FunctionType(I16, [F32])
            return builder.asm(convert, "cvt.rn.bf16.f32 $0, $1;", "=h,f", [args[0]], False)

        return signature(types.uint16 if is_bf16 else types.float32, types.float32, tensor), codegen

    @intrinsic
    def exp2(typingctx, x):
        """2**x in one instruction: relative error at most 2**-22.5; results below 2**-126 become 0."""

        def codegen(context, builder, sig, args):
            return builder.asm(ir.FunctionType(F32, [F32]), "ex2.approx.ftz.f32 $0, $1;", "=f,f", args, False)

        return signature(types.float32, types.float32), codegen

    @intrinsic
    def reciprocal(typingctx, x):
        """1 / x in one instruction: off by at most one unit in the last place; results below 2**-126 become 0."""

        def codegen(context, builder, sig, args):
            return builder.asm(ir.FunctionType(F32, [F32]), "rcp.approx.ftz.f32 $0, $1;", "=f,f", args, False)

        return signature(types.float32, types.float32), codegen

    @intrinsic
    def load_float4(typingctx, tile, row, column):
        """Four adjacent elements of a row of a float32 tile in shared memory, in one load; column % 4 must be 0.

        Their address must be a multiple of 16 bytes; it is if the sizes of all shared arrays of the kernel are.
        """

        def codegen(context, builder, sig, args):
            array = context.make_array(tile)(context, builder, args[0])
            strides = cgutils.unpack_tuple(builder, array.strides)
            offset = builder.add(builder.mul(args[1], strides[0]), builder.mul(args[2], strides[1]))
            first = builder.gep(builder.bitcast(array.data, ir.IntType(8).as_pointer()), [offset])
            vector = builder.load(builder.bitcast(first, ir.VectorType(F32, 4).as_pointer()), align=16)
            return cgutils.pack_array(builder, [builder.extract_element(vector, ir.Constant(I32, i)) for i in range(4)])

        return signature(types.UniTuple(types.float32, 4), tile, types.int64, types.int64), codegen

    @intrinsic
    def unrolled(typingctx, count, function, arguments):
        """function(i, *arguments) for i = 0, 1, ... count - 1, as `count` calls with a constant each.

        The compiler's own unrolling gives up on large bodies, and local arrays indexed in such a loop leave the
        registers.
        function: an `inlined` device function that returns nothing
        """
        kinds = (types.int64, *map(types.unliteral, arguments.types))
        times = literal(count)
        callee = typingctx.resolve_function_type(function, kinds, {})

        def codegen(context, builder, sig, args):
            call = context.get_function(function, callee)
            context.add_linking_libs(getattr(call, "libs", ()))
            values = cgutils.unpack_tuple(builder, args[2], len(kinds) - 1)
            values = [
                context.cast(builder, value, given, kind)
                for value, given, kind in zip(values, sig.args[2].types, kinds[1:], strict=True)
            ]
            for i in range(times):
                call(builder, [ir.Constant(ir.IntType(64), i), *values])

        return signature(types.void, count, function, arguments), codegen

    @device
    def warp_sum(x):
        """The sum of x over the warp, in every thread."""
        x += cuda.shfl_xor_sync(ALL_LANES, x, 16)
        x += cuda.shfl_xor_sync(ALL_LANES, x, 8)
        x += cuda.shfl_xor_sync(ALL_LANES, x, 4)
        x += cuda.shfl_xor_sync(ALL_LANES, x, 2)
        x += cuda.shfl_xor_sync(ALL_LANES, x, 1)
        return x

    @device
    def warp_max(x):
        """The maximum of x over the warp, in every thread; it may ignore a NaN."""
        x = max(x, cuda.shfl_xor_sync(ALL_LANES, x, 16))
        x = max(x, cuda.shfl_xor_sync(ALL_LANES, x, 8))
        x = max(x, cuda.shfl_xor_sync(ALL_LANES, x, 4))
        x = max(x, cuda.shfl_xor_sync(ALL_LANES, x, 2))
        x = max(x, cuda.shfl_xor_sync(ALL_LANES, x, 1))
        return x

    @device
    def block_sum(x, shared):
        """The sum of x over the block, in every thread, always added in the same order.

        shared: an array in shared memory, as long as the block; every thread of the block must call this.
        """
        warp, lane = cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP
        x = warp_sum(x)
        if lane == 0:
            shared[warp] = x
        cuda.syncthreads()
        x = shared[lane] if lane < cuda.blockDim.x // WARP else shared.dtype.type(0)
        x = warp_sum(x)
        cuda.syncthreads()
        return x

    @device
    def row_sum(x, shared):
        """The sum of x over the threads with the same threadIdx.y, in each of them, added as by `block_sum`.

        blockDim.x is WARP, or blockDim.y is 1.
        """
        return warp_sum(x) if cuda.blockDim.x == WARP else block_sum(x, shared)

    @device
    def block_scan(x, shared):
        """(the sum of x over the threads before this one, the sum over the block); see `block_sum`."""
        warp, lane = cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP
        upto = x
        for i in range(5):
            other = cuda.shfl_up_sync(ALL_LANES, upto, 1 << i)
            if lane >= 1 << i:
                upto += other
        if lane == WARP - 1:
            shared[warp] = upto
        cuda.syncthreads()
        of_warp = shared[lane] if lane < cuda.blockDim.x // WARP else shared.dtype.type(0)
        before = warp_sum(of_warp if lane < warp else shared.dtype.type(0))
        total = warp_sum(of_warp)
        cuda.syncthreads()
        return before + upto - x, total

    @device
    def block_max(x, shared):
        """The maximum of x over the block, in every thread; see `block_sum`."""
        warp, lane = cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP
        x = warp_max(x)
        if lane == 0:
            shared[warp] = x
        cuda.syncthreads()
        x = warp_max(shared[min(lane, cuda.blockDim.x // WARP - 1)])
        cuda.syncthreads()
        return x

else:
    import sys
    import warnings

    from ml_dtypes import bfloat16
    from numba.cuda.simulator import kernelapi

    from llm_numba.cuda import simulator

    simulator.install()
    config.CUDA_WARN_ON_IMPLICIT_COPY = 0
    warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)  # compiled kernels do not warn either

    def to_float(x):
        return uint16(x).view(bfloat16).astype(float32) if isinstance(x, uint16) else float32(x)

    def to_storage(x, tensor):
        return float32(x).astype(bfloat16).view(uint16) if tensor.dtype == uint16 else float32(x)

    def exp2(x):
        return np.exp2(x)

    def reciprocal(x):
        return float32(1) / x

    def load_float4(tile, row, column):
        return tile[row, column : column + 4]

    def unrolled(count, function, arguments):
        for i in range(count):
            function(i, *arguments)

    def _shared_array(self, shape, dtype, alignment=None):
        """The simulator's own function (one array per source line), which in some versions lacks `alignment`."""
        caller = sys._getframe(1)
        line = caller.f_code.co_filename, caller.f_lineno
        if line not in self._allocations:
            self._allocations.setdefault(line, np.empty(shape, dtype))  # only the first thread's array is kept
        return self._allocations[line]

    kernelapi.FakeCUDAShared.array = _shared_array

    def warp_sum(x):
        """A warp has one thread."""
        return x

    @device
    def _values_of_row(x, shared):
        """Instead of warp shuffles, every thread gets the values of all with the same threadIdx.y."""
        first = cuda.threadIdx.y * cuda.blockDim.x
        shared[first + cuda.threadIdx.x] = x
        cuda.syncthreads()
        values = [shared[first + i] for i in range(cuda.blockDim.x)]
        cuda.syncthreads()
        return values

    @device
    def block_sum(x, shared):
        return functools.reduce(operator.add, _values_of_row(x, shared))

    row_sum = block_sum

    @device
    def block_scan(x, shared):
        values = _values_of_row(x, shared)
        return sum(values[: cuda.threadIdx.x]), sum(values)

    @device
    def block_max(x, shared):
        return functools.reduce(max, _values_of_row(x, shared))
