"""Matrix product on tensor cores with mma.sync, from compute capability 8.0 on: bf16, or float32 rounded to TF32.

A block of 128 threads computes a 128 x 128 tile of out, each of its four warps 64 x 64 elements of it, which stay in
registers. Two blocks share an SM, so one multiplies while the other starts or stores. A block walks along K in steps of
64 bytes (32 elements of bf16, 16 of float32), which mma takes in two steps.

    global memory  --cp.async-->  STAGES stages in shared memory  --ldmatrix-->  two sets of fragments  -->  mma

Each arrow runs ahead of the next: while the tensor cores multiply one set of fragments, the other set is loaded, and
the copies of the next stages are under way. A stage is filled again as soon as all its fragments are in registers.

A tile of an operand takes 8 KB of a stage. It lies there row by row, as in global memory, in chunks of 16 bytes. The
chunks of a row are swizzled (XOR with the row's index), so that those which a warp reads at once lie in different
banks. An operand whose rows run along K is read by ldmatrix as it is; a transposed one by ldmatrix.trans or, as that
moves 16-bit elements, float by float.
"""

from numba import cuda
from numpy import uint8

from llm_numba.cuda.jit import compute_capability, device, float32, int32, int64, kernel, uint16, uint32
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
    load_shared,
    mma,
    mma_tf32,
    pack,
    round_to_tf32,
    shared_address,
    store_16_bytes,
    store_float2,
    store_shared,
    wait_group,
)
from llm_numba.cuda.tiling import Tile, grouped_tile, split_product, split_scratch

