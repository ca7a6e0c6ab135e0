# %% [markdown]
# # The arena: a whole training in one array
#
# **Goal.** To know every tensor that the training of a GPT-2 needs: what it is for, how large it is, and where it
# stands in memory. At the end you can say what a batch of a given size costs before anything is allocated.
#
# **Why it matters.** Most programs ask the system for memory whenever they need some, thousands of times a second.
# This one asks once. Everything that it will ever write to, parameters, gradients, what the layers remember, the batch
# and the loss, is a piece of one long array: the *arena*. That is easy to look at, it cannot run out of memory in the
# middle of the night, and lesson 09 shows that a GPU can replay a whole step only because of it.
#
# You need Python and NumPy. You do not need a GPU, nor to have seen a language model from within.

# %%
import math
import tracemalloc
from bisect import bisect_right

import numpy as np

from llm_numba.arena import Arena, format_map, layout, padded, parameter_specs, training_groups
from llm_numba.bench.tables import table
from llm_numba.cpu import memory as cpu_memory
from llm_numba.lessons import exercise, ladder, pictures, timing
from llm_numba.lessons.problem import arguments
from llm_numba.lessons.tracing import simulate_cpu
from llm_numba.models import gpt2 as model
from llm_numba.models.config import PRESETS
from llm_numba.ops import get_ops
from llm_numba.plot import COLOURS
from llm_numba.util.files import format_bytes
from rungs import lookup_cpu

ops = get_ops("cpu")

# %% [markdown]
# ## A tensor is a piece of memory with a shape
#
# Memory is a row of numbered bytes. A float32 number takes four of them. A *tensor* is an array with a shape, such as
# 3 x 4; in memory its rows stand one behind the other, so the number in row $i$ and column $j$ of a tensor with $C$
# columns is number
#
# $$ i \cdot C + j $$
#
# counted from the tensor's start. With more axes it goes on in the same way: of a tensor $B \times T \times C$, the
# number at $(b, t, c)$ is number $(b \cdot T + t) \cdot C + c$. The last index moves through memory one number at a
# time, the first one in large jumps.
#
# NumPy can look at a piece of memory as a tensor without copying a byte of it. That is called a *view*. Here are 160
# bytes and two views of them, and below the one line with which the whole project makes its views.

# %%
memory = np.zeros(160, np.uint8)
x = cpu_memory.view(memory, 0, (3, 4), "float32")
y = cpu_memory.view(memory, 64, (2, 3, 4), "float32")
x[2, 1] = 7
print("x[2, 1] is number", 2 * 4 + 1, "of x; memory as floats:", memory[: 3 * 4 * 4].view(np.float32))
print("y[1, 0, 2] is number", (1 * 3 + 0) * 4 + 2, "of y, so byte", 64 + 4 * ((1 * 3 + 0) * 4 + 2), "of memory")

pictures.source(cpu_memory.view)

# %% [markdown]
# The picture shows both views as you think of them, and beneath them the one row that they really are. A number has
# the same colour in both: the darker, the later it comes in its tensor. Between the two stand four numbers (16 bytes)
# that belong to nobody.


