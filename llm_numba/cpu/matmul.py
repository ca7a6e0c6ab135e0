"""Matmul: a linear layer, its input's gradient and its parameters' gradient, three loops around one register tile.

R = B*T rows. `multiply` wants one operand in panels: NR columns side by side, row after row, so that each step of its
inner loop reads NR contiguous numbers. Which operand is packed so is chosen to move the least: the activations in the
forward and for the weight gradient, a block of the weights at a time for the input's gradient.

Every element of a result has one owner, which sums it in one order: blocks of KB terms, one after the other. Which
thread the owner runs on changes nothing.
"""

import numpy as np
from numba import njit, prange

from llm_numba.cpu.jit import PARALLEL, TASK, dot
from llm_numba.cpu.tile import MR, NR, add_tile, multiply, new_tile, pack_rows, stack_array

KB = 384  # terms of the inner dimension in a block: a panel of them (96 KiB) stays in the L2 cache
OB = 96  # rows of the weights that one task owns
RB = 66  # rows of the activations that one task owns
PB = 4  # panels that one task owns
PACK = 16  # rows that one task packs
FEW_ROWS = 8  # below this a tile would compute mostly padding
NO_BIAS = np.empty(0, np.float32)
new_sums = stack_array(OB, NR)


def matmul_scratch_size(R, C, OC):
    """Floats of scratch that a matmul over R rows, from C channels to OC, needs."""
    return panels_of(C) * NR * max(R, KB) + panels_of(R) * NR * C


