"""The argument types for which llm_numba.cuda.attention_simt's kernels are compiled."""

from assembling import array
from numba.cuda.types import float32, int64

from llm_numba.cuda.attention_simt import WIDTHS, dkv_kernel, dq_kernel, forward_kernel

GROUPS = (1, 4)  # query heads per kv head


def cases():
    found = []
    for x in "fh":
        x3, lse = array(x + "3"), array("f3")
        kinds = [(width, group, 4) for width in WIDTHS for group in GROUPS] + [(width, 1, 1) for width in WIDTHS]
        kinds = kinds if x == "f" else [(64, 1, 4), (64, 1, 1)]
        for kind in kinds:
            kernels = [(forward_kernel(*kind), (x3, lse, x3, int64, float32))]
            kernels += [(half(*kind), (x3, x3, lse, lse, x3, int64, float32)) for half in (dkv_kernel, dq_kernel)]
            found += [dict(kernel=kernel, signature=signature, bf16=x == "h") for kernel, signature in kernels]
    return found
