# %% [markdown]
# # The matrix product on a CPU
#
# **Goal.** The op in which a language model spends nearly all of its time, from three loops that anyone would write to
# the function that the model trains with, and beside it the product of NumPy's own library. Five ideas lie between, one
# in each rung.
#
# **Why it is worth a lesson.** A layer of GPT-2 multiplies every token's numbers by four matrices, and the last layer
# by one more, with a row for each word that could come next. The next cell counts the arithmetic for one token: what
# those products take, and what attention takes for comparing it with the tokens before it. (All other layers do a
# handful of flops for each number.) A model is about as fast as its matmul.
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

L, C, T, Vp = 12, 768, 1024, 50304  # the smallest GPT-2: layers, channels, tokens of a text, words of the vocabulary
products = 2 * (L * (3 + 1 + 4 + 4) * C * C + Vp * C)  # a multiplication and an addition for each weight
attention = L * 2 * 2 * C * T / 2  # two sums of C terms for each of the tokens before: half a text, on average
share = products / (products + attention)
print(f"{1e-6 * products:.0f} million flops a token in products with weights, {share:.0%} of all")

# %% [markdown]
# ## The formula
#
# A *linear layer* takes the rows of `inp` (R, C), one for each token, C channels wide, and makes rows of `out` (R, OC)
# from them. Each output channel $o$ has C weights of its own, the row $o$ of `weight` (OC, C), and a bias:
#
# $$ y_{ro} = b_o + \sum_{c=1}^{C} x_{rc}\, w_{oc} $$
#
# In NumPy that is one line, which in float64 is this lesson's oracle. (The model's arrays have the shape (B, T, C): B
# texts of T tokens. For this op they are nothing but R = B·T rows under one another.)

# %%
pictures.source(oracle.matmul_forward)

# %% [markdown]
# There are R·OC sums, each of C terms, and a term costs a multiplication and an addition: two *flops*, floating-point
# operations. In all
#
# $$ 2 \cdot R \cdot C \cdot OC \ \text{flops, on only}\quad R\,C + OC\,C + R\,OC \ \text{numbers.} $$
#
# For R = C = OC = n these are $2n^3$ flops on $3n^2$ numbers: each number of the operands is used n times. That is the
# treasure of this op. Nothing has to wait for memory if a number, once it has been fetched, is put to use again and
# again before it is gone. All rungs below are about that and nothing else.
#
# ### What the machine could do
#
# A core finishes a fixed number of multiply-adds a second, which we measure with a loop that does nothing else. Memory
# brings a fixed number of bytes a second. Which of the two holds an op back is told by its *arithmetic intensity*, the
# flops that it does for each byte that it has to move. At $I$ flops a byte no program is faster than
#
# $$ \min(\text{peak}, \; I \cdot \text{bandwidth}). $$
#
# Drawn over $I$ this looks like a roof, and so the picture is called a *roofline*. Left of the ridge an op is
# memory-bound: LayerNorm, say. To the right it is compute-bound, and there the matrix product stands, if it has enough
# rows. With a single row, as when a model writes a text token by token, every weight is fetched for one multiply-add:
# then the very same op is memory-bound.


# %%
def intensity(R, C, OC):
    """Flops for each byte that has to come from memory or go there, each array once."""
    return 2 * R * C * OC / (4 * (R * C + OC * C + R * OC))


peaks = timing.peaks("cpu")
peak, bandwidth = peaks["flops"] or 2e11, peaks["read"] or 2e10  # made-up ones in the tests, which measure nothing
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
    axis.set(xlabel="flops for each byte of memory", ylabel="GFLOP/s", ylim=(bandwidth / 1e9 / 50, 2.5 * peak / 1e9))
    return figure, axis


figure, axis = roofline()
pictures.show(figure)

# %% [markdown]
# We go on with R = 2048 rows, far to the right: its roof is the peak. Where a rung stays below it, something other than
# memory's bandwidth is in its way: something between the registers and the caches.
#
# ## The rungs
#
# ### v1: three loops
#
# The formula as it stands.

# %%
pictures.source(naive.matmul_forward)

# %% [markdown]
# Two things are wrong with it, and both are in the innermost line. It loads two numbers for each multiply-add. And it
# adds to one `total`: each addition needs the one before it, which takes some cycles to be ready, so the core, which
# could do several vectors of sums in that time, does a single number. Lesson 01 has shown the cause: a compiler does
# not regroup a sum unasked.
#
# ### v2: the order of the loops
#
# There are R·OC sums that have nothing to do with one another. So let us take the loops in another order: for an output
# channel, first the first term of *all* rows' sums, then the second term of all of them. The innermost loop then goes
# over the rows:
#
# `sums[r] += w * column[r]`
#
# One weight, and side by side many sums: a vector instruction does 4, 8 or 16 of them, and each sum is still taken in
# the same order as before. Nobody had to be allowed anything.
#
# There is a price: the numbers `inp[0, c]`, `inp[1, c]`, ... must lie side by side in memory, and they lie C apart. So
# the input is turned first, into `scratch`, memory that the caller lends for such ends. That moves R·C numbers once,
# against R·C·OC multiply-adds.

