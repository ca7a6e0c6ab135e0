"""What the variants of attention share: the largest head, the order of query tiles, and delta = sum(dout * out)."""

from numba import cuda

from llm_numba.cuda.jit import blocks_for, device, float32, kernel, sized, stream, to_float, uint32

ROWS, THREADS = sized(32, 2), sized(128, 4)
WIDEST = 128  # channels of a head that attention on a GPU supports
PITCH = WIDEST + 1


@device
def end_of_steps(first, T, rows, GROUP):
    """Where the steps of `query_tile` end; a step advances by `rows`."""
    return T if GROUP == 1 else first + GROUP * ((T - first + rows - 1) // rows * rows)


@device
def query_tile(step, first, T, rows, kv_head, GROUP):
    """(query head, first query) at a step over the queries from `first` on of a group of query heads, head by head."""
    if GROUP == 1:
        return kv_head, step
    length = uint32(T - first + rows - 1) // rows * rows  # 32 bits: a 64-bit division costs registers, which spill
    head = uint32(uint32(step - first) // uint32(length))
    return uint32(kv_head * GROUP + head), uint32(step - head * length)


@kernel
def delta_kernel(delta, dout, out, HS):
    """delta (B, NH, T) = sum(dout * out) over the HS channels of each head; dout, out (B, T, C).

    Grid: (groups of ROWS tokens, NH, B); block: THREADS. Adjacent threads multiply adjacent elements; then a thread
    sums a row. Moves: 2*B*T*C*itemsize bytes.
    """
    products = cuda.shared.array((ROWS, PITCH), float32)
    thread, h, b = cuda.threadIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
    t0 = cuda.blockIdx.x * ROWS
    for i in range(min(ROWS, out.shape[1] - t0)):
        for c in range(thread, HS, THREADS):
            products[i, c] = to_float(dout[b, t0 + i, h * HS + c]) * to_float(out[b, t0 + i, h * HS + c])
    cuda.syncthreads()
    if thread < ROWS and t0 + thread < out.shape[1]:
        total = float32(0)
        for c in range(HS):
            total += products[thread, c]
        delta[b, h, t0 + thread] = total


def attention_delta(dout, out, num_heads, scratch):
    """delta (B, NH, T) = sum(dout * out) over the channels of each head, in the first B*NH*T floats of scratch."""
    B, T, C = out.shape
    delta = scratch[: B * num_heads * T].reshape(B, num_heads, T)
    delta_kernel[(blocks_for(T, ROWS), num_heads, B), THREADS, stream()](delta, dout, out, C // num_heads)
    return delta
