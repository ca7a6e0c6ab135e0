# %% [markdown]
# # The whole step: from hundreds of launches to one graph
#
# **Goal.** Combine the layers of the previous lessons into one training step, measure where its time goes on your
# machine, and understand why a whole step is best submitted to a GPU at once.
#
# **Why it matters.** A step consists of hundreds of small pieces. Each of them can be as fast as the machine allows,
# and the step can still be slow because it waits for Python to start the next piece. And to make a step faster, you
# must know which piece to work on: the one that takes the longest is seldom the one that looks the most complicated.
#
# **Prerequisites.** Lesson 00, and the names of the layers from the lessons in between.

# %%
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from statistics import median

import numpy as np
from numba import get_num_threads

from llm_numba import oracle
from llm_numba.arena import Arena
from llm_numba.bench.measuring import measure
from llm_numba.bench.races import new_steps, sizes_of, step_groups
from llm_numba.bench.tables import table
from llm_numba.bench.worker import WorkerFailed, torch_worker
from llm_numba.cuda.gpu import available, gpus
from llm_numba.lessons import FAST, exercise, ladder, pictures, sized, timing
from llm_numba.models import preset
from llm_numba.models.gpt2 import GPT2
from llm_numba.ops import get_ops
from llm_numba.training.loss_plot import COLOURS
from llm_numba.training.step import gradients, initialise, training_step
from rungs import _whole_step as whole_step
from rungs import calls_cpu, launches_cuda

ops = get_ops("cpu")

# %% [markdown]
# ## A step is a list of calls
#
# This is GPT-2's forward pass as the program runs it. You can read it from top to bottom, and nothing in it depends on
# the device: `ops` are the functions of one device, and `m` contains the arena's tensors by name (lesson 00).

# %%
pictures.source(GPT2.forward)

# %% [markdown]
# The loss, the backward pass and the update are written in the same way. `training_step` contains all of it, and a run
# calls it in every step: first the gradients of all micro-batches (parts of a batch that run one after the other if the
# whole batch does not fit in memory), then the optimiser.

# %%
pictures.source(training_step, gradients, GPT2.update)

# %% [markdown]
# How many calls is that, and how much work? Work is measured in *FLOPs* (floating-point multiplications and additions)
# and in bytes. We count both without computing anything: each op is replaced by one that only records its arguments,
# and the arena by one that allocates no memory. The shapes determine the minimum that each call must *compute* and
# *move*. A matmul of $R$ rows with a weight of shape $OC \times C$ takes
#
# $$ 2 \, R \, C \, OC \text{ FLOPs: a multiplication and an addition for each of } R \cdot C \cdot OC \text{ pairs,} $$
#
# and its backward takes twice as many. Every op must read each of its inputs and write each of its outputs at least
# once.

# %%
B, T = 4, 1024
calls = whole_step.dry_run("d12", B, T)
sums = whole_step.add_up(calls)
flops, nbytes = (sum(entry[i] for entry in sums.values()) for i in (2, 3))
by_work = sorted(sums.items(), key=lambda item: -item[1][2] - item[1][3])
lines = [[op, f"{n:.0f}", f"{f / flops:.1%}", f"{b / nbytes:.1%}"] for op, (n, _, f, b) in by_work]
print(f"d12, {B} x {T} tokens: {len(calls)} calls, {flops / 1e12:.3g} TFLOP, {nbytes / 1e9:.3g} GB at least")
print("\n".join(table(["op", "calls", "share of FLOPs", "share of bytes"], lines)))

counts = {preset(name).num_layers: len(whole_step.dry_run(name, B, T)) for name in ("d12", "d24", "d48")}
(L1, n1), (L2, n2), *_ = counts.items()
each = (n2 - n1) // (L2 - L1)
print(f"calls = {n1 - each * L1} + {each} L, for L layers: {counts}")
assert all(n1 - each * L1 + each * L == n for L, n in counts.items())

formula = preset("d12").flops_per_token(T) * B * T
print(f"the formula behind the log's share of peak: {formula / 1e12:.6g} TFLOP; counted: {flops / 1e12:.6g}")
assert formula == flops

