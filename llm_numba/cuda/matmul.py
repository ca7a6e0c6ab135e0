"""Matmul: a linear layer, with GELU after it or before it, and its gradients.

Each is one matrix product, with what precedes and follows it fused where the variant can do that. variants.py chooses
the kernels, in matmul_<name>.py. A variant has, with R = B*T rows and every array a matrix or a vector:

- supports(dtype, R, C, OC): "" or the reason why it cannot run;
- forward(out, inp, weight, bias, scratch, pre=None): out (R, OC) = inp (R, C) @ weight.T + bias (OC,) or None.
  With pre (R, OC): pre = that, out = GELU(pre), of pre as it is stored;
- input_gradient(dinp, dout, weight, scratch, pre=None): dinp (R, C) = dout (R, OC) @ weight. With pre (R, C): times
  GELU'(pre);
- weight_gradient(dweight, dbias, dout, inp, scratch, accumulate): dweight (OC, C) = (+= if accumulate) dout.T @ inp,
  dbias (OC,), if not None, likewise the sums of dout over its rows;
- forward_scratch(R, C, OC) and backward_scratch(R, C, OC, with_bias): the floats of scratch that these need.
"""

import math

from llm_numba.cuda.variants import choose


def matmul_forward(out, inp, weight, bias, scratch):
    """A linear layer: out = inp @ weight.T + bias.

    out (B, T, OC) <- inp (B, T, C), weight (OC, C), bias (OC,) or None
    Writes:   out =
    Scratch:  matmul_forward_scratch
    Parallel: over tiles of out
    Flops:    2*B*T*C*OC
    Errors:   UserError if a variant is forced that does not support these operands
    """
    variant_for(inp, weight).forward(rows(out), rows(inp), weight, bias, scratch)


def matmul_forward_scratch(out, inp, weight, bias):
    """Floats of scratch that `matmul_forward` needs."""
    return variant_for(inp, weight).forward_scratch(*sizes(inp, weight))


def matmul_gelu_forward(out, pre, inp, weight, bias, scratch):
    """A linear layer and GELU, in one kernel if the variant can: pre = inp @ weight.T + bias, out = GELU(pre).

    out, pre (B, T, OC) <- inp (B, T, C), weight (OC, C), bias (OC,) or None
    Writes:   out =, pre =, which the backward needs
    Scratch:  matmul_gelu_forward_scratch
    Parallel: over tiles of out
    Flops:    2*B*T*C*OC
    Source:   GELU: Hendrycks and Gimpel 2016, arXiv:1606.08415
    """
    variant_for(inp, weight).forward(rows(out), rows(inp), weight, bias, scratch, rows(pre))


def matmul_gelu_forward_scratch(out, pre, inp, weight, bias):
    """Floats of scratch that `matmul_gelu_forward` needs."""
    return matmul_forward_scratch(out, inp, weight, bias)


def matmul_backward(dinp, dweight, dbias, dout, inp, weight, scratch, accumulate):
    """The gradients of a linear layer.

    dinp (B, T, C), dweight (OC, C), dbias (OC,) or None <- dout (B, T, OC), inp (B, T, C), weight (OC, C)
    Writes:   dinp =; dweight, dbias += if accumulate, else =; both are float32 in every precision
    Scratch:  matmul_backward_scratch
    Parallel: over tiles of dinp, then over tiles of dweight
    Flops:    4*B*T*C*OC
    """
    variant, dout = variant_for(inp, weight), rows(dout)
    variant.input_gradient(rows(dinp), dout, weight, scratch)
    variant.weight_gradient(dweight, dbias, dout, rows(inp), scratch, accumulate)


def matmul_backward_scratch(dinp, dweight, dbias, dout, inp, weight, accumulate):
    """Floats of scratch that `matmul_backward` needs: its steps use the same memory."""
    return variant_for(inp, weight).backward_scratch(*sizes(inp, weight), dbias is not None)


def gelu_matmul_backward(dpre, dweight, dbias, dout, inp, weight, pre, scratch, accumulate):
    """The gradients of a linear layer whose input is inp = GELU(pre), back to pre.

    dpre (B, T, C), dweight (OC, C), dbias (OC,) or None <- dout (B, T, OC), inp, pre (B, T, C), weight (OC, C)
    Writes:   dpre = (dout @ weight) * GELU'(pre); dweight, dbias as in `matmul_backward`
    Scratch:  gelu_matmul_backward_scratch
    Parallel: over tiles of dpre, then over tiles of dweight
    Flops:    4*B*T*C*OC
    """
    variant, dout = variant_for(inp, weight), rows(dout)
    variant.input_gradient(rows(dpre), dout, weight, scratch, rows(pre))
    variant.weight_gradient(dweight, dbias, dout, rows(inp), scratch, accumulate)


def gelu_matmul_backward_scratch(dpre, dweight, dbias, dout, inp, weight, pre, accumulate):
    """Floats of scratch that `gelu_matmul_backward` needs."""
    return matmul_backward_scratch(dpre, dweight, dbias, dout, inp, weight, accumulate)


def variant_for(inp, weight):
    """The variant that multiplies these operands."""
    return choose("matmul", weight.dtype, *sizes(inp, weight))


def sizes(inp, weight):
    """R, C, OC"""
    OC, C = weight.shape
    return math.prod(inp.shape[:-1]), C, OC


def rows(x):
    """x (B, T, C) as a matrix (B*T, C)."""
    return x.reshape(-1, x.shape[2])
