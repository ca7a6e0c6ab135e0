"""The argument types for which llm_numba.cuda.matmul's kernel is compiled; the products are in the variants' files."""

from assembling import array
from numba.cuda.types import int64

from llm_numba.cuda.matmul import column_sums_kernel


def cases():
    return [
        dict(kernel=column_sums_kernel, signature=(array("f2"), array(x + "2"), int64), bf16=x == "h") for x in "fh"
    ]
