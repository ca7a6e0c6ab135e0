"""The rungs of lesson 02: a linear layer on a CPU."""

import numpy as np
from numba import njit, prange

from llm_numba import oracle
from llm_numba.cpu import naive
from llm_numba.cpu.matmul import matmul_forward, matmul_forward_scratch
from llm_numba.cpu.tile import MR, NR, add_scaled, stack_array
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

ZERO = np.float32(0)
CONTRACT = {"contract"}  # LLVM may fuse a multiply and an add
KB = 384  # terms of the sums in a block
OB = 96  # rows of the weights in a block
new_row = stack_array(1, NR)
new_tile = stack_array(MR, NR)
new_sums = stack_array(OB, NR)


def operands(out, inp, weight, bias):
    """The operands as matrices, all B*T rows in one, and zeros for a missing bias."""
    OC, C = weight.shape
    return out.reshape(-1, OC), inp.reshape(-1, C), weight, np.zeros(OC, np.float32) if bias is None else bias


def matmul_forward_v1(out, inp, weight, bias, scratch):
    """The formula: for each output a sum over the channels."""
    naive.matmul_forward(out, inp, weight, bias, scratch)


def matmul_forward_v2(out, inp, weight, bias, scratch):
    out, inp, weight, bias = operands(out, inp, weight, bias)
    R, C = inp.shape
    columns = scratch[: C * R].reshape(C, R)
    transpose(columns, inp)
    sums_side_by_side(out, columns, weight, bias)


@njit
def transpose(columns, inp):
    """columns[c, r] = inp[r, c]."""
    for r in range(inp.shape[0]):
        for c in range(inp.shape[1]):
            columns[c, r] = inp[r, c]


@njit(fastmath=CONTRACT)
def sums_side_by_side(out, columns, weight, bias):
    """For each output channel, the sums of all rows grow together, one term at a time."""
    C, R = columns.shape
    sums = np.empty(R, np.float32)
    for o in range(weight.shape[0]):
        for r in range(R):
            sums[r] = bias[o]
        for c in range(C):
            w, column = weight[o, c], columns[c]
            for r in range(R):
                sums[r] += w * column[r]
        for r in range(R):
            out[r, o] = sums[r]


def matmul_forward_v3(out, inp, weight, bias, scratch):
    out, inp, weight, bias = operands(out, inp, weight, bias)
    sums_in_registers(out, packed(inp, scratch), weight, bias)


