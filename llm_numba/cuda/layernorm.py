"""Layer normalisation over the channels.

In both kernels the threads of a block with the same threadIdx.y own a row and keep it in registers: thread x owns the
vectors of channels x, x + threads, x + 2 * threads, ... (vectors.py), so the accesses of a warp are coalesced. The
number of registers must be known at compile time, so a kernel is compiled for each number of channels.
"""

import functools
import math

from numba import cuda

from llm_numba.cuda.jit import WARP, blocks_for, float32, kernel, row_sum, sized, stream, to_float, to_storage, uint32
from llm_numba.cuda.overlap import let_next_start, overlapping, wait_for_previous
from llm_numba.cuda.vectors import load_vector, store_vector, vector_size

EPSILON = float32(1e-5)
ZERO, ONE = float32(0), float32(1)
FORWARD_EACH = sized(64, 4)  # channels per thread, at most
RESIDENT = 384  # threads of the backward per SM; 168 registers each
BACKWARD_EACH = sized(25, 4)  # channels per thread, at most; each takes five registers
BACKWARD_THREADS = sized(132 * RESIDENT, 16)  # on the 132 SMs of an H100
ROWS = sized(4, 2)  # rows of a block at a time, if a warp is enough for a row
SHARED = sized(WARP, 1024)  # floats of shared memory for row_sum
COLUMNS, SLICES = 8, sized(32, 2)  # a block of add_shares_kernel


def block_of(C: int, most: int) -> tuple[int, int, int]:
    """(threads of a row of C channels, rows of a block, channels of a thread: at most `most`, in whole vectors).

    A row has at least a warp, and a power of two, from which the compiler derives the bounds of an index.
    """
    size, threads = vector_size(C), sized(WARP, 1)
    while (each := blocks_for(C, threads * size) * size) > max(most, size):
        threads *= 2
    return threads, ROWS if threads <= sized(WARP, 2) else 1, each


@functools.cache
def forward_kernel(C: int, adds: bool):
    """The kernel of `layernorm_forward` for C channels, or of `residual_layernorm_forward` if `adds`."""
    threads, rows, each = block_of(C, FORWARD_EACH)
    size = vector_size(C)

    @kernel
    def layernorm_forward_kernel(residual, out, mean, rstd, inp1, inp2, weight, bias):
        """out (n, C), mean (n,), rstd (n,) <- inp1 (n, C), weight (1, C), bias (1, C).

        If `adds`, residual (n, C) = inp1 + inp2 (n, C), and the stored sum is normalised; else both are ignored.
        Grid: n / rows; block: (threads, rows); a thread owns every threads-th vector of its row. Moves: 2*n*C elements,
        or 4*n*C if `adds`.
        """
        position = uint32(cuda.blockIdx.x) * rows + uint32(cuda.threadIdx.y)
        row = uint32(min(position, inp1.shape[0] - 1))
        is_own = row == position  # past the last row, a row of another thread is loaded, but not stored
        thread = uint32(cuda.threadIdx.x) % threads  # the compiler derives a bound from %
        shared = cuda.shared.array(SHARED, float32)
        x = cuda.local.array(each, float32)
        y = cuda.local.array(each, float32)
        w = cuda.local.array(each, float32)
        b = cuda.local.array(each, float32)
        let_next_start()
        wait_for_previous()

        # load
        for k in range(0, each, size):
            c = thread * size + k * threads
            if c < C:
                load_vector(x, k, inp1, row, c, size)
                if adds:
                    load_vector(y, k, inp2, row, c, size)
                load_vector(w, k, weight, 0, c, size)
                load_vector(b, k, bias, 0, c, size)
        total = ZERO
        for k in range(0, each, size):
            c = thread * size + k * threads
            if c < C:
                for i in range(k, k + size):
                    if adds:
                        x[i] = to_float(to_storage(x[i] + y[i], residual))
                    total += x[i]
                if adds and is_own:
                    store_vector(residual, row, c, x, k, size)
        # reduce: the variance is the mean of (x - m)**2; mean(x**2) - m**2 would lose precision
        m = row_sum(total, shared) / float32(C)
        total = ZERO
        for k in range(0, each, size):
            if thread * size + k * threads < C:
                for i in range(k, k + size):
                    total += (x[i] - m) * (x[i] - m)
        r = ONE / math.sqrt(row_sum(total, shared) / float32(C) + EPSILON)
        # scale, shift and store
        for k in range(0, each, size):
            c = thread * size + k * threads
            if c < C:
                for i in range(k, k + size):
                    x[i] = (x[i] - m) * r * w[i] + b[i]
                if is_own:
                    store_vector(out, row, c, x, k, size)
        if thread == 0 and is_own:
            mean[row] = m
            rstd[row] = r

    return layernorm_forward_kernel


