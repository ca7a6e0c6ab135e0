"""The argument types for which llm_numba.cuda.matmul_simt's kernels are compiled."""

from assembling import array
from numba.cuda.types import boolean, int64

from llm_numba.cuda.matmul_simt import SUB, product_kernel


def cases():
    # (out, operands): a layer in float32, a layer in bf16, partial products or the gradient of the weight in bf16
    kinds = [("f", "f"), ("h", "h"), ("f", "h")]
    return [
        dict(
            kernel=product_kernel(*layout, vector),
            signature=(array(out + "3"), array(x + "2"), array(x + "2"), array(x + "1"), boolean, boolean, int64),
            bf16=x == "h",
            contains=".128",  # reads of four floats from shared memory
        )
        for layout in ((False, False), (False, True), (True, True))
        for vector in (SUB, 1)
        for out, x in kinds
        if (layout, out) != ((True, True), "h")
    ]
