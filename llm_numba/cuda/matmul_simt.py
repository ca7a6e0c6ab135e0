"""Matrix product on CUDA cores (SIMT): any GPU, float32 or bf16, every layout; tiles in shared memory and registers.

A block computes TILE_M x TILE_N elements of out, a thread OWN x OWN of them, which stay in registers. A block walks
along K in steps of TILE_K:

    global memory  -->  registers  -->  one of two tiles in shared memory  -->  fragments in registers  -->  multiply

The tiles of a and b lie in shared memory with one row per k, so that a thread reads four elements for a k at once.
While it multiplies a tile, its elements of the next one are on their way from global memory.

A thread owns four sub-tiles of SUB x SUB elements, half a tile apart. Adjacent threads own the same columns, and every
second thread the same rows: then 16-byte reads of shared memory are served for half a warp at once, else for a quarter.
"""

import functools
import math

from numba import cuda

from llm_numba.cuda.jit import float32, inlined, kernel, sized, to_float, uint32, unrolled
from llm_numba.cuda.matmul_common import unfused
from llm_numba.cuda.tiling import Tile, grouped_tile, split_product, split_scratch
from llm_numba.cuda.vectors import load_vector, store_vector

SUB = 4
OWN = 2 * SUB  # rows, and columns, of out that a thread owns
ROWS, COLUMNS = sized(8, 2), sized(16, 2)  # of threads
BLOCK = ROWS * COLUMNS
HALF_M, HALF_N = ROWS * SUB, COLUMNS * SUB
TILE_M, TILE_N, TILE_K = 2 * HALF_M, 2 * HALF_N, 8
A_PITCH, B_PITCH = (
    TILE_M + 4,
    TILE_N + 4,
)  # elements from one k to the next in shared memory; the 4 avoid bank conflicts
ALIGNMENT = 16  # bytes; lets the compiler read four floats at once
A_EACH, B_EACH = TILE_M * TILE_K // BLOCK, TILE_N * TILE_K // BLOCK  # elements of a tile that a thread loads
GROUP_M = sized(16, 2)
# of the four blocks that an SM runs at once, each gets a quarter of its speed
TILE = Tile(TILE_M, TILE_N, TILE_K, GROUP_M, resident_blocks=sized(132, 4), split_cost=1)


def supports(dtype, R: int, C: int, OC: int) -> str:
    """Always "": any dtype, any sizes."""
    return ""


def scratch_size(M: int, N: int, K: int) -> int:
    """Floats of scratch that `multiply` needs."""
    return split_scratch(M, N, K, TILE)


