"""The argument types for which llm_numba.cuda.wgmma_attention_forward's kernels are compiled."""

from assembling import array
from numba.cuda.types import float32, int64

from llm_numba.cuda.wgmma_attention_forward import CONSUMERS, forward_kernel


def cases():
    signature = (int64, int64, int64, array("f2"), array("i3"), int64, int64, float32)
    contains = ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG")
    return [dict(kernel=forward_kernel(HS), signature=signature, bf16="hopper", contains=contains) for HS in CONSUMERS]
