from assembling import array

from llm_numba.cuda.layernorm import add_shares_kernel, backward_kernel, forward_kernel

CHANNELS = (97, 768, 1600)


def cases():
    found = [dict(kernel=add_shares_kernel, signature=(array("f1"), array("f1"), array("f2")), bf16=False)]
    saved = array("f1")
    for x in ("f", "h"):
        rows, vector = array(x + "2"), array(x + "1")
        forward = (rows, saved, saved, rows, vector, vector)
        backward = (rows, array("f2"), rows, rows, vector, saved, saved)
        for C in CHANNELS:
            found += [
                dict(kernel=forward_kernel(C), signature=forward, bf16=x == "h"),
                dict(kernel=backward_kernel(C), signature=backward, bf16=x == "h"),
            ]
    return found
