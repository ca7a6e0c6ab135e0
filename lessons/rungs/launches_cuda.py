"""The rungs of lesson 09 on a GPU: N tensors copied in N launches, in N launches of a graph, and in one."""

from numba import cuda

from llm_numba.cuda.jit import THREADS, blocks_for, stream
from llm_numba.cuda.memory import capture, copy
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal


@cuda.jit
def copy_tensor(out, inp):
    """A thread owns an element."""
    i = cuda.grid(1)
    if i < out.shape[0]:
        out[i] = inp[i]


def launch_copy(out, inp):
    copy_tensor[blocks_for(out.size, THREADS), THREADS, stream()](out, inp)


def copy_v1(out, inp):
    """One launch per tensor; Python slices it out of both arrays each time."""
    for i in range(out.shape[0]):
        launch_copy(out[i], inp[i])


kept = {}  # the last arrays, their tensors, and the captured graph


def prepare(out, inp):
    """Update `kept` for these two arrays."""
    if kept.get("out") is not out or kept.get("inp") is not inp:
        pairs = [(out[i], inp[i]) for i in range(out.shape[0])]
        kept.update(out=out, inp=inp, pairs=pairs, replay=capture(launch_all))


def launch_all():
    for y, x in kept["pairs"]:
        launch_copy(y, x)


def copy_v2(out, inp):
    """The same launches, but the views are created once: the arena never moves, so they stay valid."""
    prepare(out, inp)
    launch_all()


def copy_v3(out, inp):
    """The same launches, captured as a graph and replayed by one call."""
    prepare(out, inp)
    kept["replay"]()


def exactly(out, inp):
    out[...] = inp


def inputs(rng, N, n):
    return dict(out=garbage(N, n), inp=normal(rng, N, n))


LAUNCHES = Ladder(
    "copy in launches",
    Problem(
        exactly, inputs, ("out",), (dict(N=1, n=1), dict(N=3, n=97), dict(N=97, n=3), dict(N=2, n=257)), device="cuda"
    ),
    (copy_v1, copy_v2, copy_v3, copy),
    timed=dict(N=192, n=4096),
    quick=dict(N=3, n=97),
    counted=dict(N=3, n=97),
    nbytes=lambda N, n: 2 * 4 * N * n,
)
