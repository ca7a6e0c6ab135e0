"""Break a training step down by op: how long every call takes inside the step, and how much work it does.

On a GPU the calls are timed inside the step's CUDA graph, with an event after each, so every op finds the caches as the
previous one left them and no launch is waited for. Recording an event takes the GPU about a microsecond.
"""

import math
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import numpy as np

from llm_numba.models.gpt2 import GPT2
from llm_numba.ops import CONTRACT, WRITES, Ops
from llm_numba.training.override import parameters_of
from llm_numba.training.settings import Settings
from llm_numba.training.step import training_step

OPS = WRITES.keys() - {"to_device"}
NOT_MOVED = {"scratch", "accumulate"}  # of every call
UPDATED = {  # arguments that an op reads and writes
    "layernorm_backward": ("dinp",),
    "fused_classifier": ("logits",),
    "adamw_update": ("params", "master", "m", "v"),
}
ROWS_ONLY = {"encoder_forward": ("wte",), "encoder_backward": ("dwte",)}  # of which it moves as many rows as tokens


def break_down(ops: Ops, model: GPT2, m, device: str, runs: int) -> list[dict]:
    """A record for each op of a training step on m, in the order of the step: name, shape, calls, seconds (of all its
    calls together, the median of `runs` steps), flops and bytes."""
    mark, seconds = timeline(device)
    calls: list[tuple] = []

    def marked(name, op):
        parameters = parameters_of(op)

        def call(*arguments):
            op(*arguments)
            calls.append((name, *work(name, dict(zip(parameters, arguments, strict=True)))))
            mark(len(calls))

        return call

    def program():
        calls.clear()
        mark(0)
        training_step(ops.wrap(marked, OPS), model, m, Settings())

    step = ops.capture(program)
    for _ in range(2):  # compile, then capture
        step()
    taken = []
    for _ in range(runs):
        step()
        taken.append(seconds())
    found: dict[tuple, dict] = {}
    for (name, shape, flops, nbytes), times in zip(calls, zip(*taken, strict=True), strict=True):
        row = found.setdefault(
            (name, shape), {"name": name, "shape": shape, "calls": 0, "seconds": 0.0, "flops": 0, "bytes": 0}
        )
        row["calls"] += 1
        row["seconds"] += median(times)
        row["flops"] += flops
        row["bytes"] += nbytes
    return list(found.values())


def timeline(device: str) -> tuple[Callable[[int], None], Callable[[], list[float]]]:
    """(mark, seconds): mark(i), for i = 0, 1, ..., marks the end of the work so far; seconds() returns the seconds from
    each mark to the next, in the last run."""
    if device == "cuda":
        from llm_numba.cuda import peak

        return peak.timeline()
    times: dict[int, float] = {}

    def mark(i):
        times[i] = time.perf_counter()

    return mark, lambda: [second - first for first, second in pairwise(times.values())]


def work(op: str, given: dict) -> tuple[str, int, int]:
    """(shape, flops, bytes) of a call, from its arguments by name; flops are 0 for an op that memory limits."""
    if op in CONTRACT["matmul"]:
        (OC, C), R = given["weight"].shape, math.prod(given["inp"].shape[:-1])
        return f"R={R} C={C} OC={OC}", (4 if "backward" in op else 2) * R * C * OC, 0
    if op in CONTRACT["attention"]:
        B, T, C = given["out"].shape
        return f"B={B} T={T} C={C}", (4 if "backward" in op else 2) * B * T * T * C, 0
    tensors = {name: x for name, x in given.items() if hasattr(x, "dtype") and np.ndim(x) and name not in NOT_MOVED}
    sizes = {name: x.size * x.dtype.itemsize for name, x in tensors.items()}
    for name in ROWS_ONLY.get(op, ()):
        sizes[name] = given["tokens"].size * given[name].shape[1] * given[name].dtype.itemsize
    for name in UPDATED.get(op, ()):
        sizes[name] = 2 * sizes.get(name, 0)
    return "", 0, sum(sizes.values())