# %% [markdown]
# Nearly all of the computation is in the ops with `matmul` in their names, while more than half of the bytes are
# elsewhere. So a step consists of a few compute-bound ops and many memory-bound ones; the previous lessons treated the
# two kinds differently. (`residual_backward` moves nothing at all here: under the memory plan `reuse` its two tensors
# share the same memory. `zero`, `copy`, `clip` and `add_mean` are small helpers.)
#
# Is the whole correct? The next cell compares the gradients of one step, computed by the compiled ops in float32, with
# those of the same step in NumPy in float64, from the same weights and batch. The model's code is the same; only `ops`
# and the arena's dtype differ.


# %%
def gradients_by(ops, groups):
    """(gradients, loss) of one step of `small`, always from the same weights and batch."""
    arena = Arena(groups, small, "reuse", ops)
    m = arena.training()
    initialise(ops, arena, seed=1)
    tokens = np.random.default_rng(1).integers(0, small.vocab_size, (3, 17 + 1))
    m.batches[...] = np.stack([tokens[:, :-1], tokens[:, 1:]])
    gradients(ops, small, m)
    return arena.named("gradients"), float(m.loss[0])


small = preset("nano")
groups = step_groups(ops, small, 3, 17, "fp32")
got, loss = gradients_by(ops, groups)
right, right_loss = gradients_by(oracle, oracle.in_float64(groups))
errors = {name: np.abs(got[name] - right[name]).max() / np.abs(right[name]).max() for name in right}
worst = max(errors, key=errors.get)
print(f"loss {loss:.7f}, in float64 {right_loss:.7f}")
print(f"{len(errors)} gradients; the largest relative error is {errors[worst]:.1e}, in {worst}")
assert errors[worst] < 1e-4 and abs(loss - right_loss) < 1e-5

# %% [markdown]
# ## What a call costs before it does anything
#
# Calling a compiled function from Python is not free: Python looks up names, and Numba inspects the types of all
# arguments to select the machine code. If the function runs in parallel (`prange`), the other cores must be woken up
# too. The next cell measures both on tensors with a single element, where there is nothing else to do, and extrapolates
# to all calls of a step.

