"""The argument types for which llm_numba.cuda.sampler's kernel is compiled."""

from assembling import array
from numba.cuda.types import int64

from llm_numba.cuda.sampler import sample_kernel


def cases():
    i, d = array("i1"), array("d1")
    return [
        dict(
            kernel=sample_kernel(size),
            signature=(array("i2"), i, array(x + "2"), d, d, array("f2"), int64),
            bf16=x == "h",
            wide=True,  # uniforms and choice
        )
        for x in "fh"
        for size in (1, 8)
    ]
