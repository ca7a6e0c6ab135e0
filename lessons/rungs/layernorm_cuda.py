"""The rungs of lesson 01 on a GPU: layer normalisation, forward."""

import functools
import math

from numba import cuda

from llm_numba import oracle
from llm_numba.cuda.jit import blocks_for, float32, sized, stream
from llm_numba.cuda.layernorm import layernorm_forward
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

ZERO, ONE, EPSILON = float32(0), float32(1), float32(1e-5)
THREADS = sized(128, 32)  # per block: on a GPU, in the simulator


@cuda.jit
def kernel_v1(out, mean, rstd, inp, weight, bias):
    """Thread i of the grid owns row i and runs the CPU's loops."""
    row = cuda.grid(1)
    C = inp.shape[1]
    if row < inp.shape[0]:
        m = ZERO
        for c in range(C):
            m += inp[row, c]
        m /= float32(C)
        variance = ZERO
        for c in range(C):
            variance += (inp[row, c] - m) * (inp[row, c] - m)
        r = ONE / math.sqrt(variance / float32(C) + EPSILON)
        for c in range(C):
            out[row, c] = (inp[row, c] - m) * r * weight[c] + bias[c]
        mean[row] = m
        rstd[row] = r


def layernorm_forward_v1(out, mean, rstd, inp, weight, bias):
    C = weight.size
    rows = mean.size
    kernel_v1[blocks_for(rows, THREADS), THREADS, stream()](
        out.reshape(rows, C), mean.reshape(rows), rstd.reshape(rows), inp.reshape(rows, C), weight, bias
    )


@cuda.jit(device=True)
def sum_of_block(number, shared):
    """Sum over the block, returned to every thread: half of the threads add the other half's values, then a quarter."""
    thread = cuda.threadIdx.x
    shared[thread] = number
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if thread < half:
            shared[thread] += shared[thread + half]
        cuda.syncthreads()
        half //= 2
    total = shared[0]
    cuda.syncthreads()
    return total


@cuda.jit
def kernel_v2(out, mean, rstd, inp, weight, bias):
    """A block owns a row; consecutive threads read consecutive channels, so the reads are coalesced."""
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    C = inp.shape[1]
    shared = cuda.shared.array(THREADS, float32)
    total = ZERO
    for c in range(thread, C, THREADS):
        total += inp[row, c]
    m = sum_of_block(total, shared) / float32(C)
    total = ZERO
    for c in range(thread, C, THREADS):
        total += (inp[row, c] - m) * (inp[row, c] - m)
    r = ONE / math.sqrt(sum_of_block(total, shared) / float32(C) + EPSILON)
    for c in range(thread, C, THREADS):
        out[row, c] = (inp[row, c] - m) * r * weight[c] + bias[c]
    if thread == 0:
        mean[row] = m
        rstd[row] = r


def layernorm_forward_v2(out, mean, rstd, inp, weight, bias):
    C = weight.size
    rows = mean.size
    kernel_v2[rows, THREADS, stream()](
        out.reshape(rows, C), mean.reshape(rows), rstd.reshape(rows), inp.reshape(rows, C), weight, bias
    )


@functools.cache
def make_kernel_v3(C):
    """Make the kernel for C channels: the number of registers per thread must be known at compile time."""
    each = blocks_for(C, THREADS)

    @cuda.jit
    def kernel_v3(out, mean, rstd, inp, weight, bias):
        """The row is read once and stays in registers."""
        row, thread = cuda.blockIdx.x, cuda.threadIdx.x
        shared = cuda.shared.array(THREADS, float32)
        x = cuda.local.array(each, float32)
        total = ZERO
        for k in range(each):
            c = thread + k * THREADS
            x[k] = inp[row, c] if c < C else ZERO
            total += x[k]
        m = sum_of_block(total, shared) / float32(C)
        total = ZERO
        for k in range(each):
            if thread + k * THREADS < C:
                total += (x[k] - m) * (x[k] - m)
        r = ONE / math.sqrt(sum_of_block(total, shared) / float32(C) + EPSILON)
        for k in range(each):
            c = thread + k * THREADS
            if c < C:
                out[row, c] = (x[k] - m) * r * weight[c] + bias[c]
        if thread == 0:
            mean[row] = m
            rstd[row] = r

    return kernel_v3


def layernorm_forward_v3(out, mean, rstd, inp, weight, bias):
    C = weight.size
    rows = mean.size
    make_kernel_v3(C)[rows, THREADS, stream()](
        out.reshape(rows, C), mean.reshape(rows), rstd.reshape(rows), inp.reshape(rows, C), weight, bias
    )


def forward_inputs(rng, B, T, C):
    return dict(
        out=garbage(B, T, C), mean=garbage(B, T), rstd=garbage(B, T),
        inp=normal(rng, B, T, C) + 1, weight=normal(rng, C), bias=normal(rng, C),
    )  # fmt: skip


FORWARD = Ladder(
    "layernorm_forward",
    Problem(
        oracle.layernorm_forward,
        forward_inputs,
        ("out", "mean", "rstd"),
        (dict(B=1, T=1, C=1), dict(B=3, T=1, C=3), dict(B=1, T=33, C=3), dict(B=1, T=1, C=257), dict(B=1, T=3, C=97)),
        device="cuda",
    ),
    (layernorm_forward_v1, layernorm_forward_v2, layernorm_forward_v3, layernorm_forward),
    timed=dict(B=32, T=1024, C=768),
    quick=dict(B=1, T=4, C=32),
    counted=dict(B=1, T=32, C=64),
    nbytes=lambda B, T, C: 2 * 4 * B * T * C,
    pattern="copy",
    torch="layernorm_forward",
)
