"""The argument types for which llm_numba.cuda.memory's kernels are compiled."""

from assembling import array

from llm_numba.cuda.memory import copy_kernel, zero_kernel


def cases():
    return [
        dict(kernel=zero_kernel, signature=(array("b1"),), bf16=False),
        dict(kernel=zero_kernel, signature=(array("f1"),), bf16=False),
        dict(kernel=zero_kernel, signature=(array("h1"),), bf16=True),
        dict(kernel=copy_kernel, signature=(array("f1"), array("f1")), bf16=False),
        dict(kernel=copy_kernel, signature=(array("h1"), array("h1")), bf16=True),
    ]
