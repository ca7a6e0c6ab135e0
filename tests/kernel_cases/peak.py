"""The argument types for which llm_numba.cuda.peak's kernels are compiled."""

from assembling import array
from numba.cuda import types

from llm_numba.cuda.peak import (
    fma_kernel,
    mma_kernel,
    stream_add,
    stream_copy,
    stream_read,
    stream_update,
    wgmma_kernel,
)


def cases():
    f1, number = array("f1"), types.float32
    return [
        dict(kernel=fma_kernel, signature=(f1, number, number, types.int32), bf16=False, contains="FFMA"),
        dict(kernel=mma_kernel, signature=(f1, types.int32), bf16=True, contains="HMMA"),
        dict(kernel=wgmma_kernel, signature=(f1, types.uint32), bf16="hopper", contains="HGMMA"),
        *(
            dict(kernel=pattern, signature=(f1, f1, f1), bf16=False)
            for pattern in (stream_read, stream_copy, stream_add, stream_update)
        ),
    ]
