# %% [markdown]
# # The arena: all memory of a training run in one array
#
# **Goal.** To know every tensor that training a GPT-2 needs: what it is for, how large it is, and where it is in
# memory. At the end you can compute what a batch of any size costs before anything is allocated.
#
# **Why it matters.** Most programs ask the system for memory whenever they need some, thousands of times a second. This
# one asks once. Everything that it will ever write to (parameters, gradients, activations, the batch and the loss) is
# part of one long array: the *arena*. It is easy to inspect, it cannot run out of memory in the middle of a run, and it
# is what lets a GPU replay a whole step (lesson 09).
#
# You need Python and NumPy. You do not need a GPU, nor to know how a language model works.

# %%
import math
import tracemalloc
from bisect import bisect_right

import numpy as np

from llm_numba.arena import Arena, format_map, layout, padded
from llm_numba.bench.tables import table
from llm_numba.cpu import memory as cpu_memory
from llm_numba.lessons import exercise, ladder, pictures, timing
from llm_numba.lessons.problem import arguments
from llm_numba.lessons.tracing import simulate_cpu
from llm_numba.models import preset
from llm_numba.models.gpt2 import GPT2
from llm_numba.ops import get_ops
from llm_numba.training.loss_plot import COLOURS
from llm_numba.training.memory_plan import complete, training_groups
from llm_numba.training.settings import Settings
from llm_numba.training.step import gradients, initialise, training_step
from llm_numba.util.files import format_bytes
from rungs import lookup_cpu

ops = get_ops("cpu")

# %% [markdown]
# ## A tensor is a piece of memory with a shape
#
# Memory is a sequence of numbered bytes. A float32 takes four of them. A *tensor* is an array with a shape, such as 3 x
# 4. In memory its rows follow each other, so the element in row $i$ and column $j$ of a tensor with $C$ columns has
# index
#
# $$ i \cdot C + j $$
#
# counted from the start of the tensor. The same rule extends to more axes: in a tensor $B \times T \times C$, the
# element at $(b, t, c)$ has index $(b \cdot T + t) \cdot C + c$. The last index moves through memory one element at a
# time, the first one in large jumps.
#
# NumPy can interpret a piece of memory as a tensor without copying a byte. That is called a *view*. Here are 160 bytes
# with two views, followed by the one line with which the whole project makes its views.

# %%
memory = np.zeros(160, np.uint8)
x = cpu_memory.view(memory, 0, (3, 4), "float32")
y = cpu_memory.view(memory, 64, (2, 3, 4), "float32")
x[2, 1] = 7
print("x[2, 1] is element", 2 * 4 + 1, "of x; memory as floats:", memory[: 3 * 4 * 4].view(np.float32))
print("y[1, 0, 2] is element", (1 * 3 + 0) * 4 + 2, "of y, so byte", 64 + 4 * ((1 * 3 + 0) * 4 + 2), "of memory")

pictures.source(cpu_memory.view)

# %% [markdown]
# The picture shows both views as tables, and below them the memory that they share. An element has the same colour in
# both: the darker, the later it comes in its tensor. Between the two tensors are four unused elements (16 bytes).


