"""# Exercise: when does each kernel run?

Python launches kernels one after the other. Each launch takes `launch` seconds, in which Python does nothing else:
kernel 0 has been launched at time `launch`, kernel 1 at `2 * launch`, and so on. Python does not wait for a kernel to
run.

The GPU runs the kernels in that order, one at a time. Kernel i takes `seconds[i]`. It starts as soon as it has been
launched *and* the kernel before it has ended.

Write each kernel's start time to `start` (n,) and its end time to `end` (n,). This is plain Python.
"""

from llm_numba.lessons.exercise import Exercise
from llm_numba.lessons.problem import Problem, garbage


def queue(start, end, seconds, launch):
    raise NotImplementedError  # replace this line with your code


def expected(start, end, seconds, launch):
    free = 0.0
    for i, taken in enumerate(seconds):
        start[i] = max(free, (i + 1) * launch)
        end[i] = free = start[i] + taken


def inputs(rng, n):
    seconds = rng.exponential(1.0, n).astype("float32")
    seconds[::2] *= 0.25  # sometimes the GPU waits for Python, sometimes the other way round
    return dict(start=garbage(n), end=garbage(n), seconds=seconds, launch=0.75)


EXERCISE = Exercise(
    "queue",
    Problem(expected, inputs, ("start", "end"), (dict(n=1), dict(n=3), dict(n=97), dict(n=257))),
    example=dict(n=6),
)
