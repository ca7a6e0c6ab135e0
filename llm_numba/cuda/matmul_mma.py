"""The product of two bf16 matrices on tensor cores, for cards of capability 8.0 and later.

A block of 256 threads computes a tile of TILE_M x TILE_N results, each of its eight warps 64 x 64 of them, which it
keeps in registers. It walks along the inner dimension in steps of TILE_K: copies of the next steps are under way while
the tensor cores work on the present one, in a ring of STAGES buffers in shared memory.

A box of an operand lies in shared memory row after row, as in global memory, in chunks of 8 numbers (16 bytes). The
chunks of a row are shuffled by an exclusive or with the row's number, so that the eight that a warp reads at once lie
in different banks. An operand whose inner dimension runs along its rows is read by ldmatrix as it is, one whose inner
dimension runs down its columns is transposed by ldmatrix on the way to the registers.
"""

from numba import cuda
from numpy import uint8

from llm_numba.cuda.jit import device, float32, kernel, uint32
from llm_numba.cuda.matmul_simt import tile_of_block
from llm_numba.cuda.tensor_cores import (
    address,
    close_group,
    copy_async,
    holds_bf16,
    ldmatrix,
    ldmatrix_transposed,
    load_bf16s,
    load_floats,
    mma,
    pack,
    shared_address,
    store_16_bytes,
    store_floats,
    store_shared,
    wait_for_all_but,
)

BLOCK = 256
LOG_M, LOG_N, LOG_K = 7, 8, 5
TILE_M, TILE_N, TILE_K = 1 << LOG_M, 1 << LOG_N, 1 << LOG_K
STAGES = 4
B_BOX = TILE_M * TILE_K * 2  # bytes from a stage's start to its box of b
STAGE = B_BOX + TILE_N * TILE_K * 2
FIRST_STAGES, LAST_STAGE = STAGES - 1, (STAGES - 1) * STAGE
SHARED_BYTES = STAGES * STAGE
OUT_PITCH = TILE_N * 2 + 16  # bytes from a row of bf16 results to the next; 16 more shift the next row's banks
SLOTS = 132  # blocks that an H100 works on at once, one to a multiprocessor
wait_for_stage, wait_for_copies = wait_for_all_but(STAGES - 2), wait_for_all_but(0)


@device
def position(row, chunk, log_chunks):
    """Bytes from the start of a box of 2**log_chunks chunks a row to one of them."""
    chunk ^= (row >> 1 & 3) if log_chunks == 2 else (row & 7)
    return ((row << log_chunks) + chunk) << 4


