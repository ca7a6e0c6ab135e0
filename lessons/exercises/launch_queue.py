"""# Exercise: when does each kernel run?

Python asks for kernels one after the other. Asking takes `launch` seconds each time, during which nothing else happens
in Python: kernel 0 has been asked for at the time `launch`, kernel 1 at `2 launch`, and so on. Python does not wait for
a kernel to run.

The card runs them in that order, one at a time. Kernel i takes `seconds[i]`. It starts as soon as it has been asked for
*and* the kernel before it has ended.

Write into `start` (n,) when each kernel starts, and into `end` (n,) when it ends. It is plain Python.
"""

from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage


def queue(start, end, seconds, launch):
    raise NotImplementedError  # your code in the place of this line


def oracle(start, end, seconds, launch):
    free = 0.0
    for i, taken in enumerate(seconds):
        start[i] = max(free, (i + 1) * launch)
        end[i] = free = start[i] + taken


def inputs(rng, n):
    seconds = rng.exponential(1.0, n).astype("float32")
    seconds[::2] *= 0.25  # now one waits for the other, now the other for the one
    return dict(start=garbage(n), end=garbage(n), seconds=seconds, launch=0.75)


EXERCISE = Exercise(
    "queue",
    Problem(oracle, inputs, ("start", "end"), (dict(n=1), dict(n=3), dict(n=97), dict(n=257))),
    example=dict(n=6),
)
