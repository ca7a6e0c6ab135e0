from assembling import array
from numba.cuda.types import boolean

from llm_numba.cuda.encoder import dwpe_kernel, dwte_kernel, encoder_forward_kernel


def cases():
    found = []
    for x in ("f", "h"):
        rows, table = array(x + "3"), array(x + "2")
        found += [
            dict(kernel=encoder_forward_kernel, signature=(rows, array("i2"), table, table, array("i1"), boolean), bf16=x == "h"),
            dict(kernel=dwte_kernel, signature=(array("f2"), table, array("i1")), bf16=x == "h"),
            dict(kernel=dwpe_kernel, signature=(array("f2"), rows), bf16=x == "h"),
        ]
    return found
