from assembling import array

from llm_numba.cuda.residual import residual_forward_kernel


def cases():
    return [
        dict(kernel=residual_forward_kernel, signature=(array(x), array(x), array(x)), bf16=x == "h1")
        for x in ("f1", "h1")
    ]