@device
def copy_box(box, matrix, row, column, rows, log_chunks):
    """Start to copy rows x 2**log_chunks chunks of matrix to shared memory; what lies outside it becomes zero."""
    for i in range((rows << log_chunks) // BLOCK):
        number = cuda.threadIdx.x + i * BLOCK
        r, chunk = number >> log_chunks, number & ((1 << log_chunks) - 1)
        y, x = row + r, column + chunk * 8
        inside = y < matrix.shape[0] and x < matrix.shape[1]
        copy_async(
            box + position(r, chunk, log_chunks),
            address(matrix) + (y * matrix.shape[1] + x) * 2,
            16 if inside else 0,
        )


@device
def fetch(box, matrix, row, k, log_rows, by_columns):
    """Start to copy TILE_K terms of 2**log_rows rows of an operand, or of its columns."""
    if by_columns:
        copy_box(box, matrix, k, row, TILE_K, log_rows - 3)
    else:
        copy_box(box, matrix, row, k, 1 << log_rows, LOG_K - 3)


@device
def read_piece(box, row, k, row_half, k_half, log_rows, by_columns):
    """A warp's fragment: 16 rows (or columns) of an operand from row on, 16 terms from k on.

    row_half, k_half: which of the four 8 x 8 matrices this lane gives the address of a row of
    """
    r = cuda.threadIdx.x & 7
    if by_columns:
        return ldmatrix_transposed(box + position(k + k_half * 8 + r, (row >> 3) + row_half, log_rows - 3))
    return ldmatrix(box + position(row + row_half * 8 + r, (k >> 3) + k_half, LOG_K - 3))


def product_kernel(a_by_columns, b_by_columns):
    """The kernel for one layout of the operands: the inner dimension runs along their rows, or down their columns."""

    @kernel(launch_bounds=(BLOCK, 1))
    def product(out, a, b, bias, with_bias, accumulate, K_part):
        """out[p, m, n] = (+= where accumulate) sum of a[m, k] b[n, k] over part p of k, + bias[n] where with_bias.

        out (parts, M, N) float32 or bf16; a (M, K), b (N, K), or (K, M), (K, N) by columns, and bias (N,) bf16. Only
        float32 results accumulate, only bf16 ones have a bias. K_part, the terms of a part, is a multiple of TILE_K;
        rows have a multiple of 8 numbers.

        Grid: (NEIGHBOURS * tiles of N, tiles of M / NEIGHBOURS, parts); block: BLOCK threads; a warp owns 64 x 64
        results, a thread 128 of them, in pairs
        Moves: a tile's 128 rows of a and 256 of b, of which neighbouring blocks find most in the L2 cache
        """
        M, N = out.shape[1], out.shape[2]
        K = a.shape[0] if a_by_columns else a.shape[1]
        tile_m, tile_n = tile_of_block()
        m0, n0, part = tile_m * TILE_M, tile_n * TILE_N, cuda.blockIdx.z
        if m0 >= M:
            return
        k, k_end = part * K_part, min(K, part * K_part + K_part)
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        warp_m, warp_n = (warp & 1) * 64, (warp >> 1) * 64
        half, other_half = lane >> 3 & 1, lane >> 4

        shared = shared_address(cuda.shared.array(0, uint8, alignment=128))
        sums = cuda.local.array((4, 8, 4), float32)
        b_pieces = cuda.local.array((8, 2), uint32)
        for m in range(4):
            for n in range(8):
                for i in range(4):
                    sums[m, n, i] = float32(0)

        # start to fetch the first steps
        ahead = k
        for stage in range(FIRST_STAGES):
            if ahead < k_end:
                fetch(shared + stage * STAGE, a, m0, ahead, LOG_M, a_by_columns)
                fetch(shared + stage * STAGE + B_BOX, b, n0, ahead, LOG_N, b_by_columns)
            close_group()
            ahead += TILE_K

        here, free = shared, shared + LAST_STAGE
        while k < k_end:
            # wait for this step's copies, and for the warps that still read the stage that is filled next
            wait_for_stage()
            cuda.syncthreads()
            if ahead < k_end:
                fetch(free, a, m0, ahead, LOG_M, a_by_columns)
                fetch(free + B_BOX, b, n0, ahead, LOG_N, b_by_columns)
            close_group()

            # multiply
            for step in range(0, TILE_K, 16):
                for n in range(4):
                    piece = read_piece(here + B_BOX, warp_n + n * 16, step, other_half, half, LOG_N, b_by_columns)
                    b_pieces[2 * n, 0] = piece[0]
                    b_pieces[2 * n, 1] = piece[1]
                    b_pieces[2 * n + 1, 0] = piece[2]
                    b_pieces[2 * n + 1, 1] = piece[3]
                for m in range(4):
                    piece = read_piece(here, warp_m + m * 16, step, half, other_half, LOG_M, a_by_columns)
                    for n in range(8):
                        old = sums[m, n, 0], sums[m, n, 1], sums[m, n, 2], sums[m, n, 3]
                        new = mma(old, piece, b_pieces[n, 0], b_pieces[n, 1])
                        sums[m, n, 0] = new[0]
                        sums[m, n, 1] = new[1]
                        sums[m, n, 2] = new[2]
                        sums[m, n, 3] = new[3]

            k += TILE_K
            ahead += TILE_K
            here = shared if here == shared + LAST_STAGE else here + STAGE
            free = shared if free == shared + LAST_STAGE else free + STAGE

        # store: lane (g, q) has columns 2q and 2q + 1 of rows g and g + 8 of each 16 x 8 piece
        row, column = warp_m + (lane >> 2), warp_n + (lane & 3) * 2
        if holds_bf16(out):
            # through shared memory, so that a warp then writes whole rows
            wait_for_copies()
            cuda.syncthreads()
            for n in range(8):
                x = n0 + column + n * 8
                added = load_bf16s(address(bias) + x * 2) if with_bias and x < N else (float32(0), float32(0))
                to = shared + row * OUT_PITCH + (column + n * 8) * 2
                for m in range(4):
                    for i in range(2):
                        both = pack(sums[m, n, 2 * i] + added[0], sums[m, n, 2 * i + 1] + added[1])
                        store_shared(to + (m * 16 + i * 8) * OUT_PITCH, both)
            cuda.syncthreads()
            for i in range(TILE_M * TILE_N // 8 // BLOCK):
                number = cuda.threadIdx.x + i * BLOCK
                r, chunk = number >> (LOG_N - 3), number & (TILE_N // 8 - 1)
                y, x = m0 + r, n0 + chunk * 8
                if y < M and x < N:
                    store_16_bytes(address(out) + ((part * M + y) * N + x) * 2, shared + r * OUT_PITCH + chunk * 16)
        else:
            for m in range(4):
                for i in range(2):
                    y = m0 + row + m * 16 + i * 8
                    for n in range(8):
                        x = n0 + column + n * 8
                        if y < M and x < N:
                            place = address(out) + ((part * M + y) * N + x) * 4
                            before = load_floats(place) if accumulate else (float32(0), float32(0))
                            store_floats(place, before[0] + sums[m, n, 2 * i], before[1] + sums[m, n, 2 * i + 1])

    return product


# by whether a and b are read by columns
KERNELS = {layout: product_kernel(*layout) for layout in ((False, False), (False, True), (True, True))}