# %%
def draw_views():
    """Two views as tables, and the memory that they share."""
    from matplotlib.patches import Rectangle

    figure, axes = pictures.new(2, 1, width=9, height=3.4, height_ratios=[3, 1])
    shades = [np.linspace(0.25, 0.95, 12), np.linspace(0.25, 0.95, 24)]
    import matplotlib

    maps = [matplotlib.colormaps["Blues"], matplotlib.colormaps["Oranges"]]

    def cell(axis, at, row, index, which):
        shade = shades[which][index]
        axis.add_patch(Rectangle((at, row), 0.92, 0.92, color=maps[which](shade), linewidth=0))
        colour = "white" if shade > 0.6 else "black"
        axis.text(at + 0.46, row + 0.46, index, ha="center", va="center", fontsize=7, color=colour)

    for index in range(12):
        cell(axes[0], 3 + index % 4, index // 4, index, 0)
        cell(axes[1], index, 0, index, 0)
    for index in range(24):
        cell(axes[0], 17 + 6 * (index // 12) + index % 4, index // 4 % 3, index, 1)
        cell(axes[1], 16 + index, 0, index, 1)
    for free in range(12, 16):
        axes[1].add_patch(Rectangle((free, 0), 0.92, 0.92, color="0.9", linewidth=0))
    for text, at in (("x, 3 x 4", 2.7), ("y[0]", 16.7), ("y[1]", 22.7)):
        axes[0].text(at, 1.5, text, ha="right", va="center", fontsize=8)
    for axis, height in zip(axes, (3, 1), strict=True):
        axis.set(xlim=(-0.5, 40.5), ylim=(height + 0.1, -0.1))
        axis.axis("off")
    axes[1].set_title("the same elements in memory", loc="left")
    return figure


pictures.show(draw_views())

# %% [markdown]
# ## What a GPT-2 consists of
#
# A language model reads *tokens*, integers that stand for pieces of text, and predicts for each position which token
# comes next. Its sizes are
#
# | | |
# |---|---|
# | $B$ | batch: how many sequences it reads at a time |
# | $T$ | time: how many tokens each sequence has, at most `maxT`, the context length |
# | $C$ | channels: how many elements describe a position |
# | $L$ | layers: how many times these elements are processed |
# | $V$, $V_p$ | vocabulary: how many tokens there are; padded to a multiple of 128 |
#
# What the model has learned is stored in its *parameters*, a short list of tensors. `wte` has a row of $C$ elements for
# each token, its *embedding*, and `wpe` has one for each position. A layer has four matrices (`qkvw`, `attprojw`,
# `fcw`, `fcprojw`), a bias for each (`...b`), and two *LayerNorms* (`ln1`, `ln2`), which are the subject of lesson 01.
# You need not know yet what they do: this lesson is only about sizes. Here is the list in the program, one line per
# tensor.

# %%
pictures.source(GPT2.parameters)

# %% [markdown]
# Each line gives a name and a shape, and the initial values: random with standard deviation `std`, or filled with
# `fill`. `per_layer` means that every layer has one. `decays` belongs to the optimiser (lesson 08).
#
# How many parameters are there? The first exercise is to count them.

# %%
exercise.show("count_parameters")

# %%
exercise.check("count_parameters")

# %% [markdown]
# The function in `lessons/exercises/count_parameters.py` is unfinished. Complete it and run the cell again, or write
# your own function here and pass it to `check`: `exercise.check("count_parameters", my_function)`. `check` explains
# what is wrong. (It calls a plain function like yours "the program outside prange"; lesson 01 has the other kind.)
#
# When you have tried, compare. All sizes together are
#
# $$ N = (V_p + \text{maxT})\, C + L\,(12\,C^2 + 13\,C) + 2\,C . $$
#
# The next cell counts both ways, for all presets.


# %%
def elements_of(spec, model):
    """How many elements a line of the list has, over all layers."""
    return math.prod(spec.shape) * (model.num_layers if spec.per_layer else 1)


def formula(model):
    C, L = model.channels, model.num_layers
    return (model.padded_vocab_size + model.max_seq_len) * C + L * (12 * C * C + 13 * C) + 2 * C


lines = []
for name, model in GPT2.PRESETS.items():
    total = sum(elements_of(spec, model) for spec in model.parameters())
    assert total == formula(model)
    sizes = [model.max_seq_len, model.vocab_size, model.num_layers, model.num_heads, model.channels]
    lines.append([name, *map(str, sizes), f"{total:,}"])
print("\n".join(table(["preset", "maxT", "V", "L", "heads", "C", "parameters"], lines)))

# %% [markdown]
# Where are they? In a small model the token table is the largest part. It grows with $C$, while the matrices of the
# layers grow with $C^2$, and the number of layers grows too. So in a large model almost all parameters are in the
# matrices.


# %%
def draw_parameters():
    """For each preset, the share of each kind of parameter."""
    kinds = {
        "wte, a row for each token": ("wte",),
        "wpe, a row for each position": ("wpe",),
        "matrices of attention": ("qkvw", "attprojw"),
        "matrices of the MLP": ("fcw", "fcprojw"),
    }
    figure, axis = pictures.new(width=9, height=3.2)
    for row, model in enumerate(GPT2.PRESETS.values()):
        sizes = {spec.name: elements_of(spec, model) for spec in model.parameters()}
        total, left = sum(sizes.values()), 0.0
        shares = [sum(sizes[n] for n in names) / total for names in kinds.values()]
        for i, share in enumerate([*shares, 1 - sum(shares)]):
            label = [*kinds, "biases and LayerNorms"][i] if row == 0 else None
            axis.barh(row, share, 0.75, left=left, color=COLOURS[i], label=label)
            if share > 0.06:
                axis.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", color="white", fontsize=8)
            left += share
    names = [f"{name}: {formula(model) / 1e6:,.4g} million" for name, model in GPT2.PRESETS.items()]
    axis.set(yticks=range(len(names)), yticklabels=names, xticks=[], xlim=(0, 1), xlabel="share of the parameters")
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


pictures.show(draw_parameters())

# %% [markdown]
# ## One tensor after the other
#
# `layout` goes through such lists and gives each tensor its *offset*, the byte where it starts. It allocates nothing.
# Besides addition it needs one rule. Processors prefer addresses that are multiples of 64 bytes: memory moves in *cache
# lines* of 64 bytes, and the widest registers have 64 bytes too. So each tensor is padded to a multiple of `RUN` = 64
# elements:
#
# $$ \text{padded}(n) = \left\lceil \frac{n}{64} \right\rceil \cdot 64 . $$
#
# Why elements and not bytes? Gradients correspond to parameters element by element, and the parameters may have 2 bytes
# per element while their gradients have 4. Since both are padded in elements, element $i$ of one group corresponds to
# element $i$ of the other.

# %%
exercise.show("arena_offsets")

# %%
exercise.check("arena_offsets")

# %% [markdown]
# And this is how the project does it. `shares` and `rows` are explained below.

# %%
pictures.source(padded, layout)

# %% [markdown]
# This is the memory map of the smallest model, as `--plan-memory` prints it before a run, cut after the parameters.
# `training_groups` lists what training needs, and `complete` adds the temporary memory of the ops in a step.


# %%
def groups_of(model, B, T, dtype="float32", recompute="none", **options):
    def step(ops, arena):
        training_step(ops, model, arena.training(recompute), Settings())

    return complete(training_groups(model, B, T, recompute=recompute, **options), model, ops, dtype, step)


nano = preset("nano")
B, T = 1, 8
groups = groups_of(nano, B, T)
places, nbytes = layout(groups, nano.num_layers, "keep")
text = format_map(places, nbytes).splitlines()
print("\n".join([*text[: 1 + len(groups["parameters"])], "...", text[-1]]))

# %% [markdown]
# ## What else training needs
#
# A training *step* works like this. The model reads a batch, layer by layer, and predicts for each position which token
# comes next: the *forward pass*. The *loss* is one number that measures how far these predictions are from the actual
# text. The *backward pass* then goes the same way in reverse, from the loss to the first layer, and computes for each
# parameter how the loss would change with it: its *gradient*. The *optimiser* moves each parameter a little against its
# gradient. A function that does one part of this, such as one LayerNorm forward, is called an *op*.
#
# The parameters alone are not enough for that. The arena has these groups:
#
# | group | what it holds | size |
# |---|---|---|
# | parameters | what the model has learned | $N$ |
# | gradients | for each parameter, how the loss changes with it | $N$ |
# | m, v | the optimiser's two running averages for each parameter (lesson 08) | $2N$ |
# | activations | what each layer computed, kept for the backward pass | grows with $B \cdot T$ |
# | activation gradients | how the loss changes with each activation | grows with $B \cdot T$ |
# | inputs | the batch, the learning rate, the loss: what changes each step | small |
# | scratch | temporary memory of an op | small |
#
# In float32 the first three rows take $4 \cdot 4 N = 16 N$ bytes, whatever the batch. Activations are what a batch
# costs. A layer stores about $16\,B\,T\,C$ elements. Each of the names is explained in a later lesson: two normalised
# copies of the layer's input ($2C$ per token), queries, keys and values ($3C$), attention's output ($C$), two sums
# ($2C$), and the wide middle of the layer before and after a function named GELU ($4C + 4C$).
#
# **Not every tensor needs its own memory.** In the backward pass, the gradient of one layer's activations is needed
# only until the next layer's gradient is computed. Tensors that are never needed at the same time may use the same
# memory: in the list they name the same slot, `shares="dwide"`. The *plan* decides whether they do. `reuse` overlays
# them, for training. `keep` gives each its own memory, so that you can inspect everything after a step. The code that
# computes is the same in both cases, because it only receives views.
#
# The next picture shows the whole arena of GPT-2's smallest size. Read memory like a page, from left to right and line
# by line; every line is the same number of bytes in both pages. Nothing is allocated here: a map is a list of offsets.
# Two shades of a colour separate large neighbours, and the largest tensors are labelled.

# %%
GROUP_COLOURS = dict(
    zip(
        ("parameters", "gradients", "m", "v", "activations", "activation gradients", "inputs", "scratch"),
        (COLOURS[0], COLOURS[1], COLOURS[5], "#8CC6E7", COLOURS[2], COLOURS[4], COLOURS[6], "#999999"),
        strict=True,
    )
)
WIDTH, LINES = 200, 100


def draw_map(pages):
    """The arena under several plans, on the same scale. pages: title -> (places, nbytes)."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    cell = max(nbytes for _, nbytes in pages.values()) / (WIDTH * LINES)
    figure, axes = pictures.new(1, len(pages), width=9.5, height=5.6, squeeze=False)
    for axis, (title, (places, nbytes)) in zip(axes[0], pages.items(), strict=True):
        page = np.ones((WIDTH * LINES, 3))
        labels = []
        light = False
        for place in places:
            first, last = round(place.offset / cell), round((place.offset + place.nbytes) / cell)
            if last - first > WIDTH // 4:
                light = not light  # so that neighbours differ
            tint = 0.0 if light else 0.22
            page[first:last] = np.array(to_rgb(GROUP_COLOURS[place.group])) * (1 - tint) + tint
            if last - first > 2.2 * WIDTH:
                labels.append((place.spec.name, (first + last) / 2 / WIDTH))
        axis.imshow(page.reshape(LINES, WIDTH, 3), aspect="auto", interpolation="nearest")
        for name, line in labels:
            axis.text(WIDTH / 2, line - 0.5, name, ha="center", va="center", fontsize=7, color="white")
        axis.set(title=f"{title}: {format_bytes(nbytes)}", xticks=[], yticks=[])
    legend = [Patch(color=colour, label=group) for group, colour in GROUP_COLOURS.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def map_of(model, B, T, plan, **options):
    return layout(groups_of(model, B, T, **options), model.num_layers, plan)


d12 = preset("d12")
B, T = 4, 256
pages = {f"{plan}, {B} x {T} tokens": map_of(d12, B, T, plan) for plan in ("keep", "reuse")}
pictures.show(draw_map(pages))

# %% [markdown]
# Both pages begin with the same four blocks: parameters, gradients, `m` and `v`. The difference is in what follows.
# Under `keep`, every layer has its own activation gradients; under `reuse`, one slot serves all layers in turn. These
# are the slots, and what they save:

# %%
places, _ = map_of(d12, B, T, "reuse")
slots = {}
for place in places:
    if place.spec.shares:
        slots.setdefault(place.spec.shares, []).append(place)
lines = []
for slot, members in slots.items():
    own = sum(4 * math.prod(p.spec.shape) * (d12.num_layers if p.spec.per_layer else 1) for p in members)
    lines.append([slot, ", ".join(p.spec.name for p in members), format_bytes(own), format_bytes(members[0].nbytes)])
print("\n".join(table(["slot", "tensors in it", "without sharing", "shared"], lines)))

# %% [markdown]
# ## What a batch costs
#
# Since the map is only a list of numbers, we can compute it for any batch. Everything that grows does so in proportion
# to the number of tokens $B \cdot T$, so
#
# $$ \text{bytes}(B) \approx 16 N + B \cdot (\text{bytes of one sequence}) . $$
#
# There is one deliberate exception. The *logits*, the model's predictions, have $V_p$ elements for each token and would
# be the largest tensor of all. Under `reuse` there is room for only some of the rows at a time: a quarter of them, but
# at least 4096 (`logits_rows` in `models/gpt2.py`).


# %%
def bytes_by_group(model, B, T):
    places, _ = map_of(model, B, T, "reuse")
    found = dict.fromkeys(GROUP_COLOURS, 0)
    for place in places:
        found[place.group] += place.nbytes
    return found


T = 1024
batches = [1, 2, 4, 8, 16, 32, 64]
costs = {b: bytes_by_group(d12, b, T) for b in batches}
fixed = sum(costs[1][group] for group in ("parameters", "gradients", "m", "v"))
lines = []
for b in batches:
    whole = sum(costs[b].values())
    lines.append([str(b), format_bytes(whole), f"{fixed / whole:.0%}", format_bytes((whole - fixed) / b)])
print("\n".join(table(["B", "arena", "share of parameters, gradients, m, v", "the rest, per sequence"], lines)))


# %%
def draw_costs():
    """The arena's groups by batch size, and the memory of common GPUs."""
    figure, axis = pictures.new(width=9, height=3.8)
    bottoms = np.zeros(len(batches))
    for group, colour in GROUP_COLOURS.items():
        heights = np.array([costs[b][group] for b in batches]) / 2**30
        axis.bar(range(len(batches)), heights, 0.7, bottom=bottoms, color=colour, label=group)
        bottoms += heights
    for place, total in enumerate(bottoms):
        axis.text(place, total, f"{total:.3g}", ha="center", va="bottom", fontsize=8)
    for size in (8, 16, 24, 48, 80):
        if size < 1.2 * bottoms[-1]:
            axis.axhline(size, color="0.5", linestyle=":", linewidth=1)
            axis.text(-0.6, size, f"{size} GiB", fontsize=8, color="0.4", va="bottom", ha="left")
    axis.set(xticks=range(len(batches)), xticklabels=batches, xlabel=f"B, sequences of {T} tokens", ylabel="GiB")
    axis.set(title="the arena of d12, float32; dotted: memory of common GPUs", xlim=(-0.65, len(batches) - 0.5))
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    return figure


pictures.show(draw_costs())

# %% [markdown]
# What can you do if it does not fit? Use fewer tokens at a time; or 2 bytes per element instead of 4 (`bf16`, lesson
# 08: parameters and activations shrink, while a float32 copy of the parameters, `master`, is added); or discard
# activations and compute them again in the backward pass (*recompute*, lesson 06). The map gives the cost of each
# option without a run. The last columns show the largest batch that fits into a GPU's memory, found by bisection, as
# `--plan-memory` does.

# %%
ways = {
    "float32": {},
    "bf16": dict(dtype="bfloat16", master=True),
    "bf16, GELU recomputed": dict(dtype="bfloat16", master=True, recompute="gelu"),
    "bf16, GELU and LayerNorm recomputed": dict(dtype="bfloat16", master=True, recompute="gelu+layernorm"),
}
GPUS = (16, 24, 80)  # GiB
lines = []
for name, options in ways.items():
    of_batch = lambda b, options=options: map_of(d12, b, T, "reuse", **options)[1]  # noqa: E731
    fits = [bisect_right(range(1, 1025), size * 2**30, key=of_batch) for size in GPUS]
    lines.append([name, format_bytes(of_batch(4)), format_bytes(of_batch(32)), *map(str, fits)])
print("\n".join(table(["d12", "B = 4", "B = 32", *(f"largest B in {size} GiB" for size in GPUS)], lines)))

# %% [markdown]
# ## The arena itself
#
# So far nothing was allocated. `Arena` makes the one allocation and all the views. `m`, a plain namespace, has every
# tensor by name, and `m.layers[l]` those of layer `l`. The views are created once, so a step creates none.
#
# All parameters are contiguous, and so are all gradients. `m.flat.gradients` is all of them as one long row: the
# optimiser is one call over that row and needs no list of tensors.

# %%
arena = Arena(groups, nano, "reuse", ops)
m = arena.training()
initialise(ops, arena, seed=0)


def address(x):
    return x.__array_interface__["data"][0] - arena.memory.__array_interface__["data"][0]


print(f"the arena: {arena.nbytes:,} bytes, {len(arena.tensors)} tensors")
for name, x in (("m.wte", m.wte), ("m.qkvw", m.qkvw), ("m.layers[1].qkvw", m.layers[1].qkvw)):
    print(f"{name}: shape {x.shape}, at byte {address(x):,}")
C = nano.channels
step = 4 * 3 * C * C
print(f"from one layer's qkvw to the next: 4 * 3C * C = {step:,} bytes; {address(m.qkvw) + step:,}")
m.dqkvw[1, 0, 0] = 5.0
print("m.dqkvw[1, 0, 0] = 5 is also in m.flat.gradients, at index", int(np.flatnonzero(m.flat.gradients == 5)[0]))
print(
    "m.flat.parameters has qkvw[1, 0, 0] at the same index:",
    m.flat.parameters[np.flatnonzero(m.flat.gradients == 5)[0]] == m.qkvw[1, 0, 0],
)
print("dqkv of layer 0 and dqkv of layer 1 are the same memory:", m.layers[0].dqkv is m.layers[1].dqkv)

# %% [markdown]
# A step then allocates nothing. We can verify that: `tracemalloc` counts every byte that Python or NumPy allocates.
# Here are a forward pass, the loss and a backward pass, run once to warm up and once under observation.

# %%
m.batches[...] = np.arange(m.batches.size).reshape(m.batches.shape) % nano.vocab_size
gradients(ops, nano, m)
tracemalloc.start()
before = tracemalloc.get_traced_memory()[0]
gradients(ops, nano, m)
kept, most = (x - before for x in tracemalloc.get_traced_memory())
tracemalloc.stop()
print(f"loss {m.loss[0]:.3f}; the arena has {arena.nbytes:,} bytes")
print(f"allocated during the step: at most {most:,} bytes, for small Python objects")
assert most < arena.nbytes // 10

# %% [markdown]
# ## The first op, four times
#
# Let us use the arena for the first thing that the model does with a batch. `encoder_forward` looks up each token's row
# of `wte` and adds its position's row of `wpe`:
#
# $$ \text{out}_{b,t,c} = \text{wte}_{\,\text{tokens}_{b,t},\;c} + \text{wpe}_{t,c} $$
#
# There is almost nothing to compute: one addition for every element written. So memory is what matters, and in
# particular the **order** of the accesses. Memory moves in cache lines, 16 float32 elements at a time, whether you use
# one of them or all 16.
#
# From here on, a lesson is a *ladder*. Its *rungs* are functions that compute the same result, `..._v1`, `..._v2`, and
# so on, each with one more idea. The last rung is the function that the model really uses, imported from its module.
# `@njit` is Numba's decorator: it compiles the Python function to machine code when it is first called.
#
# **v1** has the channels in its outermost loop. Each access is a whole row away from the one before, so it uses one
# element of each cache line that it fetches, and comes back for the next element when the line may have been evicted.

# %%
pictures.source(lookup_cpu.encoder_forward_v1)

# %% [markdown]
# **v2** has the same three loops in another order: $c$ is innermost. Now it goes through memory contiguously and uses
# all of each line, and the processor detects the pattern and prefetches the next lines. The compiler can also add 8 or
# 16 elements with one instruction.

# %%
pictures.source(lookup_cpu.encoder_forward_v2)

# %% [markdown]
# **v3** distributes the rows over the processor's cores. `prange` is Numba's parallel `range`: its iterations run in
# any order and at the same time. That is correct only because each iteration has its own row of `out`; no two ever
# write to the same element. Which iteration owns which output is a question that every lesson asks.

# %%
pictures.source(lookup_cpu.encoder_forward_v3)

# %% [markdown]
# **The model's op** distributes the positions $t$ instead. A thread then reads its row of `wpe` from memory once and
# uses it for the whole batch.

# %%
pictures.source(lookup_cpu.encoder_forward)

# %% [markdown]
# How far do v1 and v2 jump? The picture shows their first writes to `out` at a small size. `simulate_cpu` runs a
# function as plain Python and records every element that it reads or writes.


# %%
def draw_order(rungs, sizes, most=96):
    """The elements of out that each rung writes, in order, and their cache lines."""
    figure, axes = pictures.new(1, len(rungs), width=9, height=3.2, sharey=True)
    for axis, rung in zip(axes, rungs, strict=True):
        trace = simulate_cpu(rung, **arguments(lookup_cpu.FORWARD.problem, sizes))
        elements = [a.offset // a.nbytes for a in trace.accesses if a.array == "out" and a.kind == "write"]
        lines = [n // 16 for n in elements]
        moves = 1 + sum(a != b for a, b in zip(lines, lines[1:], strict=False))
        for line in range(0, len(elements) // 16, 2):
            axis.axhspan(16 * line - 0.5, 16 * line + 15.5, color="0.93", linewidth=0)
        axis.plot(elements[:most], ".-", markersize=4, linewidth=0.6, color=COLOURS[0])
        axis.set(title=f"{rung.__name__}: {moves} cache-line changes", xlabel="access", ylim=(-2, max(elements) + 2))
    axes[0].set_ylabel("element of out in memory\n(a stripe is a cache line)")
    return figure


order_sizes = dict(B=2, T=4, C=24, Vp=7)
rungs_shown = (lookup_cpu.encoder_forward_v1, lookup_cpu.encoder_forward_v2)
pictures.show(draw_order(rungs_shown, order_sizes))

# %% [markdown]
# Are they correct? `ladder.check` compares each rung with the same formula in NumPy with float64, at several shapes.
# Awkward sizes find the errors: 1, 3, 97 and 257 are multiples of nothing.

# %%
ladder.check(lookup_cpu.FORWARD)

# %% [markdown]
# And how fast are they? The op has to read a row of `wte` and write a row of `out` for every token, and to read `wpe`
# once: $4\,(2\,B\,T\,C + T\,C)$ bytes in float32. The table divides that by the time. Its limit is the speed at which
# this machine copies a large array, also measured here. More than 100% is possible if part of the table is still in the
# processor's caches from the run before. If PyTorch is installed, its op is timed too.

# %%
found = timing.show_times(lookup_cpu.FORWARD)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# Changing the order of two loops cost nothing and is the first rung that matters. The same question comes back on the
# GPU in another form: there 32 threads access memory together, and it matters whether the elements that they access are
# contiguous.
#
# A rung is also an op that a run can use. This trains with v2 instead of the model's own op and prints how much their
# results differ:
#
# ```sh
# python -m llm_numba.train --preset nano --use encoder_forward=lessons/rungs/lookup_cpu.py:encoder_forward_v2
# ```
#
# The last exercise does what views do for you: the lookup, with indices into one flat array.

# %%
exercise.show("arena_lookup")

# %%
exercise.check("arena_lookup")

# %% [markdown]
# ## Summary
#
# - A tensor is an offset and a shape. Rows follow each other, and the last index moves by one element.
# - Parameters, gradients and the optimiser's averages take $16 N$ bytes; what the batch adds is proportional to its
#   number of tokens.
# - Tensors that are never needed at the same time can use the same memory, without a change in the code.
# - `python -m llm_numba.train --preset d12 --batch-size 4 --plan-memory` prints the whole map, for your machine.
#
# Next: one layer by hand, and the first GPU kernel.
