"""The solution, and wrong answers with the phrases that `check` must print for each."""

from numba import cuda

from llm_numba.cuda.jit import float32

COLUMNS, SLICES = 32, 4


@cuda.jit
def solution(dbias, dout):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    c = cuda.blockIdx.x * COLUMNS + x
    R, C = dout.shape
    shared = cuda.shared.array((SLICES, COLUMNS), float32)
    total = float32(0)
    if c < C:
        for r in range(y, R, SLICES):
            total += dout[r, c]
    shared[y, x] = total
    cuda.syncthreads()
    if y == 0 and c < C:
        for other in range(1, SLICES):
            total += shared[other, x]
        dbias[c] += total


@cuda.jit
def no_barrier(dbias, dout):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    c = cuda.blockIdx.x * COLUMNS + x
    R, C = dout.shape
    shared = cuda.shared.array((SLICES, COLUMNS), float32)
    total = float32(0)
    if c < C:
        for r in range(y, R, SLICES):
            total += dout[r, c]
    shared[y, x] = total
    if y == SLICES - 1 and c < C:
        for other in range(SLICES - 1):
            total += shared[other, x]
        dbias[c] += total


@cuda.jit
def reads_beyond_the_channels(dbias, dout):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    c = cuda.blockIdx.x * COLUMNS + x
    R, C = dout.shape
    shared = cuda.shared.array((SLICES, COLUMNS), float32)
    total = float32(0)
    for r in range(y, R, SLICES):
        total += dout[r, c]
    shared[y, x] = total
    cuda.syncthreads()
    if y == 0 and c < C:
        for other in range(1, SLICES):
            total += shared[other, x]
        dbias[c] += total


@cuda.jit
def barrier_for_some(dbias, dout):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    c = cuda.blockIdx.x * COLUMNS + x
    R, C = dout.shape
    shared = cuda.shared.array((SLICES, COLUMNS), float32)
    total = float32(0)
    if c < C:
        for r in range(y, R, SLICES):
            total += dout[r, c]
        shared[y, x] = total
        cuda.syncthreads()
        if y == 0:
            for other in range(1, SLICES):
                total += shared[other, x]
            dbias[c] += total


@cuda.jit
def every_slice_adds(dbias, dout):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    c = cuda.blockIdx.x * COLUMNS + x
    R, C = dout.shape
    if c < C:
        total = float32(0)
        for r in range(y, R, SLICES):
            total += dout[r, c]
        dbias[c] += total


@cuda.jit
def only_its_own_slice(dbias, dout):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    c = cuda.blockIdx.x * COLUMNS + x
    R, C = dout.shape
    if y == 0 and c < C:
        total = float32(0)
        for r in range(y, R, SLICES):
            total += dout[r, c]
        dbias[c] += total


@cuda.jit
def overwrites(dbias, dout):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    c = cuda.blockIdx.x * COLUMNS + x
    R, C = dout.shape
    shared = cuda.shared.array((SLICES, COLUMNS), float32)
    total = float32(0)
    if c < C:
        for r in range(y, R, SLICES):
            total += dout[r, c]
    shared[y, x] = total
    cuda.syncthreads()
    if y == 0 and c < C:
        for other in range(1, SLICES):
            total += shared[other, x]
        dbias[c] = total


@cuda.jit
def first_block_only(dbias, dout):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    c = x
    R, C = dout.shape
    shared = cuda.shared.array((SLICES, COLUMNS), float32)
    total = float32(0)
    if c < C:
        for r in range(y, R, SLICES):
            total += dout[r, c]
    shared[y, x] = total
    cuda.syncthreads()
    if cuda.blockIdx.x == 0 and y == 0 and c < C:
        for other in range(1, SLICES):
            total += shared[other, x]
        dbias[c] += total


@cuda.jit
def slices_not_written(dbias, dout):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    c = cuda.blockIdx.x * COLUMNS + x
    R, C = dout.shape
    shared = cuda.shared.array((SLICES, COLUMNS), float32)
    total = float32(0)
    if c < C:
        for r in range(y, R, SLICES):
            total += dout[r, c]
            shared[y, x] = total
    cuda.syncthreads()
    if y == 0 and c < C:
        for other in range(1, SLICES):
            total += shared[other, x]
        dbias[c] += total


WRONG = (
    (no_barrier, ["a race: thread 0 of block 0 writes shared[0, 0]", "no barrier", "shared[y, x] = total"]),
    (
        reads_beyond_the_channels,
        ["R=1, C=1: thread 1 of block 0 reads dout[0, 1], which is out of bounds", "axis 1 must be 0 to 0"],
    ),
    (barrier_for_some, ["waits at syncthreads", "of its block has ended", "every barrier"]),
    (every_slice_adds, ["a race: thread 0 of block 0 writes dbias[0]", "thread (0, 1) of block 0", "no barrier"]),
    (only_its_own_slice, ["R=7, C=97: dbias[0] is", "all elements of dbias are wrong"]),
    (overwrites, ["R=1, C=1: dbias[0] is", "it is the only element of dbias"]),
    (first_block_only, ["R=7, C=97: dbias[32] is", "65 of 97 elements are wrong, from dbias[32] to dbias[96]"]),
    (slices_not_written, ["reads shared[1, 0] in shared memory before any thread of its block has written it"]),
)