# %%
one, two = np.zeros((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32)


def seconds_a_call(function, *arguments):
    """The minimum of several measurements, because other programs can only slow a call down."""
    function(*arguments)
    times = []
    for _ in range(sized(500, 20)):
        start = time.perf_counter()
        for _ in range(5):
            function(*arguments)
        times.append((time.perf_counter() - start) / 5)
    return min(times)


plain = seconds_a_call(calls_cpu.copy_row, one[0, 0], two[0, 0])
parallel = seconds_a_call(ops.residual_backward, one, two)
print(f"a call: {1e6 * plain:.2f} microseconds; one that wakes the other cores: {1e6 * parallel:.2f}")
for name in ("nano", "tiny", "d12"):
    n = len(whole_step.dry_run(name, 4, 32))
    print(
        f"{name}: {n} calls per step take {1e3 * n * plain:.2f} ms, or {1e3 * n * parallel:.2f} ms if all are parallel"
    )

# %% [markdown]
# The ladder shows the same in one op. `residual_backward` copies a gradient, $B\,T$ rows of $C$ elements (the sum of
# lesson 06 passes it on unchanged). **v1** makes one compiled call per row, and Python slices both rows out of their
# tensors each time. **v2** makes the same calls, but slices the rows once and keeps them; the arena's `m.layers` does
# the same. **v3** is one call, with the loop over the rows compiled too. The last is **the model's own**, on all cores.

# %%
pictures.source(calls_cpu.residual_backward_v1, calls_cpu.rows_of, calls_cpu.residual_backward_v2)

# %%
pictures.source(calls_cpu.residual_backward_v3)
ladder.check(calls_cpu.CALLS)
found = timing.show_times(calls_cpu.CALLS)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# All four move the same bytes. The difference between v1 and v3 is Python; the difference between v3 and the last is
# the number of cores. Below you will see how much of a whole step is spent on calls. On a GPU it matters more.
#
# ## On a GPU, launching and running are separate
#
# A GPU runs asynchronously. To *launch* a kernel is to append it to a queue, a *stream*. Python does not wait for it,
# and the GPU executes the kernels of a stream in order. If a launch takes $\tau$ seconds and kernel $i$ runs for $d_i$
# seconds ($i = 0, 1, \dots$), then
#
# $$ \text{start}_i = \max\big( (i + 1)\,\tau,\; \text{end}_{i-1} \big), \qquad \text{end}_i = \text{start}_i + d_i . $$
#
# If kernels take longer than launches, the queue fills up and the GPU never waits: the step takes $\sum d_i$. If they
# are shorter, the GPU waits for Python and the step takes $n\,\tau$, however fast the kernels are. Write that yourself:

# %%
exercise.show("launch_queue")

# %%
exercise.check("launch_queue")


# %% [markdown]
# The picture shows the first kernels of a step of `d12` on a small batch. It needs no GPU: each kernel takes the time
# that its FLOPs and bytes need on a hypothetical GPU with 100 TFLOP/s and 2 TB/s; no kernel takes less than 2
# microseconds, and a launch takes 10. These numbers are assumptions; if you have a GPU, the end of the lesson measures
# them. Each call counts as one kernel.


# %%
FLOPS, BANDWIDTH, LAUNCH, LEAST = 100e12, 2e12, 10e-6, 2e-6  # LEAST: the minimum time of a kernel


def seconds_on_gpu(calls):
    return [max(LEAST, call.flops / FLOPS, call.nbytes / BANDWIDTH) for call in calls]


def kind_of(op):
    kinds = ("matmul", "attention", "layernorm", "gelu")
    return next((kind for kind in kinds if kind in op), "others")


COLOUR = dict(zip(("matmul", "attention", "layernorm", "gelu", "others"), COLOURS, strict=False))


def draw_queues(calls, most=24):
    """Timeline of the first launches and kernels of a step: launched one by one, and as a graph."""
    from matplotlib.patches import Patch

    figure, axes = pictures.new(2, 1, width=9.5, height=3.6, sharex=True)
    seconds = seconds_on_gpu(calls)[:most]
    limit = None
    for axis, launch, title in (
        (axes[0], LAUNCH, "launched one by one"),
        (axes[1], 0.0, "as a graph, with a single launch"),
    ):
        start, end = whole_step.queue(seconds, launch)
        limit = limit or 1e6 * end[-1] * 1.02
        if launch == 0:
            start, end = start + LAUNCH, end + LAUNCH
        for i in range(most):
            if launch or i == 0:
                axis.barh(1, 1e6 * LAUNCH * 0.92, 0.7, left=1e6 * i * LAUNCH, color="0.75")
            axis.barh(0, 1e6 * (end[i] - start[i]), 0.7, left=1e6 * start[i], color=COLOUR[kind_of(calls[i].op)])
        busy = sum(seconds) / end[-1]
        axis.set(yticks=[0, 1], yticklabels=["GPU", "Python"], xlim=(0, limit))
        axis.set_title(f"{title}: {1e6 * end[-1]:.0f} microseconds; the GPU is busy {busy:.0%} of the time")
    axes[1].set_xlabel(f"microseconds; the first {most} of {len(calls)} calls")
    legend = [Patch(color="0.75", label="a launch"), *(Patch(color=c, label=k) for k, c in COLOUR.items())]
    figure.legend(handles=legend, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


pictures.show(draw_queues(whole_step.dry_run("d12", 1, 256)))

# %% [markdown]
# The next picture applies the same GPU model to all batch sizes. In the flat part of the upper curve the GPU waits for
# Python, and a larger batch costs nothing. From a certain size on the two curves coincide: the kernels are long enough
# to hide the launches.


# %%
def draw_hinge(tokens):
    """The time of a step over its number of tokens, launched one by one and as a graph."""
    figure, axis = pictures.new(width=8, height=3.2)
    one_by_one, graph = [], []
    for n in tokens:
        seconds = seconds_on_gpu(whole_step.dry_run("d12", 1, n))
        one_by_one.append(1e3 * whole_step.queue(seconds, LAUNCH)[1][-1])
        graph.append(1e3 * (LAUNCH + sum(seconds)))
    axis.plot(tokens, one_by_one, "o-", color=COLOURS[1], label="launched one by one")
    axis.plot(tokens, graph, "o-", color=COLOURS[0], label="as a graph")
    axis.set(xscale="log", yscale="log", xlabel="tokens per step of d12", ylabel="ms, on the hypothetical GPU")
    axis.set_xticks(tokens, tokens)
    axis.set_yticks([1, 2, 5, 10, 20], [1, 2, 5, 10, 20])
    axis.set_ylim(0.8 * graph[0], 1.3 * one_by_one[-1])
    axis.minorticks_off()
    axis.legend(frameon=False)
    return figure


pictures.show(draw_hinge([16, 32, 64, 128, 256, 512, 1024]))

# %% [markdown]
# ## From calls to kernels
#
# On a GPU an op consists of one or more kernels: a large sum is split into pieces, a block adds up each piece, and a
# second kernel adds the results (lesson 07). Numba's simulator lets us count without a GPU: each launch is recorded,
# and nothing runs. This model has the shape of `tiny` with the 12 layers of `d12`.

# %%
deep = replace(preset("tiny"), num_layers=12) if not FAST else replace(preset("nano"), num_layers=12)
kernels = whole_step.kernels_of(deep, 4, 128) if not FAST else whole_step.kernels_of(deep, 1, 8)
by_name = {}
for name, blocks, _ in kernels:
    by_name.setdefault(name, []).append(blocks)
lines = [
    [name, str(len(blocks)), f"{min(blocks):,}", f"{max(blocks):,}"]
    for name, blocks in sorted(by_name.items(), key=lambda item: -len(item[1]))
]
print(f"{len(kernels)} launches per step")
print("\n".join(table(["kernel", "launches", "fewest blocks", "most blocks"], lines)))

# %% [markdown]
# ## One launch for everything: the graph
#
# A *CUDA graph* is a recording of launches. Between `cuStreamBeginCapture` and `cuStreamEndCapture` the driver runs
# nothing; it records each launch with its arguments. The recording is then *instantiated*, that is, prepared for
# execution, and from then on a single launch replays it. This is how the project captures one:

# %%
pictures.source(get_ops("cudasim").capture)

# %% [markdown]
# A graph records **addresses and values**, and that limits what can be captured:
#
# - Nothing may be allocated, and no array may move. In an arena nothing does.
# - Nothing may wait for the GPU, for example to read the loss.
# - A value that changes from step to step, such as the learning rate, must not be a kernel argument. It must be in GPU
#   memory, where the kernel reads it. That is why the arena has a group `inputs`.
#
# You can see the last rule without a GPU. The next cell contains a recorder of ten lines and an optimiser of one.


# %%
class Recorder:
    """Records calls instead of executing them, like a capture; `replay` executes them."""

    def __init__(self):
        self.calls = []

    def __call__(self, function, *arguments):
        self.calls.append((function, arguments))

    def replay(self):
        for function, arguments in self.calls:
            function(*arguments)


def move(parameter, gradient, learning_rate):
    parameter -= learning_rate * gradient


parameter, gradient = np.zeros(1), np.ones(1)
rate, rate_in_memory = 0.5, np.array([0.5])
wrong, right = Recorder(), Recorder()
wrong(move, parameter, gradient, rate)  # a scalar is recorded by value
right(move, parameter, gradient, rate_in_memory)  # an array is recorded by address
rate = rate_in_memory[0] = 0.1  # the schedule changes it
for name, recorder in (("a scalar", wrong), ("an array", right)):
    parameter[:] = 0
    recorder.replay()
    print(f"the learning rate as {name}: the parameter moves by {-parameter[0]}, expected 0.1")

gradient = np.full(1, 2.0)  # a new array with the old name
parameter[:] = 0
right.replay()
print(f"with a new gradient array: it moves by {-parameter[0]:.1f}, expected 0.2: the recording has the old address")

# %% [markdown]
# The GPU rungs copy $N$ small tensors. **v1** slices out each tensor and launches a kernel for it, **v2** keeps the
# views, **v3** replays the same $N$ launches as a graph, and the last is **the model's own** `copy`: one launch for all
# of them, because they are contiguous. The arena makes that possible too: AdamW is one launch for all parameters
# instead of one per tensor.

# %%
pictures.source(launches_cuda.copy_v1, launches_cuda.prepare, launches_cuda.copy_v2, launches_cuda.copy_v3)

# %%
ladder.check(launches_cuda.LAUNCHES)
for rung in launches_cuda.LAUNCHES.rungs:
    trace = ladder.trace_of(rung, launches_cuda.LAUNCHES)
    print(f"{rung.__name__}: launches for 3 tensors: {len({access.launch for access in trace.accesses})}")
found = timing.show_times(launches_cuda.LAUNCHES)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# What if the tensors are contiguous, but each needs different treatment? One launch is still enough if each block knows
# which tensor it works on. That is the second exercise; PyTorch's fused optimisers do the same.

# %%
exercise.show("many_tensors")

# %%
exercise.check("many_tensors")

# %% [markdown]
# ## Where the time goes
#
# Now measure a whole step on this machine: each op is wrapped by one that reads the clock before and after. The first
# picture shows one step in time, from left to right: forward, backward and update, with one line per op.

# %%
name, B, T = sized(("tiny", 8, 128), ("nano", 1, 8))
step = whole_step.measure_step("cpu", name, B, T, seconds=sized(1.0, 0.01))
calls, took = step["calls"], step["seconds"]["ours"]
print(f"{timing.machine('cpu')}; {step['sizes']}")
print(f"{1e3 * took:.2f} ms per step, {B * T / took:,.0f} tokens per second, {1e-9 * step['flops'] / took:.3g} GFLOP/s")


def draw_step(calls):
    """Timeline of a step, with one line per op."""
    figure, axis = pictures.new(width=9.5, height=4.2)
    names = list(dict.fromkeys(call.op for call in calls))
    for call in calls:
        row = names.index(call.op)
        axis.barh(row, 1e3 * call.seconds, 0.8, left=1e3 * call.start, color=COLOUR[kind_of(call.op)], linewidth=0)
    first = next(call for call in calls if call.op == "fused_classifier")
    last = next(call for call in calls if call.op == "global_norm_squared")
    for at, text in ((first.start, "loss and backward"), (last.start, "update")):
        axis.axvline(1e3 * at, color="0.5", linewidth=0.8, linestyle="--")
        axis.text(1e3 * at, -1.0, f" {text}", fontsize=8, color="0.4", ha="right" if text == "update" else "left")
    axis.text(0, -1.0, " forward", fontsize=8, color="0.4")
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="ms since the start of the step")
    axis.set(ylim=(len(names) - 0.4, -1.6), xlim=(0, None))
    axis.tick_params(axis="y", labelsize=8)
    return figure


pictures.show(draw_step(calls))

# %% [markdown]
# The second picture adds these times up. The bar beside each op shows the minimum that this machine needs for it:
#
# $$ t_{\min} = \max\left( \frac{\text{FLOPs}}{F},\;\frac{\text{bytes}}{W} \right) . $$
#
# $F$ and $W$ are the highest FLOP/s and bandwidth measured on this machine. This is the *roofline* of lesson 02,
# expressed as time: the larger of the two terms limits the op. An op can take less than $t_{\min}$ if its inputs are
# still in the CPU's caches from the previous op. An op far above it, with a long bar, is where optimization may pay
# off.


# %%
def step_table(sums, peaks):
    """The lines of a table: op, calls, ms, share of the step, rate, share of the limit."""
    lines, whole = [], sum(entry[1] for entry in sums.values())
    for op, (n, seconds, flops, nbytes) in sums.items():
        rate = f"{1e-9 * flops / seconds:,.1f} GFLOP/s" if flops else f"{1e-9 * nbytes / seconds:,.1f} GB/s"
        share = ""
        if peaks["flops"]:
            share = f"{whole_step.least_seconds(op, flops, nbytes, peaks) / seconds:.0%}"
        lines.append([op, f"{n:.0f}", f"{1e3 * seconds:.3f}", f"{seconds / whole:.1%}", rate, share])
    return table(["op", "calls", "ms", "of the step", "rate", "of the limit"], lines)


def draw_sums(sums, peaks, title):
    """One bar per op, and the minimum time that the machine needs for it."""
    figure, axis = pictures.new(width=9, height=4.6)
    names = list(sums)
    axis.barh(range(len(names)), [1e3 * sums[n][1] for n in names], 0.75, color=[COLOUR[kind_of(n)] for n in names])
    if peaks["flops"]:
        least = [1e3 * whole_step.least_seconds(n, *sums[n][2:], peaks) for n in names]
        axis.barh(range(len(names)), least, 0.28, color="black", label="minimum on this machine")
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="ms per step", title=title)
    axis.invert_yaxis()
    return figure


