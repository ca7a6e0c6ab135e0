"""The solution, and wrong answers with the phrases that `check` must print for each."""

from numba import cuda

from llm_numba.cuda.jit import float32

TILE = 8
PITCH = TILE + 1


@cuda.jit
def solution(out, inp, weight):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    r0, o0 = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
    R, C = inp.shape
    OC = weight.shape[0]
    inp_tile = cuda.shared.array((TILE, PITCH), float32)
    weight_tile = cuda.shared.array((TILE, PITCH), float32)
    total = float32(0)
    for c0 in range(0, C, TILE):
        c = c0 + x
        inp_tile[y, x] = inp[r0 + y, c] if r0 + y < R and c < C else float32(0)
        weight_tile[y, x] = weight[o0 + y, c] if o0 + y < OC and c < C else float32(0)
        cuda.syncthreads()
        for k in range(TILE):
            total += inp_tile[y, k] * weight_tile[x, k]
        cuda.syncthreads()
    if r0 + y < R and o0 + x < OC:
        out[r0 + y, o0 + x] = total


@cuda.jit
def no_first_barrier(out, inp, weight):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    r0, o0 = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
    R, C = inp.shape
    OC = weight.shape[0]
    inp_tile = cuda.shared.array((TILE, PITCH), float32)
    weight_tile = cuda.shared.array((TILE, PITCH), float32)
    total = float32(0)
    for c0 in range(0, C, TILE):
        c = c0 + x
        inp_tile[y, x] = inp[r0 + y, c] if r0 + y < R and c < C else float32(0)
        weight_tile[y, x] = weight[o0 + y, c] if o0 + y < OC and c < C else float32(0)
        for k in range(TILE):
            total += inp_tile[y, k] * weight_tile[x, k]
        cuda.syncthreads()
    if r0 + y < R and o0 + x < OC:
        out[r0 + y, o0 + x] = total


@cuda.jit
def no_second_barrier(out, inp, weight):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    r0, o0 = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
    R, C = inp.shape
    OC = weight.shape[0]
    inp_tile = cuda.shared.array((TILE, PITCH), float32)
    weight_tile = cuda.shared.array((TILE, PITCH), float32)
    total = float32(0)
    for c0 in range(0, C, TILE):
        c = c0 + x
        inp_tile[y, x] = inp[r0 + y, c] if r0 + y < R and c < C else float32(0)
        weight_tile[y, x] = weight[o0 + y, c] if o0 + y < OC and c < C else float32(0)
        cuda.syncthreads()
        for k in range(TILE):
            total += inp_tile[y, k] * weight_tile[x, k]
    if r0 + y < R and o0 + x < OC:
        out[r0 + y, o0 + x] = total


@cuda.jit
def reads_beyond_the_edge(out, inp, weight):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    r0, o0 = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
    R, C = inp.shape
    OC = weight.shape[0]
    inp_tile = cuda.shared.array((TILE, PITCH), float32)
    weight_tile = cuda.shared.array((TILE, PITCH), float32)
    total = float32(0)
    for c0 in range(0, C, TILE):
        inp_tile[y, x] = inp[r0 + y, c0 + x]
        weight_tile[y, x] = weight[o0 + y, c0 + x]
        cuda.syncthreads()
        for k in range(TILE):
            total += inp_tile[y, k] * weight_tile[x, k]
        cuda.syncthreads()
    if r0 + y < R and o0 + x < OC:
        out[r0 + y, o0 + x] = total


