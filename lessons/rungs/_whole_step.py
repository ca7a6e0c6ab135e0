"""The measurements of lesson 09: a whole training step, op by op, on the CPU or on a GPU.

On a GPU this file runs as a separate program, because a lesson's process runs kernels in the simulator:
NUMBA_ENABLE_CUDASIM=0 python lessons/rungs/_whole_step.py cuda d12 4 1024 bf16
"""

import json
import math
import sys
import time
from functools import partial
from statistics import median
from typing import NamedTuple

import numpy as np

from llm_numba.arena import DTYPES, Arena
from llm_numba.bench.breakdown import PATTERNS, work
from llm_numba.bench.measuring import measure, wall_time
from llm_numba.bench.races import new_steps, step_groups
from llm_numba.models import preset
from llm_numba.ops import get_ops
from llm_numba.training.memory_plan import complete, training_groups
from llm_numba.training.override import parameters_of
from llm_numba.training.settings import Settings
from llm_numba.training.step import training_step


class Call(NamedTuple):
    """One call of an op in a step; start: seconds since the start of the step."""

    op: str
    start: float
    seconds: float
    flops: int
    nbytes: int


def watched(ops, calls, timed):
    """The same ops, each appending a Call to `calls`. timed: timed(run) -> seconds."""

    def watch(name, op):
        names = parameters_of(op)

        def call(*given):
            by_name = dict(zip(names, given, strict=False))
            start = time.perf_counter()
            seconds = timed(partial(op, *given))
            calls.append(Call(name, start, seconds, *work(name, by_name)[1:]))

        return call

    return ops.wrap(watch).replace(capture=lambda run: run)


def measure_step(device, name, B, T, dtype="fp32", seconds=2.0):
    """Measure a step of a preset: its seconds, on a GPU with and without a graph; the calls of the fastest of several
    steps; its FLOPs."""
    ops, model = get_ops(device, dtype), preset(name)
    if device == "cpu":
        ops.set_threads(0)
    whole = new_steps(ops, model, B, T, dtype, device == "cuda")
    found = {}
    for column, step in whole.items():
        for _ in range(2):  # compile, then capture
            step()
        found[column] = median(measure(step, seconds))
    del whole
    calls = []
    # on a GPU, GPU time with a cold L2 cache
    step = new_steps(watched(ops, calls, ops.timed if device == "cuda" else wall_time), model, B, T, dtype)["ours"]
    tries = []
    for _ in range(2 if device == "cuda" else 6):
        calls.clear()
        begin = time.perf_counter()
        step()
        tries.append([call._replace(start=call.start - begin) for call in calls])
    fastest = min(tries[1:], key=lambda one: sum(call.seconds for call in one))  # the first is a warm-up
    return {
        "device": device,
        "sizes": f"{name}, {B} x {T} tokens, {dtype}",
        "seconds": found,
        "calls": fastest,
        "flops": model.flops_per_token(T) * B * T,
    }


def dry_run(name, B, T):
    """The calls of a step of a preset, without times: nothing is computed or allocated."""
    ops, model, calls = get_ops("cpu"), preset(name), []

    def step(_, arena):  # `complete` passes an arena without memory
        training_step(watched(ops, calls, lambda run: 0.0), model, arena.training(), Settings())

    complete(training_groups(model, B, T), model, ops, "float32", step)
    return calls


def kernels_of(model, B, T):
    """(name, blocks, threads) of each kernel that a step launches on a GPU, in order; none of them runs."""
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
    from numba.cuda.simulator.kernel import FakeCUDAKernel

    found, call = [], FakeCUDAKernel.__call__
    ops = get_ops("cudasim").replace(allocate=lambda nbytes: FakeCUDAArray(np.zeros(nbytes, np.uint8)))
    m = Arena(step_groups(ops, model, B, T, "fp32"), model, "reuse", ops).training()

    def note(kernel, *given):
        found.append((kernel.fn.__name__, math.prod(kernel.grid_dim), math.prod(kernel.block_dim)))

    FakeCUDAKernel.__call__ = note
    try:
        training_step(ops, model, m, Settings())
    finally:
        FakeCUDAKernel.__call__ = call
    return found


def queue(seconds, launch):
    """(start, end) of each kernel, given its seconds and the seconds that Python needs per launch."""
    start, end, free = np.empty(len(seconds)), np.empty(len(seconds)), 0.0
    for i, taken in enumerate(seconds):
        start[i] = max(free, (i + 1) * launch)
        end[i] = free = start[i] + taken
    return start, end


def add_up(calls):
    """op -> (calls, seconds, flops, bytes), slowest op first."""
    found = {}
    for call in calls:
        found.setdefault(call.op, np.zeros(4))
        found[call.op] += (1, call.seconds, call.flops, call.nbytes)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def least_seconds(op, flops, nbytes, peaks):
    """The minimum time on this machine: the longer of computing and moving."""
    return max(flops / peaks["flops"], nbytes / peaks[PATTERNS.get(op, "copy")])


def main():
    """Print the result of `measure_step` and the GPU's limits as JSON."""
    from llm_numba.bench.machine import describe_machine

    device, name, B, T, dtype = sys.argv[1:]
    found = measure_step(device, name, int(B), int(T), dtype)
    ops = get_ops(device, dtype)
    found["peaks"] = {"flops": ops.peak_flops(DTYPES[dtype]), **ops.peak_bandwidth()}
    found["machine"] = describe_machine(device, 0, ops)
    print(json.dumps(found, default=float))


if __name__ == "__main__":
    main()
