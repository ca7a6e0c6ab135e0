"""The register tile: MR x NR sums that stay in vector registers while a product runs along its inner dimension.

Each step of the inner loop multiplies MR elements of `a` with a row of NR elements of `b`: MR * NR multiply-adds for
MR + NR loads. This ratio makes a matmul fast; matmul.py and attention.py are loops around this one.

The tile is an array of constant size on the stack. LLVM sees that no other code can reach it and keeps it in registers,
provided that `multiply` is inlined into the function that made the tile. To LLVM, a row of the tile is one wide vector,
which it splits into registers on any machine. A loop over the row would depend on the loop vectoriser instead.
"""

import numpy as np
from llvmlite import ir
from numba import carray, config, njit, types
from numba.extending import intrinsic, overload, register_jitable

from llm_numba.cpu.jit import INLINE, TASK
from llm_numba.cpu.vectors import vector_bits

# The tile takes 24 of 32 registers of 16 floats (AVX-512), 12 of 16 of 8 floats (AVX2), 24 of 32 of 4 floats (NEON).
# Without the compiler a small tile is faster, because a tile at the edge of a matrix is computed whole.
MR, NR = (2, 8) if config.DISABLE_JIT else (6, 64 if vector_bits() == 512 else 16)
LANES = vector_bits() // 32  # float32 in a register
CACHE_LINE = 16  # floats


@intrinsic(prefer_literal=True)
def _stack_floats(typing_context, size):
    """A pointer to `size` float32 on the stack, aligned to 64 bytes, allocated when the function is entered."""
    count = size.literal_value

    def generate(context, builder, signature, arguments):
        with builder.goto_entry_block():
            block = builder.alloca(ir.ArrayType(ir.FloatType(), count))
        block.align = 64
        return builder.bitcast(block, ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(size), generate


def stack_array(rows, columns):
    """A function that returns a (rows, columns) float32 array of undefined content, compiled or not.

    Compiled, the array is on the stack: it costs nothing and must not outlive the caller.
    """

    def new():
        return np.empty((rows, columns), np.float32)

    size = rows * columns

    @overload(new, inline="always")
    def _new():
        return lambda: carray(_stack_floats(size), (rows, columns))

    return new


new_tile = stack_array(MR, NR)


@register_jitable
def panels_of(columns):
    """The number of panels of NR columns that hold this many columns."""
    return (columns + NR - 1) // NR


def start_of(context, builder, kind, array):
    """The address of the first element of an array."""
    return context.make_array(kind)(context, builder, array).data


@intrinsic
def _add_scaled(typing_context, sums, x, row):
    """`add_scaled` as one operation on vectors of NR float32."""

    def generate(context, builder, signature, arguments):
        vector, fused = ir.VectorType(ir.FloatType(), NR), ("contract",)
        to, of = (
            builder.bitcast(start_of(context, builder, signature.args[i], arguments[i]), vector.as_pointer())
            for i in (0, 2)
        )
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[1], ir.IntType(32)(0))
        factor = builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), NR), [0] * NR))
        product = builder.fmul(factor, builder.load(of, align=4), fused)
        builder.store(builder.fadd(builder.load(to, align=4), product, fused), to, align=4)
        return context.get_dummy_value()

    return types.none(sums, x, row), generate


