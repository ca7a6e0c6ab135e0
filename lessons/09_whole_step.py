# %% [markdown]
# # The whole step: from hundreds of launches to one graph
#
# **Goal.** To put the layers of the lessons before together into one training step, to see where its time goes on your
# machine, and to understand why a GPU is told about a whole step at once.
#
# **Why it matters.** A step is made of hundreds of small pieces. Each of them can be as fast as the machine allows,
# and the step can still be slow, if it is spent waiting for Python to ask for the next piece. And whoever wants a
# faster step has to know which piece to work on: the one that takes the longest is seldom the one that looks the most
# complicated.
#
# You need lesson 00, and the names of the layers from the lessons between.

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

from llm_numba import oracle, train
from llm_numba.arena import Arena, training_groups
from llm_numba.bench.measuring import measure
from llm_numba.bench.races import new_steps, sizes_of
from llm_numba.bench.tables import table
from llm_numba.bench.worker import WorkerFailed, torch_worker
from llm_numba.cuda.gpu import available, gpus
from llm_numba.lessons import FAST, exercise, ladder, pictures, sized, timing
from llm_numba.models import gpt2 as model
from llm_numba.models.config import PRESETS, preset
from llm_numba.ops import get_ops
from llm_numba.plot import COLOURS
from rungs import _whole_step as whole_step
from rungs import calls_cpu, launches_cuda

ops = get_ops("cpu")

# %% [markdown]
# ## A step is a list of calls
#
# This is GPT-2's forward pass, as the program has it. It reads from the top to the bottom, and nothing in it depends
# on the device: `ops` are the functions of one device, and `m` has the arena's tensors by name (lesson 00).

# %%
pictures.source(model.forward)

# %% [markdown]
# The loss, the backward pass and the update are written in the same way. `update` in `train.py` has all of it, and is
# what a run calls again and again: first the gradients of all micro-batches (parts of a batch that are run one after
# the other, when the whole does not fit), then the optimiser.

# %%
pictures.source(train.update, model.gradients, model.update)

# %% [markdown]
# How many calls is that, and how much work? Work is counted in *flops*, multiplications and additions of numbers, and
# in bytes. We count them without computing anything: each op is replaced by one that only notes what it was called
# with, and the arena by one that takes no memory. From the shapes follows what each call must *compute* and *move* at
# least. A product of $R$ rows with a weight of $OC \times C$ takes
#
# $$ 2 \, R \, C \, OC \text{ flops, a multiplication and an addition for each of } R \cdot C \cdot OC \text{ pairs;} $$
#
# its backward twice as many; and an op has to read each of its inputs and to write each of its outputs at least once.

# %%
B, T = 4, 1024
calls = whole_step.dry_run("d12", B, T)
sums = whole_step.add_up(calls)
flops, nbytes = (sum(entry[i] for entry in sums.values()) for i in (2, 3))
by_work = sorted(sums.items(), key=lambda item: -item[1][2] - item[1][3])
lines = [[op, f"{n:.0f}", f"{f / flops:.1%}", f"{b / nbytes:.1%}"] for op, (n, _, f, b) in by_work]
print(f"d12, {B} x {T} tokens: {len(calls)} calls, {flops / 1e12:.3g} TFLOP, {nbytes / 1e9:.3g} GB at least")
print("\n".join(table(["op", "calls", "of the flops", "of the bytes"], lines)))

counts = {L: len(whole_step.dry_run(name, B, T)) for name in ("d12", "d24", "d48") for L in [PRESETS[name].num_layers]}
(L1, n1), (L2, n2), *_ = counts.items()
each = (n2 - n1) // (L2 - L1)
print(f"calls = {n1 - each * L1} + {each} L, for L layers: {counts}")
assert all(n1 - each * L1 + each * L == n for L, n in counts.items())

config = preset("d12")
formula = train.flops_per_token(config, T) * B * T
print(f"and by the formula that the log's share of peak uses: {formula / 1e12:.6g} TFLOP; counted: {flops / 1e12:.6g}")
assert formula == flops

