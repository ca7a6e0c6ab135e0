"""Layer normalisation over the channels.

In both kernels a block owns a row and keeps it in registers: thread i owns the channels i, i + threads,
i + 2 * threads, ..., so the loads of a warp are coalesced. The number of registers must be known at compile time, so a
kernel is compiled for each number of channels.
"""

import functools
import math

from numba import cuda

from llm_numba.cuda.jit import WARP, block_sum, blocks_for, float32, kernel, sized, stream, to_float, to_storage, uint32

EPSILON = float32(1e-5)
ZERO, ONE = float32(0), float32(1)
FORWARD_EACH = sized(64, 4)  # channels per thread, at most
RESIDENT = 384  # threads of the backward per SM; 168 registers each
BACKWARD_EACH = sized(25, 4)  # channels per thread, at most; each takes five registers
BACKWARD_THREADS = sized(132 * RESIDENT, 16)  # on the 132 SMs of an H100
SHARED = sized(WARP, 1024)  # floats of shared memory for block_sum
COLUMNS, SLICES = 8, sized(128, 2)  # a block of add_shares_kernel


def row_threads(C: int, each: int) -> int:
    """Threads of a block that owns a row of C channels, at most `each` per thread.

    At least a warp, and a power of two, from which the compiler derives the bounds of an index.
    """
    return max(sized(WARP, 1), 1 << (blocks_for(C, each) - 1).bit_length())


@functools.cache
def forward_kernel(C: int, adds: bool):
    """The kernel of `layernorm_forward` for C channels, or of `residual_layernorm_forward` if `adds`."""
    threads = row_threads(C, FORWARD_EACH)
    each = blocks_for(C, threads)

    @kernel
    def layernorm_forward_kernel(residual, out, mean, rstd, inp, more, weight, bias):
        """out (n, C), mean (n,), rstd (n,) <- inp (n, C), weight (C,), bias (C,).

        If `adds`, residual (n, C) = inp + more (n, C), and the stored sum is normalised; else both are ignored.
        Grid: n; block: threads; a block owns a row, a thread every threads-th of its channels. Moves: 2*n*C elements,
        or 4*n*C if `adds`.
        """
        row, thread = uint32(cuda.blockIdx.x), uint32(cuda.threadIdx.x) % threads  # the compiler derives a bound from %
        shared = cuda.shared.array(SHARED, float32)
        x = cuda.local.array(each, float32)

        # load
        total = ZERO
        for k in range(each):
            c = thread + k * threads
            x[k] = to_float(inp[row, c]) if c < C else ZERO
            if adds and c < C:
                x[k] += to_float(more[row, c])
        for k in range(each):
            c = thread + k * threads
            if adds and c < C:
                rounded = to_storage(x[k], residual)
                residual[row, c] = rounded
                x[k] = to_float(rounded)
            total += x[k]
        # reduce: the variance is the mean of (x - m)**2; mean(x**2) - m**2 would lose precision
        m = block_sum(total, shared) / float32(C)
        total = ZERO
        for k in range(each):
            if thread + k * threads < C:
                total += (x[k] - m) * (x[k] - m)
        r = ONE / math.sqrt(block_sum(total, shared) / float32(C) + EPSILON)
        # scale and shift, then store: the compiler does not move a load before an earlier store
        for k in range(each):
            c = thread + k * threads
            if c < C:
                x[k] = (x[k] - m) * r * to_float(weight[c]) + to_float(bias[c])
        for k in range(each):
            c = thread + k * threads
            if c < C:
                out[row, c] = to_storage(x[k], out)
        if thread == 0:
            mean[row] = m
            rstd[row] = r

    return layernorm_forward_kernel


