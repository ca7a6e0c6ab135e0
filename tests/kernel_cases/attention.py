"""What llm_numba.cuda.attention's kernels are compiled for."""

from assembling import array
from numba.cuda import types

from llm_numba.cuda.attention import BACKWARD, FORWARD, WIDTHS, append_kernel, attend_kernel, dot_rows_kernel


def cases():
    found = []
    lse, head = array("f3"), (types.int64, types.float32)
    for x in "fh":
        x3, cache = array(x + "3"), array(x + "4")
        widths = WIDTHS if x == "f" else (64,)  # bf16 changes no more than how numbers are read and written
        kernels = [(FORWARD[width], (x3, lse, x3, *head)) for width in widths]
        kernels += [(half, (x3, x3, lse, lse, x3, *head)) for width in widths for half in BACKWARD[width]]
        kernels += [
            (dot_rows_kernel, (lse, x3, x3, types.int64)),
            (append_kernel, (cache, x3, array("i1"))),
            (attend_kernel, (x3, cache, x3, array("i1"), types.int64, *head)),
        ]
        found += [dict(kernel=kernel, signature=signature, bf16=x == "h") for kernel, signature in kernels]
    return found