BLOCK = 128
LOG_SIZE = 7
SIZE = 1 << LOG_SIZE  # rows and columns of a block's tile of out
DEPTH = 64  # bytes of k in a stage
GROUP_M = 16
TILE = Tile(SIZE, SIZE, DEPTH // 2, GROUP_M, resident_blocks=264)  # two per SM
STAGES = 3  # more are not faster, and two blocks must fit into the 100 KB of an SM of compute capability 8.6 or 8.9
OPERAND = SIZE * DEPTH  # bytes of an operand's tile
STAGE = 2 * OPERAND
LAST_STAGE = (STAGES - 1) * STAGE
SHARED_BYTES = STAGES * STAGE
EACH = OPERAND // 16 // BLOCK  # chunks that a thread copies
OUT_PITCH = SIZE * 2 + 16  # bytes from one row of bf16 results to the next; the 16 more avoid bank conflicts
wait_for_first, wait_for_stage, wait_for_copies = wait_group(STAGES - 1), wait_group(STAGES - 2), wait_group(0)


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
def log_chunks_of(matrix, transposed):
    """Base 2 logarithm of the chunks in a row of an operand's tile."""
    return (LOG_SIZE - 3 if holds_bf16(matrix) else LOG_SIZE - 2) if transposed else 2


@device
def swizzled_offset(row, chunk, log_chunks):
    """Bytes from the start of a tile with 2**log_chunks chunks per row to one of them."""
    if log_chunks == 2:
        chunk ^= row >> 1 & 3
    elif log_chunks == LOG_SIZE - 3:
        chunk ^= row & 7
    else:
        chunk ^= row << 1 & 7
    return uint32(((row << log_chunks) + chunk) << 4)


@device
def first_chunk(matrix, row, k, transposed):
    """The first chunk that this thread copies of an operand's tile at (row, k): its address, its offset in a tile, and
    the elements from there to the end of the matrix along k and along the operand's rows."""
    log_chunks = log_chunks_of(matrix, transposed)
    each, size = (8, 2) if holds_bf16(matrix) else (4, 4)
    r, chunk = cuda.threadIdx.x >> log_chunks, cuda.threadIdx.x & ((1 << log_chunks) - 1)
    y, x = (k + r, row + chunk * each) if transposed else (row + r, k + chunk * each)
    place = address(matrix) + (int64(y) * matrix.shape[1] + x) * size
    y_left, x_left = int32(matrix.shape[0] - y), int32(matrix.shape[1] - x)
    k_left, row_left = (y_left if x_left > 0 else int32(0), x_left) if transposed else (x_left, y_left)
    return place, swizzled_offset(r, chunk, log_chunks), k_left, row_left


@device
def copy_operand(tile, place, k_left, row_left, matrix, transposed):
    """Start copying an operand's tile; zeros outside the matrix.

    tile, place: the thread's first chunk in shared and global memory; its others lie `apart` rows apart, a distance
    that the swizzle does not see
    """
    log_chunks = log_chunks_of(matrix, transposed)
    apart = BLOCK >> log_chunks
    pitch = matrix.shape[1] * (2 if holds_bf16(matrix) else 4)
    for i in range(EACH):
        inside = k_left > i * apart if transposed else row_left > i * apart and k_left > 0
        copy_async(tile + ((i * apart) << (log_chunks + 4)), place + i * apart * pitch, 16 if inside else 0)


@device
def load_float(tile, row, k):
    """Each lane's element (row + lane // 4, k + lane % 4) of a transposed float32 operand's tile: that at
    swizzled_offset, written so that few registers serve all rows. row % 8 and k % 4 are 0."""
    lane = cuda.threadIdx.x & 31
    chunk = lane >> 4 ^ (lane & 3) << 1 ^ (row >> 2 & 6)
    return load_shared(tile + uint32(((k + (lane & 3)) << 9) + (row >> 5 << 7) + (chunk << 4) + (lane & 12)))


@device
def load_fragment(tile, row, step, rows_first, matrix, transposed):
    """A warp's fragment of an operand: 16 rows from `row` and a step of k, as four 8 x 8 matrices (8 x 4 of float32).

    rows_first: whether the second of the four lies 8 rows on, as for a, or half a step of k on, as for b
    """
    lane, k = cuda.threadIdx.x & 31, step * 8
    if transposed and not holds_bf16(matrix):
        on_row, on_k = (8, 0) if rows_first else (0, 4)
        second, third = load_float(tile, row + on_row, k + on_k), load_float(tile, row + 8 - on_row, k + 4 - on_k)
        return load_float(tile, row, k), second, third, load_float(tile, row + 8, k + 4)
    half, other_half = lane >> 3 & 1, lane >> 4
    row_half, k_half = (half, other_half) if rows_first else (other_half, half)
    if transposed:
        k, chunk = step * 16 + k_half * 8 + (lane & 7), (row >> 3) + row_half
        return ldmatrix_transposed(tile + swizzled_offset(k, chunk, LOG_SIZE - 3))
    return ldmatrix(tile + swizzled_offset(row + row_half * 8 + (lane & 7), step * 2 + k_half, 2))


@device
def load_fragments(a_fragments, b_fragments, to, stage, step, a, b, a_transposed, b_transposed):
    """Load a warp's fragments of both operands for a step of k into set `to` (0 or 1)."""
    warp = cuda.threadIdx.x >> 5
    for n in range(4):
        four = load_fragment(stage + OPERAND, (warp >> 1) * 64 + n * 16, step, False, b, b_transposed)
        for i in range(4):
            b_fragments[to, 2 * n + i // 2, i % 2] = four[i] if holds_bf16(b) else round_to_tf32(four[i])
    for m in range(4):
        four = load_fragment(stage, (warp & 1) * 64 + m * 16, step, True, a, a_transposed)
        for i in range(4):
            a_fragments[to, m, i] = four[i] if holds_bf16(a) else round_to_tf32(four[i])


@device
def multiply_fragments(sums, a_fragments, b_fragments, which, a):
    """Add the product of a set of fragments to sums."""
    for m in range(4):
        rows = a_fragments[which, m, 0], a_fragments[which, m, 1], a_fragments[which, m, 2], a_fragments[which, m, 3]
        for n in range(8):
            b0, b1 = b_fragments[which, n, 0], b_fragments[which, n, 1]
            old = sums[m, n, 0], sums[m, n, 1], sums[m, n, 2], sums[m, n, 3]
            new = mma(old, rows, b0, b1) if holds_bf16(a) else mma_tf32(old, rows, b0, b1)
            sums[m, n, 0] = new[0]
            sums[m, n, 1] = new[1]
            sums[m, n, 2] = new[2]
            sums[m, n, 3] = new[3]


@device
def multiply_and_load(sums, a_fragments, b_fragments, which, stage, a, b, a_transposed, b_transposed):
    """Multiply set `which` of fragments and load the other one, for the next step of k."""
    other = 1 - which
    if holds_bf16(a):
        load_fragments(a_fragments, b_fragments, other, stage, other, a, b, a_transposed, b_transposed)
        multiply_fragments(sums, a_fragments, b_fragments, which, a)
    else:  # loading first would need more registers than there are
        multiply_fragments(sums, a_fragments, b_fragments, which, a)
        load_fragments(a_fragments, b_fragments, other, stage, other, a, b, a_transposed, b_transposed)


def product_kernel(a_transposed, b_transposed):
    """The kernel for one layout of the operands."""

    @kernel(launch_bounds=(BLOCK, 2))
    def product(out, a, b, bias, with_bias, accumulate, K_split):
        """out[s, m, n] = (+= if accumulate) sum of a[m, k] b[n, k] over split s of k, + bias[n] if with_bias.

        out (splits, M, N) float32 or bf16; a (M, K), b (N, K), or (K, M), (K, N) if transposed, and bias (N,), all bf16
        or all float32. Only float32 results accumulate, and they have a bias only if the operands are float32 too.
        K_split, the length of a split, is a multiple of TILE.K; row lengths are multiples of 8.

        Grid: tiling.grid; block: BLOCK threads; a warp owns 64 x 64 elements of out, a thread 128 of them, in pairs
        Moves: 128 rows of a and of b per block; most are in L2 because of the grouped tiles
        """
        M, N = out.shape[1], out.shape[2]
        K = a.shape[0] if a_transposed else a.shape[1]
        tile_m, tile_n = grouped_tile(GROUP_M)
        m0, n0, s = tile_m * SIZE, tile_n * SIZE, cuda.blockIdx.z
        if m0 >= M:
            return
        k = s * K_split
        depth = DEPTH // 2 if holds_bf16(a) else DEPTH // 4
        stages = int32((min(K, k + K_split) - k + depth - 1) // depth)  # left to multiply
        shared = shared_address(cuda.shared.array(0, uint8, alignment=128))
        a_fragments = cuda.local.array((2, 4, 4), uint32)
        b_fragments = cuda.local.array((2, 8, 2), uint32)
        sums = cuda.local.array((4, 8, 4), float32)
        for m in range(4):
            for n in range(8):
                for i in range(4):
                    sums[m, n, i] = float32(0)

        # start copying the first stages
        a_from, a_offset, a_left, m_left = first_chunk(a, m0, k, a_transposed)
        b_from, b_offset, b_left, n_left = first_chunk(b, n0, k, b_transposed)
        a_step = (a.shape[1] if a_transposed else 1) * DEPTH
        b_step = (b.shape[1] if b_transposed else 1) * DEPTH
        for i in range(STAGES):
            if i < stages:
                copy_operand(shared + i * STAGE + a_offset, a_from, a_left, m_left, a, a_transposed)
                copy_operand(shared + i * STAGE + OPERAND + b_offset, b_from, b_left, n_left, b, b_transposed)
            commit_group()
            a_from, b_from = a_from + a_step, b_from + b_step
            a_left, b_left = int32(a_left - depth), int32(b_left - depth)
        wait_for_first()
        cuda.syncthreads()

        stage = shared
        load_fragments(a_fragments, b_fragments, 0, stage, 0, a, b, a_transposed, b_transposed)
        while stages > 0:
            multiply_and_load(sums, a_fragments, b_fragments, 0, stage, a, b, a_transposed, b_transposed)

            # all fragments of this stage are in registers: go on to the next stage, and fill this one again
            wait_for_stage()
            cuda.syncthreads()
            filled, stage = stage, shared if stage == shared + uint32(LAST_STAGE) else uint32(stage + uint32(STAGE))
            multiply_and_load(sums, a_fragments, b_fragments, 1, stage, a, b, a_transposed, b_transposed)
            if stages > STAGES:
                copy_operand(filled + a_offset, a_from, a_left, m_left, a, a_transposed)
                copy_operand(filled + OPERAND + b_offset, b_from, b_left, n_left, b, b_transposed)
            commit_group()
            a_from, b_from = a_from + a_step, b_from + b_step
            a_left, b_left = int32(a_left - depth), int32(b_left - depth)
            stages -= int32(1)

        # store: lane (g, q) holds columns 2q and 2q + 1 of rows g and g + 8 of each 16 x 8 fragment
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        row, column = (warp & 1) * 64 + (lane >> 2), (warp >> 1) * 64 + (lane & 3) * 2
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
            for i in range(SIZE * SIZE // 8 // BLOCK):
                index = cuda.threadIdx.x + i * BLOCK
                r, chunk = index >> (LOG_SIZE - 3), index & (SIZE // 8 - 1)
                y, x = m0 + r, n0 + chunk * 8
                if y < M and x < N:
                    store_16_bytes(address(out) + ((s * M + y) * N + x) * 2, shared + r * OUT_PITCH + chunk * 16)
        else:
            for n in range(8):
                x = n0 + column + n * 8
                if x < N:
                    added = load_float2(address(bias) + x * 4) if with_bias else (float32(0), float32(0))
                    for m in range(4):
                        for i in range(2):
                            y = m0 + row + m * 16 + i * 8
                            if y < M:
                                place = address(out) + ((s * M + y) * N + x) * 4
                                before = load_float2(place) if accumulate else added
                                store_float2(place, before[0] + sums[m, n, 2 * i], before[1] + sums[m, n, 2 * i + 1])

    return product


# (a_transposed, b_transposed) -> kernel
KERNELS = {layout: product_kernel(*layout) for layout in ((False, False), (False, True), (True, True))}


def multiply(out, a, b, scratch, bias=None, a_transposed=False, b_transposed=False, accumulate=False):
    """See matmul_common.unfused."""
    product = KERNELS[a_transposed, b_transposed]
    split_product(product, TILE, BLOCK, SHARED_BYTES, out, a, b, scratch, bias, a_transposed, accumulate)


forward, input_gradient, weight_gradient, forward_scratch, backward_scratch = unfused(multiply, scratch_size)
