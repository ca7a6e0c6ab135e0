"""Matrix product on CUDA cores (SIMT): any GPU, float32 or bf16, every layout; tiles in shared memory and registers.

A block computes TILE_M x TILE_N elements of out. It walks along K in steps of TILE_K: the tiles of a and b of a step
lie in shared memory, one row per k, and are read there many times while the tiles of the next step are loaded to
registers. A thread owns four sub-tiles of SUB x SUB elements, half a tile apart, so that the threads of a warp read
adjacent elements.
"""

from numba import cuda

from llm_numba.cuda.hopper import inlined, unrolled
from llm_numba.cuda.jit import device, float32, kernel, sized, to_float, to_storage, uint32
from llm_numba.cuda.matmul_common import unfused
from llm_numba.cuda.tiling import Tile, grouped_tile, split_product, split_scratch

SUB = 4
SIDE = sized(16, 2)
BLOCK = SIDE * SIDE
TILE_K = 8
UNROLLED = 4
HALF = SIDE * SUB
TILE_M = TILE_N = 2 * HALF
PITCH = TILE_M + 4  # elements from one k to the next in shared memory; the 4 more avoid bank conflicts
OWN = 2 * SUB  # rows, and columns, of out that a thread owns
EACH = TILE_M * TILE_K // BLOCK  # elements of a tile that a thread loads
ALIGNMENT = 16  # bytes; lets the compiler read four floats at once
GROUP_M = sized(16, 2)
TILE = Tile(TILE_M, TILE_N, TILE_K, GROUP_M, resident_blocks=sized(264, 4))


def supports(dtype, R: int, C: int, OC: int) -> str:
    """Always "": any dtype, any sizes."""
    return ""


def scratch_size(M: int, N: int, K: int) -> int:
    """Floats of scratch that `multiply` needs."""
    return split_scratch(M, N, K, TILE)


@device
def load(registers, matrix, row, k, k_end, transposed):
    """registers = this thread's elements of the tile at row and k; zero outside the matrix and from k_end on."""
    for i in range(EACH):
        index = uint32(cuda.threadIdx.x) + i * BLOCK
        if transposed:
            y, x = k + index // TILE_M, row + index % TILE_M
            inside = y < k_end and x < matrix.shape[1]
        else:
            y, x = row + index // TILE_K, k + index % TILE_K
            inside = y < matrix.shape[0] and x < k_end
        registers[i] = to_float(matrix[y, x]) if inside else float32(0)


@device
def store_shared(tile, registers, transposed):
    """tile (TILE_K, PITCH), in shared memory = this thread's elements of it."""
    for i in range(EACH):
        index = uint32(cuda.threadIdx.x) + i * BLOCK
        if transposed:
            tile[index // TILE_M, index % TILE_M] = registers[i]
        else:
            tile[index % TILE_K, index // TILE_K] = registers[i]


@inlined
def multiply_step(i, first, sums, a_fragment, b_fragment, a_tiles, b_tiles, current, row, column):
    """sums (OWN, OWN) += the products of the elements at k that a thread multiplies: SUB rows from `row` on, and SUB
    from HALF further on, and likewise columns."""
    k = first + i
    for i in range(SUB):
        a_fragment[i] = a_tiles[current, k, row + i]
        a_fragment[SUB + i] = a_tiles[current, k, HALF + row + i]
        b_fragment[i] = b_tiles[current, k, column + i]
        b_fragment[SUB + i] = b_tiles[current, k, HALF + column + i]
    for i in range(OWN):
        for j in range(OWN):
            sums[i, j] += a_fragment[i] * b_fragment[j]


@device
def store(out, n0, sums, bias, accumulate):
    """Store the elements that a thread owns in one row of out."""
    for j in range(OWN):
        n = uint32(n0 + j % SUB + j // SUB * HALF)
        if n < out.shape[0]:
            before = to_float(out[n]) if accumulate else float32(0)
            out[n] = to_storage(before + (sums[j] + bias[j]), out)


def product_kernel(a_transposed, b_transposed):
    """The kernel for one layout of the operands."""

    @kernel(launch_bounds=(BLOCK, 2))
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
        m0, n0, s = tile_m * TILE_M, tile_n * TILE_N, cuda.blockIdx.z
        if m0 >= M:
            return
        k, k_end = uint32(s * K_split), min(K, s * K_split + K_split)
        row, column = uint32(cuda.threadIdx.x) // SIDE * SUB, uint32(cuda.threadIdx.x) % SIDE * SUB

        a_tiles = cuda.shared.array((2, TILE_K, PITCH), float32, ALIGNMENT)
        b_tiles = cuda.shared.array((2, TILE_K, PITCH), float32, ALIGNMENT)
        a_next = cuda.local.array(EACH, float32)
        b_next = cuda.local.array(EACH, float32)
        a_fragment = cuda.local.array(OWN, float32)
        b_fragment = cuda.local.array(OWN, float32)
        sums = cuda.local.array((OWN, OWN), float32)
        for i in range(OWN):
            for j in range(OWN):
                sums[i, j] = float32(0)

        load(a_next, a, m0, k, k_end, a_transposed)
        load(b_next, b, n0, k, k_end, b_transposed)
        current = uint32(0)
        while k < k_end:
            # store the loaded tiles to shared memory, and load the next ones
            store_shared(a_tiles[current], a_next, a_transposed)
            store_shared(b_tiles[current], b_next, b_transposed)
            cuda.syncthreads()
            k = uint32(k + TILE_K)
            load(a_next, a, m0, k, k_end, a_transposed)
            load(b_next, b, n0, k, k_end, b_transposed)

            # multiply
            for first in range(0, TILE_K, UNROLLED):
                arguments = first, sums, a_fragment, b_fragment, a_tiles, b_tiles, current, row, column
                unrolled(UNROLLED, multiply_step, arguments)
            current = uint32(1 - current)

        # store
        for j in range(OWN):
            n = n0 + column + j % SUB + j // SUB * HALF
            b_fragment[j] = to_float(bias[n]) if with_bias and n < N else float32(0)
        for i in range(OWN):
            m = m0 + row + i % SUB + i // SUB * HALF
            if m < M:
                store(out[s, m], n0 + column, sums[i], b_fragment, accumulate)

    return product


# (a_transposed, b_transposed) -> kernel
KERNELS = {layout: product_kernel(*layout) for layout in ((False, False), (False, True), (True, True))}


def multiply(out, a, b, scratch, bias=None, a_transposed=False, b_transposed=False, accumulate=False):
    """See matmul_common.unfused."""
    product = KERNELS[a_transposed, b_transposed]
    split_product(product, TILE, BLOCK, 0, out, a, b, scratch, bias, a_transposed, accumulate)


forward, input_gradient, weight_gradient, forward_scratch, backward_scratch = unfused(multiply, scratch_size)
