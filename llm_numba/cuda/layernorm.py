"""Layer normalisation over the channels.

Both kernels give a row to a block, which keeps it in registers: thread i owns the channels i, i + threads, i +
2 * threads, ..., so that what a warp loads at a time is side by side. How many these are, the compiler has to know: a
kernel is made for a number of channels.
"""

import functools
import math

from numba import cuda

from llm_numba.cuda.jit import WARP, block_sum, blocks_for, float32, kernel, sized, stream, to_float, to_storage, uint32

EPSILON = float32(1e-5)
ZERO, ONE = float32(0), float32(1)
FORWARD_EACH = sized(64, 4)  # channels of a thread, at most
RESIDENT = 384  # threads of the backward that a multiprocessor runs at a time: each may have 168 registers
BACKWARD_EACH = sized(25, 4)  # of which a channel takes five
BACKWARD_THREADS = sized(132 * RESIDENT, 16)  # on all of an H100
SHARED = sized(WARP, 1024)  # numbers that a sum over the block needs
COLUMNS, SLICES = 8, sized(128, 2)  # the block that adds up the backward's shares


def row_threads(C: int, each: int) -> int:
    """The threads of a block that owns a row, so that none has more than `each` of its C channels: a power of two,
    which makes their channels' bounds plain to the compiler, and a warp at least."""
    return max(sized(WARP, 1), 1 << (blocks_for(C, each) - 1).bit_length())


@functools.cache
def forward_kernel(C: int, adds: bool):
    """The kernel of `layernorm_forward` for C channels; where it adds, of `residual_layernorm_forward`."""
    threads = row_threads(C, FORWARD_EACH)
    each = blocks_for(C, threads)

    @kernel
    def layernorm_forward_kernel(residual, out, mean, rstd, inp, more, weight, bias):
        """out (n, C), mean (n,), rstd (n,) <- inp (n, C), weight (C,), bias (C,); where it adds, residual (n, C) = inp
        + more (n, C), which it normalises as stored, else these two are not looked at.

        Grid: n; block: threads; a block owns a row, a thread every threads-th of its channels. Moves: 2*n*C numbers, 4
        where it adds.
        """
        row, thread = uint32(cuda.blockIdx.x), uint32(cuda.threadIdx.x) % threads  # % tells the compiler a bound
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
        # reduce: the variance as an average of squares, since that of inp**2 - mean**2 would cancel
        m = block_sum(total, shared) / float32(C)
        total = ZERO
        for k in range(each):
            if thread + k * threads < C:
                total += (x[k] - m) * (x[k] - m)
        r = ONE / math.sqrt(block_sum(total, shared) / float32(C) + EPSILON)
        # scale and shift, then store: no load starts before a store that the program puts first
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
        """dinp (n, C) += and shares (pieces, 2*C) = a piece's dweight, then its dbias
            <- dout (n, C), inp (n, C), weight (C,), mean (n,), rstd (n,).

        Grid: pieces; block: threads; a block owns a piece: every pieces-th row; a thread every threads-th channel of
        these, whose sums over the rows stay in its registers. Moves: 4*n*C numbers.
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
            # load: norm is inp at first, dnorm is dout
            for k in range(each):
                c = thread + k * threads
                if c < C:
                    norm[k], dnorm[k], dx[k] = to_float(inp[row, c]), to_float(dout[row, c]), to_float(dinp[row, c])
            # reduce: a channel's sums over the rows go on, the row's over the channels are the block's
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
    """dweight (C,), dbias (C,) = (+= where accumulate) the sums of the columns of shares (pieces, 2*C), in one order.

    Grid: a block for COLUMNS of the 2*C columns; block: (COLUMNS, SLICES); a thread adds up every SLICES-th share of
    its column, and the first thread of a column then what all of the column's have. Moves: 2*pieces*C floats.
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
    """Normalise each (b, t) row to zero mean and unit variance, then scale and shift.

    out (B, T, C), mean (B, T), rstd (B, T) <- inp (B, T, C), weight (C,), bias (C,)
    Writes:   out =, mean =, rstd = 1 / sqrt(biased variance + 1e-5)
    Parallel: over the B*T rows; each block owns a row, so nothing races
    Moves:    2*B*T*C numbers
    Source:   Ba et al. 2016, arXiv:1607.06450
    """
    C = weight.size
    y, x = out.reshape(-1, C), inp.reshape(-1, C)
    launch = forward_kernel(C, False)[mean.size, row_threads(C, FORWARD_EACH), stream()]
    launch(x, y, mean.reshape(-1), rstd.reshape(-1), x, x, weight, bias)


def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, scratch, accumulate):
    """The gradients of `layernorm_forward`, in one pass over the rows.

    dinp (B, T, C), dweight (C,), dbias (C,)
        <- dout (B, T, C), inp (B, T, C), weight (C,), mean (B, T), rstd (B, T), scratch
    With norm = (inp - mean) * rstd and dnorm = weight * dout, both (B, T, C), and averages over a row's channels:
    Writes:   dinp += rstd * (dnorm - average(dnorm) - norm * average(dnorm * norm)),
              dweight: sum over b, t of dout * norm, dbias: sum over b, t of dout; both += where accumulate, else =
    Parallel: over pieces of the rows, each of which sums its share of dweight and dbias in its own part of scratch;
              then over the channels, whose shares are added up in order. The cut depends on the shape alone, so the
              sums do not change from card to card
    Moves:    4*B*T*C numbers and 4*C floats a piece
    Scratch:  layernorm_scratch_size(C) floats
    """
    C = weight.size
    pieces = min(most_pieces(C), mean.size)
    shares = scratch[: pieces * 2 * C].reshape(pieces, 2 * C)
    backward_kernel(C)[pieces, row_threads(C, BACKWARD_EACH), stream()](
        dinp.reshape(-1, C), shares, dout.reshape(-1, C), inp.reshape(-1, C), weight, mean.reshape(-1), rstd.reshape(-1)
    )
    add_shares_kernel[blocks_for(2 * C, COLUMNS), (COLUMNS, SLICES), stream()](dweight, dbias, shares, accumulate)


def most_pieces(C: int) -> int:
    """The pieces that the backward cuts many rows in: one for each block that a large card runs at a time."""
    return max(1, BACKWARD_THREADS // row_threads(C, BACKWARD_EACH))


def layernorm_scratch_size(C: int) -> int:
    """How many floats `layernorm_backward` needs for C channels."""
    return most_pieces(C) * 2 * C
