from assembling import array

from llm_numba.cuda.gelu import gelu_backward_kernel, gelu_forward_kernel


def cases():
    found = []
    for x in ("f1", "h1"):
        found += [
            dict(kernel=gelu_forward_kernel, signature=(array(x), array(x)), bf16=x == "h1"),
            dict(kernel=gelu_backward_kernel, signature=(array(x), array(x), array(x)), bf16=x == "h1"),
        ]
    return found
