"""The argument types for which llm_numba.cuda.adamw's kernels are compiled."""

from assembling import array
from numba.cuda import types

from llm_numba.cuda.adamw import adamw_kernel


def cases():
    f1, h1, i1, number, factors = array("f1"), array("h1"), array("i1"), types.float32, types.UniTuple(types.float32, 3)
    rest = (types.boolean, f1, f1, f1, array("b1"), f1, factors, factors, number, number, i1, i1, f1)
    return [
        dict(kernel=adamw_kernel, signature=(params, weights, *rest), bf16=params == h1)
        for params, weights in ((f1, f1), (h1, f1), (h1, h1))
    ]
