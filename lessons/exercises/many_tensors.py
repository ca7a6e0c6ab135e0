"""# Exercise: many small tensors in one launch

`flat` holds N tensors one after the other: tensor i is `flat[offsets[i] : offsets[i + 1]]`. Multiply every element of
tensor i by `scales[i]`, in place.

N launches, one per tensor, would cost more than the work itself. Instead there is one launch of N blocks, and block i
owns tensor i. Its threads take every THREADS-th element: thread 3 takes elements 3, 3 + THREADS, and so on, counted
from the start of the tensor. A tensor may have more or fewer elements than the block has threads.
"""

import numpy as np
from numba import cuda

from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, normal

THREADS = 32


@cuda.jit
def scale_all(flat, offsets, scales):
    tensor, thread = cuda.blockIdx.x, cuda.threadIdx.x
    raise NotImplementedError  # replace this line with your code


def expected(flat, offsets, scales):
    for i, scale in enumerate(scales):
        flat[offsets[i] : offsets[i + 1]] *= scale


def inputs(rng, N, n):
    lengths = rng.integers(1, n + 1, N)
    lengths[0] = n
    offsets = np.append(0, np.cumsum(lengths))
    return dict(flat=normal(rng, int(offsets[-1])), offsets=offsets, scales=2 + rng.random(N, np.float32))


EXERCISE = Exercise(
    "scale_all",
    Problem(
        expected,
        inputs,
        ("flat",),
        (dict(N=1, n=1), dict(N=3, n=97), dict(N=2, n=257), dict(N=5, n=3)),
        device="cuda",
    ),
    example=dict(N=3, n=40),
    launch=lambda kernel, flat, offsets, scales: kernel[scales.size, THREADS](flat, offsets, scales),
    array="flat",
)