@functools.cache
def backward_kernel(C: int):
    """The kernel of `layernorm_backward` for C channels."""
    threads, rows, each = block_of(C, BACKWARD_EACH)
    size, shared_sums = vector_size(C), each * threads if rows > 1 else 1

    @kernel(launch_bounds=(threads * rows, max(1, RESIDENT // (threads * rows))))
    def layernorm_backward_kernel(dinp, shares, dout, inp, weight, mean, rstd):
        """dinp (n, C) +=, shares (pieces, 2*C) = dweight, then dbias, of each piece
            <- dout (n, C), inp (n, C), weight (1, C), mean (n,), rstd (n,).

        Grid: pieces; block: (threads, rows); a block takes `rows` rows at a time, pieces * rows apart. A thread owns
        every threads-th vector of its rows, whose sums over the rows stay in registers; at the end the block adds up
        those of its threads, in the order of threadIdx.y. Moves: 4*n*C elements.
        """
        y, thread = uint32(cuda.threadIdx.y), uint32(cuda.threadIdx.x) % threads
        shared = cuda.shared.array(SHARED, float32)
        sums = cuda.shared.array((2, shared_sums), float32)
        norm = cuda.local.array(each, float32)
        dnorm = cuda.local.array(each, float32)
        dx = cuda.local.array(each, float32)
        dweight = cuda.local.array(each, float32)
        dbias = cuda.local.array(each, float32)
        w = cuda.local.array(size, float32)
        for k in range(each):
            dweight[k] = ZERO
            dbias[k] = ZERO

        for first in range(uint32(cuda.blockIdx.x) * rows, inp.shape[0], cuda.gridDim.x * rows):
            row = uint32(min(first + y, inp.shape[0] - 1))
            is_own = row == first + y  # past the last row, a row of another thread is loaded, but not used
            m, r = mean[row], rstd[row]
            # load: norm holds inp at first, dnorm holds dout
            for k in range(0, each, size):
                c = thread * size + k * threads
                if c < C:
                    load_vector(norm, k, inp, row, c, size)
                    load_vector(dnorm, k, dout, row, c, size)
                    load_vector(dx, k, dinp, row, c, size)
            # reduce: over the rows in registers, over the channels of the row with row_sum
            if is_own:
                for k in range(each):
                    dweight[k] += dnorm[k] * ((norm[k] - m) * r)
                    dbias[k] += dnorm[k]
            dnorm_total, dnorm_norm_total = ZERO, ZERO
            for k in range(0, each, size):
                c = thread * size + k * threads
                if c < C:
                    load_vector(w, 0, weight, 0, c, size)
                    for i in range(k, k + size):
                        norm[i] = (norm[i] - m) * r
                        dnorm[i] *= w[i - k]
                        dnorm_total += dnorm[i]
                        dnorm_norm_total += dnorm[i] * norm[i]
            dnorm_average = row_sum(dnorm_total, shared) / float32(C)
            dnorm_norm_average = row_sum(dnorm_norm_total, shared) / float32(C)
            # store
            for k in range(0, each, size):
                c = thread * size + k * threads
                if c < C and is_own:
                    for i in range(k, k + size):
                        dx[i] += r * (dnorm[i] - dnorm_average - norm[i] * dnorm_norm_average)
                    store_vector(dinp, row, c, dx, k, size)

        for turn in range(rows):
            if y == turn:
                for k in range(each):
                    c = thread * size + k // size * size * threads + k % size
                    if c < C:
                        place = k * threads + thread
                        if turn > 0:
                            dweight[k] += sums[0, place]
                            dbias[k] += sums[1, place]
                        if turn < rows - 1:
                            sums[0, place], sums[1, place] = dweight[k], dbias[k]
                        else:
                            shares[cuda.blockIdx.x, c], shares[cuda.blockIdx.x, C + c] = dweight[k], dbias[k]
            cuda.syncthreads()

    return layernorm_backward_kernel


@kernel
def add_shares_kernel(dweight, dbias, shares, accumulate):
    """dweight (C,), dbias (C,) = (+= if accumulate) the column sums of shares (pieces, 2*C), in a fixed order.

    Grid: 2*C / COLUMNS; block: (COLUMNS, SLICES); a thread sums every SLICES-th share of its column, then the first
    thread of the column sums their results. Moves: 2*pieces*C floats.
    """
    x, y, C = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y), dweight.shape[0]
    column = uint32(cuda.blockIdx.x) * COLUMNS + x
    slices = cuda.shared.array((SLICES, COLUMNS), float32)

    total = ZERO
    if column < 2 * C:
        for piece in range(y, shares.shape[0], SLICES):
            total += shares[piece, column]
    slices[y, x] = total
    cuda.syncthreads()
    if y == 0 and column < 2 * C:
        for other in range(1, SLICES):
            total += slices[other, x]
        if column < C:
            dweight[column] = dweight[column] + total if accumulate else total
        else:
            dbias[column - C] = dbias[column - C] + total if accumulate else total


def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Normalise each row (b, t) to zero mean and unit variance, then scale and shift.

    out (B, T, C), mean (B, T), rstd (B, T) <- inp (B, T, C), weight (C,), bias (C,)
    Writes:   out =, mean =, rstd = 1 / sqrt(biased variance + 1e-5)
    Parallel: over the B*T rows; a warp owns a row, or a block a long one, so nothing races
    Moves:    2*B*T*C elements
    Source:   Ba et al. 2016, arXiv:1607.06450
    """
    C = weight.size
    y, x = out.reshape(-1, C), inp.reshape(-1, C)
    launch_forward(False, x, y, mean, rstd, x, x, weight, bias)


def launch_forward(adds, residual, out, mean, rstd, inp1, inp2, weight, bias):
    """Launch forward_kernel; residual, out, inp1 and inp2 are (n, C)."""
    n, C = inp1.shape
    threads, rows, _ = block_of(C, FORWARD_EACH)
    overlapping(forward_kernel(C, adds), blocks_for(n, rows), (threads, rows))(
        residual, out, mean.reshape(-1), rstd.reshape(-1), inp1, inp2, weight.reshape(1, C), bias.reshape(1, C)
    )


def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, scratch, accumulate):
    """The gradients of `layernorm_forward`, in one pass over the rows.

    dinp (B, T, C), dweight (C,), dbias (C,)
        <- dout (B, T, C), inp (B, T, C), weight (C,), mean (B, T), rstd (B, T)
    With norm = (inp - mean) * rstd and dnorm = weight * dout, both (B, T, C), and averages over the channels of a row:
    Writes:   dinp += rstd * (dnorm - average(dnorm) - norm * average(dnorm * norm));
              dweight, the sum over b, t of dout * norm, and dbias, the sum of dout: += if accumulate, else =
    Parallel: over pieces of the rows, whose sums for dweight and dbias go to scratch; then over the channels, which add
              them in order. The pieces depend on the shape alone, so every GPU gives the same bits
    Moves:    4*B*T*C elements, and 4*C floats per piece
    Scratch:  layernorm_backward_scratch
    """
    C = weight.size
    pieces = pieces_of(mean.size, C)
    shares = scratch[: pieces * 2 * C].reshape(pieces, 2 * C)
    launch = backward_kernel(C)[pieces, block_of(C, BACKWARD_EACH)[:2], stream()]
    rows = [x.reshape(-1, C) for x in (dinp, dout, inp)]
    launch(rows[0], shares, *rows[1:], weight.reshape(1, C), mean.reshape(-1), rstd.reshape(-1))
    add_shares_kernel[blocks_for(2 * C, COLUMNS), (COLUMNS, SLICES), stream()](dweight, dbias, shares, accumulate)


def layernorm_backward_scratch(dinp, dweight, dbias, dout, inp, weight, mean, rstd, accumulate) -> int:
    """Floats of scratch that `layernorm_backward` needs."""
    C = weight.shape[0]
    return pieces_of(math.prod(mean.shape), C) * 2 * C


def pieces_of(n: int, C: int) -> int:
    """Into how many pieces the backward cuts n rows: at most as many as blocks that an H100 runs at once."""
    threads, rows, _ = block_of(C, BACKWARD_EACH)
    return min(max(1, BACKWARD_THREADS // (threads * rows)), blocks_for(n, rows))
