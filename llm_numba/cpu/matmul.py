"""Matmul: a linear layer and its gradients, as loops around one register tile. GELU stays a pass of its own: fusing it
into the product saved no time.

R = B*T rows. `multiply` needs one operand packed in panels: strips of NR columns, row by row, so that each step of its
inner loop reads NR contiguous elements. The operand that is cheapest to move is packed: the activations in the forward
and for the gradient of the weights, one block of the weights at a time for the gradient of the input.

Every element of a result has one owner, which sums it in a fixed order: blocks of KB terms, one after the other. So the
number of threads does not change the result.
"""

import numpy as np
from numba import njit, prange

from llm_numba.cpu import gelu
from llm_numba.cpu.jit import PARALLEL, TASK, ZERO, dot
from llm_numba.cpu.tile import (
    MR,
    NR,
    add_tile,
    multiply,
    new_tile,
    pack_rows,
    panels_of,
    prefetch,
    stack_array,
    transpose,
)

KB = 384  # terms of the inner dimension per block: a panel of them (96 KiB) stays in the L2 cache
CHUNK = 8 * KB  # terms that all tasks sum before any task continues
OB = 96  # rows of the weights per task
RB = 528  # rows of the activations per task
PACK = 16  # rows that one task packs
FEW_ROWS = 8  # with fewer rows, a tile would compute mostly padding
NO_BIAS = np.empty(0, np.float32)
new_sums = stack_array(OB, NR)
new_panel = stack_array(KB, NR)
new_strips = stack_array(OB // MR * KB, MR)


def matmul_forward_scratch(out, inp, weight, bias):
    """inp transposed, in panels."""
    B, T, C = inp.shape
    return panels_of(B * T) * NR * C


def matmul_gelu_forward_scratch(out, pre, inp, weight, bias):
    """As for `matmul_forward`."""
    return matmul_forward_scratch(out, inp, weight, bias)


def matmul_backward_scratch(dinp, dweight, dbias, dout, inp, weight, accumulate):
    """inp in panels."""
    B, T, C = inp.shape
    return panels_of(C) * NR * B * T


def gelu_matmul_backward_scratch(dpre, dweight, dbias, dout, inp, weight, pre, accumulate):
    """As for `matmul_backward`; before that, the gradient of inp, which is smaller."""
    return matmul_backward_scratch(dpre, dweight, dbias, dout, inp, weight, accumulate)


def matmul_forward(out, inp, weight, bias, scratch):
    """A linear layer: out = inp weightT + bias.

    out (B, T, OC) <- inp (B, T, C), weight (OC, C), bias (OC,) or None
    Writes:   out =
    Scratch:  matmul_forward_scratch(...)
    Parallel: over blocks of OB output channels
    Flops:    2*B*T*C*OC
    """
    out, inp = rows(out), rows(inp)
    bias = NO_BIAS if bias is None else bias
    if len(inp) < FEW_ROWS:
        forward_few_rows(out, inp, weight, bias)
    else:
        forward_tiled(out, inp, weight, bias, scratch)


def matmul_gelu_forward(out, pre, inp, weight, bias, scratch):
    """A linear layer and GELU: pre = inp weightT + bias, out = GELU(pre).

    out, pre (B, T, OC) <- inp (B, T, C), weight (OC, C), bias (OC,) or None
    Writes:   out =, pre =, which the backward needs
    Scratch:  matmul_gelu_forward_scratch(...)
    Parallel: as `matmul_forward` and `gelu_forward`
    Flops:    2*B*T*C*OC
    """
    matmul_forward(pre, inp, weight, bias, scratch)
    gelu.gelu_forward(out, pre)


def matmul_backward(dinp, dweight, dbias, dout, inp, weight, scratch, accumulate):
    """The gradients of a linear layer.

    dinp (B, T, C), dweight (OC, C), dbias (OC,) or None <- dout (B, T, OC), inp (B, T, C), weight (OC, C)
    Writes:   dinp =; dweight, dbias += if accumulate, else =
    Scratch:  matmul_backward_scratch(...)
    Parallel: dinp over blocks of rows and channels, dweight and dbias over blocks of output channels
    Flops:    4*B*T*C*OC
    """
    backward_input(rows(dinp), rows(dout), weight)
    backward_weight(dweight, NO_BIAS if dbias is None else dbias, rows(dout), rows(inp), scratch, accumulate)


def gelu_matmul_backward(dpre, dweight, dbias, dout, inp, weight, pre, scratch, accumulate):
    """The gradients of a linear layer whose input is inp = GELU(pre), back to pre.

    dpre (B, T, C), dweight (OC, C), dbias (OC,) or None <- dout (B, T, OC), inp, pre (B, T, C), weight (OC, C)
    Writes:   dpre = (dout weight) * GELU'(pre); dweight, dbias as in `matmul_backward`
    Scratch:  gelu_matmul_backward_scratch(...)
    Parallel: as `matmul_backward` and `gelu_backward`
    Flops:    4*B*T*C*OC
    """
    dinp = scratch[: dpre.size].reshape(dpre.shape)  # free until backward_weight; in place, the loop is not vectorised
    backward_input(rows(dinp), rows(dout), weight)
    gelu.gelu_backward(dpre, pre, dinp)
    backward_weight(dweight, NO_BIAS if dbias is None else dbias, rows(dout), rows(inp), scratch, accumulate)


def rows(x):
    """x (B, T, C) as a matrix (B*T, C)."""
    return x.reshape(-1, x.shape[2])


@njit(**PARALLEL)
def forward_tiled(out, inp, weight, bias, scratch):
    """out[r, o] = sum_k inp[r, k] weight[o, k] + bias[o].

    The rows of a tile are rows of weight; its columns are rows of inp, which is transposed into panels.
    """
    R, K = inp.shape
    O = weight.shape[0]
    J = (R + NR - 1) // NR
    panels = scratch[: J * K * NR].reshape(J, K, NR)
    for t in prange(J * ((K + NR - 1) // NR)):
        j, k0 = t % J, t // J * NR
        pack_transposed(panels[j, k0 : k0 + NR], inp[j * NR : j * NR + NR, k0 : k0 + NR])
    for p in prange((O + OB - 1) // OB):
        o0, o1 = p * OB, p * OB + OB
        forward_columns(out, weight[o0:o1], bias[o0:o1], panels, o0)


@njit(**TASK)
def pack_transposed(panel, rows):
    """panel[k, c] = rows[c, k]; if there are fewer than NR rows, the last one is repeated."""
    transpose(panel, rows)
    for k in range(rows.shape[1]):
        for c in range(rows.shape[0], NR):
            panel[k, c] = rows[rows.shape[0] - 1, k]


@njit(**TASK)
def forward_columns(out, weight, bias, panels, first):
    """At most OB columns of out, from `first` on, which belong to these rows of weight."""
    O, K = weight.shape
    tile, sums = new_tile(), new_sums()
    for j in range(panels.shape[0]):
        rows = out[j * NR : j * NR + NR, first : first + O]
        for k0 in range(0, K, KB):
            k1 = min(k0 + KB, K)
            for o in range(0, O, MR):
                multiply(tile, weight[o : o + MR, k0:k1], panels[j, k0:k1])
                add_tile(sums[o : o + MR], tile, k0 > 0)
        transpose(rows, sums[:O, : rows.shape[0]])
        for r in range(rows.shape[0]):
            row = rows[r]
            for o in range(bias.shape[0]):
                row[o] += bias[o]


@njit(**PARALLEL)
def forward_few_rows(out, inp, weight, bias):
    """The same with dot products: with so few rows, the time is that of reading the weights."""
    R = inp.shape[0]
    O = weight.shape[0]
    for p in prange((O + OB - 1) // OB):
        for o in range(p * OB, min(p * OB + OB, O)):
            w = weight[o]
            for r in range(R):
                total = dot(inp[r], w)
                out[r, o] = total + bias[o] if bias.shape[0] > 0 else total


@njit(**PARALLEL)
def backward_input(dinp, dout, weight):
    """dinp[r, c] = sum_o dout[r, o] weight[o, c].

    CHUNK terms at a time: every task reads all of dout, and a chunk of it stays in the last-level cache between tasks.
    """
    R, C = dinp.shape
    J = (C + NR - 1) // NR
    for k0 in range(0, weight.shape[0], CHUNK):
        k1 = k0 + CHUNK
        for t in prange((R + RB - 1) // RB * J):
            r0, r1, c0 = t // J * RB, t // J * RB + RB, t % J * NR
            backward_columns(dinp[r0:r1], dout[r0:r1, k0:k1], weight[k0:k1], c0, k0 > 0)


@njit(**TASK)
def backward_columns(dinp, dout, weight, first, accumulate):
    """NR columns of dinp, from `first` on: = these terms of the sum, += if accumulate.

    The rows of a tile are rows of dout; its columns are columns of weight, of which KB rows at a time are packed into a
    panel. Each tile prefetches a few of the next KB rows.
    """
    R, O = dout.shape
    tile, panel = new_tile(), new_panel()
    for k0 in range(0, O, KB):
        k1 = min(k0 + KB, O)
        pack_block(panel, weight[k0:k1], first)
        ahead = weight[k1 : k1 + KB, first : first + NR]
        for r in range(0, R, MR):
            prefetch(ahead[r * ahead.shape[0] // R : (r + MR) * ahead.shape[0] // R])
            multiply(tile, dout[r : r + MR, k0:k1], panel[: k1 - k0])
            add_tile(dinp[r : r + MR, first : first + NR], tile, accumulate or k0 > 0)


@njit(**PARALLEL)
def backward_weight(dweight, dbias, dout, inp, scratch, accumulate):
    """dweight[o, c] = (+= if accumulate) sum_r dout[r, o] inp[r, c]; dbias[o] likewise sum_r dout[r, o].

    All threads share inp, packed into panels.
    """
    R, C = inp.shape
    O = dout.shape[1]
    J = (C + NR - 1) // NR
    panels = scratch[: J * R * NR].reshape(J, R, NR)
    for p in prange((R + PACK - 1) // PACK):
        r = p * PACK
        pack_rows(panels, r, inp[r : r + PACK])
    for p in prange((O + OB - 1) // OB):
        o0, o1 = p * OB, p * OB + OB
        backward_rows(dweight[o0:o1], dbias[o0:o1], dout[:, o0:o1], panels, accumulate)


@njit(**TASK)
def backward_rows(dweight, dbias, dout, panels, accumulate):
    """At most OB rows of dweight, which belong to these columns of dout.

    The rows of a tile are columns of dout; KB elements of each are packed at a time, in strips of MR columns.
    """
    R, O = dout.shape
    C = dweight.shape[1]
    tile, strips = new_tile(), new_strips()
    for r0 in range(0, R, KB):
        r1 = min(r0 + KB, R)
        adding = accumulate or r0 > 0
        pack_strips(strips, dout[r0:r1])
        if dbias.shape[0]:
            add_rows(dbias, dout[r0:r1], adding)
        for j in range(panels.shape[0]):
            for o in range(0, O, MR):
                block = dweight[o : o + MR, j * NR : min(j * NR + NR, C)]
                prefetch(block)
                multiply(tile, strips[o // MR * KB : o // MR * KB + r1 - r0].T, panels[j, r0:r1])
                add_tile(block, tile, adding)


@njit(**TASK)
def pack_block(panel, rows, first):
    """panel[r, c] = rows[r, first + c]; columns beyond the end of rows are left as they are."""
    for r in range(rows.shape[0]):
        to, row = panel[r], rows[r, first : first + NR]
        for c in range(row.shape[0]):
            to[c] = row[c]


@njit(**TASK)
def pack_strips(strips, rows):
    """strips[s * KB + r, c] = rows[r, s * MR + c]; beyond the last column, copies of it."""
    R, C = rows.shape
    for s in range((C + MR - 1) // MR):
        for r in range(R):
            strip, row = strips[s * KB + r], rows[r, s * MR : s * MR + MR]
            if row.shape[0] == MR:
                for c in range(MR):
                    strip[c] = row[c]
            else:
                for c in range(MR):
                    strip[c] = row[min(c, row.shape[0] - 1)]


@njit(**TASK)
def add_rows(total, rows, accumulate):
    """total[c] = (+= if accumulate) sum_r rows[r, c], in the order of r."""
    if not accumulate:
        total[:] = ZERO
    for r in range(rows.shape[0]):
        row = rows[r]
        for c in range(row.shape[0]):
            total[c] += row[c]