# %% [markdown]
# Nearly all of the computing is in `matmul_forward` and `matmul_backward`, while more than half of the moving is
# elsewhere. So a step is a few ops that compute and many that only move; the two need different care, and have had it
# in different lessons. (`residual_backward` moves nothing at all here: under the plan `reuse` both of its tensors are
# the same memory. `zero`, `copy`, `clip` and `add_mean` are small helpers.)
#
# Is the whole right? A step's gradients, computed by the compiled ops in float32, beside those of the same step in
# NumPy with float64 numbers, from the same weights and the same batch. The model's code is the same; only `ops` and
# the arena's precision differ.


# %%
def gradients_by(ops, dtype, config, B, T, weights=None):
    """(the gradients, the loss, the weights) of one step; with random weights where none are given."""
    groups = training_groups(config, B, T, ops)
    arena = Arena(oracle.in_float64(groups) if dtype == "float64" else groups, config, "reuse", ops)
    m = arena.training()
    model.initialise(get_ops("cpu"), arena, seed=1)
    if weights is not None:
        m.flat.parameters[...] = weights
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (B, T + 1))
    m.batches[...] = np.stack([tokens[:, :-1], tokens[:, 1:]])
    model.gradients(ops, m, config.vocab_size)
    return arena.named("gradients"), float(m.loss[0]), np.array(m.flat.parameters)


small = preset("nano")
got, loss, weights = gradients_by(ops, "float32", small, 3, 17)
right, right_loss, _ = gradients_by(oracle, "float64", small, 3, 17, weights)
errors = {name: np.abs(got[name] - right[name]).max() / np.abs(right[name]).max() for name in right}
worst = max(errors, key=errors.get)
print(f"loss {loss:.7f}, in float64 {right_loss:.7f}")
print(f"{len(errors)} gradients; the worst is {worst}, off by {errors[worst]:.1e} of its largest number")
assert errors[worst] < 1e-4 and abs(loss - right_loss) < 1e-5

# %% [markdown]
# ## What a call costs before it does anything
#
# Calling a compiled function from Python is not free: Python looks up names, Numba looks at the types of all arguments
# and chooses the machine code. If the function shares its loop out (`prange`), the other cores must be woken too. Here
# is what both take on tensors of a single number, where there is nothing else to do, and what that would make for all
# calls of a step.

