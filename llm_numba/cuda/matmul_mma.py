"""Matrix product of bf16 matrices on tensor cores with mma.sync, from compute capability 8.0 on.

A block of 256 threads computes a TILE_M x TILE_N tile of out, each of its eight warps 64 x 64 elements of it, which
stay in registers. It walks along K in steps of TILE_K. Asynchronous copies of the next steps to a ring of STAGES
buffers in shared memory run while the tensor cores work on the current step.

A tile of an operand lies in shared memory row by row, as in global memory, in chunks of 8 elements (16 bytes). The
chunks of a row are swizzled (XOR with the row's index), so that the eight chunks that ldmatrix reads at once lie in
different banks. An operand whose rows run along K is read by ldmatrix as it is; a transposed one by ldmatrix.trans.
"""

from numba import cuda
from numpy import uint8

from llm_numba.cuda.jit import compute_capability, device, float32, kernel, uint16, uint32
from llm_numba.cuda.matmul_common import unfused
from llm_numba.cuda.tensor_cores import (
    address,
    commit_group,
    copy_async,
    holds_bf16,
    ldmatrix,
    ldmatrix_transposed,
    load_bf16x2,
    load_float2,
    mma,
    pack,
    shared_address,
    store_16_bytes,
    store_float2,
    store_shared,
    wait_group,
)
from llm_numba.cuda.tiling import Tile, grouped_tile, split_product, split_scratch

BLOCK = 256
LOG_M, LOG_N, LOG_K = 7, 8, 5
TILE_M, TILE_N, TILE_K = 1 << LOG_M, 1 << LOG_N, 1 << LOG_K
GROUP_M = 16
TILE = Tile(TILE_M, TILE_N, TILE_K, GROUP_M, resident_blocks=132)  # one per SM
STAGES = 4
B_TILE = TILE_M * TILE_K * 2  # bytes from the start of a stage to its tile of b
STAGE = B_TILE + TILE_N * TILE_K * 2
FIRST_STAGES, LAST_STAGE = STAGES - 1, (STAGES - 1) * STAGE
SHARED_BYTES = STAGES * STAGE
OUT_PITCH = TILE_N * 2 + 16  # bytes from one row of bf16 results to the next; the 16 more avoid bank conflicts
wait_for_stage, wait_for_copies = wait_group(STAGES - 2), wait_group(0)


def supports(dtype, R: int, C: int, OC: int) -> str:
    """Why the kernels cannot multiply these operands, or "".

    With rows of whole 16-byte chunks, every tensor of the arena starts at a multiple of 16 bytes too.
    """
    if dtype != uint16:
        return "needs bf16"
    if compute_capability() < (8, 0):
        return "needs compute capability 8.0"
    return "rows must be multiples of 8 elements" if C % 8 or OC % 8 else ""


def scratch_size(M: int, N: int, K: int) -> int:
    """Floats of scratch that `multiply` needs."""
    return split_scratch(M, N, K, TILE)


@device
def swizzled_offset(row, chunk, log_chunks):
    """Bytes from the start of a tile with 2**log_chunks chunks per row to one of them."""
    chunk ^= (row >> 1 & 3) if log_chunks == 2 else (row & 7)
    return ((row << log_chunks) + chunk) << 4