def packed(inp, scratch):
    """inp in panels of NR rows: panels[j, c, i] = inp[j * NR + i, c]."""
    R, C = inp.shape
    J = -(-R // NR)
    panels = scratch[: J * C * NR].reshape(J, C, NR)
    pack(panels, inp)
    return panels


@njit
def pack(panels, inp):
    """The panel beyond the last row of inp keeps its old content; nobody reads the sums made from it."""
    for r in range(inp.shape[0]):
        panel, i = panels[r // NR], r % NR
        for c in range(inp.shape[1]):
            panel[c, i] = inp[r, c]


@njit(fastmath=CONTRACT)
def sums_in_registers(out, panels, weight, bias):
    """NR sums at a time; they stay in registers until they are complete."""
    R, C = out.shape[0], weight.shape[1]
    tile = new_row()
    for o in range(weight.shape[0]):
        for j in range(panels.shape[0]):
            for i in range(NR):
                tile[0, i] = bias[o]
            for c in range(C):
                add_scaled(tile[0], weight[o, c], panels[j, c])
            for i in range(min(NR, R - j * NR)):
                out[j * NR + i, o] = tile[0, i]


def matmul_forward_v4(out, inp, weight, bias, scratch):
    out, inp, weight, bias = operands(out, inp, weight, bias)
    tiles_in_registers(out, packed(inp, scratch), weight, bias)


@njit(inline="always", fastmath=CONTRACT)
def multiply(tile, weight, panel):
    """tile (MR, NR) = weight (at most MR, K) times panel (K, NR); missing rows of weight repeat its last row."""
    last = np.uintp(weight.shape[0] - 1)
    for m in range(MR):
        for i in range(NR):
            tile[m, i] = 0
    for c in range(weight.shape[1]):
        for m in range(MR):
            add_scaled(tile[m], weight[min(np.uintp(m), last), c], panel[c])


@njit(fastmath=CONTRACT)
def tiles_in_registers(out, panels, weight, bias):
    """MR rows of NR sums: an element loaded from a panel is used MR times, one loaded from the weights NR times."""
    R, O = out.shape
    tile = new_tile()
    for o in range(0, O, MR):
        for j in range(panels.shape[0]):
            multiply(tile, weight[o : o + MR], panels[j])
            for i in range(min(NR, R - j * NR)):
                for m in range(min(MR, O - o)):
                    out[j * NR + i, o + m] = tile[m, i] + bias[o + m]


def matmul_forward_v5(out, inp, weight, bias, scratch):
    out, inp, weight, bias = operands(out, inp, weight, bias)
    all_blocks(out, packed(inp, scratch), weight, bias)


@njit(fastmath=CONTRACT)
def block_of_outputs(out, panels, weight, bias):
    """out (R, at most OB) from as many rows of the weights; these and the block of the panel stay in the cache."""
    R, O = out.shape
    C = weight.shape[1]
    tile, sums = new_tile(), new_sums()
    for j in range(panels.shape[0]):
        for c0 in range(0, C, KB):
            panel = panels[j, c0 : c0 + KB]
            for o in range(0, O, MR):
                multiply(tile, weight[o : o + MR, c0 : c0 + KB], panel)
                for m in range(MR):
                    row = sums[o + m]
                    for i in range(NR):
                        row[i] = tile[m, i] if c0 == 0 else row[i] + tile[m, i]
        for i in range(min(NR, R - j * NR)):
            row = out[j * NR + i]
            for o in range(O):
                row[o] = sums[o, i] + bias[o]


@njit
def all_blocks(out, panels, weight, bias):
    for o in range(0, weight.shape[0], OB):
        block_of_outputs(out[:, o : o + OB], panels, weight[o : o + OB], bias[o : o + OB])


def matmul_forward_v6(out, inp, weight, bias, scratch):
    out, inp, weight, bias = operands(out, inp, weight, bias)
    all_blocks_at_once(out, packed(inp, scratch), weight, bias)


@njit(parallel=True)
def all_blocks_at_once(out, panels, weight, bias):
    """Each core owns blocks of output channels."""
    for block in prange((weight.shape[0] + OB - 1) // OB):
        first, last = block * OB, block * OB + OB
        block_of_outputs(out[:, first:last], panels, weight[first:last], bias[first:last])


def numpy_blas(out, inp, weight, bias, scratch):
    np.matmul(inp, weight.T, out=out)
    out += bias


def inputs(rng, R, C, OC, bias):
    arguments = dict(out=garbage(1, R, OC), inp=normal(rng, 1, R, C), weight=normal(rng, OC, C), bias=normal(rng, OC))
    return arguments | dict(scratch=garbage(matmul_forward_scratch(**arguments)))


FORWARD = Ladder(
    "matmul_forward",
    Problem(
        oracle.matmul_forward,
        inputs,
        ("out",),
        (
            dict(R=1, C=1, OC=1, bias=True),
            dict(R=3, C=97, OC=257, bias=True),
            dict(R=97, C=3, OC=1, bias=True),
            dict(R=257, C=1, OC=97, bias=True),
            dict(R=257, C=500, OC=97, bias=True),
        ),
    ),
    (
        matmul_forward_v1,
        matmul_forward_v2,
        matmul_forward_v3,
        matmul_forward_v4,
        matmul_forward_v5,
        matmul_forward_v6,
        matmul_forward,
    ),
    timed=dict(R=2048, C=768, OC=768, bias=True),
    quick=dict(R=64, C=96, OC=96, bias=True),
    flops=lambda R, C, OC, bias: 2 * R * C * OC,
    vendors=(numpy_blas,),
    torch="matmul_forward",
)
