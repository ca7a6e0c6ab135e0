"""The rungs of lesson 06 on a GPU: add two activations and normalise the sum."""

import functools
import math

from numba import cuda

from llm_numba import oracle
from llm_numba.cuda.jit import block_sum, blocks_for, float32, sized, stream
from llm_numba.cuda.layernorm import layernorm_forward
from llm_numba.cuda.residual import residual_layernorm_forward
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

THREADS = sized(128, 32)  # per block: on a GPU, in the simulator
ZERO, ONE, EPSILON = float32(0), float32(1), float32(1e-5)


@cuda.jit
def add_kernel(residual, inp1, inp2):
    """A thread owns an element."""
    i = cuda.grid(1)
    if i < residual.shape[0]:
        residual[i] = inp1[i] + inp2[i]


@cuda.jit
def normalise_kernel(out, mean, rstd, x, weight, bias):
    """A block owns a row and reads it from global memory as often as the formula mentions it."""
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    C = x.shape[1]
    shared = cuda.shared.array(THREADS, float32)
    total = ZERO
    for c in range(thread, C, THREADS):
        total += x[row, c]
    m = block_sum(total, shared) / float32(C)
    total = ZERO
    for c in range(thread, C, THREADS):
        d = x[row, c] - m
        total += d * d
    r = ONE / math.sqrt(block_sum(total, shared) / float32(C) + EPSILON)
    for c in range(thread, C, THREADS):
        out[row, c] = (x[row, c] - m) * r * weight[c] + bias[c]
    if thread == 0:
        mean[row] = m
        rstd[row] = r


def residual_layernorm_forward_v1(residual, out, mean, rstd, inp1, inp2, weight, bias):
    """Two kernels; the second reads the sum three times."""
    add_kernel[blocks_for(residual.size, THREADS), THREADS, stream()](
        residual.reshape(-1), inp1.reshape(-1), inp2.reshape(-1)
    )
    rows = mean.size, weight.size
    normalise_kernel[mean.size, THREADS, stream()](
        out.reshape(rows), mean.reshape(-1), rstd.reshape(-1), residual.reshape(rows), weight, bias
    )


def residual_layernorm_forward_v2(residual, out, mean, rstd, inp1, inp2, weight, bias):
    """Two kernels; the second is the model's, which reads the sum once and keeps it in registers."""
    add_kernel[blocks_for(residual.size, THREADS), THREADS, stream()](
        residual.reshape(-1), inp1.reshape(-1), inp2.reshape(-1)
    )
    layernorm_forward(out, mean, rstd, residual, weight, bias)


@functools.cache
def make_kernel_v3(C):
    """Make the kernel for C channels; a thread keeps every THREADS-th channel of its row."""
    each = blocks_for(C, THREADS)

    @cuda.jit
    def kernel_v3(residual, out, mean, rstd, inp1, inp2, weight, bias):
        """The sum is written for the next addition but never read: it stays in registers."""
        row, thread = cuda.blockIdx.x, cuda.threadIdx.x
        shared = cuda.shared.array(THREADS, float32)
        x = cuda.local.array(each, float32)
        total = ZERO
        for k in range(each):
            c = thread + k * THREADS
            x[k] = ZERO
            if c < C:
                x[k] = inp1[row, c] + inp2[row, c]
                residual[row, c] = x[k]
            total += x[k]
        m = block_sum(total, shared) / float32(C)
        total = ZERO
        for k in range(each):
            if thread + k * THREADS < C:
                total += (x[k] - m) * (x[k] - m)
        r = ONE / math.sqrt(block_sum(total, shared) / float32(C) + EPSILON)
        for k in range(each):
            c = thread + k * THREADS
            if c < C:
                out[row, c] = (x[k] - m) * r * weight[c] + bias[c]
        if thread == 0:
            mean[row] = m
            rstd[row] = r

    return kernel_v3


def residual_layernorm_forward_v3(residual, out, mean, rstd, inp1, inp2, weight, bias):
    """One kernel."""
    rows = mean.size, weight.size
    make_kernel_v3(weight.size)[mean.size, THREADS, stream()](
        residual.reshape(rows), out.reshape(rows), mean.reshape(-1), rstd.reshape(-1),
        inp1.reshape(rows), inp2.reshape(rows), weight, bias,
    )  # fmt: skip


def inputs(rng, B, T, C):
    return dict(
        residual=garbage(B, T, C), out=garbage(B, T, C), mean=garbage(B, T), rstd=garbage(B, T),
        inp1=normal(rng, B, T, C) + 1, inp2=normal(rng, B, T, C), weight=normal(rng, C), bias=normal(rng, C),
    )  # fmt: skip


FORWARD = Ladder(
    "residual_layernorm_forward",
    Problem(
        oracle.residual_layernorm_forward,
        inputs,
        ("residual", "out", "mean", "rstd"),
        (dict(B=1, T=1, C=1), dict(B=1, T=1, C=257), dict(B=3, T=1, C=3), dict(B=1, T=1, C=97)),
        device="cuda",
    ),
    (
        residual_layernorm_forward_v1, residual_layernorm_forward_v2, residual_layernorm_forward_v3,
        residual_layernorm_forward,
    ),
    timed=dict(B=32, T=1024, C=768),
    quick=dict(B=1, T=2, C=32),
    counted=dict(B=1, T=2, C=128),
    nbytes=lambda B, T, C: 4 * 4 * B * T * C,
    pattern="add",
    torch="residual_layernorm_forward",
)  # fmt: skip
