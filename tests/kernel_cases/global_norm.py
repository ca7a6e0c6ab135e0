"""The argument types for which llm_numba.cuda.global_norm's kernels are compiled."""

from assembling import array
from numba.cuda import types

from llm_numba.cuda.global_norm import clip_kernel, sum_kernel, sums_of_squares_kernel


def cases():
    f1, d1 = array("f1"), array("d1")
    return [
        dict(kernel=sums_of_squares_kernel, signature=(d1, f1), bf16=False, wide=True),
        dict(kernel=sum_kernel, signature=(d1, d1), bf16=False, wide=True),
        dict(kernel=clip_kernel, signature=(f1, d1, d1, d1, types.float64), bf16=False, wide=True),
    ]
