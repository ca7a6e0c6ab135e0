"""Matrix product with few rows, as in sampling: the time is that of reading the weights once, so no tensor cores.

A block owns COLUMNS columns of out for one or ROWS rows of inp. Its threads walk along the rows of the weights side by
side, one vector (16 bytes of bf16) at a time. All loads of a step are in flight at once, and a vector of inp serves all
columns. There are as many threads as a row of the weights has vectors, if that is not too many, so mostly it is one
step:

    weight  row o       | t0 | t1 | t2 | t3 | ...
            row o + 1   | t0 | t1 | t2 | t3 | ...
            ...
    inp     row r       | t0 | t1 | t2 | t3 | ...

Each thread sums its products, then a warp by shuffles, then the block through shared memory, always in one order. The
gradients, which sampling does not need, are those of matmul_simt.py.
"""

import functools

from numba import cuda

from llm_numba.cuda.gelu import gate
from llm_numba.cuda.jit import WARP, blocks_for, float32, kernel, sized, to_float, to_storage, uint32, warp_sum
from llm_numba.cuda.matmul_simt import backward_scratch, input_gradient, weight_gradient  # noqa: F401
from llm_numba.cuda.overlap import let_next_start, overlapping, prefetch, wait_for_previous
from llm_numba.cuda.vectors import load_vector, vector_size

MOST_ROWS = 16
ROWS, COLUMNS = sized(4, 2), sized(4, 2)
MOST_THREADS = sized(512, 4)
LANES = sized(WARP, 1)
WARPS = MOST_THREADS // LANES


def supports(dtype, R, C, OC) -> str:
    """Why the kernel cannot multiply these operands, or ""."""
    return "" if R <= MOST_ROWS else f"needs at most {MOST_ROWS} rows"


@functools.cache
def forward_kernel(rows: int, size: int):
    """The kernel for blocks of this many rows, and vectors of this size."""
    own = rows * COLUMNS

    @kernel(launch_bounds=(MOST_THREADS, 1))
    def few_rows_kernel(out, pre, inp, weight, bias, with_bias, with_gelu):
        """out (R, OC) = inp (R, C) @ weight (OC, C).T, + bias (OC,) if with_bias; if with_gelu, that is pre (R, OC)
        and out = GELU(pre).

        Grid: (OC / COLUMNS, R / rows); block: at most MOST_THREADS, at least own; a thread owns every blockDim.x-th
        vector of the rows; at the end the first ones own an element of out. Moves: weight
        """
        R, OC, C = uint32(out.shape[0]), uint32(out.shape[1]), uint32(inp.shape[1])
        o0, r0 = uint32(cuda.blockIdx.x) * uint32(COLUMNS), uint32(cuda.blockIdx.y) * uint32(rows)
        thread, threads = uint32(cuda.threadIdx.x), uint32(cuda.blockDim.x)
        of_warps = cuda.shared.array((WARPS, own), float32)
        sums = cuda.local.array((COLUMNS, rows), float32)
        weights = cuda.local.array((COLUMNS, size), float32)
        x = cuda.local.array(size, float32)
        let_next_start()
        first = uint32(thread * uint32(size))
        for j in range(COLUMNS):
            if first < C:
                prefetch(weight, min(o0 + j, OC - 1), first)
            for i in range(rows):
                sums[j, i] = float32(0)
        wait_for_previous()

        # the element of out that this thread owns
        o, r = uint32(o0 + thread // uint32(rows)), uint32(r0 + thread % uint32(rows))
        owner = thread < own and o < OC and r < R
        total = to_float(bias[o]) if with_bias and owner else float32(0)
        c = first
        while c < C:
            for j in range(COLUMNS):
                load_vector(weights[j], 0, weight, min(o0 + j, OC - 1), c, size)
            for i in range(rows):
                load_vector(x, 0, inp, min(r0 + i, R - 1), c, size)
                for j in range(COLUMNS):
                    for k in range(size):
                        sums[j, i] += x[k] * weights[j, k]
            c = uint32(c + threads * uint32(size))

        for j in range(COLUMNS):
            for i in range(rows):
                of_warp = warp_sum(sums[j, i])
                if thread % uint32(LANES) == 0:
                    of_warps[thread // uint32(LANES), j * rows + i] = of_warp
        cuda.syncthreads()
        if owner:
            for warp in range(threads // uint32(LANES)):
                total += of_warps[warp, thread]
            if with_gelu:
                pre[r, o] = to_storage(total, pre)
                total = to_float(pre[r, o])
                total *= gate(total)
            out[r, o] = to_storage(total, out)

    return few_rows_kernel


def forward_scratch(R, C, OC):
    """None."""
    return 0


def forward(out, inp, weight, bias, scratch, pre=None):
    """See matmul.py."""
    (R, OC), C = out.shape, inp.shape[1]
    rows, size = 1 if R == 1 else ROWS, vector_size(C)
    threads = max(rows * COLUMNS, min(MOST_THREADS, blocks_for(blocks_for(C, size), LANES) * LANES))
    grid = blocks_for(OC, COLUMNS), blocks_for(R, rows)
    with_bias, with_gelu = bias is not None, pre is not None
    overlapping(forward_kernel(rows, size), grid, threads)(
        out, pre if with_gelu else out, inp, weight, bias if with_bias else weight.reshape(-1), with_bias, with_gelu
    )