sums, peaks = whole_step.add_up(calls), timing.peaks("cpu")
print("\n".join(step_table(sums, peaks)))
inside = sum(call.seconds for call in calls)
print(f"all ops together {1e3 * inside:.2f} ms; the step without instrumentation {1e3 * took:.2f} ms")
print(f"{len(calls)} empty calls would take {1e3 * len(calls) * plain:.2f} ms, {len(calls) * plain / took:.1%}")
if peaks["flops"]:
    least = sum(whole_step.least_seconds(op, *entry[2:], peaks) for op, entry in sums.items())
    print(f"minimum, with every op at its limit: {1e3 * least:.2f} ms, {least / took:.0%} of the measured time")
pictures.show(draw_sums(sums, peaks, f"{step['sizes']}, on the CPU"))

# %% [markdown]
# If there is a GPU, the same is measured there, in another process (this one runs kernels in the simulator): the whole
# step as a graph and launch by launch, and the ops one by one, each with a cold L2 cache.


# %%
def step_on_gpu(name, B, T):
    dtype = "bf16" if gpus()[0].has_bf16 else "fp32"
    run = subprocess.run(
        [sys.executable, whole_step.__file__, "cuda", name, str(B), str(T), dtype],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "0"},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        print("the step cannot be timed on the GPU:", (run.stderr.strip().splitlines() or ["no output"])[-1])
        return None
    return json.loads(run.stdout.splitlines()[-1])


