"""The argument types for which llm_numba.cuda.tiling's kernel is compiled."""

from assembling import array
from numba.cuda.types import boolean

from llm_numba.cuda.tiling import add_splits_kernel


def cases():
    return [
        dict(
            kernel=add_splits_kernel,
            signature=(array(x + "2"), array("f3"), array(x + "1"), boolean, boolean),
            bf16=x == "h",
        )
        for x in "fh"
    ]
