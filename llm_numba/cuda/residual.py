"""The residual stream: what a block computes is added to what came in, and normalised for the next block."""

from llm_numba.cuda.jit import stream
from llm_numba.cuda.layernorm import FORWARD_EACH, forward_kernel, row_threads
from llm_numba.cuda.memory import copy


def residual_layernorm_forward(residual, out, mean, rstd, inp1, inp2, weight, bias):
    """Add two activations, and normalise the sum while it is in registers.

    residual (B, T, C), out (B, T, C), mean (B, T), rstd (B, T)
        <- inp1 (B, T, C), inp2 (B, T, C), weight (C,), bias (C,)
    Writes:   residual = inp1 + inp2; out =, mean =, rstd = as `layernorm_forward` makes them of residual
    Parallel: over the B*T rows; each block owns a row, so nothing races
    Moves:    4*B*T*C numbers, one less than the two steps on their own
    Source:   He et al. 2015, arXiv:1512.03385; Ba et al. 2016, arXiv:1607.06450
    """
    C = weight.size
    rows = [x.reshape(-1, C) for x in (residual, out, inp1, inp2)]
    launch = forward_kernel(C, True)[mean.size, row_threads(C, FORWARD_EACH), stream()]
    launch(rows[0], rows[1], mean.reshape(-1), rstd.reshape(-1), rows[2], rows[3], weight, bias)


def residual_backward(dinp, dout):
    """A sum hands its gradient on unchanged, to both of its inputs: dout itself already is one's, dinp is the other's.

    dinp (B, T, C) <- dout (B, T, C); where they are the same tensor there is nothing to do
    Writes:   dinp = dout
    Moves:    2*B*T*C numbers, or none
    """
    if dinp is not dout:
        copy(dinp, dout)
