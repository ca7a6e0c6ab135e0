"""The argument types for which llm_numba.cuda.attention's kernels are compiled; see also its variants."""

from assembling import array
from numba.cuda.types import float32, int64

from llm_numba.cuda.attention import attend_kernel, weights_kernel


def cases():
    found, position = [], array("i1")
    for x in "fh":
        x2, x3 = array(x + "2"), array(x + "3")
        attend = x2, x2, x2, position, int64, int64, float32
        kernels = [(attend_kernel(HS, group), attend) for HS, group in ((64, 1), (97, 1), (128, 4))]
        kernels += [(weights_kernel, (array("f4"), array("f3"), x3, int64, int64, int64, float32))]
        found += [dict(kernel=kernel, signature=signature, bf16=x == "h") for kernel, signature in kernels]
    return found
