"""Break a training step down by op: how long every call takes inside the step, and how much work it does.

On a GPU the calls are timed inside the step's CUDA graph, with an event after each, so every op finds the caches as the
previous one left them and no launch is waited for. Recording an event takes the GPU about a microsecond.
"""

import math
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

from llm_numba.models.gpt2 import GPT2
from llm_numba.ops import CONTRACT, WRITES, Ops
from llm_numba.training.override import parameters_of
from llm_numba.training.settings import Settings
from llm_numba.training.step import training_step

OPS = WRITES.keys() - {"to_device"}
# arguments that an op reads and writes; their bytes count twice
UPDATED = {
    "encoder_backward": ("dwte", "dwpe"),
    "layernorm_backward": ("dinp",),
    "fused_classifier": ("logits",),
    "adamw_update": ("params", "master", "m", "v"),
}
TABLES = {"wte", "dwte", "wpe", "dwpe"}  # of which the encoder moves at most as many rows as there are tokens
# the closest access pattern of `peak_bandwidth`; "copy" for all other ops
PATTERNS = {
    "global_norm_squared": "read",
    "gelu_backward": "add",
    "residual_layernorm_forward": "add",
    "layernorm_backward": "update",
    "fused_classifier": "update",
    "encoder_backward": "update",
    "adamw_update": "update",
}


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
    for _ in range(2 if device == "cuda" else 0):  # compile, then capture
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
    """(shape, FLOPs, bytes) of a call, from its arguments by name. FLOPs of products and attention, of which memory is
    not the limit; for all ops the fewest bytes, each input read once and each output written once."""
    arrays = {name: x for name, x in given.items() if getattr(x, "shape", ()) and name != "scratch"}
    sizes = {name: x.size * x.dtype.itemsize * (2 if name in UPDATED.get(op, ()) else 1) for name, x in arrays.items()}
    if op in CONTRACT["encoder"]:
        for name in sizes.keys() & TABLES:
            rows = given[name].shape[0]
            sizes[name] = sizes[name] // rows * min(rows, given["tokens"].size)
    nbytes = 0 if op == "residual_backward" and given["dinp"] is given["dout"] else sum(sizes.values())
    times = 4 if "backward" in op else 2
    if op in CONTRACT["matmul"]:
        (OC, C), R = given["weight"].shape, math.prod(given["inp"].shape[:-1])
        return f"R={R} C={C} OC={OC}", times * R * C * OC, nbytes
    if op in ("attention_forward", "attention_backward"):
        B, T, C = given["out"].shape  # causal: half of T x T
        return f"B={B} T={T} C={C}", times * B * T * T * C, nbytes
    return "", 0, nbytes