@device
def copy_tile(tile, matrix, row, column, rows, log_chunks):
    """Start copying rows x 2**log_chunks chunks of matrix to shared memory; zeros outside the matrix."""
    for i in range((rows << log_chunks) // BLOCK):
        index = cuda.threadIdx.x + i * BLOCK
        r, chunk = index >> log_chunks, index & ((1 << log_chunks) - 1)
        y, x = row + r, column + chunk * 8
        inside = y < matrix.shape[0] and x < matrix.shape[1]
        copy_async(
            tile + swizzled_offset(r, chunk, log_chunks),
            address(matrix) + (y * matrix.shape[1] + x) * 2,
            16 if inside else 0,
        )


@device
def copy_operand(tile, matrix, row, k, log_rows, transposed):
    """Start copying an operand's tile of 2**log_rows rows and TILE_K steps of k."""
    if transposed:
        copy_tile(tile, matrix, k, row, TILE_K, log_rows - 3)
    else:
        copy_tile(tile, matrix, row, k, 1 << log_rows, LOG_K - 3)


@device
def load_fragment(tile, row, k, row_half, k_half, log_rows, transposed):
    """A warp's fragment of an operand: 16 rows from `row`, 16 steps of k from `k`.

    row_half, k_half: which of the four 8 x 8 matrices this lane addresses a row of
    """
    r = cuda.threadIdx.x & 7
    if transposed:
        return ldmatrix_transposed(tile + swizzled_offset(k + k_half * 8 + r, (row >> 3) + row_half, log_rows - 3))
    return ldmatrix(tile + swizzled_offset(row + row_half * 8 + r, (k >> 3) + k_half, LOG_K - 3))


def product_kernel(a_transposed, b_transposed):
    """The kernel for one layout of the operands."""

    @kernel(launch_bounds=(BLOCK, 1))
    def product(out, a, b, bias, with_bias, accumulate, K_split):
        """out[s, m, n] = (+= if accumulate) sum of a[m, k] b[n, k] over split s of k, + bias[n] if with_bias.

        out (splits, M, N) float32 or bf16; a (M, K), b (N, K), or (K, M), (K, N) if transposed, and bias (N,) bf16.
        Only float32 results accumulate, only bf16 ones have a bias. K_split, the length of a split, is a multiple of
        TILE_K; row lengths are multiples of 8.

        Grid: tiling.grid; block: BLOCK threads; a warp owns 64 x 64 elements of out, a thread 128 of them, in pairs
        Moves: 128 rows of a and 256 of b per block; most are in L2 because of the grouped tiles
        """
        M, N = out.shape[1], out.shape[2]
        K = a.shape[0] if a_transposed else a.shape[1]
        tile_m, tile_n = grouped_tile(GROUP_M)
        m0, n0, s = tile_m * TILE_M, tile_n * TILE_N, cuda.blockIdx.z
        if m0 >= M:
            return
        k, k_end = s * K_split, min(K, s * K_split + K_split)
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        warp_m, warp_n = (warp & 1) * 64, (warp >> 1) * 64
        half, other_half = lane >> 3 & 1, lane >> 4

        shared = shared_address(cuda.shared.array(0, uint8, alignment=128))
        sums = cuda.local.array((4, 8, 4), float32)
        b_fragments = cuda.local.array((8, 2), uint32)
        for m in range(4):
            for n in range(8):
                for i in range(4):
                    sums[m, n, i] = float32(0)

        # start copying the first steps
        ahead = k
        for stage in range(FIRST_STAGES):
            if ahead < k_end:
                copy_operand(shared + stage * STAGE, a, m0, ahead, LOG_M, a_transposed)
                copy_operand(shared + stage * STAGE + B_TILE, b, n0, ahead, LOG_N, b_transposed)
            commit_group()
            ahead += TILE_K

        current, free = shared, shared + LAST_STAGE
        while k < k_end:
            # wait for the copies of this step, and for the warps that still read the stage that is filled next
            wait_for_stage()
            cuda.syncthreads()
            if ahead < k_end:
                copy_operand(free, a, m0, ahead, LOG_M, a_transposed)
                copy_operand(free + B_TILE, b, n0, ahead, LOG_N, b_transposed)
            commit_group()

            # multiply
            for step in range(0, TILE_K, 16):
                for n in range(4):
                    b_fragment = load_fragment(
                        current + B_TILE, warp_n + n * 16, step, other_half, half, LOG_N, b_transposed
                    )
                    b_fragments[2 * n, 0] = b_fragment[0]
                    b_fragments[2 * n, 1] = b_fragment[1]
                    b_fragments[2 * n + 1, 0] = b_fragment[2]
                    b_fragments[2 * n + 1, 1] = b_fragment[3]
                for m in range(4):
                    a_fragment = load_fragment(current, warp_m + m * 16, step, half, other_half, LOG_M, a_transposed)
                    for n in range(8):
                        old = sums[m, n, 0], sums[m, n, 1], sums[m, n, 2], sums[m, n, 3]
                        new = mma(old, a_fragment, b_fragments[n, 0], b_fragments[n, 1])
                        sums[m, n, 0] = new[0]
                        sums[m, n, 1] = new[1]
                        sums[m, n, 2] = new[2]
                        sums[m, n, 3] = new[3]

            k += TILE_K
            ahead += TILE_K
            current = shared if current == shared + LAST_STAGE else current + STAGE
            free = shared if free == shared + LAST_STAGE else free + STAGE

        # store: lane (g, q) holds columns 2q and 2q + 1 of rows g and g + 8 of each 16 x 8 fragment
        row, column = warp_m + (lane >> 2), warp_n + (lane & 3) * 2
        if holds_bf16(out):
            # through shared memory, so that a warp writes whole rows
            wait_for_copies()
            cuda.syncthreads()
            for n in range(8):
                x = n0 + column + n * 8
                added = load_bf16x2(address(bias) + x * 2) if with_bias and x < N else (float32(0), float32(0))
                to = shared + row * OUT_PITCH + (column + n * 8) * 2
                for m in range(4):
                    for i in range(2):
                        pair = pack(sums[m, n, 2 * i] + added[0], sums[m, n, 2 * i + 1] + added[1])
                        store_shared(to + (m * 16 + i * 8) * OUT_PITCH, pair)
            cuda.syncthreads()
            for i in range(TILE_M * TILE_N // 8 // BLOCK):
                index = cuda.threadIdx.x + i * BLOCK
                r, chunk = index >> (LOG_N - 3), index & (TILE_N // 8 - 1)
                y, x = m0 + r, n0 + chunk * 8
                if y < M and x < N:
                    store_16_bytes(address(out) + ((s * M + y) * N + x) * 2, shared + r * OUT_PITCH + chunk * 16)
        else:
            for m in range(4):
                for i in range(2):
                    y = m0 + row + m * 16 + i * 8
                    for n in range(8):
                        x = n0 + column + n * 8
                        if y < M and x < N:
                            place = address(out) + ((s * M + y) * N + x) * 4
                            before = load_float2(place) if accumulate else (float32(0), float32(0))
                            store_float2(place, before[0] + sums[m, n, 2 * i], before[1] + sums[m, n, 2 * i + 1])

    return product


# (a_transposed, b_transposed) -> kernel
KERNELS = {layout: product_kernel(*layout) for layout in ((False, False), (False, True), (True, True))}


def multiply(out, a, b, scratch, bias=None, a_transposed=False, b_transposed=False, accumulate=False):
    """See matmul_common.unfused."""
    product = KERNELS[a_transposed, b_transposed]
    split_product(product, TILE, BLOCK, SHARED_BYTES, out, a, b, scratch, bias, a_transposed, accumulate)


forward, input_gradient, weight_gradient, forward_scratch, backward_scratch = unfused(multiply, scratch_size)
