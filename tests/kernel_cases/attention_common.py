"""The argument types for which llm_numba.cuda.attention_common's kernel is compiled."""

from assembling import array
from numba.cuda.types import int64

from llm_numba.cuda.attention_common import delta_kernel


def cases():
    return [
        dict(kernel=delta_kernel, signature=(array("f3"), array(x + "3"), array(x + "3"), int64), bf16=x == "h")
        for x in "fh"
    ]
