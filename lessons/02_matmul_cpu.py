# %% [markdown]
# # Matrix multiplication on a CPU
#
# **Goal.** The op in which a language model spends almost all of its time, from three naive loops to the function that
# the model trains with, compared with the matrix product of NumPy's library. There are five ideas in between, one per
# rung.
#
# **Why it is worth a lesson.** A layer of GPT-2 multiplies every token's activations by four matrices, and the last
# layer by one more, with a row for each word of the vocabulary. The next cell counts the arithmetic for one token: in
# those products, and in attention, which compares the token with the tokens before it. (All other layers do a handful
# of flops per element.) A model is about as fast as its matmul.
#
# **What you need.** Lesson 01: vector registers, `prange`, and how to read a ladder. No GPU: that is lesson 03.

# %%
from collections import OrderedDict

import numpy as np
from numba import get_num_threads

from llm_numba import oracle
from llm_numba.cpu import naive
from llm_numba.cpu.tile import MR, NR
from llm_numba.lessons import exercise, ladder, pictures, sized, timing
from rungs import matmul_cpu

L, C, T, Vp = 12, 768, 1024, 50304  # the smallest GPT-2: layers, channels, context length, vocabulary
products = 2 * (L * (3 + 1 + 4 + 4) * C * C + Vp * C)  # a multiplication and an addition per weight
attention = L * 2 * 2 * C * T / 2  # two sums of C terms per earlier token; on average half the context
share = products / (products + attention)
print(f"{1e-6 * products:.0f} million flops per token in products with weights, {share:.0%} of the total")

# %% [markdown]
# ## The formula
#
# A *linear layer* maps the rows of `inp` (R, C), one for each token and C channels wide, to rows of `out` (R, OC). Each
# output channel $o$ has its own C weights, row $o$ of `weight` (OC, C), and a bias:
#
# $$ y_{ro} = b_o + \sum_{c=1}^{C} x_{rc}\, w_{oc} $$
#
# In NumPy that is one line, which in float64 is the oracle of this lesson. (The model's arrays have shape (B, T, C): B
# sequences of T tokens. For this op they are simply R = B·T rows.)

# %%
pictures.source(oracle.matmul_forward)

# %% [markdown]
# There are R·OC sums of C terms each, and a term costs a multiplication and an addition: two *flops*, floating-point
# operations. In total
#
# $$ 2 \cdot R \cdot C \cdot OC \ \text{flops, on only}\quad R\,C + OC\,C + R\,OC \ \text{elements.} $$
#
# For R = C = OC = n these are $2n^3$ flops on $3n^2$ elements: each element of the operands is used n times. That is
# the opportunity of this op. Nothing has to wait for memory if an element, once fetched, is reused many times before it
# is evicted. All rungs below are about this reuse.
#
# ### What the machine could do
#
# A core executes a fixed number of multiply-adds a second, which we measure with a loop that does nothing else. Memory
# delivers a fixed number of bytes a second. Which of the two limits an op depends on its *arithmetic intensity*, the
# flops that it does for each byte that it moves. At $I$ flops per byte no program is faster than
#
# $$ \min(\text{peak}, \; I \cdot \text{bandwidth}). $$
#
# Drawn over $I$ this looks like a roof, so the picture is called a *roofline*; its corner is the *ridge point*. Left of
# the ridge point an op is memory-bound, like LayerNorm. Right of it an op is compute-bound, like the matrix product, if
# it has enough rows. With a single row, as when a model generates a text token by token, every weight is fetched for
# one multiply-add: then the same op is memory-bound.


# %%
def intensity(R, C, OC):
    """Flops per byte moved, if each array is read or written once."""
    return 2 * R * C * OC / (4 * (R * C + OC * C + R * OC))


peaks = timing.peaks("cpu")
peak, bandwidth = peaks["flops"] or 2e11, peaks["read"] or 2e10  # made-up values in the tests, which measure nothing
places = {
    "two arrays added": 1 / 12,
    "matmul, 1 row": intensity(1, 768, 768),
    "16 rows": intensity(16, 768, 768),
    "2048 rows": intensity(2048, 768, 768),
}


