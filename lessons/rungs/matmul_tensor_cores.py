"""The rungs of lesson 03 on tensor cores: the product of two bf16 matrices, in float32."""

from numba import cuda

from llm_numba.cuda.jit import SIMULATED, blocks_for, device, float32, stream, to_float, uint16, uint32
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

ZERO, NOTHING = float32(0), uint32(0)
WARP = 32
PIECE_M, PIECE_N, PIECE_K = 16, 8, 16  # the shape of the instruction: (16 x 16) times (16 x 8)
MANY_M, MANY_N = 2, 4  # v2: tiles of results per warp, vertically and horizontally

if SIMULATED:
    import numpy as np

    from llm_numba.cuda.matmul_simt import multiply, scratch_size

    A, B = np.empty((16, 16), float32), np.empty((16, 8), float32)  # the operands of a warp

    def halves(both):
        return to_float(uint16(both & 0xFFFF)), to_float(uint16(both >> 16))

    @device
    def mma(sums, a, b0, b1):
        """The tensor core instruction in plain Python: sums + A B, distributed over the threads of a warp.

        A and B are assembled from the threads' registers, and thread (g, q) gets its four results.
        """
        g, q = cuda.threadIdx.x // 4, cuda.threadIdx.x % 4
        A[g, 2 * q : 2 * q + 2] = halves(a[0])
        A[g + 8, 2 * q : 2 * q + 2] = halves(a[1])
        A[g, 2 * q + 8 : 2 * q + 10] = halves(a[2])
        A[g + 8, 2 * q + 8 : 2 * q + 10] = halves(a[3])
        B[2 * q : 2 * q + 2, g] = halves(b0)
        B[2 * q + 8 : 2 * q + 10, g] = halves(b1)
        cuda.syncthreads()  # mma synchronises a warp; the simulator needs a barrier
        new = A[[g, g, g + 8, g + 8]] @ B[:, [2 * q, 2 * q + 1]]
        cuda.syncthreads()
        return sums[0] + new[0, 0], sums[1] + new[1, 1], sums[2] + new[2, 0], sums[3] + new[3, 1]

else:
    from llm_numba.cuda.matmul_mma import multiply, scratch_size
    from llm_numba.cuda.tensor_cores import mma


@device
def pair(x, row, k):
    """Two consecutive bf16 in one register, the first in the lower half; zeros outside x."""
    low = uint32(x[row, k]) if row < x.shape[0] and k < x.shape[1] else NOTHING
    high = uint32(x[row, k + 1]) if row < x.shape[0] and k + 1 < x.shape[1] else NOTHING
    return uint32(uint32(high << uint32(16)) | low)


@device
def store(out, row, column, number):
    if row < out.shape[0] and column < out.shape[1]:
        out[row, column] = number


@cuda.jit
def kernel_v1(out, a, b):
    """A warp owns 16 x 8 results. Each thread loads its fragments of the operands, and the tensor core multiplies."""
    g, q = cuda.threadIdx.x // 4, cuda.threadIdx.x % 4
    m, n = cuda.blockIdx.x * PIECE_M + g, cuda.blockIdx.y * PIECE_N + g
    sums = (ZERO, ZERO, ZERO, ZERO)
    for k0 in range(0, a.shape[1], PIECE_K):
        k = k0 + 2 * q
        a_piece = (pair(a, m, k), pair(a, m + 8, k), pair(a, m, k + 8), pair(a, m + 8, k + 8))
        sums = mma(sums, a_piece, pair(b, n, k), pair(b, n, k + 8))
    column = cuda.blockIdx.y * PIECE_N + 2 * q
    store(out, m, column, sums[0])
    store(out, m, column + 1, sums[1])
    store(out, m + 8, column, sums[2])
    store(out, m + 8, column + 1, sums[3])


def multiply_v1(out, a, b, scratch):
    kernel_v1[(blocks_for(out.shape[0], PIECE_M), blocks_for(out.shape[1], PIECE_N)), WARP, stream()](out, a, b)


@cuda.jit
def kernel_v2(out, a, b):
    """A warp owns 2 x 4 tiles of results: each loaded fragment is used in four or two products."""
    g, q = cuda.threadIdx.x // 4, cuda.threadIdx.x % 4
    m0, n0 = cuda.blockIdx.x * PIECE_M * MANY_M, cuda.blockIdx.y * PIECE_N * MANY_N
    sums = cuda.local.array((MANY_M, MANY_N, 4), float32)
    b_pieces = cuda.local.array((MANY_N, 2), uint32)
    for i in range(MANY_M):
        for j in range(MANY_N):
            for s in range(4):
                sums[i, j, s] = ZERO
    for k0 in range(0, a.shape[1], PIECE_K):
        k = k0 + 2 * q
        for j in range(MANY_N):
            n = n0 + j * PIECE_N + g
            b_pieces[j, 0] = pair(b, n, k)
            b_pieces[j, 1] = pair(b, n, k + 8)
        for i in range(MANY_M):
            m = m0 + i * PIECE_M + g
            a_piece = (pair(a, m, k), pair(a, m + 8, k), pair(a, m, k + 8), pair(a, m + 8, k + 8))
            for j in range(MANY_N):
                old = (sums[i, j, 0], sums[i, j, 1], sums[i, j, 2], sums[i, j, 3])
                new = mma(old, a_piece, b_pieces[j, 0], b_pieces[j, 1])
                sums[i, j, 0] = new[0]
                sums[i, j, 1] = new[1]
                sums[i, j, 2] = new[2]
                sums[i, j, 3] = new[3]
    for i in range(MANY_M):
        for j in range(MANY_N):
            m, n = m0 + i * PIECE_M + g, n0 + j * PIECE_N + 2 * q
            store(out, m, n, sums[i, j, 0])
            store(out, m, n + 1, sums[i, j, 1])
            store(out, m + 8, n, sums[i, j, 2])
            store(out, m + 8, n + 1, sums[i, j, 3])


def multiply_v2(out, a, b, scratch):
    grid = blocks_for(out.shape[0], PIECE_M * MANY_M), blocks_for(out.shape[1], PIECE_N * MANY_N)
    kernel_v2[grid, WARP, stream()](out, a, b)


def bf16(numbers):
    """The bits of the nearest bf16, in uint16."""
    from ml_dtypes import bfloat16

    return numbers.astype(bfloat16).view(uint16)


def exactly(out, a, b, scratch):
    from ml_dtypes import bfloat16

    out[...] = a.view(bfloat16).astype(float) @ b.view(bfloat16).astype(float).T


def inputs(rng, R, C, OC, bias=False):
    return dict(
        out=garbage(R, OC), a=bf16(normal(rng, R, C)), b=bf16(normal(rng, OC, C)),
        scratch=garbage(scratch_size(R, OC, C)),
    )  # fmt: skip


PRODUCT = Ladder(
    "matmul_bf16",
    Problem(
        exactly,
        inputs,
        ("out",),
        (
            dict(R=1, C=1, OC=1),
            dict(R=1, C=1, OC=97),
            dict(R=3, C=257, OC=1),
            dict(R=33, C=3, OC=1),
            dict(R=17, C=16, OC=9),
        ),
        device="cuda",
    ),
    (multiply_v1, multiply_v2, multiply),
    timed=dict(R=4096, C=768, OC=3072, bias=False),
    quick=dict(R=8, C=8, OC=8),
    counted=dict(R=32, C=32, OC=32),
    flops=lambda R, C, OC, bias=False: 2 * R * C * OC,
    dtype="bfloat16",
    torch="matmul_forward",
)