@intrinsic
def _prefetch(typing_context, row):
    """Prefetch the cache line of row[0] for reading and writing."""

    def generate(context, builder, signature, arguments):
        word, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        place = builder.bitcast(start_of(context, builder, signature.args[0], arguments[0]), byte)
        builder.call(fetch, [place, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.none(row), generate


@intrinsic
def _transpose_square(typing_context, to, square):
    """`transpose_square` on vectors: in log2(LANES) rounds with d = 1, 2, 4, ..., rows that are d apart swap elements
    that are d apart.

    Source: J. O. Eklundh 1972, A Fast Computer Method for Matrix Transposing, IEEE Transactions on Computers C-21
    """

    def generate(context, builder, signature, arguments):
        vector, word = ir.VectorType(ir.FloatType(), LANES), ir.IntType(32)

        def rows_of(i):
            array = context.make_array(signature.args[i])(context, builder, arguments[i])
            first = builder.ptrtoint(array.data, ir.IntType(64))
            step = builder.extract_value(array.strides, 0)
            places = (builder.add(first, builder.mul(step, step.type(r))) for r in range(LANES))
            return [builder.inttoptr(place, vector.as_pointer()) for place in places]

        def taken(a, b, lanes):
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(word, LANES), lanes))

        rows = [builder.load(place, align=4) for place in rows_of(1)]
        d = 1
        while d < LANES:
            for r in (r for r in range(LANES) if not r & d):
                a, b = rows[r], rows[r + d]
                rows[r] = taken(a, b, [lane - d + LANES if lane & d else lane for lane in range(LANES)])
                rows[r + d] = taken(a, b, [lane + LANES if lane & d else lane + d for lane in range(LANES)])
            d *= 2
        for row, place in zip(rows, rows_of(0), strict=True):
            builder.store(row, place, align=4)
        return context.get_dummy_value()

    return types.none(to, square), generate


def add_scaled(sums, x, row):
    """sums += x * row, two contiguous rows of NR elements."""
    sums += x * row


def prefetch(rows):
    """Load rows (n, m), each contiguous, into the cache without waiting for them."""


def transpose_square(to, square):
    """to = square transposed, both (LANES, LANES), their rows contiguous."""
    to[:] = square.T


@overload(transpose_square, inline="always")
def _transpose_square_compiled(to, square):
    return lambda to, square: _transpose_square(to, square)


@overload(add_scaled, inline="always")
def _add_scaled_compiled(sums, x, row):
    return lambda sums, x, row: _add_scaled(sums, x, row)


@overload(prefetch, inline="always")
def _prefetch_compiled(rows):
    def ask(rows):
        for r in range(rows.shape[0]):
            for c in range(0, rows.shape[1], CACHE_LINE):
                _prefetch(rows[r, c:])

    return ask


@njit(**INLINE)
def multiply(tile, a, b):
    """tile[r, c] = sum over k of a[r, k] * b[k, c].

    tile (MR, NR) = ; a (1 to MR, K), of any strides; b (K, NR), its rows contiguous.
    If a has fewer rows than the tile, the last rows of the tile repeat those of a's last row and mean nothing.
    """
    last = np.uintp(a.shape[0] - 1)
    for r in range(MR):
        for c in range(NR):
            tile[r, c] = 0
    for k in range(a.shape[1]):
        for r in range(MR):
            add_scaled(tile[r], a[min(np.uintp(r), last), k], b[k])


@njit(**INLINE)
def add_tile(block, tile, accumulate):
    """block = tile, or block += tile if accumulate; a block at the edge is smaller than the tile."""
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
    """panels[j, first + r, c] = rows[r, j * NR + c]: the columns of a matrix in strips of NR."""
    for r in range(rows.shape[0]):
        for j in range(panels.shape[0]):
            strip = rows[r, j * NR : j * NR + NR]
            for c in range(strip.shape[0]):
                panels[j, first + r, c] = strip[c]


@njit(**TASK)
def transpose(to, rows):
    """to[c, r] = rows[r, c], both with contiguous rows: squares of LANES x LANES, and single elements at the edges."""
    R, C = rows.shape
    whole_R, whole_C = R // LANES * LANES, C // LANES * LANES
    for r in range(0, whole_R, LANES):
        for c in range(0, whole_C, LANES):
            transpose_square(to[c : c + LANES, r : r + LANES], rows[r : r + LANES, c : c + LANES])
    for r in range(R):
        for c in range(whole_C if r < whole_R else 0, C):
            to[c, r] = rows[r, c]


@njit(**INLINE)
def pack_columns(panels, rows):
    """panels[j, c, r] = rows[j * NR + r, c]: `pack_rows` of the transposed matrix."""
    for j in range(panels.shape[0]):
        transpose(panels[j], rows[j * NR : j * NR + NR])
