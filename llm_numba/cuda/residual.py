"""The residual stream: the output of a block is added to its input, and the sum is normalised for the next block."""

from llm_numba.cuda.layernorm import launch_forward
from llm_numba.cuda.memory import copy


def residual_layernorm_forward(residual, out, mean, rstd, inp1, inp2, weight, bias):
    """Add two activations, and normalise the sum while it is still in registers.

    residual (B, T, C), out (B, T, C), mean (B, T), rstd (B, T)
        <- inp1 (B, T, C), inp2 (B, T, C), weight (C,), bias (C,)
    Writes:   residual = inp1 + inp2; out =, mean =, rstd = layernorm_forward of residual
    Parallel: over the B*T rows; each block owns a row, so nothing races
    Moves:    4*B*T*C elements; two separate kernels would move 5*B*T*C
    Source:   He et al. 2015, arXiv:1512.03385; Ba et al. 2016, arXiv:1607.06450
    """
    C = weight.size
    residual, out, inp1, inp2 = (x.reshape(-1, C) for x in (residual, out, inp1, inp2))
    launch_forward(True, residual, out, mean, rstd, inp1, inp2, weight, bias)


def residual_backward(dinp, dout):
    """The gradient of a sum goes unchanged to both inputs: dout serves as the one, dinp is the other.

    dinp (B, T, C) <- dout (B, T, C); nothing happens if they are the same tensor
    Writes:   dinp = dout
    Moves:    2*B*T*C elements, or none
    """
    if dinp is not dout:
        copy(dinp, dout)