def roofline():
    figure, axis = pictures.new(width=8, height=3.4)
    I = np.logspace(-1.6, 2.8, 200)
    axis.loglog(I, np.minimum(peak, I * bandwidth) / 1e9, color="0.3", linewidth=1.8)
    for i, (name, x) in enumerate(places.items()):
        axis.axvline(x, color=pictures.COLOURS[i], linewidth=1, linestyle=":")
        axis.text(x * 1.06, 1.5 * peak / 1e9, name, color=pictures.COLOURS[i], fontsize=8)
    axis.text(1.4, bandwidth / 1e9, f"memory: {bandwidth / 1e9:.0f} GB/s", fontsize=8, va="top")
    axis.text(600, 0.85 * peak / 1e9, f"all cores: {peak / 1e9:.0f} GFLOP/s", fontsize=8, ha="right", va="top")
    axis.set(
        xlabel="arithmetic intensity: flops per byte", ylabel="GFLOP/s", ylim=(bandwidth / 1e9 / 50, 2.5 * peak / 1e9)
    )
    return figure, axis


figure, axis = roofline()
pictures.show(figure)

# %% [markdown]
# From here on we use R = 2048 rows, far to the right: the limit is the peak. If a rung stays below it, something other
# than memory bandwidth holds it back, between the registers and the caches.
#
# ## The rungs
#
# ### v1: three loops
#
# The formula as loops.

# %%
pictures.source(naive.matmul_forward)

# %% [markdown]
# Two things are wrong with it, both in the innermost line. It loads two elements for each multiply-add. And it adds to
# one `total`: each addition waits for the one before it, which takes several cycles, so a core that could compute
# several vectors of sums in that time computes a single one. Lesson 01 explained the cause: a compiler must not regroup
# a sum.
#
# ### v2: the order of the loops
#
# There are R·OC independent sums. So let us change the order of the loops: for an output channel, first add the first
# term of *all* rows' sums, then the second term of all of them. The innermost loop then goes over the rows:
#
# `sums[r] += w * column[r]`
#
# One weight and many adjacent sums: a vector instruction does 4, 8 or 16 of them, and each sum is still computed in the
# same order as before. No `fastmath` is needed.
#
# There is a price: the elements `inp[0, c]`, `inp[1, c]`, ... must be contiguous in memory, but they lie C apart. So
# the input is transposed first, into `scratch`, temporary memory that the caller provides. That moves R·C elements
# once, compared with R·C·OC multiply-adds.

# %%
pictures.source(matmul_cpu.operands, matmul_cpu.matmul_forward_v2, matmul_cpu.transpose, matmul_cpu.sums_side_by_side)

# %% [markdown]
# ### v3: sums that stay in registers
#
# Look at v2's innermost line as the core sees it: load `column[r]`, load `sums[r]`, multiply and add, store `sums[r]`.
# Two loads and a store for a multiply-add. The sums travel to the cache and back C times, although only the final
# values are needed.
#
# A core has 16 or 32 vector registers. If we take only so many rows at a time that their sums fit into a few registers,
# the sums stay there until they are complete. `NR` is that number of rows. `new_row()` returns an array of NR elements
# whose size the compiler knows and that nothing else can access, so it keeps them in registers.
# `add_scaled(sums, x, numbers)` is `sums += x * numbers` for NR elements. (Both come from `llm_numba/cpu/tile.py`. An
# array from `np.empty` would do as well, except that the compiler cannot prove that nothing else accesses it, and
# stores it each time.)
#
# The input is packed accordingly, in *panels* of NR rows: `panels[j, c, i] = inp[j * NR + i, c]`. So each step reads
# the next NR elements in memory.

# %%
pictures.source(matmul_cpu.sums_in_registers, matmul_cpu.packed, matmul_cpu.pack)

# %% [markdown]
# Per multiply-add that is one load and no store, a third of v2's traffic with the nearest cache. And yet both v2 and v3
# go through all of the input, R·C elements, for every single output channel. If these do not fit into the nearer
# caches, they come from farther away each time, 4·R·C·OC bytes in total, and then both rungs wait for the same data.
# Check in the table below whether they do here. The cure is to use an element more often once it has been fetched.
#
# ### v4: a register tile
#
# Now the main idea of all fast matrix products, on CPUs and GPUs alike. Take MR output channels at a time. For a term
# $c$, load NR elements of the panel and MR weights, and multiply *each with each*: MR·NR multiply-adds for MR + NR
# loaded elements. The work grows with the area of the tile, the traffic with its edges:
#
# $$ \frac{\text{multiply-adds}}{\text{elements loaded}} = \frac{MR \cdot NR}{MR + NR} $$

