"""The rungs of lesson 09 on a CPU: the same copy in many calls and in one."""

from numba import njit

from llm_numba.cpu.residual import residual_backward
from llm_numba.lessons.ladder import Ladder
from llm_numba.lessons.problem import Problem, garbage, normal


@njit
def copy_row(dx, dy):
    for c in range(dy.shape[0]):
        dx[c] = dy[c]


def residual_backward_v1(dinp, dout):
    """One compiled call per row; Python slices both rows out of their tensors each time."""
    B, T, _ = dout.shape
    for b in range(B):
        for t in range(T):
            copy_row(dinp[b, t], dout[b, t])


kept = {}  # the last tensors, and their rows


def rows_of(dinp, dout):
    """Pairs of rows, sliced once for these two tensors."""
    if kept.get("dinp") is not dinp or kept.get("dout") is not dout:
        B, T, _ = dout.shape
        kept.update(dinp=dinp, dout=dout, rows=[(dinp[b, t], dout[b, t]) for b in range(B) for t in range(T)])
    return kept["rows"]


def residual_backward_v2(dinp, dout):
    """The same calls, but the views are created once: the arena never moves, so they stay valid."""
    for dx, dy in rows_of(dinp, dout):
        copy_row(dx, dy)


@njit
def residual_backward_v3(dinp, dout):
    """One call: the loop over the rows is compiled too."""
    B, T, C = dout.shape
    for b in range(B):
        for t in range(T):
            for c in range(C):
                dinp[b, t, c] = dout[b, t, c]


def exactly(dinp, dout):
    dinp[...] = dout


def inputs(rng, B, T, C):
    return dict(dinp=garbage(B, T, C), dout=normal(rng, B, T, C))


CALLS = Ladder(
    "residual_backward in calls",
    Problem(
        exactly,
        inputs,
        ("dinp",),
        (dict(B=1, T=1, C=1), dict(B=3, T=1, C=97), dict(B=1, T=257, C=3), dict(B=3, T=97, C=257)),
    ),
    (residual_backward_v1, residual_backward_v2, residual_backward_v3, residual_backward),
    timed=dict(B=64, T=1024, C=192),
    quick=dict(B=2, T=16, C=32),
    nbytes=lambda B, T, C: 2 * 4 * B * T * C,
)
