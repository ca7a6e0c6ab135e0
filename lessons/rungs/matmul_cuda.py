"""The rungs of lesson 03 on a GPU: a linear layer, forward, in float32."""

from numba import cuda

from llm_numba import oracle
from llm_numba.cuda.jit import SIMULATED, blocks_for, float32, sized, stream
from llm_numba.cuda.matmul import matmul_forward, matmul_forward_scratch
from llm_numba.lessons import sized as in_tests
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

ZERO = float32(0)
WARP = 32
TILE = sized(16, 8)  # v3, v4: side of a block's tile of results, and terms per step; 8 in the simulator
SIDE = sized(16, 8)  # v5, v6: side of a block of threads
OWN = 4  # side of a thread's tile of results
BLOCK = SIDE * SIDE
BIG = SIDE * OWN  # side of the block's tile of results
DEPTH = 8  # terms per step
PITCH = BIG + 4  # elements from one channel of a tile to the next


def launch(kernel, grid, block, out, inp, weight, bias):
    """Launch a kernel on out (R, OC) and inp (R, C). Without a bias, weight fills the array argument."""
    OC, C = weight.shape
    given = (weight.reshape(-1), False) if bias is None else (bias, True)
    kernel[grid, block, stream()](out.reshape(-1, OC), inp.reshape(-1, C), weight, *given)


def shape(out, weight):
    """(R, OC), the shape of the results."""
    return out.size // weight.shape[0], weight.shape[0]


@cuda.jit
def kernel_v1(out, inp, weight, bias, with_bias):
    """A thread owns a result; consecutive threads own results in consecutive rows."""
    r, o = cuda.grid(2)
    if r < out.shape[0] and o < out.shape[1]:
        total = ZERO
        for c in range(inp.shape[1]):
            total += inp[r, c] * weight[o, c]
        out[r, o] = total + (bias[o] if with_bias else ZERO)


def matmul_forward_v1(out, inp, weight, bias, scratch):
    R, OC = shape(out, weight)
    launch(kernel_v1, (blocks_for(R, WARP), blocks_for(OC, 4)), (WARP, 4), out, inp, weight, bias)


@cuda.jit
def kernel_v2(out, inp, weight, bias, with_bias):
    """A warp owns 32 results of a row. For each of them its threads split the terms and walk along c together."""
    r, o0, lane = cuda.blockIdx.x, cuda.blockIdx.y * WARP, cuda.threadIdx.x
    OC, C = weight.shape
    partial = cuda.shared.array((WARP, WARP), float32)
    for i in range(min(WARP, OC - o0)):
        total = ZERO
        for c in range(lane, C, WARP):
            total += inp[r, c] * weight[o0 + i, c]
        partial[i, lane] = total
    cuda.syncthreads()
    o = o0 + lane
    if o < OC:
        total = ZERO
        for k in range(WARP):
            total += partial[lane, k]
        out[r, o] = total + (bias[o] if with_bias else ZERO)


def matmul_forward_v2(out, inp, weight, bias, scratch):
    R, OC = shape(out, weight)
    launch(kernel_v2, (R, blocks_for(OC, WARP)), WARP, out, inp, weight, bias)


def tile_kernel(pitch):
    """The kernel of v3 and v4; pitch: elements from one row of a tile to the next in shared memory."""

    @cuda.jit
    def kernel(out, inp, weight, bias, with_bias):
        """A block owns a tile of results. It loads tiles of inp and weight into shared memory and multiplies them."""
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        r0, o0 = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
        R, C = inp.shape
        OC = weight.shape[0]
        inp_tile = cuda.shared.array((TILE, pitch), float32)
        weight_tile = cuda.shared.array((TILE, pitch), float32)
        total = ZERO
        for c0 in range(0, C, TILE):
            # load: consecutive threads read consecutive channels
            inp_tile[y, x] = inp[r0 + y, c0 + x] if r0 + y < R and c0 + x < C else ZERO
            weight_tile[y, x] = weight[o0 + y, c0 + x] if o0 + y < OC and c0 + x < C else ZERO
            cuda.syncthreads()
            # multiply: thread (y, x) owns the result in row y and column x
            for k in range(TILE):
                total += inp_tile[y, k] * weight_tile[x, k]
            cuda.syncthreads()
        if r0 + y < R and o0 + x < OC:
            out[r0 + y, o0 + x] = total + (bias[o0 + x] if with_bias else ZERO)

    return kernel


kernel_v3, kernel_v4 = tile_kernel(TILE), tile_kernel(TILE + 1)


def matmul_forward_v3(out, inp, weight, bias, scratch):
    R, OC = shape(out, weight)
    launch(kernel_v3, (blocks_for(OC, TILE), blocks_for(R, TILE)), (TILE, TILE), out, inp, weight, bias)


def matmul_forward_v4(out, inp, weight, bias, scratch):
    R, OC = shape(out, weight)
    launch(kernel_v4, (blocks_for(OC, TILE), blocks_for(R, TILE)), (TILE, TILE), out, inp, weight, bias)


