"""What llm_numba.cuda.matmul's own kernels are compiled for; its products are in matmul_plain and matmul_mma."""

from assembling import array
from numba.cuda.types import boolean, int64

from llm_numba.cuda.matmul import add_parts, column_sums


def cases():
    def parts(out, bias):
        return array(out), array("f3"), array(bias), boolean, boolean

    return [
        dict(kernel=add_parts, signature=parts("f2", "f1"), bf16=False),
        dict(kernel=add_parts, signature=parts("h2", "h1"), bf16=True),
        dict(kernel=add_parts, signature=parts("f2", "h1"), bf16=True),
        dict(kernel=column_sums, signature=(array("f2"), array("f2"), int64), bf16=False),
        dict(kernel=column_sums, signature=(array("f2"), array("h2"), int64), bf16=True),
    ]
