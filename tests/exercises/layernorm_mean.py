"""The solution, and wrong answers with the phrases that `check` must print for each."""

from numba import cuda

from llm_numba.cuda.jit import float32

THREADS = 32


@cuda.jit
def solution(mean, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    C = inp.shape[1]
    shared = cuda.shared.array(THREADS, float32)
    total = float32(0)
    for c in range(thread, C, THREADS):
        total += inp[row, c]
    shared[thread] = total
    cuda.syncthreads()
    if thread == 0:
        total = float32(0)
        for i in range(THREADS):
            total += shared[i]
        mean[row] = total / float32(C)


@cuda.jit
def no_barrier(mean, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    C = inp.shape[1]
    shared = cuda.shared.array(THREADS, float32)
    total = float32(0)
    for c in range(thread, C, THREADS):
        total += inp[row, c]
    shared[thread] = total
    if thread == THREADS - 1:
        total = float32(0)
        for i in range(THREADS):
            total += shared[i]
        mean[row] = total / float32(C)


@cuda.jit
def beyond_the_row(mean, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    C = inp.shape[1]
    shared = cuda.shared.array(THREADS, float32)
    total = float32(0)
    for k in range((C + THREADS - 1) // THREADS):
        total += inp[row, thread + k * THREADS]
    shared[thread] = total
    cuda.syncthreads()
    if thread == 0:
        total = float32(0)
        for i in range(THREADS):
            total += shared[i]
        mean[row] = total / float32(C)


@cuda.jit
def not_divided(mean, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    shared = cuda.shared.array(THREADS, float32)
    total = float32(0)
    for c in range(thread, inp.shape[1], THREADS):
        total += inp[row, c]
    shared[thread] = total
    cuda.syncthreads()
    if thread == 0:
        total = float32(0)
        for i in range(THREADS):
            total += shared[i]
        mean[row] = total


@cuda.jit
def all_write(mean, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    C = inp.shape[1]
    shared = cuda.shared.array(THREADS, float32)
    total = float32(0)
    for c in range(thread, C, THREADS):
        total += inp[row, c]
    shared[thread] = total
    cuda.syncthreads()
    total = float32(0)
    for i in range(THREADS):
        total += shared[i]
    mean[row] = total / float32(C)


@cuda.jit
def barrier_for_some(mean, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    C = inp.shape[1]
    shared = cuda.shared.array(THREADS, float32)
    total = float32(0)
    for c in range(thread, C, THREADS):
        total += inp[row, c]
    shared[thread] = total
    if thread < C:
        cuda.syncthreads()
    if thread == 0:
        total = float32(0)
        for i in range(min(C, THREADS)):
            total += shared[i]
        mean[row] = total / float32(C)


@cuda.jit
def unwritten(mean, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    C = inp.shape[1]
    shared = cuda.shared.array(THREADS, float32)
    total = float32(0)
    for c in range(thread, C, THREADS):
        total += inp[row, c]
    if thread < C:
        shared[thread] = total
    cuda.syncthreads()
    if thread == 0:
        total = float32(0)
        for i in range(THREADS):
            total += shared[i]
        mean[row] = total / float32(C)


@cuda.jit
def only_the_first(mean, inp):
    if cuda.threadIdx.x == 0 and cuda.blockIdx.x == 0:
        total = float32(0)
        for c in range(inp.shape[1]):
            total += inp[0, c]
        mean[0] = total / float32(inp.shape[1])


@cuda.jit
def keeps_the_sum(mean, inp):
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    C = inp.shape[1]
    for c in range(thread, C, THREADS):
        if c > 0 and thread == 0:
            inp[row, 0] += inp[row, c]
    if thread == 0:
        mean[row] = inp[row, 0] / float32(C)


WRONG = (
    (no_barrier, ["a race: thread 0 of block 0 writes shared[0]", "no barrier", "shared[thread] = total"]),
    (
        beyond_the_row,
        [
            "R=1, C=1: thread 1 of block 0 reads inp[0, 1], which is out of bounds",
            "the index of axis 1 must be 0 to 0",
        ],
    ),
    (not_divided, ["R=3, C=97: mean[0] is", "all elements of mean are wrong"]),
    (all_write, ["a race", "mean[0]", "thread 1"]),
    (barrier_for_some, ["waits at syncthreads", "thread 1 of its block has ended", "every barrier"]),
    (unwritten, ["thread 0 of block 0 reads shared[1] in shared memory before any thread of its block has written it"]),
    (only_the_first, ["R=3, C=97", "mean[1] is never written", "2 of 3 elements are wrong"]),
    (keeps_the_sum, ["it changes its input inp, at inp[0, 0]"]),
)