@cuda.jit(device=True)
def bring(tile, matrix, row, c0):
    """Load BIG rows from `row` on, DEPTH channels from c0 on, into tile[k, row]; zeros outside."""
    for i in range(BIG * DEPTH // BLOCK):
        number = cuda.threadIdx.y * SIDE + cuda.threadIdx.x + i * BLOCK
        r, k = number // DEPTH, number % DEPTH
        inside = row + r < matrix.shape[0] and c0 + k < matrix.shape[1]
        tile[k, r] = matrix[row + r, c0 + k] if inside else ZERO


@cuda.jit
def kernel_v5(out, inp, weight, bias, with_bias):
    """A thread owns 4 x 4 results, SIDE apart, in registers: 8 reads of shared memory feed 16 multiply-adds."""
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    r0, o0 = cuda.blockIdx.y * BIG, cuda.blockIdx.x * BIG
    inp_tile = cuda.shared.array((DEPTH, PITCH), float32)
    weight_tile = cuda.shared.array((DEPTH, PITCH), float32)
    a = cuda.local.array(OWN, float32)
    b = cuda.local.array(OWN, float32)
    sums = cuda.local.array((OWN, OWN), float32)
    for i in range(OWN):
        for j in range(OWN):
            sums[i, j] = ZERO
    for c0 in range(0, inp.shape[1], DEPTH):
        bring(inp_tile, inp, r0, c0)
        bring(weight_tile, weight, o0, c0)
        cuda.syncthreads()
        for k in range(DEPTH):
            for i in range(OWN):
                a[i] = inp_tile[k, y + i * SIDE]
                b[i] = weight_tile[k, x + i * SIDE]
            for i in range(OWN):
                for j in range(OWN):
                    sums[i, j] += a[i] * b[j]
        cuda.syncthreads()
    for i in range(OWN):
        for j in range(OWN):
            r, o = r0 + y + i * SIDE, o0 + x + j * SIDE
            if r < out.shape[0] and o < out.shape[1]:
                out[r, o] = sums[i, j] + (bias[o] if with_bias else ZERO)


def matmul_forward_v5(out, inp, weight, bias, scratch):
    R, OC = shape(out, weight)
    launch(kernel_v5, (blocks_for(OC, BIG), blocks_for(R, BIG)), (SIDE, SIDE), out, inp, weight, bias)


if SIMULATED:
    import numpy as np

    def load_float4(tile, row, column):
        """For the simulator, which then records one 16-byte read."""
        return np.frombuffer(tile.view("V16")[row, column // 4].tobytes(), float32)

else:
    from llm_numba.cuda.jit import load_float4


@cuda.jit
def kernel_v6(out, inp, weight, bias, with_bias):
    """As v5, but a thread's 4 x 4 results are adjacent, so that it reads four elements at once."""
    x, y = cuda.threadIdx.x * OWN, cuda.threadIdx.y * OWN
    r0, o0 = cuda.blockIdx.y * BIG, cuda.blockIdx.x * BIG
    inp_tile = cuda.shared.array((DEPTH, PITCH), float32, 16)
    weight_tile = cuda.shared.array((DEPTH, PITCH), float32, 16)
    sums = cuda.local.array((OWN, OWN), float32)
    for i in range(OWN):
        for j in range(OWN):
            sums[i, j] = ZERO
    for c0 in range(0, inp.shape[1], DEPTH):
        bring(inp_tile, inp, r0, c0)
        bring(weight_tile, weight, o0, c0)
        cuda.syncthreads()
        for k in range(DEPTH):
            a = load_float4(inp_tile, k, y)
            b = load_float4(weight_tile, k, x)
            for i in range(OWN):
                for j in range(OWN):
                    sums[i, j] += a[i] * b[j]
        cuda.syncthreads()
    for i in range(OWN):
        for j in range(OWN):
            r, o = r0 + y + i, o0 + x + j
            if r < out.shape[0] and o < out.shape[1]:
                out[r, o] = sums[i, j] + (bias[o] if with_bias else ZERO)


def matmul_forward_v6(out, inp, weight, bias, scratch):
    R, OC = shape(out, weight)
    launch(kernel_v6, (blocks_for(OC, BIG), blocks_for(R, BIG)), (SIDE, SIDE), out, inp, weight, bias)


def inputs(rng, R, C, OC, bias=True):
    given = dict(
        out=garbage(1, R, OC), inp=normal(rng, 1, R, C), weight=normal(rng, OC, C),
        bias=normal(rng, OC) if bias else None,
    )  # fmt: skip
    return given | dict(scratch=garbage(matmul_forward_scratch(**given)))


FORWARD = Ladder(
    "matmul_forward",
    Problem(
        oracle.matmul_forward,
        inputs,
        ("out",),
        (
            dict(R=1, C=1, OC=1),
            dict(R=1, C=1, OC=257),
            dict(R=1, C=97, OC=3),
            dict(R=33, C=3, OC=2),
            dict(R=9, C=16, OC=10, bias=False),
        ),
        device="cuda",
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
    timed=dict(R=4096, C=768, OC=3072, bias=True),
    quick=dict(R=8, C=8, OC=8, bias=True),
    counted=dict(R=32, C=in_tests(32, 8), OC=32),
    flops=lambda R, C, OC, bias=True: 2 * R * C * OC,
    torch="matmul_forward",
)