# %%
one, two = np.zeros((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32)


def seconds_a_call(function, *arguments):
    """The least of some tries, as other programs can only make it longer."""
    function(*arguments)
    times = []
    for _ in range(sized(500, 20)):
        start = time.perf_counter()
        for _ in range(5):
            function(*arguments)
        times.append((time.perf_counter() - start) / 5)
    return min(times)


plain = seconds_a_call(calls_cpu.copy_row, one[0, 0], two[0, 0])
shared_out = seconds_a_call(ops.residual_backward, one, two)
print(f"a call: {1e6 * plain:.2f} microseconds; one that wakes the other cores: {1e6 * shared_out:.2f}")
for name in ("nano", "tiny", "d12"):
    n = len(whole_step.dry_run(name, 4, 32))
    print(
        f"{name}: {n} calls a step are {1e3 * n * plain:.2f} ms, all of them shared out {1e3 * n * shared_out:.2f} ms"
    )

# %% [markdown]
# The ladder shows the same in one op. `residual_backward` copies a gradient, $B\,T$ rows of $C$ numbers (the sum of
# lesson 06 hands it on unchanged). **v1** is one compiled call a row, and Python cuts both rows out of their tensors
# each time. **v2** makes the same calls, but has cut the rows once and kept them: that is what the arena's `m.layers`
# are. **v3** is one call, with the loop over the rows compiled too. The last is **the model's own**, on all cores.

# %%
pictures.source(calls_cpu.residual_backward_v1, calls_cpu.rows_of, calls_cpu.residual_backward_v2)

# %%
pictures.source(calls_cpu.residual_backward_v3)
ladder.check(calls_cpu.CALLS)
found = timing.show_times(calls_cpu.CALLS)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# All four move the same bytes; between v1 and v3 the difference is Python, and between v3 and the last the cores. How
# much of a whole step goes into calls, we shall see below. On a GPU it matters more.
#
# ## On a GPU: asking and running are two things
#
# A GPU, the *card*, runs beside the processor. To *launch* a kernel is to put it at the end of a queue, a *stream*;
# Python does not wait for it, and the card takes the kernels from the queue in order. With $\tau$ seconds for a
# launch, and $d_i$ seconds of work in kernel $i$ ($i = 0, 1, \dots$),
#
# $$ \text{start}_i = \max\big( (i + 1)\,\tau,\; \text{end}_{i-1} \big), \qquad \text{end}_i = \text{start}_i + d_i . $$
#
# If kernels take longer than launches, the queue fills and the card never waits: the step takes $\sum d_i$. If they
# are shorter, the card waits for Python, and the step takes $n\,\tau$, however fast the kernels are. Write that
# yourself:

# %%
exercise.show("launch_queue")

# %%
exercise.check("launch_queue")


# %% [markdown]
# The picture shows the first kernels of a step of `d12` on a small batch. No card is needed: each kernel takes what
# its flops and its bytes need on a card that we make up, with 100 TFLOP/s and 2 TB/s; no kernel takes less than 2
# microseconds, and a launch takes 10. These numbers are assumptions; where there is a card, the end of the lesson
# measures. Each call counts as one kernel.


# %%
FLOPS, BANDWIDTH, LAUNCH, LEAST = 100e12, 2e12, 10e-6, 2e-6  # LEAST: what any kernel takes


def seconds_on_the_card(calls):
    return [max(LEAST, call.flops / FLOPS, call.nbytes / BANDWIDTH) for call in calls]


def kind_of(op):
    kinds = ("matmul", "attention", "layernorm", "gelu")
    return next((kind for kind in kinds if kind in op), "others")


COLOUR = dict(zip(("matmul", "attention", "layernorm", "gelu", "others"), COLOURS, strict=False))


def draw_queues(calls, most=24):
    """Launches and kernels of a step's beginning in time: launched one by one, and as a graph."""
    from matplotlib.patches import Patch

    figure, axes = pictures.new(2, 1, width=9.5, height=3.6, sharex=True)
    seconds = seconds_on_the_card(calls)[:most]
    limit = None
    for axis, launch, title in (
        (axes[0], LAUNCH, "launched one by one"),
        (axes[1], 0.0, "as a graph: one launch, then the card goes on alone"),
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
        axis.set(yticks=[0, 1], yticklabels=["card", "Python"], xlim=(0, limit))
        axis.set_title(f"{title}: {1e6 * end[-1]:.0f} microseconds, the card busy for {busy:.0%} of them")
    axes[1].set_xlabel(f"microseconds; the first {most} of {len(calls)} calls")
    legend = [Patch(color="0.75", label="a launch"), *(Patch(color=c, label=k) for k, c in COLOUR.items())]
    figure.legend(handles=legend, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


pictures.show(draw_queues(whole_step.dry_run("d12", 1, 256)))

# %% [markdown]
# The same model of a card for all batch sizes. Where the upper curve is flat, the card waits for Python, and a larger
# batch costs nothing. From some size on the two curves are the same: then the kernels are long enough to hide the
# launches.


# %%
def draw_hinge(tokens):
    """A step's time by its number of tokens, one by one and as a graph."""
    figure, axis = pictures.new(width=8, height=3.2)
    one_by_one, graph = [], []
    for n in tokens:
        seconds = seconds_on_the_card(whole_step.dry_run("d12", 1, n))
        one_by_one.append(1e3 * whole_step.queue(seconds, LAUNCH)[1][-1])
        graph.append(1e3 * (LAUNCH + sum(seconds)))
    axis.plot(tokens, one_by_one, "o-", color=COLOURS[1], label="launched one by one")
    axis.plot(tokens, graph, "o-", color=COLOURS[0], label="as a graph")
    axis.set(xscale="log", yscale="log", xlabel="tokens of a step of d12", ylabel="ms, on the card made up above")
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
# On a card, an op is one kernel or several: a large sum is cut into pieces, each added up by a block, and a second
# kernel adds the pieces (lesson 07). Numba's simulator lets us count without a card: we have each launch noted, and
# nothing run. This is a model of the shape of `tiny` with the 12 layers of `d12`.

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
print(f"{len(kernels)} launches for a step")
print("\n".join(table(["kernel", "launches", "fewest blocks", "most blocks"], lines)))

# %% [markdown]
# ## One launch for all of them: the graph
#
# A *CUDA graph* is a recording. Between `cuStreamBeginCapture` and `cuStreamEndCapture` the driver runs nothing: it
# notes each launch with its arguments. The recording is then *instantiated*, made ready for the card, and from then on
# a single launch replays it. This is how the project makes one:

# %%
pictures.source(get_ops("cudasim").capture)

# %% [markdown]
# What is noted are **addresses and numbers**, and that sets the rules for whatever is to be recorded:
#
# - Nothing may be allocated, and no array may move. In an arena nothing does.
# - Nothing may wait for the card, such as a look at the loss on the way.
# - A number that changes from step to step, the learning rate for one, must not be an argument. It must stand in the
#   card's memory, where the kernel reads it. That is why the arena has a group `inputs`.
#
# You can see the last rule without a card. Here is a recorder of ten lines, and an optimiser of one.


# %%
class Recorder:
    """Notes calls instead of making them, as a capture does; `replay` makes them."""

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
wrong(move, parameter, gradient, rate)  # a number: its value now
right(move, parameter, gradient, rate_in_memory)  # an array: its address
rate = rate_in_memory[0] = 0.1  # the schedule goes on
for name, recorder in (("a number", wrong), ("in memory", right)):
    parameter[:] = 0
    recorder.replay()
    print(f"the learning rate as {name}: the parameter moves by {-parameter[0]}, and should by 0.1")

gradient = np.full(1, 2.0)  # a new array under the old name
parameter[:] = 0
right.replay()
print(f"with a new array of gradients: it moves by {-parameter[0]:.1f}, not by 0.2: the recording has the old one")

# %% [markdown]
# The rungs on a card copy $N$ small tensors. **v1** cuts each tensor out and launches a kernel for it, **v2** keeps
# the views, **v3** replays the same $N$ launches as a graph, and the last is **the model's own** `copy`: one launch
# for all, as they stand side by side. The arena makes that possible too: AdamW is one launch for all parameters, not
# one for each tensor.

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
# What if the tensors do stand side by side, but each needs something of its own? Then one launch can still do, if the
# blocks know who they are. That is the second exercise; PyTorch's fused optimisers do the same.

# %%
exercise.show("many_tensors")

# %%
exercise.check("many_tensors")

# %% [markdown]
# ## Where the time goes
#
# Now we measure a whole step on this machine: each op is replaced by one that looks at the clock before and after. The
# first picture is one step as it happened, from left to right, forward, backward and update, a line for each kind of
# op.

# %%
name, B, T = sized(("tiny", 8, 128), ("nano", 1, 8))
step = whole_step.measure_step("cpu", name, B, T, seconds=sized(1.0, 0.01))
calls, took = step["calls"], step["seconds"]["ours"]
print(f"{timing.machine('cpu')}; {step['sizes']}")
print(f"{1e3 * took:.2f} ms a step, {B * T / took:,.0f} tokens a second, {1e-9 * step['flops'] / took:.3g} GFLOP/s")


def draw_step(calls):
    """Every call of a step, at its time, in the line of its op."""
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
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="ms since the step's beginning")
    axis.set(ylim=(len(names) - 0.4, -1.6), xlim=(0, None))
    axis.tick_params(axis="y", labelsize=8)
    return figure


pictures.show(draw_step(calls))

# %% [markdown]
# The second picture adds them up, and beside each bar stands what this machine needs for that op at least:
#
# $$ t_{\min} = \max\left( \frac{\text{flops}}{F},\;\frac{\text{bytes}}{W} \right) . $$
#
# $F$ and $W$ are the most flops and bytes a second that this machine was seen to do, measured here. This is the
# *roofline* of lesson 02, as time: whichever of the two is the longer is what limits the op. An op can need less than
# $t_{\min}$ if what it reads is still in the processor's caches from the op before; an op far above it is where work
# may pay, if its bar is long.


# %%
def step_table(sums, peaks):
    """The lines of a table: op, calls, ms, share of the step, what is done a second, share of the limit."""
    lines, whole = [], sum(entry[1] for entry in sums.values())
    for op, (n, seconds, flops, nbytes) in sums.items():
        rate = f"{1e-9 * flops / seconds:,.1f} GFLOP/s" if flops else f"{1e-9 * nbytes / seconds:,.1f} GB/s"
        share = ""
        if peaks["flops"]:
            share = f"{whole_step.least_seconds(op, flops, nbytes, peaks) / seconds:.0%}"
        lines.append([op, f"{n:.0f}", f"{1e3 * seconds:.3f}", f"{seconds / whole:.1%}", rate, share])
    return table(["op", "calls", "ms", "of the step", "rate", "of the limit"], lines)


def draw_sums(sums, peaks, title):
    """A bar for each op, and what the machine needs for it at least."""
    figure, axis = pictures.new(width=9, height=4.6)
    names = list(sums)
    axis.barh(range(len(names)), [1e3 * sums[n][1] for n in names], 0.75, color=[COLOUR[kind_of(n)] for n in names])
    if peaks["flops"]:
        least = [1e3 * whole_step.least_seconds(n, *sums[n][2:], peaks) for n in names]
        axis.barh(range(len(names)), least, 0.28, color="black", label="what the machine needs at least")
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="ms of a step", title=title)
    axis.invert_yaxis()
    return figure


sums, peaks = whole_step.add_up(calls), timing.peaks("cpu")
print("\n".join(step_table(sums, peaks)))
inside = sum(call.seconds for call in calls)
print(f"all ops together {1e3 * inside:.2f} ms; the step, unwatched, {1e3 * took:.2f} ms")
print(
    f"{len(calls)} calls that do nothing would take {1e3 * len(calls) * plain:.2f} ms, {len(calls) * plain / took:.1%}"
)
if peaks["flops"]:
    least = sum(whole_step.least_seconds(op, *entry[2:], peaks) for op, entry in sums.items())
    print(f"at least, if every op were at its limit: {1e3 * least:.2f} ms, {least / took:.0%} of what it takes")
pictures.show(draw_sums(sums, peaks, f"{step['sizes']}, on the CPU"))

# %% [markdown]
# Where there is a card, the same is measured there, by another process (this one runs kernels in the simulator): the
# whole step as a graph and launch by launch, and the ops one by one. Each op there starts with none of its data in the
# card's cache.


# %%
def step_on_card(name, B, T):
    dtype = "bf16" if gpus()[0].has_bf16 else "fp32"
    run = subprocess.run(
        [sys.executable, whole_step.__file__, "cuda", name, str(B), str(T), dtype],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "0"},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        print("the step cannot be timed on the card:", (run.stderr.strip().splitlines() or ["it said nothing"])[-1])
        return None
    return json.loads(run.stdout.splitlines()[-1])


on_card = step_on_card("d12", 4, 1024) if available() and not FAST else None
if on_card:
    on_card["calls"] = [whole_step.Call(*call) for call in on_card["calls"]]
    sums, peaks = whole_step.add_up(on_card["calls"]), on_card["peaks"]
    print(f"{on_card['machine']}; {on_card['sizes']}")
    for column, seconds in on_card["seconds"].items():
        print(f"{'as a graph' if column == 'ours' else column}: {1e3 * seconds:.2f} ms a step")
    print("\n".join(step_table(sums, peaks)))
    pictures.show(draw_sums(sums, peaks, f"{on_card['sizes']}, on the card"))
else:
    print("No card here (or the lesson runs small).")

# %% [markdown]
# ## Beside PyTorch
#
# PyTorch takes another way to the same numbers. You write only the forward pass, as calls on its tensors. While it
# runs, PyTorch notes each of them, allocates what it needs, and afterwards goes through its notes backwards:
# *autograd*. Its kernels for products are the vendors' own (MKL on a CPU, cuBLAS on a card). Where it is installed,
# here is the same step there, in a process of its own with as many threads; PyTorch *eager*, that is, op by op as it
# is written.

# %%
ours, times = new_steps(ops, preset(name), B, T)["ours"], {"llm_numba": [], "PyTorch, eager": []}
if find_spec("torch") and not FAST:
    try:
        with torch_worker() as ask:
            ask("start", threads=get_num_threads())
            ask("prepare_step", config=sizes_of(preset(name)), B=B, T=T)
            ask("first", mode="eager")
            for _ in range(3):  # in turn, so that both see the same machine
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
print("\n".join(table(["", "ms a step", "rate", "of this machine's peak", "speed, ours = 100%"], lines)))

# %% [markdown]
# ## From here to llm.c and PyTorch
#
# You can now read other programs that do the same. [llm.c](https://github.com/karpathy/llm.c) is GPT-2 in C and CUDA,
# written out by hand like this project; many names here are its names. PyTorch has the same pieces behind one line
# each.
#
# | here | llm.c (`train_gpt2.c`) | PyTorch |
# |---|---|---|
# | `Arena`, `TensorSpec` | `ParameterTensors`, `malloc_and_point_parameters` | `nn.Parameter`s; a caching allocator |
# | `encoder_forward` | `encoder_forward` | `F.embedding(tokens, wte) + wpe` |
# | `layernorm_forward` | `layernorm_forward` | `F.layer_norm` |
# | `matmul_forward` | `matmul_forward` | `F.linear` |
# | `attention_forward` | `attention_forward` | `F.scaled_dot_product_attention(..., is_causal=True)` |
# | `gelu_forward` | `gelu_forward` | `F.gelu(..., approximate="tanh")` |
# | `residual_layernorm_forward` | `residual_forward`, `layernorm_forward` | `x + y`, `F.layer_norm` |
# | `fused_classifier` | `softmax_forward`, `crossentropy_forward` | `F.cross_entropy` |
# | `model.backward`, by hand | `gpt2_backward`, by hand | `loss.backward()`, from autograd's notes |
# | `adamw_update` | `gpt2_update` | `torch.optim.AdamW(fused=True)` |
# | `capture` | | `torch.cuda.graph`, `torch.compile(mode="reduce-overhead")` |
#
# And what each of them has that the others have not:
#
# - **Here** every kernel is Python that you can step through, and a step allocates nothing.
# - **llm.c**'s CUDA version calls cuBLASLt for the products and can call cuDNN for attention; it trains on many cards
#   and many machines.
# - **PyTorch** takes any model, not one. `torch.compile` fuses neighbouring ops into one kernel by itself, which
#   lesson 06 did by hand, and it can record CUDA graphs.
#
# Try a rung of your own in a real run; the log's first lines then say how long it takes in a step and how far it is
# off:
#
# ```sh
# python -m llm_numba.train --preset tiny --steps 20 \
#     --use layernorm_forward=lessons/rungs/layernorm_cpu.py:layernorm_forward_v2
# python -m llm_numba.bench --against torch        # all ops, whole steps and sampling, in turn with PyTorch's
# ```
#
# ## What to take along
#
# - A step is a list of calls; flops and bytes follow from the shapes, and from them what the machine needs at least.
# - On a card, asking and running are two queues. Short kernels wait for Python; a graph asks once.
# - A recording holds addresses and numbers: an arena that never moves, and changing numbers in memory, make it
#   possible.
# - Look where the time goes before you make anything faster.