# %%
def draw_views():
    """Two views as tables, and the memory that they share as a row."""
    from matplotlib.patches import Rectangle

    figure, axes = pictures.new(2, 1, width=9, height=3.4, height_ratios=[3, 1])
    shades = [np.linspace(0.25, 0.95, 12), np.linspace(0.25, 0.95, 24)]
    import matplotlib

    maps = [matplotlib.colormaps["Blues"], matplotlib.colormaps["Oranges"]]

    def cell(axis, at, row, number, which):
        shade = shades[which][number]
        axis.add_patch(Rectangle((at, row), 0.92, 0.92, color=maps[which](shade), linewidth=0))
        colour = "white" if shade > 0.6 else "black"
        axis.text(at + 0.46, row + 0.46, number, ha="center", va="center", fontsize=7, color=colour)

    for number in range(12):
        cell(axes[0], 3 + number % 4, number // 4, number, 0)
        cell(axes[1], number, 0, number, 0)
    for number in range(24):
        cell(axes[0], 17 + 6 * (number // 12) + number % 4, number // 4 % 3, number, 1)
        cell(axes[1], 16 + number, 0, number, 1)
    for free in range(12, 16):
        axes[1].add_patch(Rectangle((free, 0), 0.92, 0.92, color="0.9", linewidth=0))
    for text, at in (("x, 3 x 4", 2.7), ("y[0]", 16.7), ("y[1]", 22.7)):
        axes[0].text(at, 1.5, text, ha="right", va="center", fontsize=8)
    for axis, height in zip(axes, (3, 1), strict=True):
        axis.set(xlim=(-0.5, 40.5), ylim=(height + 0.1, -0.1))
        axis.axis("off")
    axes[1].set_title("the same numbers in memory", loc="left")
    return figure


pictures.show(draw_views())

# %% [markdown]
# ## What a GPT-2 consists of
#
# A language model reads *tokens*, whole numbers that stand for pieces of text, and says for each place which token may
# come next. Its sizes are
#
# | | |
# |---|---|
# | $B$ | batch: how many pieces of text it reads at a time |
# | $T$ | time: how many tokens each piece has, at most `maxT`, the context |
# | $C$ | channels: how many numbers describe a place in the text |
# | $L$ | layers: how often these numbers are worked over |
# | $V$, $V_p$ | vocabulary: how many tokens there are; padded to a multiple of 128 |
#
# What it has learned are its *parameters*, a short list of tensors. `wte` has a row of $C$ numbers for each token, its
# *embedding*, and `wpe` one for each position. A layer has four matrices (`qkvw`, `attprojw`, `fcw`, `fcprojw`), a
# bias for each (`...b`), and two *LayerNorms* (`ln1`, `ln2`), which are the subject of lesson 01. You need not know
# yet what they do: sizes are all that this lesson is about. Here is the list itself, as the program has it; a line is
# a tensor.

# %%
pictures.source(parameter_specs)

# %% [markdown]
# A line says name and shape, and how the tensor starts: random with a deviation of `std`, or filled with `fill`.
# `per_layer` says that every layer has one; `decays` belongs to the optimiser, lesson 08.
#
# How many parameters is that? The first exercise: count them.

# %%
exercise.show("count_parameters")

# %%
exercise.check("count_parameters")

# %% [markdown]
# The function in `lessons/exercises/count_parameters.py` has a hole. Write into it and run the cell again, or write
# your own function here and give it to `check`: `exercise.check("count_parameters", my_function)`. What is wrong, it
# says in words. ("The program outside of prange" is a function like yours; lesson 01 has others.)
#
# When you have tried, compare: all sizes together are
#
# $$ N = (V_p + \text{maxT})\, C + L\,(12\,C^2 + 13\,C) + 2\,C . $$
#
# The next cell counts both ways, for all the models that the project knows by name.


# %%
def numbers_of(spec, config):
    """How many numbers a line of the list stands for."""
    return math.prod(spec.shape) * (config.num_layers if spec.per_layer else 1)


def formula(config):
    C, L = config.channels, config.num_layers
    return (config.padded_vocab_size + config.max_seq_len) * C + L * (12 * C * C + 13 * C) + 2 * C


lines = []
for name, config in PRESETS.items():
    total = sum(numbers_of(spec, config) for spec in parameter_specs(config))
    assert total == formula(config)
    sizes = [config.max_seq_len, config.vocab_size, config.num_layers, config.num_heads, config.channels]
    lines.append([name, *map(str, sizes), f"{total:,}"])
print("\n".join(table(["preset", "maxT", "V", "L", "heads", "C", "parameters"], lines)))

# %% [markdown]
# Where are they? In a small model the table of tokens is the largest part. It grows with $C$, while the matrices of
# the layers grow with $C^2$, and the number of layers grows too, so that in a large model nearly all is in the
# matrices.


# %%
def draw_parameters():
    """For each preset, the share of each kind of parameters."""
    kinds = {
        "wte, a row for each token": ("wte",),
        "wpe, a row for each position": ("wpe",),
        "matrices of attention": ("qkvw", "attprojw"),
        "matrices of the MLP": ("fcw", "fcprojw"),
    }
    figure, axis = pictures.new(width=9, height=3.2)
    for row, config in enumerate(PRESETS.values()):
        numbers = {spec.name: numbers_of(spec, config) for spec in parameter_specs(config)}
        total, left = sum(numbers.values()), 0.0
        shares = [sum(numbers[n] for n in names) / total for names in kinds.values()]
        for i, share in enumerate([*shares, 1 - sum(shares)]):
            label = [*kinds, "biases and LayerNorms"][i] if row == 0 else None
            axis.barh(row, share, 0.75, left=left, color=COLOURS[i], label=label)
            if share > 0.06:
                axis.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", color="white", fontsize=8)
            left += share
    names = [f"{name}: {formula(c) / 1e6:,.4g} million" for name, c in PRESETS.items()]
    axis.set(yticks=range(len(names)), yticklabels=names, xticks=[], xlim=(0, 1), xlabel="share of the parameters")
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


pictures.show(draw_parameters())

# %% [markdown]
# ## One tensor behind the other
#
# `layout` goes through such lists and gives each tensor its *offset*, the byte at which it begins. It allocates
# nothing. One rule is needed beside adding up. Processors like addresses that are multiples of 64 bytes: a *cache
# line*, the piece in which memory is moved, has 64 bytes, and the widest register does too. So each tensor is padded
# to a multiple of `RUN` = 64 numbers:
#
# $$ \text{padded}(n) = \left\lceil \frac{n}{64} \right\rceil \cdot 64 . $$
#
# Why numbers and not bytes? Gradients belong to parameters number by number, and the parameters may later be 2 bytes
# wide while their gradients have 4. As both are padded in numbers, number $i$ of one group belongs to number $i$ of
# the other.

# %%
exercise.show("arena_offsets")

# %%
exercise.check("arena_offsets")

# %% [markdown]
# And this is how the project does it. What `shares` and `rows` are for comes below.

# %%
pictures.source(padded, layout)

# %% [markdown]
# This is the map of the smallest model, as `--plan-memory` prints it before a run, cut after the parameters.

# %%
nano = PRESETS["nano"]
B, T = 1, 8
groups = training_groups(nano, B, T, ops)
places, nbytes = layout(groups, nano.num_layers, "keep")
text = format_map(places, nbytes).splitlines()
print("\n".join([*text[: 1 + len(groups["parameters"])], "...", text[-1]]))

# %% [markdown]
# ## What else a training needs
#
# A training *step* goes like this. The model reads a batch, layer by layer, and answers for each place which token
# comes next: the *forward pass*. The *loss* is one number that says how far these answers are from the true text. The
# *backward pass* then goes the same way in reverse, from the loss to the first layer, and finds for each parameter how
# the loss would change with it: its *gradient*. The *optimiser* moves each parameter a little against its gradient. A
# function that does one piece of this, such as one LayerNorm forward, is called an *op*.
#
# For that the parameters alone are not enough. The arena has these groups:
#
# | group | what it holds | size |
# |---|---|---|
# | parameters | what the model has learned | $N$ |
# | gradients | for each parameter, how the loss changes with it | $N$ |
# | m, v | the optimiser's two running averages for each parameter (lesson 08) | $2N$ |
# | activations | what each layer computed, kept because the way back needs it | grows with $B \cdot T$ |
# | activation gradients | how the loss changes with each activation | grows with $B \cdot T$ |
# | inputs | the batch, the learning rate, the loss: the numbers that change each step | small |
# | scratch | room that an op may use while it runs | small |
#
# In float32 the first three rows make $4 \cdot 4 N = 16 N$ bytes, whatever the batch. Activations are what a batch
# costs. A layer leaves about $16\,B\,T\,C$ numbers. Do not mind the names yet, each has its lesson: two normalised
# copies of the layer's input ($2C$ a token), queries, keys and values ($3C$), attention's result ($C$), two sums
# ($2C$), and the wide middle of the layer before and after a function named GELU ($4C + 4C$).
#
# **Not everything needs a place of its own.** On the way back, the gradient of one layer's activations is needed only
# until the next layer's is there. Tensors that are never needed at the same time may stand in the same place: in the
# list they name the same slot, `shares="dwide"`. The *plan* decides whether that is done. `reuse` lays them over one
# another, for training. `keep` gives each its own place, so that you can look at everything after a step. The code
# that computes is the same: it is given views, and does not know.
#
# Now the picture of it all, for GPT-2's smallest size. Memory is read like a page, from left to right and line by
# line; every line is the same number of bytes in both pages. Nothing here is allocated: a map is a list of numbers.
# Two tones of a colour tell large neighbours apart, and the largest tensors have their names.

# %%
GROUP_COLOURS = dict(
    zip(
        ("parameters", "gradients", "m", "v", "activations", "activation gradients", "inputs", "scratch"),
        (COLOURS[0], COLOURS[1], COLOURS[5], "#8CC6E7", COLOURS[2], COLOURS[4], COLOURS[6], "#999999"),
        strict=True,
    )
)
WIDTH, LINES = 200, 100


def draw_map(pages, config):
    """The arena under several plans, on one scale. pages: a title -> (places, nbytes)."""
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
                light = not light  # large neighbours differ
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


def map_of(config, B, T, plan, **options):
    groups = training_groups(config, B, T, ops, **options)
    return layout(groups, config.num_layers, plan)


d12 = PRESETS["d12"]
B, T = 4, 256
pages = {f"{plan}, {B} x {T} tokens": map_of(d12, B, T, plan) for plan in ("keep", "reuse")}
pictures.show(draw_map(pages, d12))

# %% [markdown]
# Both pages begin with the same four blocks: parameters, gradients, `m` and `v`. The difference is in what follows.
# Under `keep`, every layer has its own gradients of activations, and attention keeps all of its weights, a number for
# each pair of tokens (`att`); under `reuse` a slot serves all layers in turn, and attention keeps one number for each
# token and head, from which lesson 05 gets the rest again. These are the slots, and what they save:

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
print("\n".join(table(["slot", "who lives there", "each its own", "shared"], lines)))

# %% [markdown]
# ## What a batch costs
#
# As the map is a list of numbers, we can ask it for any batch at all. Everything that grows does so in proportion to
# the tokens $B \cdot T$ (only attention's weights under `keep` grow with $B\,T^2$), so that
#
# $$ \text{bytes}(B) \approx 16 N + B \cdot (\text{bytes of one piece of text}) . $$
#
# One exception is there on purpose. The *logits*, the model's answers, have $V_p$ numbers for each token. There are so
# many that they would be the largest tensor of all. Under `reuse` there is room for a part of the rows at a time, a
# quarter of them but at least 1024 (`logits_rows` in `arena.py`).


# %%
def bytes_by_group(config, B, T, plan="reuse", **options):
    places, _ = map_of(config, B, T, plan, **options)
    found = dict.fromkeys(GROUP_COLOURS, 0)
    for place in places:
        found[place.group if place.group in found else "parameters"] += place.nbytes
    return found


T = 1024
batches = [1, 2, 4, 8, 16, 32, 64]
costs = {b: bytes_by_group(d12, b, T) for b in batches}
fixed = sum(costs[1][group] for group in ("parameters", "gradients", "m", "v"))
lines = []
for b in batches:
    whole = sum(costs[b].values())
    lines.append([str(b), format_bytes(whole), f"{fixed / whole:.0%}", format_bytes((whole - fixed) / b)])
print("\n".join(table(["B", "the arena", "of it parameters, gradients, m, v", "the rest, for each B"], lines)))


# %%
def draw_costs():
    """The arena's groups by batch size, beside the memory of common cards."""
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
    axis.set(xticks=range(len(batches)), xticklabels=batches, xlabel=f"B, pieces of {T} tokens", ylabel="GiB")
    axis.set(title="the arena of d12, float32; dotted: memory of common cards", xlim=(-0.65, len(batches) - 0.5))
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    return figure


pictures.show(draw_costs())

# %% [markdown]
# What can be done when it does not fit? Fewer tokens at a time; or numbers of 2 bytes in the place of 4 (`bf16`,
# lesson 08: parameters and activations shrink, while a float32 copy of the parameters, `master`, comes on top); or to
# forget activations and compute them again on the way back (*recompute*, lesson 06). The map prices all of that
# without a run. The last column looks for the largest batch in a card's memory, by halving the interval, as
# `--plan-memory` does.

# %%
ways = {
    "float32": {},
    "bf16": dict(dtype="bfloat16", master=True),
    "bf16, GELU recomputed": dict(dtype="bfloat16", master=True, recompute="gelu"),
    "bf16, GELU and LayerNorm recomputed": dict(dtype="bfloat16", master=True, recompute="gelu+layernorm"),
}
CARDS = (16, 24, 80)  # GiB
lines = []
for name, options in ways.items():
    of_batch = lambda b, options=options: map_of(d12, b, T, "reuse", **options)[1]  # noqa: E731
    fits = [bisect_right(range(1, 1025), size * 2**30, key=of_batch) for size in CARDS]
    lines.append([name, format_bytes(of_batch(4)), format_bytes(of_batch(32)), *map(str, fits)])
print("\n".join(table(["d12", "B = 4", "B = 32", *(f"largest B in {size} GiB" for size in CARDS)], lines)))

# %% [markdown]
# ## The arena itself
#
# So far nothing was allocated. `Arena` makes the one allocation and all the views. `m`, a plain namespace, has every
# tensor by its name, and `m.layers[l]` those of layer `l`: pieces of the same memory, cut once, so that a step cuts
# nothing.
#
# All parameters stand side by side, and so do all gradients. `m.flat.gradients` is all of them as one long row: the
# optimiser is one call over that row, and need not know that there are tensors.

# %%
arena = Arena(training_groups(nano, 1, 8, ops), nano, "reuse", ops)
m = arena.training()
model.initialise(ops, arena, seed=0)


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
    "and its place among the parameters:",
    m.flat.parameters[np.flatnonzero(m.flat.gradients == 5)[0]] == m.qkvw[1, 0, 0],
)
print("dqkv of layer 0 and of layer 1 are the same memory:", m.layers[0].dqkv is m.layers[1].dqkv)

# %% [markdown]
# A step then allocates nothing. Python can be asked: `tracemalloc` counts each byte that Python or NumPy takes. Here
# is a forward pass of the model, its loss, and the way back, once to warm up and once under observation.

# %%
m.batches[...] = np.arange(m.batches.size).reshape(m.batches.shape) % nano.vocab_size
model.gradients(ops, m, nano.vocab_size)
tracemalloc.start()
before = tracemalloc.get_traced_memory()[0]
model.gradients(ops, m, nano.vocab_size)
kept, most = (x - before for x in tracemalloc.get_traced_memory())
tracemalloc.stop()
print(f"loss {m.loss[0]:.3f}; the arena has {arena.nbytes:,} bytes")
print(f"taken during the step: {most:,} bytes at most, for the small objects of Python's own")
assert most < arena.nbytes // 10

# %% [markdown]
# ## The first op, four times
#
# Let us use the map for something: the first thing that the model does with a batch. `encoder_forward` looks up each
# token's row of `wte` and adds its position's row of `wpe`:
#
# $$ \text{out}_{b,t,c} = \text{wte}_{\,\text{tokens}_{b,t},\;c} + \text{wpe}_{t,c} $$
#
# There is nearly nothing to compute: an addition for every number that is written. So what counts is memory, and what
# counts there is **order**. Memory comes in cache lines, 16 float32 numbers at a time, whether you use one of them or
# all 16.
#
# From here on, a lesson is a *ladder*. Its *rungs* are functions that compute the same, `..._v1`, `..._v2`, and so on,
# each with one idea more than the one before; the last rung is the function that the model really uses, imported from
# where it stands. `@njit` is Numba's: it compiles the Python function to machine code when it is first called.
#
# **v1** walks through the channels in its outermost loop. From one access to the next it moves by a whole row, so of
# each cache line that is fetched it uses one number, and comes back for the next one when the line may be long gone.

# %%
pictures.source(lookup_cpu.encoder_forward_v1)

# %% [markdown]
# **v2** has the same three loops in another order: $c$ is innermost. Now it walks through memory as it is laid out,
# uses all of each line, and the processor, which sees where this is going, fetches the next lines in advance. The
# compiler can also add 8 or 16 numbers with one instruction.

# %%
pictures.source(lookup_cpu.encoder_forward_v2)

# %% [markdown]
# **v3** shares the rows out among the processor's cores. `prange` is Numba's parallel `range`: its iterations run in
# any order and at the same time. That is only right because each of them has its own row of `out`; no two ever write
# to the same number. Who owns what is a question that all lessons ask.

# %%
pictures.source(lookup_cpu.encoder_forward_v3)

# %% [markdown]
# **The model's own** shares out the positions $t$ instead, because then a thread reads its row of `wpe` from memory
# once, and uses it for all the batch.

# %%
pictures.source(lookup_cpu.encoder_forward)

# %% [markdown]
# How far do v1 and v2 jump? The picture follows their first accesses to `out` at a small size. `simulate_cpu` runs a
# function as plain Python and notes every number that it reads or writes.


# %%
def draw_order(rungs, sizes, most=96):
    """Which number of out each rung writes, access after access, and the cache lines that these are in."""
    figure, axes = pictures.new(1, len(rungs), width=9, height=3.2, sharey=True)
    for axis, rung in zip(axes, rungs, strict=True):
        trace = simulate_cpu(rung, **arguments(lookup_cpu.FORWARD.problem, sizes))
        numbers = [a.offset // a.nbytes for a in trace.accesses if a.array == "out" and a.kind == "write"]
        lines = [n // 16 for n in numbers]
        moves = 1 + sum(a != b for a, b in zip(lines, lines[1:], strict=False))
        for line in range(0, len(numbers) // 16, 2):
            axis.axhspan(16 * line - 0.5, 16 * line + 15.5, color="0.93", linewidth=0)
        axis.plot(numbers[:most], ".-", markersize=4, linewidth=0.6, color=COLOURS[0])
        axis.set(title=f"{rung.__name__}: {moves} changes of line", xlabel="access", ylim=(-2, max(numbers) + 2))
    axes[0].set_ylabel("number of out in memory\n(a stripe is a cache line)")
    return figure


order_sizes = dict(B=2, T=4, C=24, Vp=7)
rungs_shown = (lookup_cpu.encoder_forward_v1, lookup_cpu.encoder_forward_v2)
pictures.show(draw_order(rungs_shown, order_sizes))

# %% [markdown]
# Are they right? `ladder.check` holds each rung against the same formula in NumPy with float64 numbers, at several
# shapes. The awkward ones find the mistakes: 1, 3, 97 and 257 are multiples of nothing.

# %%
ladder.check(lookup_cpu.FORWARD)

# %% [markdown]
# And how fast are they? The op has to read a row of `wte` and write a row of `out` for every token, and to read `wpe`
# once: $4\,(2\,B\,T\,C + T\,C)$ bytes in float32. The table divides that by the time. Its "limit" is what this machine
# moves at most when it only copies, measured here too; a little more than 100% is possible, where some of the table is
# still in the processor's caches from the run before. Where there is PyTorch, its own op stands beside ours.

# %%
found = timing.show_times(lookup_cpu.FORWARD)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# The order of two loops is the first rung that matters, and it cost nothing. It will come back on the GPU in another
# form: there 32 threads ask for memory together, and the question is whether what they ask for lies side by side.
#
# A rung is also an op that a run can use. This trains with v2 in the place of the model's own, and says how far apart
# the two are:
#
# ```sh
# python -m llm_numba.train --preset nano --use encoder_forward=lessons/rungs/lookup_cpu.py:encoder_forward_v2
# ```
#
# The last exercise does what all views do for you: the lookup, by indices into one flat array.

# %%
exercise.show("arena_lookup")

# %%
exercise.check("arena_lookup")

# %% [markdown]
# ## What to take along
#
# - A tensor is an offset and a shape; rows stand one behind the other, and the last index moves by one number.
# - Parameters, gradients and the optimiser's averages cost $16 N$ bytes; what the batch adds is in proportion to its
#   tokens.
# - What is never needed at the same time can stand in the same place, and the code need not know.
# - `python -m llm_numba.train --preset d12 --batch-size 4 --plan-memory` prints the whole map, for your machine.
#
# Next: one layer by hand, and the first GPU kernel.