def panels_of(columns):
    """How many panels of NR columns hold this many columns."""
    return -(-columns // NR)


def matmul_forward(out, inp, weight, bias, scratch):
    """A linear layer: every row of inp times every row of weight.

    out (B, T, OC) <- inp (B, T, C), weight (OC, C), bias (OC,) or None
    Writes:   out =
    Scratch:  matmul_scratch_size(B*T, C, OC)
    Parallel: over blocks of OB output channels
    Flops:    2*B*T*C*OC
    """
    R, C = inp.shape[0] * inp.shape[1], inp.shape[2]
    out, inp = out.reshape(R, weight.shape[0]), inp.reshape(R, C)
    bias = NO_BIAS if bias is None else bias
    if R < FEW_ROWS:
        forward_few_rows(out, inp, weight, bias)
    else:
        forward_tiled(out, inp, weight, bias, scratch)


def matmul_backward(dinp, dweight, dbias, dout, inp, weight, scratch):
    """The gradients of a linear layer.

    dinp (B, T, C), dweight (OC, C), dbias (OC,) or None <- dout (B, T, OC), inp (B, T, C), weight (OC, C)
    Writes:   dinp =, dweight +=, dbias +=
    Scratch:  matmul_scratch_size(B*T, C, OC)
    Parallel: dinp over blocks of rows and channels, dweight and dbias over blocks of output channels
    Flops:    4*B*T*C*OC
    """
    R, C = inp.shape[0] * inp.shape[1], inp.shape[2]
    dinp, dout, inp = dinp.reshape(R, C), dout.reshape(R, weight.shape[0]), inp.reshape(R, C)
    backward_input(dinp, dout, weight, scratch)
    backward_weight(dweight, dout, inp, scratch)
    if dbias is not None:
        backward_bias(dbias, dout)


@njit(**PARALLEL)
def forward_tiled(out, inp, weight, bias, scratch):
    """out[r, o] = sum_k inp[r, k] weight[o, k] + bias[o].

    The tile's rows are rows of weight and its columns are rows of inp, transposed into panels.
    """
    R, K = inp.shape
    O = weight.shape[0]
    J = (R + NR - 1) // NR
    panels = scratch[: J * K * NR].reshape(J, K, NR)
    for t in prange(J * ((K + NR - 1) // NR)):
        j, k0 = t % J, t // J * NR
        transpose(panels[j, k0 : k0 + NR], inp[j * NR : j * NR + NR, k0 : k0 + NR])
    for p in prange((O + OB - 1) // OB):
        o0, o1 = p * OB, p * OB + OB
        forward_columns(out[:, o0:o1], weight[o0:o1], bias[o0:o1], panels)


@njit(**TASK)
def transpose(panel, rows):
    """panel[k, c] = rows[c, k]; where there are fewer than NR rows, the last one is repeated."""
    for c in range(NR):
        row = rows[min(c, rows.shape[0] - 1)]
        for k in range(row.shape[0]):
            panel[k, c] = row[k]


@njit(**TASK)
def forward_columns(out, weight, bias, panels):
    """At most OB columns of out, of which these are the rows of weight."""
    O, K = weight.shape
    tile, sums = new_tile(), new_sums()
    for j in range(panels.shape[0]):
        for k0 in range(0, K, KB):
            k1 = min(k0 + KB, K)
            for o in range(0, O, MR):
                multiply(tile, weight[o : o + MR, k0:k1], panels[j, k0:k1])
                add_tile(sums[o : o + MR], tile, k0 > 0)
        # transpose the sums into NR rows of out
        for r in range(j * NR, min(j * NR + NR, out.shape[0])):
            row = out[r]
            for o in range(O):
                row[o] = sums[o, r - j * NR]
            for o in range(bias.shape[0]):
                row[o] += bias[o]


@njit(**PARALLEL)
def forward_few_rows(out, inp, weight, bias):
    """The same sums as dot products: for a handful of rows reading the weights is all the work."""
    R = inp.shape[0]
    O = weight.shape[0]
    for p in prange((O + OB - 1) // OB):
        for o in range(p * OB, min(p * OB + OB, O)):
            w = weight[o]
            for r in range(R):
                total = dot(inp[r], w)
                out[r, o] = total + bias[o] if bias.shape[0] > 0 else total


@njit(**PARALLEL)
def backward_input(dinp, dout, weight, scratch):
    """dinp[r, c] = sum_o dout[r, o] weight[o, c].

    The tile's rows are rows of dout; KB rows of weight at a time are packed into panels that all threads share.
    """
    R, C = dinp.shape
    O = weight.shape[0]
    J = (C + NR - 1) // NR
    JP = (J + PB - 1) // PB
    panels = scratch[: J * KB * NR].reshape(J, KB, NR)
    for k0 in range(0, O, KB):
        k1 = min(k0 + KB, O)
        for p in prange((k1 - k0 + PACK - 1) // PACK):
            k = p * PACK
            pack_rows(panels, k, weight[k0:k1][k : k + PACK])
        for t in prange((R + RB - 1) // RB * JP):
            r0, j0 = t // JP * RB, t % JP * PB
            for j in range(j0, min(j0 + PB, J)):
                block = dinp[r0 : r0 + RB, j * NR : j * NR + NR]
                product(block, dout[r0 : r0 + RB, k0:k1], panels[j, : k1 - k0], k0 > 0)


@njit(**TASK)
def product(out, a, panel, accumulate):
    """out (rows, at most NR) = a (rows, K) times panel (K, NR), or += where accumulate."""
    tile = new_tile()
    for r in range(0, a.shape[0], MR):
        multiply(tile, a[r : r + MR], panel)
        add_tile(out[r : r + MR], tile, accumulate)


@njit(**PARALLEL)
def backward_weight(dweight, dout, inp, scratch):
    """dweight[o, c] += sum_r dout[r, o] inp[r, c].

    The tile's rows are columns of dout; inp is packed into panels that all threads share.
    """
    R, C = inp.shape
    O = dout.shape[1]
    J = (C + NR - 1) // NR
    panels = scratch[: J * R * NR].reshape(J, R, NR)
    for p in prange((R + PACK - 1) // PACK):
        r = p * PACK
        pack_rows(panels, r, inp[r : r + PACK])
    for p in prange((O + OB - 1) // OB):
        o0, o1 = p * OB, min(p * OB + OB, O)
        for r0 in range(0, R, KB):
            r1 = min(r0 + KB, R)
            for o in range(o0, o1, MR):
                rows = slice(o, min(o + MR, o1))
                for j in range(J):
                    product(dweight[rows, j * NR : j * NR + NR], dout[r0:r1, rows].T, panels[j, r0:r1], True)


@njit(**PARALLEL)
def backward_bias(dbias, dout):
    """dbias[o] += sum_r dout[r, o]."""
    R, O = dout.shape
    for p in prange((O + NR - 1) // NR):
        total = dbias[p * NR : p * NR + NR]
        for r in range(R):
            row = dout[r, p * NR : p * NR + NR]
            for c in range(row.shape[0]):
                total[c] += row[c]
