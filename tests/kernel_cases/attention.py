"""The argument types for which llm_numba.cuda.attention's kernels are compiled; see also its variants."""

from assembling import array
from numba.cuda.types import float32, int64

from llm_numba.cuda.attention import append_kernel, attend_kernel, weights_kernel


def cases():
    found, position = [], array("i1")
    for x in "fh":
        x3, cache = array(x + "3"), array(x + "4")
        kernels = [
            (append_kernel, (cache, x3, position)),
            (attend_kernel, (x3, cache, x3, position, int64, int64, int64, float32)),
            (weights_kernel, (array("f4"), array("f3"), x3, int64, int64, int64, float32)),
        ]
        found += [dict(kernel=kernel, signature=signature, bf16=x == "h") for kernel, signature in kernels]
    return found