@cuda.jit
def whole_tiles_only(out, inp, weight):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    r0, o0 = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
    R, C = inp.shape
    OC = weight.shape[0]
    inp_tile = cuda.shared.array((TILE, PITCH), float32)
    weight_tile = cuda.shared.array((TILE, PITCH), float32)
    total = float32(0)
    for step in range(C // TILE):
        c = step * TILE + x
        inp_tile[y, x] = inp[r0 + y, c] if r0 + y < R else float32(0)
        weight_tile[y, x] = weight[o0 + y, c] if o0 + y < OC else float32(0)
        cuda.syncthreads()
        for k in range(TILE):
            total += inp_tile[y, k] * weight_tile[x, k]
        cuda.syncthreads()
    if r0 + y < R and o0 + x < OC:
        out[r0 + y, o0 + x] = total


@cuda.jit
def wrong_row_of_weight(out, inp, weight):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    r0, o0 = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
    R, C = inp.shape
    OC = weight.shape[0]
    inp_tile = cuda.shared.array((TILE, PITCH), float32)
    weight_tile = cuda.shared.array((TILE, PITCH), float32)
    total = float32(0)
    for c0 in range(0, C, TILE):
        c = c0 + x
        inp_tile[y, x] = inp[r0 + y, c] if r0 + y < R and c < C else float32(0)
        weight_tile[y, x] = weight[o0 + y, c] if o0 + y < OC and c < C else float32(0)
        cuda.syncthreads()
        for k in range(TILE):
            total += inp_tile[y, k] * weight_tile[y, k]
        cuda.syncthreads()
    if r0 + y < R and o0 + x < OC:
        out[r0 + y, o0 + x] = total


@cuda.jit
def only_the_last_step(out, inp, weight):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    r0, o0 = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
    R, C = inp.shape
    OC = weight.shape[0]
    inp_tile = cuda.shared.array((TILE, PITCH), float32)
    weight_tile = cuda.shared.array((TILE, PITCH), float32)
    for c0 in range(0, C, TILE):
        c = c0 + x
        inp_tile[y, x] = inp[r0 + y, c] if r0 + y < R and c < C else float32(0)
        weight_tile[y, x] = weight[o0 + y, c] if o0 + y < OC and c < C else float32(0)
        cuda.syncthreads()
        total = float32(0)
        for k in range(TILE):
            total += inp_tile[y, k] * weight_tile[x, k]
        cuda.syncthreads()
    if r0 + y < R and o0 + x < OC:
        out[r0 + y, o0 + x] = total


@cuda.jit
def threads_exit_early(out, inp, weight):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    r0, o0 = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
    R, C = inp.shape
    OC = weight.shape[0]
    inp_tile = cuda.shared.array((TILE, PITCH), float32)
    weight_tile = cuda.shared.array((TILE, PITCH), float32)
    total = float32(0)
    if r0 + y >= R or o0 + x >= OC:
        return
    for c0 in range(0, C, TILE):
        c = c0 + x
        inp_tile[y, x] = inp[r0 + y, c] if c < C else float32(0)
        weight_tile[y, x] = weight[o0 + y, c] if o0 + y < OC and c < C else float32(0)
        cuda.syncthreads()
        for k in range(TILE):
            total += inp_tile[y, k] * weight_tile[x, k]
        cuda.syncthreads()
    out[r0 + y, o0 + x] = total


@cuda.jit
def no_zeros(out, inp, weight):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    r0, o0 = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
    R, C = inp.shape
    OC = weight.shape[0]
    inp_tile = cuda.shared.array((TILE, PITCH), float32)
    weight_tile = cuda.shared.array((TILE, PITCH), float32)
    total = float32(0)
    for c0 in range(0, C, TILE):
        c = c0 + x
        if r0 + y < R and c < C:
            inp_tile[y, x] = inp[r0 + y, c]
        if o0 + y < OC and c < C:
            weight_tile[y, x] = weight[o0 + y, c]
        cuda.syncthreads()
        for k in range(TILE):
            total += inp_tile[y, k] * weight_tile[x, k]
        cuda.syncthreads()
    if r0 + y < R and o0 + x < OC:
        out[r0 + y, o0 + x] = total


WRONG = (
    (no_first_barrier, ["R=1, C=1, OC=1: a race", "inp_tile[0, 0]", "no barrier"]),
    (no_second_barrier, ["R=3, C=97, OC=1: a race", "no barrier (cuda.syncthreads) separates the two"]),
    (reads_beyond_the_edge, ["R=1, C=1, OC=1: thread 1 of block 0 reads inp[0, 1], which is out of bounds"]),
    (whole_tiles_only, ["R=1, C=1, OC=1: out[0, 0] is 0, but should be"]),
    (wrong_row_of_weight, ["R=3, C=97, OC=1: out[1, 0] is"]),
    (only_the_last_step, ["R=3, C=97, OC=1: out[0, 0] is", "all elements of out are wrong"]),
    (threads_exit_early, ["waits at syncthreads", "of its block has ended", "every barrier"]),
    (no_zeros, ["in shared memory before any thread of its block has written it"]),
)