# %%
pictures.source(matmul_cpu.tiles_in_registers, matmul_cpu.multiply)


# %%
def draw_reads(axis, title, rows, columns):
    """Three matrices, and the parts that one innermost step accesses: out = inp times weight transposed."""
    from matplotlib.patches import Rectangle

    n = 12
    for x, y, name, part in (
        (0, 0, "inp (R, C)", (0, 4, n, rows)),
        (n + 1, -n - 1, "weight, transposed (C, OC)", (5, 0, columns, n)),
        (n + 1, 0, "out (R, OC)", (5, 4, columns, rows)),
    ):
        axis.add_patch(Rectangle((x, y), n, n, facecolor="0.93", linewidth=0))
        colour = pictures.COLOURS[1] if name.startswith("out") else pictures.COLOURS[0]
        axis.add_patch(Rectangle((x + part[0], y + part[1]), part[2], part[3], facecolor=colour, linewidth=0))
        axis.text(x + n / 2, y + n + 1.2 if y == 0 else y - 0.4, name, ha="center", fontsize=8)
    axis.set_title(f"{title}\nloads: {rows} + {columns}, multiply-adds: {rows * columns}", fontsize=9)
    axis.set(xlim=(-0.5, 2 * n + 1.5), ylim=(n + 2, -n - 2.5), aspect="equal")
    axis.axis("off")


figure, axes = pictures.new(1, 3, width=9, height=3.4)
draw_reads(axes[0], "v1: one sum", 1, 1)
draw_reads(axes[1], "v3: a row of sums", 4, 1)
draw_reads(axes[2], "v4: a tile of sums", 4, 3)
pictures.show(figure)

# %% [markdown]
# (The picture shows a small tile of 4 rows and 3 output channels. On this machine the tile is `NR` by `MR`, as the next
# cell prints.)
#
# So why not a tile of 100 x 100? Because of the registers: they must hold all sums, and also NR elements of the panel
# and a weight. The next picture shows the multiply-adds for each vector load or weight load, for tiles of MR output
# channels and $v$ vectors of rows: MR·v multiply-adds for MR + v loads. The white line encloses the tiles that fit into
# 32 registers: MR·v sums, v vectors of the panel, and a weight.

# %%
channels, vectors = np.arange(1, 13), np.arange(1, 9)
ratio = channels[:, None] * vectors / (channels[:, None] + vectors)
fits = channels[:, None] * vectors + vectors + 1 <= 32
figure, axis = pictures.new(width=7, height=3.6)
drawn = axis.imshow(ratio, origin="lower", cmap="viridis", extent=(0.5, 8.5, 0.5, 12.5), aspect="auto")
for v in vectors:
    most = channels[fits[:, v - 1]].max()
    axis.plot([v - 0.5, v + 0.5], [most + 0.5] * 2, color="white", linewidth=2)
    if v > 1:
        axis.plot([v - 0.5] * 2, [most + 0.5, channels[fits[:, v - 2]].max() + 0.5], color="white", linewidth=2)
for m, v in np.ndindex(ratio.shape):
    colour = "black" if ratio[m, v] > 3.2 else "white"
    axis.text(v + 1, m + 1, f"{ratio[m, v]:.1f}", ha="center", va="center", fontsize=7, color=colour)
axis.set(xlabel="v: vectors of rows in the tile", ylabel="MR: output channels", yticks=channels[1::2])
axis.set_title("multiply-adds per load; below the line: fits into 32 registers")
figure.colorbar(drawn, ax=axis)
pictures.show(figure)
print(f"the model's tile on this machine: MR = {MR} output channels, NR = {NR} rows")

