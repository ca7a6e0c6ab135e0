"""# Exercise: count the parameters of a GPT-2

Each row of `sizes` (n, 4) is a model: context length maxT, vocabulary size V, layers L and channels C. Write the number
of its parameters to `total` (n,). The tensors are:

- `wte` Vp x C, where Vp is V rounded up to a multiple of 128, and `wpe` maxT x C;
- in every layer: two LayerNorms, each with a weight and a bias of C elements; and four matrices, `qkvw` 3C x C,
  `attprojw` C x C, `fcw` 4C x C and `fcprojw` C x 4C, each with a bias whose length is the matrix's first dimension;
- at the end one more LayerNorm. The output layer reuses `wte` and adds nothing.

This is plain Python. Do not count the padding between tensors in the arena.
"""

import math

import numpy as np

from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem
from llm_numba.models.gpt2 import GPT2


def count_parameters(total, sizes):
    for i in range(sizes.shape[0]):
        maxT, V, L, C = sizes[i, 0], sizes[i, 1], sizes[i, 2], sizes[i, 3]
        raise NotImplementedError  # replace this line with your code


def expected(total, sizes):
    for i, (maxT, V, L, C) in enumerate(sizes.tolist()):
        parameters = GPT2(maxT, V, L, 1, C).parameters()
        total[i] = sum(math.prod(spec.shape) * (L if spec.per_layer else 1) for spec in parameters)


def inputs(rng, n, V):
    sizes = np.stack([rng.integers(1, 33, n), rng.integers(V, V + 40, n), rng.integers(1, 5, n), rng.integers(1, 9, n)])
    return dict(total=np.full(n, -1), sizes=np.ascontiguousarray(sizes.T))


EXERCISE = Exercise(
    "count_parameters",
    Problem(
        expected,
        inputs,
        ("total",),
        (dict(n=1, V=1), dict(n=3, V=97), dict(n=97, V=257)),
        tolerance=0,
    ),
    example=dict(n=2, V=257),
)
