"""The solution, and wrong answers with the phrases that `check` must print for each."""

from numba import cuda

THREADS = 32


@cuda.jit
def solution(flat, offsets, scales):
    tensor, thread = cuda.blockIdx.x, cuda.threadIdx.x
    for i in range(offsets[tensor] + thread, offsets[tensor + 1], THREADS):
        flat[i] *= scales[tensor]


@cuda.jit
def one_element_each(flat, offsets, scales):
    tensor, thread = cuda.blockIdx.x, cuda.threadIdx.x
    if offsets[tensor] + thread < offsets[tensor + 1]:
        flat[offsets[tensor] + thread] *= scales[tensor]


@cuda.jit
def from_the_start_of_all(flat, offsets, scales):
    tensor, thread = cuda.blockIdx.x, cuda.threadIdx.x
    for i in range(thread, offsets[tensor + 1], THREADS):
        flat[i] *= scales[tensor]


@cuda.jit
def one_too_many(flat, offsets, scales):
    tensor, thread = cuda.blockIdx.x, cuda.threadIdx.x
    for i in range(offsets[tensor] + thread, offsets[tensor + 1] + 1, THREADS):
        flat[i] *= scales[tensor]


@cuda.jit
def every_thread_does_all(flat, offsets, scales):
    tensor = cuda.blockIdx.x
    for i in range(offsets[tensor], offsets[tensor + 1]):
        flat[i] *= scales[tensor]


@cuda.jit
def stride_of_the_grid(flat, offsets, scales):
    tensor, thread = cuda.blockIdx.x, cuda.threadIdx.x
    for i in range(offsets[tensor] + thread, offsets[tensor + 1], THREADS * cuda.gridDim.x):
        flat[i] *= scales[tensor]


@cuda.jit
def scale_of_the_thread(flat, offsets, scales):
    tensor, thread = cuda.blockIdx.x, cuda.threadIdx.x
    for i in range(offsets[tensor] + thread, offsets[tensor + 1], THREADS):
        flat[i] *= scales[thread]


@cuda.jit
def the_first_tensors_scale(flat, offsets, scales):
    tensor, thread = cuda.blockIdx.x, cuda.threadIdx.x
    for i in range(offsets[tensor] + thread, offsets[tensor + 1], THREADS):
        flat[i] *= scales[0]


@cuda.jit
def one_too_few(flat, offsets, scales):
    tensor, thread = cuda.blockIdx.x, cuda.threadIdx.x
    for i in range(offsets[tensor] + thread, offsets[tensor + 1] - 1, THREADS):
        flat[i] *= scales[tensor]


WRONG = (
    (one_element_each, ["N=3, n=97: flat[32] is", "elements are wrong"]),
    (from_the_start_of_all, ["a race", "block", "flat["]),
    (one_too_many, ["flat[1], which is out of bounds", "flat has shape (1,)"]),
    (every_thread_does_all, ["a race: thread 0 of block 0 writes flat[0]", "thread 1 of block 0 reads it"]),
    (stride_of_the_grid, ["N=3, n=97: flat[32] is"]),
    (scale_of_the_thread, ["scales[3], which is out of bounds", "scales has shape (3,)"]),
    (the_first_tensors_scale, ["N=3, n=97: flat[97] is"]),
    (one_too_few, ["N=1, n=1: flat[0] is", "it is the only element of flat"]),
)