# %%
pictures.source(matmul_cpu.operands, matmul_cpu.matmul_forward_v2, matmul_cpu.transpose, matmul_cpu.sums_side_by_side)

# %% [markdown]
# ### v3: sums that stay in registers
#
# Look at v2's innermost line as the core sees it: load `column[r]`, load `sums[r]`, multiply and add, store `sums[r]`.
# Two loads and a store for a multiply-add. The sums travel to the cache and back C times, and only the last visit
# counts.
#
# A core has 16 or 32 vector registers. If we take only so many rows at a time that their sums fit into a few of them,
# the sums need not leave before they are whole. `NR` is that number of rows. `new_row()` gives an array of NR numbers
# of which the compiler knows the size and that nobody else can see, so that it keeps them in registers;
# `add_scaled(sums, x, numbers)` is `sums += x * numbers` for NR numbers. (Both come from `llm_numba/cpu/tile.py`. An
# array of `np.empty` would do as well, were it not that the compiler cannot prove that it is ours alone, and stores it
# each time.)
#
# The input is packed accordingly: in *panels* of NR rows, `panels[j, c, i] = inp[j * NR + i, c]`, so that each step
# reads the next NR numbers in memory.

# %%
pictures.source(matmul_cpu.sums_in_registers, matmul_cpu.packed, matmul_cpu.pack)

# %% [markdown]
# Per multiply-add that is one load and no store, a third of v2's traffic with the nearest cache. And yet: both v2 and
# v3 go through all of the input, R·C numbers, for every single output channel. If these do not fit into the nearer
# caches, they come from farther away each time, in all 4·R·C·OC bytes of them, and then both rungs wait for the same
# thing. Look at the table below whether they do here. The cure is to use a number more often, once it is there.
#
# ### v4: a tile in registers
#
# Now the main idea of all fast matrix products, on CPUs and GPUs alike. Take MR output channels at a time. For a term
# $c$, load NR numbers of the panel and MR weights, and multiply *each with each*: MR·NR multiply-adds for MR + NR
# loaded numbers. What grows with the tile's area is work, what grows with its edges is traffic:
#
# $$ \frac{\text{multiply-adds}}{\text{numbers loaded}} = \frac{MR \cdot NR}{MR + NR} $$

# %%
pictures.source(matmul_cpu.tiles_in_registers, matmul_cpu.multiply)