# %% [markdown]
# The best of those that fit are nearly square. A much larger tile would spill: the compiler would have to keep sums in
# memory, which is where they were in v2. If a processor's vectors hold 16 elements, NR = 64 is four of them, and the
# tile is the nearly square 6 x 4.
#
# ### v5: blocks that stay in the cache
#
# The registers are full; now the caches. Behind the registers a core has a small first-level cache (*L1*, tens of kB),
# a second-level cache (*L2*, around one MB), then one that all cores share (*L3*), then memory: each several times
# larger and several times slower than the one before. Caches keep the data that was used last, in *lines* of 64 bytes.
# A loop that returns to an element soon finds it still there; a loop that goes through more than the cache holds before
# it returns does not.
#
# v4 goes through *all* panels for each MR output channels: R·C elements, before it returns to the first. If they do not
# fit into L2, every tile has to fetch its panel from L3 or memory. v5 only changes the order of the tiles:
#
# - a block of OB = 96 rows of weights at a time,
# - within it one panel at a time,
# - and of both only KB = 384 terms at a time.
#
# Then each panel reuses OB·KB weights (the panel's part is smaller still), and they fit into L2. The sums are no longer
# complete after a tile, so a small array `sums` (OB, NR) accumulates them.

# %%
pictures.source(matmul_cpu.block_of_outputs, matmul_cpu.all_blocks)

# %% [markdown]
# We can compute the effect without measuring. The next cell simulates a cache of $s$ lines with a list: a line that is
# accessed moves to the front, and a line that falls off the end is evicted. We let the loops of the rungs access their
# lines, at toy sizes, and count the cache misses.


# %%
def fetched(stream, size):
    """The number of cache misses of a stream of lines, in an LRU cache of `size` lines."""
    cache, count = OrderedDict(), 0
    for line in stream:
        if line in cache:
            cache.move_to_end(line)
        else:
            count += 1
            cache[line] = None
            if len(cache) > size:
                cache.popitem(last=False)
    return count


LINE = 16  # float32 elements in a line of 64 bytes
R = O = sized(128, 64)
K = 64
tile_rows, tile_channels, block_channels, block_terms = 16, 4, 32, 32


def lines_v1():
    for r in range(R):
        for o in range(O):
            for c in range(0, K, LINE):
                yield "inp", r, c
                yield "weight", o, c


def lines_v2():
    for o in range(O):
        for c in range(K):
            if c % LINE == 0:
                yield "weight", o, c
            for r in range(0, R, LINE):
                yield "column", c, r
                yield "sums", r


