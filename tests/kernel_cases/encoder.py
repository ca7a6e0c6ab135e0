from assembling import array
from numba.cuda import types

from llm_numba.cuda.encoder import (
    dwpe_kernel,
    dwte_kernel,
    forward_kernel,
    heads_kernel,
    sort_kernel,
)


def cases():
    table, i1 = array("f2"), array("i1")
    sorting = i1, i1, array("i2"), i1, types.int64, types.boolean
    found = [dict(kernel=sort_kernel(size), signature=sorting, bf16=False) for size in (1, 8)]
    found += [dict(kernel=heads_kernel(size), signature=(table, table, i1), bf16=False) for size in (1, 8)]
    for x in ("f", "h"):
        matrix = array(x + "2")
        forward = matrix, i1, matrix, matrix, types.int64, i1
        for size in (1, 8):
            found += [
                *(dict(kernel=forward_kernel(size, at), signature=forward, bf16=x == "h") for at in (False, True)),
                dict(kernel=dwte_kernel(size), signature=(table, table, matrix, i1, i1), bf16=x == "h"),
                dict(kernel=dwpe_kernel(size), signature=(table, matrix), bf16=x == "h"),
            ]
    return found