on_gpu = step_on_gpu("d12", 4, 1024) if available() and not FAST else None
if on_gpu:
    on_gpu["calls"] = [whole_step.Call(*call) for call in on_gpu["calls"]]
    sums, peaks = whole_step.add_up(on_gpu["calls"]), on_gpu["peaks"]
    print(f"{on_gpu['machine']}; {on_gpu['sizes']}")
    for column, seconds in on_gpu["seconds"].items():
        print(f"{'as a graph' if column == 'ours' else column}: {1e3 * seconds:.2f} ms per step")
    print("\n".join(step_table(sums, peaks)))
    pictures.show(draw_sums(sums, peaks, f"{on_gpu['sizes']}, on the GPU"))
else:
    print("No GPU found, or LESSONS_FAST is set.")

# %% [markdown]
# ## Compared with PyTorch
#
# PyTorch computes the same values in another way. You write only the forward pass, as operations on its tensors. While
# it runs, PyTorch records each operation and allocates what it needs; afterwards it goes through the record backwards:
# *autograd*. Its matmuls are the vendors' own (MKL on a CPU, cuBLAS on a GPU). If PyTorch is installed, the next cell
# runs the same step there, in a separate process with the same number of threads, in *eager* mode: op by op, as
# written.

# %%
ours, times = new_steps(ops, preset(name), B, T)["ours"], {"llm_numba": [], "PyTorch, eager": []}
if find_spec("torch") and not FAST:
    try:
        with torch_worker() as ask:
            ask("start", threads=get_num_threads())
            ask("prepare_step", config=sizes_of(preset(name)), B=B, T=T)
            ask("first", mode="eager")
            for _ in range(3):  # in turn, so that both see the same load
                times["llm_numba"] += measure(ours, 1.0)
                times["PyTorch, eager"] += ask("measure", mode="eager", seconds=1.0, launches_only=False)
    except WorkerFailed as error:
        print(f"PyTorch is not timed: {error}")
