"""The rungs of lesson 07 on a GPU: the norm of the gradients, and the embedding's gradient."""

import numpy as np
from numba import cuda

from llm_numba import oracle
from llm_numba.cuda.encoder import encoder_backward, encoder_backward_scratch
from llm_numba.cuda.global_norm import global_norm_squared, global_norm_squared_scratch
from llm_numba.cuda.jit import blocks_for, float32, sized, stream
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal

float64 = np.float64
THREADS = sized(256, 64)  # per block: on a GPU, in the simulator; a power of two
EACH = sized(64, 4)  # elements per thread
BLOCK = EACH * THREADS
CHANNELS = 32  # per block of the encoder's kernels


@cuda.jit
def clear_kernel(out):
    out[0] = float64(0)


@cuda.jit
def norm_kernel_v1(out, grads):
    """A thread owns an element and adds its square to the result."""
    i = cuda.grid(1)
    if i < grads.shape[0]:
        number = float64(grads[i])
        cuda.atomic.add(out, 0, number * number)


def global_norm_squared_v1(out, grads, scratch):
    clear_kernel[1, 1, stream()](out)
    norm_kernel_v1[blocks_for(grads.shape[0], THREADS), THREADS, stream()](out, grads)


@cuda.jit(device=True)
def sum_of_thread(grads):
    """The sum of EACH squares; the elements are THREADS apart, so that a warp's reads are coalesced."""
    first = cuda.blockIdx.x * BLOCK + cuda.threadIdx.x
    total = float64(0)
    for i in range(first, min(first + BLOCK, grads.shape[0]), THREADS):
        number = float64(grads[i])
        total += number * number
    return total


@cuda.jit
def norm_kernel_v2(out, grads):
    """A thread first adds up its elements in a register."""
    cuda.atomic.add(out, 0, sum_of_thread(grads))


def global_norm_squared_v2(out, grads, scratch):
    clear_kernel[1, 1, stream()](out)
    norm_kernel_v2[blocks_for(grads.shape[0], BLOCK), THREADS, stream()](out, grads)


@cuda.jit
def norm_kernel_v3(out, grads):
    """A tree: adjacent threads add, then adjacent pairs, then fours; one thread per block updates the result."""
    thread = cuda.threadIdx.x
    shared = cuda.shared.array(THREADS, float64)
    shared[thread] = sum_of_thread(grads)
    cuda.syncthreads()
    step = 1
    while step < THREADS:
        if thread % (2 * step) == 0:
            shared[thread] += shared[thread + step]
        cuda.syncthreads()
        step *= 2
    if thread == 0:
        cuda.atomic.add(out, 0, shared[0])


def global_norm_squared_v3(out, grads, scratch):
    clear_kernel[1, 1, stream()](out)
    norm_kernel_v3[blocks_for(grads.shape[0], BLOCK), THREADS, stream()](out, grads)


@cuda.jit(device=True)
def sum_of_block(number, shared):
    """The sum over the block, for thread 0: the first half of the threads adds the second half's sums, and so on."""
    thread = cuda.threadIdx.x
    shared[thread] = number
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if thread < half:
            shared[thread] += shared[thread + half]
        cuda.syncthreads()
        half //= 2
    return shared[0]


@cuda.jit
def norm_kernel_v4(out, grads):
    """The tree folded in half: the active threads stay next to each other."""
    shared = cuda.shared.array(THREADS, float64)
    total = sum_of_block(sum_of_thread(grads), shared)
    if cuda.threadIdx.x == 0:
        cuda.atomic.add(out, 0, total)


def global_norm_squared_v4(out, grads, scratch):
    clear_kernel[1, 1, stream()](out)
    norm_kernel_v4[blocks_for(grads.shape[0], BLOCK), THREADS, stream()](out, grads)


@cuda.jit
def norm_kernel_v5(sums, grads):
    """Each block writes its sum to an element of its own."""
    shared = cuda.shared.array(THREADS, float64)
    total = sum_of_block(sum_of_thread(grads), shared)
    if cuda.threadIdx.x == 0:
        sums[cuda.blockIdx.x] = total


@cuda.jit
def sum_kernel(out, sums):
    """One block adds up the blocks' sums."""
    shared = cuda.shared.array(THREADS, float64)
    total = float64(0)
    for i in range(cuda.threadIdx.x, sums.shape[0], THREADS):
        total += sums[i]
    total = sum_of_block(total, shared)
    if cuda.threadIdx.x == 0:
        out[0] = total


def global_norm_squared_v5(out, grads, scratch):
    blocks = blocks_for(grads.shape[0], BLOCK)
    sums = scratch[: 2 * blocks].view(float64)
    norm_kernel_v5[blocks, THREADS, stream()](sums, grads)
    sum_kernel[1, THREADS, stream()](out, sums)