# %%
def draw_reads(axis, title, rows, columns):
    """Three matrices, and what of each an innermost piece of work touches: out = inp times weight turned."""
    from matplotlib.patches import Rectangle

    n = 12
    for x, y, name, part in (
        (0, 0, "inp (R, C)", (0, 4, n, rows)),
        (n + 1, -n - 1, "weight, turned (C, OC)", (5, 0, columns, n)),
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
# (Drawn with a tile of 4 rows and 3 output channels, to be seen at all. On this machine the tile is `NR` by `MR`, as
# the next cell prints.)
#
# So why not a tile of 100 x 100? Because of the registers: the sums must all be in them, and so must NR numbers of the
# panel and a weight. The next picture shows the multiply-adds for each vector load or weight load, for tiles of MR
# output channels and $v$ vectors of rows: MR·v multiply-adds for MR + v loads. The white line goes around the tiles
# that fit into 32 registers: MR·v sums, v vectors of the panel, and a weight.

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
axis.set_title("multiply-adds for each load; below the line: fits into 32 registers")
figure.colorbar(drawn, ax=axis)
pictures.show(figure)
print(f"the model's tile on this machine: MR = {MR} output channels, NR = {NR} rows")

# %% [markdown]
# The best of those that fit are nearly square, and a tile much larger would spill: the compiler would have to park sums
# in memory, which is where they were in v2. Where a processor's vectors hold 16 numbers, NR = 64 is four of them, and
# the tile is the square-ish 6 x 4.
#
# ### v5: blocks that stay in the cache
#
# Registers are full; now the caches. Behind the registers a core has a small first-level cache (*L1*, tens of kB), a
# second one (*L2*, around one MB), and behind these one that all cores share (*L3*), then memory: each some times
# larger and some times slower. They hold what was used last, in *lines* of 64 bytes. A loop that comes back to a number
# soon finds it still there; one that walks through more than the cache holds before it comes back finds nothing.
#
# v4 walks through *all* panels for each MR output channels: R·C numbers, before it comes back to the first. If they do
# not fit into L2, then every tile has to fetch its panel from behind it. v5 changes only the order in which the tiles
# are done:
#
# - a block of OB = 96 rows of weights at a time,
# - for it a panel at a time,
# - and of both only KB = 384 terms at a time.
#
# Then OB·KB weights (a panel's part is smaller still) are gone through for each panel, and they fit into L2. The sums
# are no longer whole after a tile, so a small array `sums` (OB, NR) collects them.

# %%
pictures.source(matmul_cpu.block_of_outputs, matmul_cpu.all_blocks)

# %% [markdown]
# How much that is worth can be computed without any measuring. Below, a cache of $s$ lines is played by a list: what is
# asked for goes to its front, what falls off its end is gone. We let the loops of the rungs ask for their lines, at toy
# sizes, and count how many had to be fetched from behind the cache.


# %%
def fetched(stream, size):
    """How many lines of a stream of accesses are not among the `size` lines that were used last."""
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


LINE = 16  # numbers of 4 bytes in a line of 64
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
axis.set(xlabel="lines that the cache holds", ylabel="lines fetched", xticks=sizes, xticklabels=map(str, sizes))
axis.set(ylim=(once * 0.5, None))
axis.minorticks_off()
axis.legend(frameon=False)
pictures.show(figure)

# %% [markdown]
# Read it from right to left. In a cache that holds both operands all rungs are alike: each line comes once. As soon as
# it does not, v1, v2 and v4 jump, as each of them comes back to an operand only after it has gone through all of it: v1
# and v2 for each row or channel, v4 for each MR of them. v5 comes back to the panels once for each block, and stays low
# down to where a block of weights and a panel's piece no longer fit. (In the smallest caches v2 is worst: it has sums
# to fetch, too.)
#
# ### v6: all cores
#
# Each core takes blocks of output channels for itself: blocks are the right size for sharing out, too. No two cores
# write the same number of `out`, and all of them read the same panels.

# %%
pictures.source(matmul_cpu.matmul_forward_v6, matmul_cpu.all_blocks_at_once)

# %% [markdown]
# ## Right first, then fast
#
# The shapes are chosen to be awkward: one row; 97 and 257, which no tile divides; 500 terms, of which a block of 384
# leaves a rest.

# %%
ladder.check(matmul_cpu.FORWARD)

# %% [markdown]
# The table's limit is the peak of all cores together, although v1 to v5 use a single one. `numpy_blas` is
# `np.matmul`, which calls a *BLAS*, a library with hand-written kernels for each family of processors; PyTorch brings
# another one. They are the 100% to compare with.

# %%
found = timing.show_times(matmul_cpu.FORWARD)
pictures.show(pictures.draw_times(found))
for rung in (matmul_cpu.matmul_forward_v2, matmul_cpu.matmul_forward_v3):
    rate = 2 * found["work"] / found["rows"][rung.__name__]  # 4 bytes for each multiply-add, which is two flops
    print(f"{rung.__name__} goes through the input at {1e-9 * rate:.1f} GB/s")

# %% [markdown]
# The same on the roofline. All rungs do the same flops on the same arrays, so they stand at one place, one above
# another: what they differ in is how much of the roof's height they reach. The dashed line is one core's share of the
# roof.

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
# The green bar is the model's own `matmul_forward`, from `llm_numba/cpu/matmul.py`. Its plan is that of v6. What it
# adds is care: the panels are packed by all cores, the sums are turned into rows of `out` in small squares, a handful
# of rows is computed by dot products, as tiles would be mostly empty, and `multiply` is built so that the compiler
# cannot help but keep the tile in registers, on machines with vectors of 4, 8 or 16 numbers.
#
# Its twin, `matmul_backward`, is two products more, by the same `multiply`:
#
# $$ dx_{rc} = \sum_o dy_{ro}\, w_{oc} \qquad dw_{oc} = \sum_r dy_{ro}\, x_{rc} \qquad db_o = \sum_r dy_{ro} $$
#
# The input's gradient sums over output channels, the weight's over rows: each time another operand has to be packed.
# With the forward that makes three products, and so a training step costs three times what running the model does.
#
# A rung goes into real training, too, where it is timed and compared beside the model's own:
#
# ```sh
# python -m llm_numba.train --preset nano --use matmul_forward=lessons/rungs/matmul_cpu.py:matmul_forward_v4
# ```
#
# ## Your turn
#
# Tiles are simple but for their edges: nobody's matrices are multiples of the tile. Write a product in tiles that is
# right for any shape. Open `exercises/matmul_tiled.py`, put your code where it raises `NotImplementedError`, and run
# the last cell again. The function is first run as plain Python, with every read and write recorded, and then compiled.

# %%
exercise.show("matmul_tiled")

# %%
exercise.check("matmul_tiled")

# %% [markdown]
# ## To go on
#
# - Halve `KB` and double `OB` in a copy of `rungs/matmul_cpu.py`. What should change in the picture of the cache, and
#   what in the table?
# - Change R to 8 in the ladder's `timed` sizes. Which rungs suffer, and why does packing no longer pay?
# - Lesson 03 does all this once more on a GPU: there, a block of threads has its own small memory to keep tiles in, and
#   you say yourself what goes into it.
