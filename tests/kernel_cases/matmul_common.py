"""The argument types for which llm_numba.cuda.matmul_common's kernel is compiled."""

from assembling import array
from numba.cuda.types import int64

from llm_numba.cuda.matmul_common import column_sums_kernel


def cases():
    return [
        dict(kernel=column_sums_kernel, signature=(array("f2"), array(x + "2"), int64), bf16=x == "h") for x in "fh"
    ]
