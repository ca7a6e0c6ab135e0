"""# Exercise: many small tensors in one launch

`flat` holds N tensors one behind the other: tensor i stands in `flat[offsets[i]]` up to, and without,
`flat[offsets[i + 1]]`. Multiply all numbers of tensor i by `scales[i]`, in place.

N launches, one a tensor, would cost more than the work. So there is one launch of N blocks: block i owns tensor i. Its
THREADS threads take the tensor's numbers in turn: thread 3 the one at 3, the one at 3 + THREADS, and so on, counted
from the tensor's beginning. A tensor may be longer than a block has threads, or shorter.
"""

import numpy as np
from numba import cuda

from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, normal

THREADS = 32


@cuda.jit
def scale_all(flat, offsets, scales):
    tensor, thread = cuda.blockIdx.x, cuda.threadIdx.x
    raise NotImplementedError  # your code in the place of this line


def oracle(flat, offsets, scales):
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
        oracle,
        inputs,
        ("flat",),
        (dict(N=1, n=1), dict(N=3, n=97), dict(N=2, n=257), dict(N=5, n=3)),
        device="cuda",
    ),
    example=dict(N=3, n=40),
    launch=lambda kernel, flat, offsets, scales: kernel[scales.size, THREADS](flat, offsets, scales),
    array="flat",
)