@functools.cache
def backward_kernel(C: int):
    """The kernel of `layernorm_backward` for C channels."""
    threads = row_threads(C, BACKWARD_EACH)
    each = blocks_for(C, threads)

    @kernel(launch_bounds=(threads, max(1, RESIDENT // threads)))
    def layernorm_backward_kernel(dinp, shares, dout, inp, weight, mean, rstd):
        """dinp (n, C) +=, shares (pieces, 2*C) = dweight, then dbias, of each piece
            <- dout (n, C), inp (n, C), weight (C,), mean (n,), rstd (n,).

        Grid: pieces; block: threads; a block owns every pieces-th row, a thread every threads-th channel of them, whose
        sums over the rows stay in registers. Moves: 4*n*C elements.
        """
        piece, thread = uint32(cuda.blockIdx.x), uint32(cuda.threadIdx.x) % threads
        shared = cuda.shared.array(SHARED, float32)
        norm = cuda.local.array(each, float32)
        dnorm = cuda.local.array(each, float32)
        dx = cuda.local.array(each, float32)
        dweight = cuda.local.array(each, float32)
        dbias = cuda.local.array(each, float32)
        for k in range(each):
            dweight[k] = ZERO
            dbias[k] = ZERO

        for row in range(piece, inp.shape[0], cuda.gridDim.x):
            m, r = mean[row], rstd[row]
            # load: norm holds inp at first, dnorm holds dout
            for k in range(each):
                c = thread + k * threads
                if c < C:
                    norm[k], dnorm[k], dx[k] = to_float(inp[row, c]), to_float(dout[row, c]), to_float(dinp[row, c])
            # reduce: over the rows in registers, over the channels of the row with block_sum
            dnorm_total, dnorm_norm_total = ZERO, ZERO
            for k in range(each):
                c = thread + k * threads
                if c < C:
                    norm[k] = (norm[k] - m) * r
                    dweight[k] += dnorm[k] * norm[k]
                    dbias[k] += dnorm[k]
                    dnorm[k] *= to_float(weight[c])
                    dnorm_total += dnorm[k]
                    dnorm_norm_total += dnorm[k] * norm[k]
            dnorm_average = block_sum(dnorm_total, shared) / float32(C)
            dnorm_norm_average = block_sum(dnorm_norm_total, shared) / float32(C)
            # store
            for k in range(each):
                c = thread + k * threads
                if c < C:
                    dx[k] += r * (dnorm[k] - dnorm_average - norm[k] * dnorm_norm_average)
                    dinp[row, c] = to_storage(dx[k], dinp)

        for k in range(each):
            c = thread + k * threads
            if c < C:
                shares[piece, c] = dweight[k]
                shares[piece, C + c] = dbias[k]

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
    Parallel: over the B*T rows; each block owns a row, so nothing races
    Moves:    2*B*T*C elements
    Source:   Ba et al. 2016, arXiv:1607.06450
    """
    C = weight.size
    y, x = out.reshape(-1, C), inp.reshape(-1, C)
    launch = forward_kernel(C, False)[mean.size, row_threads(C, FORWARD_EACH), stream()]
    launch(x, y, mean.reshape(-1), rstd.reshape(-1), x, x, weight, bias)


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
    pieces = min(max_pieces(C), mean.size)
    shares = scratch[: pieces * 2 * C].reshape(pieces, 2 * C)
    backward_kernel(C)[pieces, row_threads(C, BACKWARD_EACH), stream()](
        dinp.reshape(-1, C), shares, dout.reshape(-1, C), inp.reshape(-1, C), weight, mean.reshape(-1), rstd.reshape(-1)
    )
    add_shares_kernel[blocks_for(2 * C, COLUMNS), (COLUMNS, SLICES), stream()](dweight, dbias, shares, accumulate)


def layernorm_backward_scratch(dinp, dweight, dbias, dout, inp, weight, mean, rstd, accumulate) -> int:
    """Floats of scratch that `layernorm_backward` needs."""
    C = weight.shape[0]
    return min(max_pieces(C), math.prod(mean.shape)) * 2 * C


def max_pieces(C: int) -> int:
    """Into how many pieces the backward cuts many rows: as many as blocks that an H100 runs at once."""
    return max(1, BACKWARD_THREADS // row_threads(C, BACKWARD_EACH))