rows = {label: median(seconds) for label, seconds in times.items() if seconds} or {"llm_numba": took}
took = rows["llm_numba"]
lines = []
for label, seconds in rows.items():
    rate = step["flops"] / seconds
    share = f"{rate / timing.peaks('cpu')['flops']:.0%}" if timing.peaks("cpu")["flops"] else ""
    lines.append([label, f"{1e3 * seconds:.2f}", f"{1e-9 * rate:.1f} GFLOP/s", share, f"{took / seconds:.0%}"])
print(step["sizes"])
print("\n".join(table(["", "ms per step", "rate", "of this machine's peak", "speed, ours = 100%"], lines)))

# %% [markdown]
# ## From here to llm.c and PyTorch
#
# You can now read other programs that do the same. [llm.c](https://github.com/karpathy/llm.c) is GPT-2 in C and CUDA,
# written out by hand like this project, and many names here come from it. PyTorch has the same pieces, each behind one
# line.
#
# | here | llm.c (`train_gpt2.c`) | PyTorch |
# |---|---|---|
# | `Arena`, `TensorSpec` | `ParameterTensors`, `malloc_and_point_parameters` | `nn.Parameter`s; a caching allocator |
# | `encoder_forward` | `encoder_forward` | `F.embedding(tokens, wte) + wpe` |
# | `layernorm_forward` | `layernorm_forward` | `F.layer_norm` |
# | `matmul_forward` | `matmul_forward` | `F.linear` |
# | `attention_forward` | `attention_forward` | `F.scaled_dot_product_attention(..., is_causal=True)` |
# | `matmul_gelu_forward` | `matmul_forward`, `gelu_forward` | `F.gelu(F.linear(...), approximate="tanh")` |
# | `residual_layernorm_forward` | `residual_forward`, `layernorm_forward` | `x + y`, `F.layer_norm` |
# | `fused_classifier` | `softmax_forward`, `crossentropy_forward` | `F.cross_entropy` |
# | `GPT2.backward`, by hand | `gpt2_backward`, by hand | `loss.backward()`, by autograd |
# | `adamw_update` | `gpt2_update` | `torch.optim.AdamW(fused=True)` |
# | `capture` | | `torch.cuda.graph`, `torch.compile(mode="reduce-overhead")` |
#
# Each of them has something the others do not have:
#
# - **Here** every kernel is Python that you can step through, and a step allocates nothing.
# - **llm.c**'s CUDA version calls cuBLASLt for matmuls and can call cuDNN for attention. It trains on many GPUs and
#   many machines.
# - **PyTorch** runs any model. `torch.compile` fuses adjacent ops into one kernel automatically, which lesson 06 did by
#   hand, and it can capture CUDA graphs.
#
# Try a rung of your own in a real run. The first lines of the log show how long it takes in a step and its error:
#
# ```sh
# python -m llm_numba.train --preset tiny --steps 20 \
#     --use layernorm_forward=lessons/rungs/layernorm_cpu.py:layernorm_forward_v2
# python -m llm_numba.bench --against torch        # all ops, whole steps and sampling, compared with PyTorch
# ```
#
# ## Summary
#
# - A step is a list of calls. FLOPs and bytes follow from the shapes, and so does the minimum time on a given machine.
# - On a GPU, launching and running are separate. Short kernels wait for Python; a graph needs only one launch.
# - A graph records addresses and values. An arena that never moves, with changing values in memory, makes that
#   possible.
# - Find out where the time goes before you make anything faster.