@cuda.jit
def encoder_kernel_v1(dwte, dwpe, dout, tokens):
    """A thread owns an element of dout and adds it to dwte and dwpe."""
    b, t = cuda.blockIdx.x, cuda.blockIdx.y
    c = cuda.blockIdx.z * CHANNELS + cuda.threadIdx.x
    if c < dout.shape[2]:
        cuda.atomic.add(dwte, (tokens[b, t], c), dout[b, t, c])
        cuda.atomic.add(dwpe, (t, c), dout[b, t, c])


def encoder_backward_v1(dwte, dwpe, dout, tokens, scratch):
    B, T, C = dout.shape
    encoder_kernel_v1[(B, T, blocks_for(C, CHANNELS)), CHANNELS, stream()](dwte, dwpe, dout, tokens)


@cuda.jit
def encoder_kernel_v2(dwte, dwpe, dout, tokens):
    """A thread owns a channel and processes all rows in order."""
    c = cuda.grid(1)
    if c < dout.shape[2]:
        for b in range(dout.shape[0]):
            for t in range(dout.shape[1]):
                number = dout[b, t, c]
                dwte[tokens[b, t], c] += number
                dwpe[t, c] += number


def encoder_backward_v2(dwte, dwpe, dout, tokens, scratch):
    encoder_kernel_v2[blocks_for(dout.shape[2], CHANNELS), CHANNELS, stream()](dwte, dwpe, dout, tokens)


@cuda.jit
def dwte_kernel_v3(dwte, dout, tokens):
    """A block owns CHANNELS elements of one token's row of dwte and searches all positions for the token."""
    token, c = cuda.blockIdx.x, cuda.blockIdx.y * CHANNELS + cuda.threadIdx.x
    if c < dwte.shape[1]:
        total, found = float32(0), False
        for b in range(dout.shape[0]):
            for t in range(dout.shape[1]):
                if tokens[b, t] == token:
                    total += dout[b, t, c]
                    found = True
        if found:
            dwte[token, c] += total


@cuda.jit
def dwpe_kernel_v3(dwpe, dout):
    """A thread owns an element of dwpe and adds up its B rows."""
    t, c = cuda.blockIdx.x, cuda.blockIdx.y * CHANNELS + cuda.threadIdx.x
    if c < dout.shape[2]:
        total = float32(0)
        for b in range(dout.shape[0]):
            total += dout[b, t, c]
        dwpe[t, c] += total


def encoder_backward_v3(dwte, dwpe, dout, tokens, scratch):
    B, T, C = dout.shape
    blocks = blocks_for(C, CHANNELS)
    dwte_kernel_v3[(dwte.shape[0], blocks), CHANNELS, stream()](dwte, dout, tokens)
    dwpe_kernel_v3[(T, blocks), CHANNELS, stream()](dwpe, dout)


def norm_inputs(rng, n):
    given = dict(out=np.full(1, np.nan), grads=normal(rng, n))
    return given | dict(scratch=garbage(max(global_norm_squared_scratch(**given), 2 * blocks_for(n, BLOCK))))


def encoder_inputs(rng, B, T, C, Vp):
    """Low token ids are frequent, as in a tokenizer's vocabulary."""
    given = dict(
        dwte=normal(rng, Vp, C), dwpe=normal(rng, T, C), dout=normal(rng, B, T, C),
        tokens=(Vp * rng.random((B, T)) ** 3).astype(np.int32),
    )  # fmt: skip
    return given | dict(scratch=garbage(encoder_backward_scratch(**given)))


NORM = Ladder(
    "global_norm_squared",
    Problem(
        oracle.global_norm_squared,
        norm_inputs,
        ("out",),
        tuple(dict(n=n) for n in (1, 3, 97, 257)),
        device="cuda",
    ),
    (
        global_norm_squared_v1,
        global_norm_squared_v2,
        global_norm_squared_v3,
        global_norm_squared_v4,
        global_norm_squared_v5,
        global_norm_squared,
    ),
    timed=dict(n=1 << 27),
    quick=dict(n=1 << 10),
    counted=dict(n=1024),
    nbytes=lambda n: 4 * n,
    pattern="read",
    torch="global_norm_squared",
)
ENCODER = Ladder(
    "encoder_backward",
    Problem(
        oracle.encoder_backward,
        encoder_inputs,
        ("dwte", "dwpe"),
        (
            dict(B=1, T=1, C=1, Vp=1),
            dict(B=2, T=1, C=97, Vp=1),
            dict(B=3, T=9, C=3, Vp=4),
            dict(B=1, T=1, C=257, Vp=2),
        ),
        device="cuda",
    ),
    (encoder_backward_v1, encoder_backward_v2, encoder_backward_v3, encoder_backward),
    timed=dict(B=32, T=1024, C=768, Vp=50304),
    quick=dict(B=1, T=4, C=32, Vp=8),
    counted=dict(B=2, T=8, C=32, Vp=16),
    nbytes=lambda B, T, C, Vp: 2 * 4 * B * T * C,
    pattern="read",
    torch="encoder_backward",
)
