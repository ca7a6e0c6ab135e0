"""The argument types for which llm_numba.cuda.sampler's kernel is compiled."""

from assembling import array

from llm_numba.cuda.sampler import sample_token_kernel


def cases():
    i, d = array("i1"), array("d1")
    return [
        dict(
            kernel=sample_token_kernel,
            signature=(array("i2"), i, array(x + "2"), d, d, array("f1")),
            bf16=x == "h",
            wide=True,  # uniforms and choice
        )
        for x in "fh"
    ]
