"""What llm_numba.cuda.matmul_simt's kernels are compiled for."""

from assembling import array
from numba.cuda.types import boolean, int64

from llm_numba.cuda.matmul_simt import KERNELS


def cases():
    # results, and the operands: of a layer in float32, of one in bf16, and of one of its parts or its weight's gradient
    kinds = [("f", "f"), ("h", "h"), ("f", "h")]
    return [
        dict(
            kernel=kernel,
            signature=(array(out + "3"), array(x + "2"), array(x + "2"), array(x + "1"), boolean, boolean, int64),
            bf16=x == "h",
            contains=".128",  # numbers are read from shared memory four at a time
        )
        for layout, kernel in KERNELS.items()
        for out, x in kinds
        if (layout, out) != ((True, True), "h")
    ]
