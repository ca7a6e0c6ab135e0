"""The argument types for which llm_numba.cuda.matmul_few_rows's kernel is compiled."""

from assembling import array
from numba.cuda.types import boolean

from llm_numba.cuda.matmul_few_rows import ROWS, forward_kernel


def cases():
    found = []
    for x in "fh":
        matrix = array(x + "2")
        signature = (matrix, matrix, matrix, matrix, array(x + "1"), boolean, boolean)
        found += [
            dict(
                kernel=forward_kernel(rows, n),
                signature=signature,
                bf16=x == "h",
                contains=".128" if n > 1 else (),
            )
            for rows in (1, ROWS)
            for n in (1, 8)
        ]
    return found
