"""The product of two matrices on any card, float32 or bf16 in every layout: tiles in shared memory and in registers.

A block computes TILE_M x TILE_N results. It walks along the inner dimension in steps of TILE_K terms: each step's boxes
of the operands come to shared memory term after term, are read there many times over, and meanwhile the next step's
are on the way to registers. A thread owns four blocks of GROUP x GROUP results, half a tile apart, so that the threads
of a warp read neighbouring numbers.
"""

from numba import cuda

from llm_numba.cuda.jit import device, float32, kernel, sized, to_float, to_storage, uint32

GROUP = 4
SIDE = sized(16, 2)
BLOCK = SIDE * SIDE
TILE_K = 8
HALF = SIDE * GROUP
TILE_M = TILE_N = 2 * HALF
PITCH = TILE_M + 4  # numbers from a term to the next: the 4 more shift the next term's banks
OWN = 2 * GROUP  # rows, and columns, of results that a thread owns
EACH = TILE_M * TILE_K // BLOCK  # numbers of a box that a thread brings
ALIGNMENT = 16  # lets the compiler read four numbers at once
SLOTS = sized(264, 4)  # blocks that an H100 works on at once
SHARED_BYTES = 0  # beside what the kernel has of its own
NEIGHBOURS = sized(16, 2)  # tiles one below the other that blocks of neighbouring numbers compute


@device
def tile_of_block():
    """The tile of this block, by its place in a grid of (NEIGHBOURS * tiles of N, tiles of M / NEIGHBOURS, parts).

    Blocks of neighbouring numbers run at the same time: NEIGHBOURS tiles below each other want the same part of b.
    """
    x, y = uint32(cuda.blockIdx.x), uint32(cuda.blockIdx.y)
    return uint32(x % NEIGHBOURS + y * NEIGHBOURS), uint32(x // NEIGHBOURS)


@device
def fetch(numbers, matrix, row, k, k_end, by_columns):
    """This thread's numbers of the box at row and k; zero outside the matrix and from k_end on."""
    for i in range(EACH):
        number = uint32(cuda.threadIdx.x) + i * BLOCK
        if by_columns:
            y, x = k + number // TILE_M, row + number % TILE_M
            inside = y < k_end and x < matrix.shape[1]
        else:
            y, x = row + number // TILE_K, k + number % TILE_K
            inside = y < matrix.shape[0] and x < k_end
        numbers[i] = to_float(matrix[y, x]) if inside else float32(0)


@device
def put(box, numbers, by_columns):
    """This thread's numbers to the box in shared memory, (TILE_K, PITCH)."""
    for i in range(EACH):
        number = uint32(cuda.threadIdx.x) + i * BLOCK
        if by_columns:
            box[number // TILE_M, number % TILE_M] = numbers[i]
        else:
            box[number % TILE_K, number // TILE_K] = numbers[i]


@device
def store(out, n0, sums, bias, accumulate):
    """A thread's results of a row."""
    for j in range(OWN):
        n = uint32(n0 + j % GROUP + j // GROUP * HALF)
        if n < out.shape[0]:
            before = to_float(out[n]) if accumulate else float32(0)
            out[n] = to_storage(before + (sums[j] + bias[j]), out)


def product_kernel(a_by_columns, b_by_columns):
    """The kernel for one layout of the operands: the inner dimension runs along their rows, or down their columns."""

    @kernel(launch_bounds=(BLOCK, 2))
    def product(out, a, b, bias, with_bias, accumulate, K_part):
        """out[p, m, n] = (+= where accumulate) sum of a[m, k] b[n, k] over part p of k, + bias[n] where with_bias.

        out (parts, M, N), a (M, K), b (N, K), or (K, M), (K, N) by columns, bias (N,): float32 or bf16. K_part: the
        terms of a part, a multiple of TILE_K.

        Grid: (NEIGHBOURS * tiles of N, tiles of M / NEIGHBOURS, parts); block: BLOCK threads; a thread owns
        OWN x OWN results
        Moves: a tile's TILE_M rows of a and TILE_N of b, of which neighbouring blocks find most in the L2 cache
        """
        M, N = out.shape[1], out.shape[2]
        K = a.shape[0] if a_by_columns else a.shape[1]
        tile_m, tile_n = tile_of_block()
        m0, n0, part = tile_m * TILE_M, tile_n * TILE_N, cuda.blockIdx.z
        if m0 >= M:
            return
        k, k_end = uint32(part * K_part), min(K, part * K_part + K_part)
        row, column = uint32(cuda.threadIdx.x) // SIDE * GROUP, uint32(cuda.threadIdx.x) % SIDE * GROUP

        a_boxes = cuda.shared.array((2, TILE_K, PITCH), float32, ALIGNMENT)
        b_boxes = cuda.shared.array((2, TILE_K, PITCH), float32, ALIGNMENT)
        a_next = cuda.local.array(EACH, float32)
        b_next = cuda.local.array(EACH, float32)
        a_now = cuda.local.array(OWN, float32)
        b_now = cuda.local.array(OWN, float32)
        sums = cuda.local.array((OWN, OWN), float32)
        for i in range(OWN):
            for j in range(OWN):
                sums[i, j] = float32(0)

        fetch(a_next, a, m0, k, k_end, a_by_columns)
        fetch(b_next, b, n0, k, k_end, b_by_columns)
        here = uint32(0)
        while k < k_end:
            # what was fetched becomes the present step's boxes; fetch the next
            put(a_boxes[here], a_next, a_by_columns)
            put(b_boxes[here], b_next, b_by_columns)
            cuda.syncthreads()
            k = uint32(k + TILE_K)
            fetch(a_next, a, m0, k, k_end, a_by_columns)
            fetch(b_next, b, n0, k, k_end, b_by_columns)

            # multiply
            for t in range(TILE_K):
                for i in range(GROUP):
                    a_now[i] = a_boxes[here, t, row + i]
                    a_now[GROUP + i] = a_boxes[here, t, HALF + row + i]
                    b_now[i] = b_boxes[here, t, column + i]
                    b_now[GROUP + i] = b_boxes[here, t, HALF + column + i]
                for i in range(OWN):
                    for j in range(OWN):
                        sums[i, j] += a_now[i] * b_now[j]
            here = uint32(1 - here)

        # store
        for j in range(OWN):
            n = n0 + column + j % GROUP + j // GROUP * HALF
            b_now[j] = to_float(bias[n]) if with_bias and n < N else float32(0)
        for i in range(OWN):
            m = m0 + row + i % GROUP + i // GROUP * HALF
            if m < M:
                store(out[part, m], n0 + column, sums[i], b_now, accumulate)

    return product


# by whether a and b are read by columns
KERNELS = {layout: product_kernel(*layout) for layout in ((False, False), (False, True), (True, True))}
