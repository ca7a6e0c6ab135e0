"""The register tile: MR x NR sums that stay in vector registers while a product runs along its inner dimension.

Each step of the inner loop multiplies MR numbers of `a` with a row of NR numbers of `b`: MR * NR multiply-adds for
MR + NR loads. That ratio is what makes a matmul fast; matmul.py and attention.py are loops around this one.

The tile lives on the stack, in an array of constant size. LLVM sees that nobody else can reach it and keeps it in
registers, provided that `multiply` is inlined where the tile was made.
"""

import numpy as np
from llvmlite import ir
from numba import carray, config, njit, types
from numba.extending import intrinsic, overload

from llm_numba.cpu.jit import INLINE

# With AVX-512 the tile takes 24 of the 32 vector registers. Where nothing is compiled a small one is quicker to walk
# through, as a tile at the edge of a matrix is computed whole.
MR, NR = (2, 8) if config.DISABLE_JIT else (6, 64)


@intrinsic(prefer_literal=True)
def _stack_floats(typing_context, size):
    """A pointer to `size` float32 on the stack, aligned to 64 bytes, made once when the function is entered."""
    count = size.literal_value

    def generate(context, builder, signature, arguments):
        with builder.goto_entry_block():
            block = builder.alloca(ir.ArrayType(ir.FloatType(), count))
        block.align = 64
        return builder.bitcast(block, ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(size), generate


def stack_array(rows, columns):
    """A function, for compiled and plain Python alike, that returns a (rows, columns) float32 array.

    The content is undefined. Compiled, it is on the stack: it costs nothing, and is gone when the caller returns.
    """

    def new():
        return np.empty((rows, columns), np.float32)

    size = rows * columns

    @overload(new, inline="always")
    def _new():
        return lambda: carray(_stack_floats(size), (rows, columns))

    return new


new_tile = stack_array(MR, NR)


@njit(**INLINE)
def multiply(tile, a, b):
    """tile[r, c] = sum over k of a[r, k] * b[k, c].

    tile (MR, NR) = ; a (1 to MR, K); b (K, NR), both of any strides, best when the rows of b are contiguous.
    Where a has fewer rows than the tile, the tile's last rows repeat a's last one and mean nothing.
    """
    last = np.uintp(a.shape[0] - 1)
    for r in range(MR):
        for c in range(NR):
            tile[r, c] = 0
    for k in range(a.shape[1]):
        for r in range(MR):
            x = a[min(np.uintp(r), last), k]
            for c in range(NR):
                tile[r, c] += x * b[k, c]


@njit(**INLINE)
def add_tile(block, tile, accumulate):
    """block = tile, or block += tile where accumulate; a block at the edge is smaller than the tile."""
    for r in range(block.shape[0]):
        row = block[r]
        if accumulate:
            for c in range(row.shape[0]):
                row[c] += tile[r, c]
        else:
            for c in range(row.shape[0]):
                row[c] = tile[r, c]


@njit(**INLINE)
def pack_rows(panels, first, rows):
    """panels[j, first + r, c] = rows[r, j * NR + c]: a matrix's columns in strips of NR; the rest is untouched."""
    for r in range(rows.shape[0]):
        for j in range(panels.shape[0]):
            strip = rows[r, j * NR : j * NR + NR]
            for c in range(strip.shape[0]):
                panels[j, first + r, c] = strip[c]


@njit(**INLINE)
def pack_columns(panels, rows):
    """panels[j, c, r] = rows[j * NR + r, c]: the same for the transposed matrix."""
    for r in range(rows.shape[0]):
        row, panel = rows[r], panels[r // NR]
        for c in range(row.shape[0]):
            panel[c, r % NR] = row[c]