def lines_v4():
    for o in range(0, O, tile_channels):
        for j in range(R // tile_rows):
            yield from lines_of_tile(o, j, 0, K)


def lines_v5():
    for block in range(0, O, block_channels):
        for j in range(R // tile_rows):
            for c0 in range(0, K, block_terms):
                for o in range(block, block + block_channels, tile_channels):
                    yield from lines_of_tile(o, j, c0, c0 + block_terms)


def lines_of_tile(o, j, first, last):
    for c in range(first, last):
        yield "panel", j, c
        if c % LINE == 0:
            for m in range(tile_channels):
                yield "weight", o + m, c


sizes = [2**i for i in range(3, sized(12, 11))]
figure, axis = pictures.new(width=7.5, height=3.2)
for i, stream in enumerate((lines_v1, lines_v2, lines_v4, lines_v5)):
    counts = [fetched(stream(), size) for size in sizes]
    axis.loglog(sizes, counts, marker="o", markersize=3, color=pictures.COLOURS[i], label=stream.__name__[-2:])
once = (R * K + O * K) // LINE
axis.axhline(once, color="0.5", linestyle="--", linewidth=1)
axis.text(sizes[0], once * 0.72, "each line of both operands once", fontsize=8, color="0.4")
axis.set(xlabel="cache size in lines", ylabel="lines fetched", xticks=sizes, xticklabels=map(str, sizes))
axis.set(ylim=(once * 0.5, None))
axis.minorticks_off()
axis.legend(frameon=False)
pictures.show(figure)

# %% [markdown]
# Read it from right to left. In a cache that holds both operands all rungs are alike: each line is fetched once. As
# soon as the operands do not fit, v1, v2 and v4 jump, because each of them returns to an operand only after going
# through all of it: v1 and v2 for each row or channel, v4 for each MR of them. v5 returns to the panels once per block,
# and stays low until a block of weights and a piece of a panel no longer fit. (In the smallest caches v2 is worst,
# because it also has to fetch sums.)
#
# ### v6: all cores
#
# Each core takes its own blocks of output channels; blocks are also a good unit for distributing the work. No two cores
# write the same element of `out`, and all of them read the same panels.

# %%
pictures.source(matmul_cpu.matmul_forward_v6, matmul_cpu.all_blocks_at_once)

# %% [markdown]
# ## First correct, then fast
#
# The shapes are awkward on purpose: one row; 97 and 257, which no tile divides; 500 terms, of which a block of 384
# leaves a remainder.

# %%
ladder.check(matmul_cpu.FORWARD)

# %% [markdown]
# The table's limit is the peak of all cores together, although v1 to v5 use only one. `numpy_blas` is `np.matmul`,
# which calls a *BLAS*, a library with hand-written kernels for each family of processors. PyTorch uses another one.
# They are the ones to compare with.

# %%
found = timing.show_times(matmul_cpu.FORWARD)
pictures.show(pictures.draw_times(found))
for rung in (matmul_cpu.matmul_forward_v2, matmul_cpu.matmul_forward_v3):
    rate = 2 * found["work"] / found["rows"][rung.__name__]  # 4 bytes per multiply-add, which is two flops
    print(f"{rung.__name__} reads the input at {1e-9 * rate:.1f} GB/s")

# %% [markdown]
# The same results on the roofline. All rungs do the same flops on the same arrays, so they have the same intensity and
# stand above one another; they differ in how much of the peak they reach. The dashed line is one core's share of the
# peak.

# %%
figure, axis = roofline()
threads = get_num_threads()
if threads > 1:
    axis.axhline(peak / threads / 1e9, color="0.5", linestyle="--", linewidth=1)
    axis.text(0.03, 1.08 * peak / threads / 1e9, "one core", fontsize=8, color="0.4")
for name, seconds in found["rows"].items():
    rate, x = found["work"] / seconds / 1e9, places["2048 rows"]
    axis.plot(x, rate, "o", markersize=4, color=pictures.colour_of(name))
    if name.rpartition("_v")[2] in "1234":
        left = name[-1] in "13"
        axis.text(
            (0.88 if left else 1.15) * x, rate, name[-2:], fontsize=8, ha="right" if left else "left", va="center"
        )
pictures.show(figure)

# %% [markdown]
# ## The last rung
#
# The green bar is the model's own `matmul_forward`, from `llm_numba/cpu/matmul.py`. It has the structure of v6, plus
# details: all cores pack the panels; the sums are transposed into rows of `out` in small squares; a handful of rows is
# computed by dot products, because tiles would be mostly empty; and `multiply` is written so that the compiler reliably
# keeps the tile in registers, on machines with vectors of 4, 8 or 16 elements.
#
# Its twin, `matmul_backward`, is two more products, with the same `multiply`:
#
# $$ dx_{rc} = \sum_o dy_{ro}\, w_{oc} \qquad dw_{oc} = \sum_r dy_{ro}\, x_{rc} \qquad db_o = \sum_r dy_{ro} $$
#
# The input's gradient sums over output channels, the weight's over rows, so each time another operand has to be packed.
# With the forward product that makes three, so a training step costs three times as much as a forward pass.
#
# A rung can also run in real training, where it is timed and compared with the model's own:
#
# ```sh
# python -m llm_numba.train --preset nano --use matmul_forward=lessons/rungs/matmul_cpu.py:matmul_forward_v4
# ```
#
# ## Exercise: a tiled product
#
# Tiles are simple except at the edges: real matrices are rarely multiples of the tile. Write a tiled product that is
# correct for any shape. Open `exercises/matmul_tiled.py`, replace the line that raises `NotImplementedError`, and run
# the last cell again. It first runs the function as plain Python, with every read and write recorded, and then
# compiled.

# %%
exercise.show("matmul_tiled")

# %%
exercise.check("matmul_tiled")

# %% [markdown]
# ## Further experiments
#
# - Halve `KB` and double `OB` in a copy of `rungs/matmul_cpu.py`. What should change in the cache picture, and what in
#   the table?
# - Change R to 8 in the ladder's `timed` sizes. Which rungs get slower, and why does packing no longer pay off?
# - Lesson 03 does all this on a GPU. There, a block of threads has its own small memory for tiles, and the program
#   decides what goes into it.
