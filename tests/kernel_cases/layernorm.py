from assembling import array
from numba.cuda import types

from llm_numba.cuda.layernorm import add_shares_kernel, backward_kernel, forward_kernel

CHANNELS = (97, 768, 1600)


def cases():
    shares = (array("f1"), array("f1"), array("f2"), types.boolean)
    found = [dict(kernel=add_shares_kernel, signature=shares, bf16=False)]
    saved = array("f1")
    for x in ("f", "h"):
        rows = vector = array(x + "2")
        forward = (rows, rows, saved, saved, rows, rows, vector, vector)
        backward = (rows, array("f2"), rows, rows, vector, saved, saved)
        for C in CHANNELS:
            found += [
                *(dict(kernel=forward_kernel(C, adds), signature=forward, bf16=x == "h") for adds in (False, True)),
                dict(kernel=backward_kernel(C), signature=backward, bf16=x == "h"),
            ]
    return found
