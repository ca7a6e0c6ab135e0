"""The argument types for which llm_numba.cuda.wgmma_attention_backward's kernels are compiled."""

from assembling import array
from numba.cuda.types import float32, int64

from llm_numba.cuda.wgmma_attention_backward import STAGES, backward_kernel, statistics_kernel


def cases():
    statistics = (array("f4"), array("f2"), array("h3"), array("h3"), array("f3"))
    backward = (int64, int64, int64, int64, array("f4"), array("f1"), array("f2"), *6 * (int64,), float32)
    contains = ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "RED")
    return [
        case
        for HS in STAGES
        for case in (
            dict(kernel=statistics_kernel(HS), signature=statistics, bf16="hopper"),
            dict(kernel=backward_kernel(HS), signature=backward, bf16="hopper", contains=contains),
        )
    ]
