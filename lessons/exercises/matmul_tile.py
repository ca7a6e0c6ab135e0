"""# Exercise: a matrix product with tiles in shared memory

`out[r, o]` is the sum over c of `inp[r, c] * weight[o, c]`. `out` has shape (R, OC), `inp` (R, C), `weight` (OC, C).

A block has TILE x TILE threads and owns a tile of `out`: the rows from `r0` and the columns from `o0`. Thread (y, x)
owns the element in row `r0 + y` and column `o0 + x`. The block walks along c in steps of TILE:

1. Thread (y, x) copies one element of `inp` to `inp_tile[y, x]` and one of `weight` to `weight_tile[y, x]`, such that
   threads with consecutive x read consecutive elements. Fill the parts of a tile outside the matrix with zeros.
2. When all threads have done so, each thread adds TILE products to its sum, reading only shared memory.
3. When all threads have done *that*, the tiles may be overwritten.

At the end each thread writes its element, if it is inside `out`. R, C and OC may be any size, also less than TILE.
"""

from numba import cuda

from llm_numba.cuda.jit import blocks_for, float32
from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage, normal

TILE = 8
PITCH = TILE + 1  # one element of padding per row, so that the elements of a column lie in different banks


@cuda.jit
def matmul_tile(out, inp, weight):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    r0, o0 = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
    R, C = inp.shape
    OC = weight.shape[0]
    inp_tile = cuda.shared.array((TILE, PITCH), float32)
    weight_tile = cuda.shared.array((TILE, PITCH), float32)
    total = float32(0)
    raise NotImplementedError  # replace this line with your code


def expected(out, inp, weight):
    out[...] = inp @ weight.T


def launch(kernel, out, inp, weight):
    R, OC = out.shape
    kernel[(blocks_for(OC, TILE), blocks_for(R, TILE)), (TILE, TILE)](out, inp, weight)


EXERCISE = Exercise(
    "matmul_tile",
    Problem(
        expected,
        lambda rng, R, C, OC: dict(out=garbage(R, OC), inp=normal(rng, R, C), weight=normal(rng, OC, C)),
        ("out",),
        (
            dict(R=1, C=1, OC=1),
            dict(R=3, C=97, OC=1),
            dict(R=1, C=1, OC=257),
            dict(R=9, C=16, OC=10),
        ),
        device="cuda",
    ),
    example=dict(R=8, C=16, OC=8),
    launch=launch,
    array="weight",
)
