"""Launches that overlap: a kernel starts while the kernel before it still runs (programmatic dependent launch).

Between two dependent kernels the GPU idles for a microsecond or more: the last blocks finish, the next blocks start and
compute their indices. A kernel that is launched by `overlapping` may start as soon as every block of the kernel before
it has called `let_next_start`. It must call `wait_for_previous`, which waits until all earlier kernels have finished,
before it touches memory that they use. Until then it can load into L2 what none of them writes, such as weights.

From compute capability 9.0 on. On older GPUs and in the simulator kernels run one after another.
Source: NVIDIA, CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"
"""

from collections.abc import Callable

from llm_numba.cuda.jit import SIMULATED, compute_capability, stream

if not SIMULATED:
    from cuda.core import LaunchConfig
    from cuda.core import launch as launch_kernel
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.core.targetconfig import ConfigStack
    from numba.cuda.extending import intrinsic
    from numba.cuda.typing import signature

    from llm_numba.cuda.vectors import pointer

    def on_hopper(text):
        """A device function that runs a line of PTX from compute capability 9.0 on, else does nothing."""

        def emit(typingctx):
            def codegen(context, builder, sig, args):
                if ConfigStack().top().compute_capability >= (9, 0):
                    builder.asm(ir.FunctionType(ir.VoidType(), []), text, "~{memory}", [], True)

            return signature(types.void), codegen

        return intrinsic(emit)

    wait_for_previous = on_hopper("griddepcontrol.wait;")
    let_next_start = on_hopper("griddepcontrol.launch_dependents;")

    @intrinsic
    def prefetch(typingctx, matrix, row, column):
        """Load the line of this element of a matrix into L2."""

        def codegen(context, builder, sig, args):
            place = pointer(context, builder, matrix, *args[:1], args[1:], ir.IntType(8))
            kind = ir.FunctionType(ir.VoidType(), [place.type])
            builder.asm(kind, "prefetch.global.L2 [$0];", "l,~{memory}", [place], True)

        return signature(types.void, matrix, types.int64, types.int64), codegen

    def overlapping(kernel, grid, block) -> Callable:
        """kernel[grid, block, stream()], which may start before the kernel before it has finished."""
        configured = kernel[grid, block, stream()]
        if compute_capability() < (9, 0):
            return configured

        def launch(*args):
            """What Numba does, with another LaunchConfig."""
            compiled, words = kernel.compile(tuple(kernel.typeof_pyval(arg) for arg in args)), []
            for kind, arg in zip(compiled.argument_types, args, strict=True):
                compiled._prepare_args(kind, arg, stream(), [], words)
            config = LaunchConfig(grid=grid, block=block, programmatic_stream_serialization=True)
            launch_kernel(configured.stream, config, compiled._codelibrary.get_cufunc().kernel, *words)

        return launch

else:

    def wait_for_previous():
        pass

    let_next_start = wait_for_previous

    def prefetch(matrix, row, column):
        pass

    def overlapping(kernel, grid, block) -> Callable:
        return kernel[grid, block]