def tile_functions(tile_rows, transposed, vector):
    """(load, store_shared) for an operand: they move a tile of tile_rows x TILE_K elements, SUB adjacent ones at a
    time, `vector` at once from global memory."""
    length = tile_rows if transposed else TILE_K  # of the tile's rows in global memory

    @inlined
    def place(i):
        """(row, k) in the tile of the thread's elements from number i on, in SUB rows or for SUB k."""
        first = uint32(uint32(cuda.threadIdx.x) * SUB)
        across, along = uint32(first // length + i * BLOCK // length), uint32(first % length)
        return (along, across) if transposed else (across, along)

    @inlined
    def load(registers, matrix, row, k, k_end):
        """registers = this thread's elements of the tile at row and k; zero outside the matrix and from k_end on."""
        rows = matrix.shape[1 if transposed else 0]
        for i in range(0, len(registers), SUB):
            tile_row, tile_k = place(i)
            m, at = uint32(row + tile_row), uint32(k + tile_k)
            for j in range(0, SUB, vector):
                y, x = (at, uint32(m + j)) if transposed else (m, uint32(at + j))
                if y < (k_end if transposed else rows) and x < (rows if transposed else k_end):
                    load_vector(registers, i + j, matrix, y, x, vector)
                else:
                    for e in range(vector):
                        registers[i + j + e] = float32(0)

    @inlined
    def store_shared(tile, registers):
        """tile, in shared memory = this thread's elements of it."""
        for i in range(0, len(registers), SUB):
            row, k = place(i)
            for j in range(SUB):
                if transposed:
                    tile[k, row + j] = registers[i + j]
                else:
                    tile[k + j, row] = registers[i + j]

    return load, store_shared


@inlined
def multiply_step(k, sums, a_fragment, b_fragment, a_tile, b_tile, row, column):
    """sums (OWN, OWN) += the products of the elements at k of the thread's rows of both tiles."""
    for i in range(SUB):
        a_fragment[i] = a_tile[k, row + i]
        a_fragment[SUB + i] = a_tile[k, HALF_M + row + i]
        b_fragment[i] = b_tile[k, column + i]
        b_fragment[SUB + i] = b_tile[k, HALF_N + column + i]
    for i in range(OWN):
        for j in range(OWN):
            sums[i, j] += a_fragment[i] * b_fragment[j]


@functools.cache
def product_kernel(a_transposed, b_transposed, vector):
    """The kernel for one layout of the operands, all of whose rows are multiples of `vector` elements."""
    load_a, store_a = tile_functions(TILE_M, a_transposed, vector)
    load_b, store_b = tile_functions(TILE_N, b_transposed, vector)

    @inlined
    def store_row(i, out, place, sums, bias, values, accumulate):
        """Store the elements that the thread owns in its row number i of out. place: its first row and column."""
        m0, n0 = place
        m = uint32(m0 + i % SUB + i // SUB * HALF_M)
        if m < out.shape[0]:
            for j in range(0, OWN, vector):
                n = uint32(n0 + j % SUB + j // SUB * HALF_N)
                if n < out.shape[1]:
                    for e in range(vector):
                        values[e] = float32(0)
                    if accumulate:
                        load_vector(values, 0, out, m, n, vector)
                    for e in range(vector):
                        values[e] += sums[i, j + e] + bias[j + e]
                    store_vector(out, m, n, values, 0, vector)

    @kernel(launch_bounds=(BLOCK, 4 if vector == SUB else 3))  # addresses of single elements take more registers
    def product(out, a, b, bias, with_bias, accumulate, K_split):
        """out[s, m, n] = (+= if accumulate) sum of a[m, k] b[n, k] over split s of k, + bias[n] if with_bias.

        out (splits, M, N), a (M, K), b (N, K), or (K, M), (K, N) if transposed, bias (N,): float32 or bf16. K_split:
        the length of a split, a multiple of TILE_K.

        Grid: tiling.grid; block: BLOCK threads; a thread owns OWN x OWN elements of out
        Moves: TILE_M rows of a and TILE_N of b per block; most are in L2 because of the grouped tiles
        """
        M, N = out.shape[1], out.shape[2]
        K = a.shape[0] if a_transposed else a.shape[1]
        tile_m, tile_n = grouped_tile(GROUP_M)
        m0, n0, s = uint32(tile_m * TILE_M), uint32(tile_n * TILE_N), cuda.blockIdx.z
        if m0 >= M:
            return
        k, k_end = uint32(s * K_split), uint32(min(K, s * K_split + K_split))
        thread = uint32(cuda.threadIdx.x)
        row = uint32((thread // (2 * COLUMNS) * 2 + thread % 2) * SUB)
        column = uint32(thread // 2 % COLUMNS * SUB)

        a_tiles = cuda.shared.array((2, TILE_K, A_PITCH), float32, ALIGNMENT)
        b_tiles = cuda.shared.array((2, TILE_K, B_PITCH), float32, ALIGNMENT)
        a_next = cuda.local.array(A_EACH, float32)
        b_next = cuda.local.array(B_EACH, float32)
        a_fragment = cuda.local.array(OWN, float32)
        b_fragment = cuda.local.array(OWN, float32)
        sums = cuda.local.array((OWN, OWN), float32)
        for i in range(OWN):
            for j in range(OWN):
                sums[i, j] = float32(0)

        load_a(a_next, a, m0, k, k_end)
        load_b(b_next, b, n0, k, k_end)
        current = uint32(0)
        while k < k_end:
            # store the loaded tiles to shared memory, and load the next ones
            current = uint32(1 - current)
            a_tile, b_tile = a_tiles[current], b_tiles[current]
            store_a(a_tile, a_next)
            store_b(b_tile, b_next)
            cuda.syncthreads()
            k = uint32(k + TILE_K)
            load_a(a_next, a, m0, k, k_end)
            load_b(b_next, b, n0, k, k_end)

            unrolled(TILE_K, multiply_step, (sums, a_fragment, b_fragment, a_tile, b_tile, row, column))

        # store
        for j in range(OWN):
            n = n0 + column + j % SUB + j // SUB * HALF_N
            b_fragment[j] = to_float(bias[n]) if with_bias and n < N else float32(0)
        place = uint32(m0 + row), uint32(n0 + column)
        unrolled(OWN, store_row, (out[s], place, sums, b_fragment, a_fragment, accumulate))

    return product


def multiply(out, a, b, scratch, bias=None, a_transposed=False, b_transposed=False, accumulate=False):
    """See matmul_common.unfused."""
    vector = math.gcd(a.shape[1], b.shape[1], out.shape[1], SUB)
    product = product_kernel(a_transposed, b_transposed, vector)
    split_product(product, TILE, BLOCK, 0, out, a, b, scratch, bias, a_transposed, accumulate)


forward, input_gradient, weight_gradient, forward_scratch, backward_scratch = unfused(multiply, scratch_size)
