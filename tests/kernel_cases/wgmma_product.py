"""The argument types for which llm_numba.cuda.wgmma_product's kernels are compiled."""

from numba.cuda.types import int64

from llm_numba.cuda.matmul_wgmma import WIDTHS, product_kernel
from llm_numba.cuda.wgmma_ends import BIAS, GELU, GELU_BACKWARD, GRADIENT, GRADIENT_WITH_BIAS, PLAIN

KINDS = [(0, 0, BIAS), (0, 0, GELU), (0, 1, PLAIN), (0, 1, GELU_BACKWARD), (1, 1, GRADIENT), (1, 1, GRADIENT_WITH_BIAS)]
INSTRUCTIONS = ("HGMMA", "UTMALDG", "UBLKCP", "USETMAXREG")


def cases():
    kernels = [product_kernel(*kind, width) for kind in KINDS for width in WIDTHS]
    return [dict(kernel=kernel, signature=(int64,) * 16, bf16="hopper", contains=INSTRUCTIONS) for kernel in kernels]
