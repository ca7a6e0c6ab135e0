"""What llm_numba.cuda.attention_mma's kernels are compiled for."""

from assembling import array
from numba.cuda import types

from llm_numba.cuda.attention_mma import DKV, DQ, FORWARD


def cases():
    h3, f3 = array("h3"), array("f3")
    backward = (h3, h3, f3, f3, h3, types.float32)
    found = [(kernel, (h3, f3, h3, types.float32)) for kernel in FORWARD.values()]
    found += [(kernel, backward) for halves in (DKV, DQ) for kernel in halves.values()]
    wanted = ("HMMA", "LDGSTS")
    return [dict(kernel=kernel, signature=signature, bf16=True, contains=wanted) for kernel, signature in found]
