"""The argument types for which llm_numba.cuda.attention_mma's kernels are compiled."""

from assembling import array
from numba.cuda.types import float32

from llm_numba.cuda.attention_mma import dkv_kernel, dq_kernel, forward_kernel

GROUPS = (1, 4)  # query heads per kv head


def cases():
    h3, f3 = array("h3"), array("f3")
    backward = (h3, h3, f3, f3, h3, float32)
    kernels = [
        (make(HS, group), (h3, f3, h3, float32) if make is forward_kernel else backward)
        for make in (forward_kernel, dkv_kernel, dq_kernel)
        for HS in (64, 128)
        for group in GROUPS
    ]
    instructions = ("HMMA", "LDGSTS")
    return [dict(kernel=kernel, signature=types, bf16=True, contains=instructions) for kernel, types in kernels]
