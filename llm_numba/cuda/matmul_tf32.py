"""Matrix product of float32 matrices on tensor cores, on request: --variant matmul=tf32.

It rounds every element of both operands to TF32, which keeps 10 of the 23 bits of a float32 mantissa: a relative error
of at most 2**-11 per element. Products and sums are float32. The kernels are those of matmul_mma.py.
"""

from llm_numba.cuda.jit import compute_capability, float32
from llm_numba.cuda.matmul_common import unfused
from llm_numba.cuda.matmul_mma import multiply, scratch_size


def supports(dtype, R: int, C: int, OC: int) -> str:
    """Why the kernels cannot multiply these operands, or "". They need rows of whole 16-byte chunks."""
    if dtype != float32:
        return "needs fp32"
    if compute_capability() < (8, 0):
        return "needs compute capability 8.0"
    return "rows must be multiples of 4 elements" if C % 4 or OC % 4 else ""


forward, input_gradient, weight_gradient, forward_scratch, backward_scratch = unfused(multiply, scratch_size)
