"""The argument types for which llm_numba.cuda.wgmma_product's kernels are compiled."""

from numba.cuda.types import boolean, int64

from llm_numba.cuda.matmul_wgmma import TILE_N, activation_kernel, gradient_kernel
from llm_numba.cuda.wgmma_product import GELU, GELU_BACKWARD, PLAIN, WITH_BIAS

ACTIVATION, GRADIENT = (int64,) * 9, (*(int64,) * 13, boolean)
INSTRUCTIONS = ("HGMMA", "UTMALDG", "USETMAXREG")


def cases():
    ends = ((False, WITH_BIAS), (False, GELU), (True, PLAIN), (True, GELU_BACKWARD))
    found = [(activation_kernel(*end, TILE_N), ACTIVATION, (*INSTRUCTIONS, "UTMASTG", "STSM")) for end in ends]
    found += [(gradient_kernel(with_bias, TILE_N), GRADIENT, (*INSTRUCTIONS, "UBLKCP")) for with_bias in (False, True)]
    return [
        dict(kernel=kernel, signature=signature, bf16="hopper", contains=contains)
        for kernel, signature, contains in found
    ]
