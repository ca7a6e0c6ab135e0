"""The residual stream: what a block computes is added to what came in."""

from numba import cuda

from llm_numba.cuda.jit import THREADS, blocks_for, float32, kernel, narrow, sized, stream, uint32, widen
from llm_numba.cuda.memory import copy

EACH = sized(8, 2)  # numbers of a thread: it takes several loads on their way at once to keep the memory busy


@kernel
def residual_forward_kernel(out, inp1, inp2):
    """out (n,) = inp1 (n,) + inp2 (n,).

    Grid: a block for THREADS * EACH numbers; block: THREADS; a thread owns EACH numbers, THREADS apart, so that a
    warp's are side by side. Moves: 3 numbers an element.
    """
    first = uint32(cuda.blockIdx.x) * THREADS * EACH + uint32(cuda.threadIdx.x)  # not signed, so never below 0
    sums = cuda.local.array(EACH, float32)
    # load them all before the first is stored: behind a store no load would start early
    for k in range(EACH):
        i = first + k * THREADS
        if i < out.shape[0]:
            sums[k] = widen(inp1[i]) + widen(inp2[i])
    for k in range(EACH):
        i = first + k * THREADS
        if i < out.shape[0]:
            out[i] = narrow(sums[k], out)


def residual_forward(out, inp1, inp2):
    """Add two activations.

    out (B, T, C) <- inp1 (B, T, C), inp2 (B, T, C)
    Writes:   out = inp1 + inp2
    Parallel: over all numbers; nothing races
    Moves:    3*B*T*C numbers
    Source:   He et al. 2015, arXiv:1512.03385
    """
    blocks = blocks_for(out.size, THREADS * EACH)
    residual_forward_kernel[blocks, THREADS, stream()](out.reshape(-1), inp1.reshape(-1), inp2.reshape(-1))


def residual_backward(dinp, dout):
    """A sum hands its gradient on unchanged, to both of its inputs: dout itself already is one's, dinp is the other's.

    dinp (B, T, C) <- dout (B, T, C); where they are the same tensor there is nothing to do
    Writes:   dinp = dout
    Moves:    2*B*T*C numbers, or none
    """
    if dinp is not dout:
        copy(dinp, dout)
