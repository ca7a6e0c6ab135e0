# %% [markdown]
# # Matmul on a GPU
#
# **Goal.** The product of two matrices, from the kernel that anyone would write first to the one that the model
# trains with, and then the same on tensor cores. Almost all of a training step's arithmetic is in this one op, so
# nothing else pays as much.
#
# **What you need.** Python and NumPy, and from lesson 01 the part "A GPU, in five minutes": a kernel says what one
# *thread* does; threads come in *blocks*; 32 threads of a block are a *warp* and make each step together; *global*
# memory is large and far away and moves in *sectors* of 32 bytes, so that a warp's reads should lie side by side, which
# is called *coalesced*; *shared* memory belongs to a block and is near. You need no GPU: the kernels run in a simulator
# that records every access.
#
# **How to read it.** Each rung (`matmul_forward_v1`, `_v2`, ...) has one idea more than the one before. For each we
# count what its threads ask of memory. These counts explain the times, which you get where there is a card.

# %%
import numpy as np
from matplotlib.patches import Rectangle

from llm_numba import oracle
from llm_numba.lessons import counting, exercise, ladder, pictures, problem, timing, tracing
from rungs import matmul_cuda, matmul_tensor_cores

LADDER = matmul_cuda.FORWARD

# %% [markdown]
# ## The op
#
# A linear layer takes R rows of C numbers, the *channels*, and makes R rows of OC numbers of them (R is B·T: every
# token of every text in the batch is a row). Each output channel $o$ has a row of weights:
#
# $$ \mathrm{out}_{r,o} = \sum_{c=0}^{C-1} \mathrm{inp}_{r,c}\; \mathrm{weight}_{o,c} + \mathrm{bias}_o $$
#
# Note how the matrices lie: `inp` is (R, C) and `weight` (OC, C), so the sum runs along the rows of *both*. In memory,
# the numbers of a row are neighbours.

# %%
pictures.source(oracle.matmul_forward)

# %% [markdown]
# For each of the R·OC results there are C multiplications and C additions: $2\,R\,C\,OC$ *flops* (floating-point
# operations). A multiplication with the addition that follows is one instruction of the hardware, a *multiply-add*.
# The matrices have only $R\,C + OC\,C + R\,OC$ numbers. So each number is used many times: one of `inp` in OC results,
# one of `weight` in R of them.
#
# This is the whole story of the lesson. The flops are given; **how often a number is fetched for them is up to us.**
# A naive kernel fetches two numbers, 8 bytes, for every multiply-add: that is 2 flops for 8 bytes. The next cell
# prints, for three of GPT-2's linear layers and 4096 tokens, how many flops there could be for each byte, if each
# number crossed the way between memory and the cores only once.

# %%
for name, R, C, OC in (
    ("attention's first layer", 4096, 768, 3 * 768),
    ("MLP, up", 4096, 768, 4 * 768),
    ("MLP, down", 4096, 4 * 768, 768),
):
    flops, numbers = 2 * R * C * OC, R * C + OC * C + R * OC
    best = flops / (4 * numbers)
    print(f"{name:>23}: {1e-9 * flops:5.1f} Gflop; flops for a byte: naive {2 / 8}, at best {best:.0f}")

# %% [markdown]
# ## v1: a thread for each result
#
# The formula, and a thread for each (r, o). `cuda.grid(2)` gives a thread its place in the grid of all threads, in
# two directions, x and y; neighbouring threads of a warp differ in x, and here that is `r`. The rung below the kernel
# starts as many blocks of 32 x 4 threads as cover all results: `blocks_for(n, m)` is n / m, rounded up. (`launch`
# flattens B and T into R and starts the kernel on `stream()`, the queue in which all of the project's kernels wait
# their turn. `bias` may be absent, hence `with_bias`. `scratch` is memory that an op may use as it likes: only the last
# rung does.)

# %%
pictures.source(matmul_cuda.kernel_v1, matmul_cuda.matmul_forward_v1, matmul_cuda.launch)

# %% [markdown]
# Every rung below is run once in the simulator, on small matrices, and all accesses are recorded. In the picture each
# line is one step of a warp, and each square one number of `inp`, coloured by the thread that wants it. Grey are the
# sectors of 32 bytes that have to be moved for it.

# %%
traces = {rung.__name__: ladder.trace_of(rung, LADDER) for rung in LADDER.rungs[:-1]}
print("recorded at", ladder.in_words(LADDER.counted))
v1 = traces["matmul_forward_v1"]
pictures.show(pictures.draw_warp(v1, "inp", steps=6, title="v1, inp: neighbours want numbers that lie C apart"))
pictures.show(pictures.draw_warp(v1, "weight", steps=6, title="v1, weight: all threads want the same number"))

# %% [markdown]
# `weight` is well served: all threads want one number at a time (in the picture the last one's colour hides the
# others'), and it is fetched once and handed to all. But for `inp` each of the threads wants a number of another row,
# and each of these lies in a sector of its own. Eight numbers are moved for one that is used.
#
# Could we turn the warp by 90 degrees, so that neighbouring threads differ in `o`? Then `inp` would be served well,
# and `weight` badly. In this layout a thread's result has its row of `inp` and its row of `weight`, and whichever way
# the threads lie, they go *across* one of the two.
#
# ## v2: coalesced
#
# What lies side by side in memory is the channels. So let the threads of a warp take neighbouring *channels*: the
# warp works on one result at a time, thread `lane` takes the channels lane, lane + 32, and so on. Each thread then has
# a part of the sum only. The parts of 32 results are kept in shared memory, and at the end thread `lane` adds up those
# of result `lane`. Between the two stands `cuda.syncthreads()`, the barrier: nobody reads a part before all are there.

# %%
pictures.source(matmul_cuda.kernel_v2)

# %%
v2 = traces["matmul_forward_v2"]
pictures.show(pictures.draw_warp(v2, "inp", steps=6, title="v2, inp: neighbouring threads, neighbouring numbers"))
pictures.show(pictures.draw_warp(v2, "weight", steps=6, title="v2, weight: the same; the next step is the next row"))


# %%
def reads(counted, space):
    """(numbers that the threads ask of this memory, sectors that are moved for them), without those of the bias."""
    found = [c for c in counted if c.space == space and c.kind == "read" and c.array != "bias"]
    return sum(c.accesses for c in found), sum(c.sectors for c in found)


counted = {name: counting.count(trace) for name, trace in traces.items()}
for name in ("matmul_forward_v1", "matmul_forward_v2"):
    numbers, sectors = reads(counted[name], "global")
    print(f"{name}: reads {numbers:,} numbers of inp and weight, for which {sectors:,} sectors are moved")

# %% [markdown]
# The reads are as orderly as can be; but there are as many as before. Each multiply-add still asks global memory for
# two numbers. (A row of `inp` is read again for each of the 32 results. A card's caches will catch much of that, as
# they do for v1. The counts here know no caches: they say what is *asked for*.)
#
# ## v3: tiles in shared memory
#
# To ask less often, a number that has been fetched must serve several results. The threads of a block have shared
# memory in common; so let a block own a *tile* of TILE x TILE results. It needs TILE rows of `inp` and TILE rows of
# `weight`, and it walks along them in steps of TILE channels:
#
# - **bring:** the threads copy a tile of `inp` and a tile of `weight` to shared memory, each thread one number of both;
#   neighbouring threads copy neighbouring channels, so that this is coalesced;
# - **use:** the block has TILE x TILE threads, `cuda.threadIdx.x` and `.y` say which one this is. Thread (y, x) owns
#   the result in row y and column x of the tile. It goes through row y of the one tile and row x of the other.
#
# Who fetches a number and who uses it are no longer the same thread: this is what v1 lacked.

# %%
figure, axis = pictures.new(width=6.5, height=4.2)
blue, orange = pictures.COLOURS[0], pictures.COLOURS[1]


def box(x, y, width, height, **style):
    axis.add_patch(Rectangle((x, y), width, height, **{"facecolor": "none", "edgecolor": "0.5", **style}))


box(0, 0, 8, 6)  # inp
box(9, 7, 6, 8)  # weight, seen with its rows as columns
box(9, 0, 6, 6)  # out
for k in range(4):  # the steps
    box(2 * k, 2, 2, 2, facecolor=blue, alpha=0.8 if k == 1 else 0.15)
    box(11, 13 - 2 * k, 2, 2, facecolor=orange, alpha=0.8 if k == 1 else 0.15)
box(11, 2, 2, 2, facecolor="0.35")
axis.annotate("", (4.9, 1.7), (2.1, 1.7), arrowprops=dict(arrowstyle="->", color="0.3"))
axis.annotate("", (10.7, 10.1), (10.7, 12.9), arrowprops=dict(arrowstyle="->", color="0.3"))
axis.text(0.1, 5.4, "inp (R, C)")
axis.text(9.1, 15.2, "weight (OC, C), on its side")
axis.text(9.1, 5.4, "out (R, OC)")
axis.text(12, 1.4, "a block's tile", ha="center", fontsize=8)
words = """A block walks along c.
Each step's two tiles (dark)
come to shared memory, and
each of their numbers serves
TILE results."""
axis.text(0.2, 10.5, words, va="center")
axis.set(xlim=(-0.3, 15.3), ylim=(-0.3, 16), aspect="equal")
axis.axis("off")
pictures.show(figure)

# %% [markdown]
# A step brings $2\,\mathrm{TILE}^2$ numbers and does $\mathrm{TILE}^3$ multiply-adds with them: $2/\mathrm{TILE}$ reads
# of global memory for each, instead of 2.
#
# Two barriers are needed in each step. The first between bring and use: nobody uses a tile before it is complete. The
# second between use and the next bring: nobody fills a tile while another thread still uses it. And no thread may go
# home early, even if it has no result to own at the edge of the matrix: a barrier waits for all of the block, and
# those threads have numbers to bring.
#
# ### Your turn
#
# Do write this kernel yourself before you read ours: it is the best exercise there is on GPUs. You have all that it
# takes. Fill the hole in `lessons/exercises/matmul_tile.py`. `show` prints what is wanted, and, when your kernel runs,
# draws what its first warp reads of `weight`; `check` says what is wrong: which element, which thread, which line. Try
# leaving out each of the two barriers.

# %%
exercise.show("matmul_tile")

# %%
exercise.check("matmul_tile")

# %% [markdown]
# ### Ours
#
# (It contains the solution of the exercise.) The function makes a kernel for a *pitch*, which says how far apart the
# rows of a tile lie in shared memory. For v3 that is TILE: the rows follow each other.

# %%
pictures.source(matmul_cuda.tile_kernel)
TILE = matmul_cuda.TILE
print(f"in the simulator: TILE = {TILE}, so that a block has {TILE**2} threads; on a card: TILE = 16, {16**2} threads")

# %% [markdown]
# ## v4: a column to spare
#
# Shared memory has a rule of its own. It is divided into 32 *banks*: number 0 lies in bank 0, number 1 in bank 1, and
# number 32 in bank 0 again. A bank hands out one number at a time. If the threads of a warp want numbers from 32
# different banks, or the same number, all of them are served in one turn. If they want several numbers from one bank,
# they wait for as many turns: a *bank conflict*.
#
# Look at `weight_tile[x, k]`. Neighbouring threads, with neighbouring x, want numbers that lie a row apart. With rows
# of 16 numbers, as on a card, that is bank 0, 16, 0, 16, and so on: two banks do all the work.
#
# The cure costs nothing but a little room: rows of 17 numbers, of which the last is never used. Neighbouring x then
# differ by 17 banks, and all fall on banks of their own. In the kernel, only the pitch changes.

# %%
pictures.text("```python\nkernel_v3, kernel_v4 = tile_kernel(TILE), tile_kernel(TILE + 1)\n```")


# %%
def draw_banks(axis, words, title):
    """A column for each bank, and in it a square for each number that the warp wants of it."""
    height = [0] * 32
    for word in sorted(set(words)):
        bank = word % 32
        axis.add_patch(Rectangle((bank + 0.1, height[bank] + 0.1), 0.8, 0.8, color=pictures.COLOURS[0]))
        height[bank] += 1
    axis.set(xlim=(0, 32), ylim=(0, 8.4), xlabel="bank", title=f"{title}; turns: {max(height)}")
    axis.set(xticks=[0, 8, 16, 24, 32], yticks=[0, 4, 8])


figure, axes = pictures.new(1, 2, width=9, height=2.6, sharey=True)
for axis, rung, pitch in zip(axes, ("v3", "v4"), (16, 17), strict=True):
    draw_banks(axis, [x * pitch for x in range(16)], f"{rung}, rows of {pitch} numbers")
axes[0].set_ylabel("numbers wanted of a bank")
figure.suptitle("one request of a warp: weight_tile[x, 0] for all x", fontsize=9)
pictures.show(figure)

# %% [markdown]
# (With the simulator's rows of 8 numbers it is two turns, as you will see in the counts. And the sum at the end of v2,
# down the columns of an array with rows of 32 numbers? All 32 numbers lie in one bank: it takes 32 turns, and the same
# cure helps. That one we leave to you.)
#
# ## v5: tiles in registers
#
# Shared memory is near, but not free either. v4 reads two numbers of it for each multiply-add: it has moved the
# naive kernel's pattern one level up. So we use the same trick one level up. A thread's own variables lie in
# *registers*, which are at hand at once. Let a thread own not one result but 4 x 4 of them: it reads 4 numbers of one
# tile and 4 of the other, and makes 16 multiply-adds of them. That is half a read for each, instead of two.
#
# `cuda.local.array` is an array of the thread's own. As its size and all its indices are known when the kernel is
# compiled, it lives in registers. The sixteen results of a thread lie SIDE apart, so that at each read neighbouring
# threads want neighbouring numbers. For that the tiles now lie the other way round in shared memory, a row for each
# channel; `bring` turns them over on the way. (Four numbers to spare in each row: a warp brings 8 channels of 4 rows
# at once, which so fall in 32 different banks.)
#
# The block's tile grows with it: BIG = 4·SIDE results on each side. So global memory, too, is asked less often.

# %%
pictures.source(matmul_cuda.bring, matmul_cuda.kernel_v5)
SIDE, BIG, DEPTH, OWN = matmul_cuda.SIDE, matmul_cuda.BIG, matmul_cuda.DEPTH, matmul_cuda.OWN
print(f"in the simulator: SIDE = {SIDE}, BIG = {BIG}, DEPTH = {DEPTH}; on a card: SIDE = 16, BIG = 64")

# %% [markdown]
# ## v6: four numbers at once
#
# An instruction that reads shared memory may also read 16 bytes, four numbers that lie side by side, instead of 4.
# So let a thread's 4 x 4 results be neighbours: then its four numbers of a tile are neighbours too, and one
# instruction fetches them. For 16 multiply-adds a thread now issues 2 requests instead of 8. That counts because a
# multiprocessor starts only so many instructions in a cycle: each one that fetches is one that does not multiply.
#
# `load_float4(tile, row, column)` is that instruction. It needs an address that is a multiple of 16 bytes: so the rows
# have four numbers to spare, as before, and the arrays ask to begin at such an address (the 16 in `cuda.shared.array`).

# %%
pictures.source(matmul_cuda.kernel_v6)

# %% [markdown]
# ## Right, at awkward sizes
#
# Every rung against the formula in float64: single numbers, and 3, 97 and 257, which no tile divides. In the
# simulator the check also looks for races, indices out of bounds, shared memory that is read before it was written,
# and barriers that some threads never come to. The last line is the function that the model uses.

# %%
ladder.check(LADDER)

# %% [markdown]
# ## Why each rung is faster, without a GPU
#
# On the left: how many numbers the threads ask of global memory, and how many sectors that moves. On the right: how
# many requests the warps make to shared memory, and how many turns of the banks these take. First from v1 to v3, where
# global memory is what changes; then from v3 to v6, with other scales.

# %%
counts = {name: counting.total(trace) for name, trace in traces.items()}
names = list(counts)
pictures.show(pictures.draw_counts({name: counts[name] for name in names[:3]}))
pictures.show(pictures.draw_counts({name: counts[name] for name in names[2:]}))

# %% [markdown]
# Three things to look at twice. v2's requests to shared memory take many turns: the sums down the columns. v4's take a
# little more than one each, as the rows that a warp brings to a tile now overlap in a bank. And v6 moves more sectors
# than v5, though it asks for the same numbers: a thread's results are neighbours, so that neighbouring threads write 4
# apart. That happens once for each result, however many channels there are: with more than the few channels here it
# hardly counts.
#
# Divided by the number of multiply-adds, and beside what the text above has promised:

# %%
terms = LADDER.flops(**LADDER.counted) // 2
promised = {
    "matmul_forward_v1": (2, 0), "matmul_forward_v2": (2, 32 / LADDER.counted["C"]),
    "matmul_forward_v3": (2 / TILE, 2), "matmul_forward_v4": (2 / TILE, 2),
    "matmul_forward_v5": (2 / BIG, 2 / OWN), "matmul_forward_v6": (2 / BIG, 2 / OWN / 4),
}  # fmt: skip
print(f"{'for each multiply-add':<22} reads of global (promised)   reads of shared (promised)")
for name, (from_global, from_shared) in promised.items():
    numbers, shared = (reads(counted[name], space)[0] for space in ("global", "shared"))
    asked, said = f"({from_global:g})", f"({from_shared:g})"
    print(f"{name:<22} {numbers / terms:15.4g} {asked:>10} {shared / terms:17.4g} {said:>10}")

# %% [markdown]
# The whole ladder is in this table: v2 makes the same reads cheaper, v3 asks global memory less
# often, v4 makes the reads of shared memory cheaper, v5 asks it less often, v6 with fewer instructions. A matrix
# product is fast when a number, once fetched, is used as often as there is room to keep it, at every level: memory,
# shared memory, registers.
#
# How large should a tile be? The larger the better for the reads, as the next picture shows. But a thread has at most
# 255 registers, a block 1024 threads, and a multiprocessor only so much shared memory: a thread that owns 8 x 8 results
# needs 64 registers for the sums alone. With fewer threads on a multiprocessor there is also less that it can do while
# some of them wait for memory.

# %%
sides = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])
figure, axis = pictures.new(width=6.5, height=2.8)
axis.loglog(sides, sides / 4, marker="o", markersize=4, color=pictures.COLOURS[0], base=2)
for side, text in ((1, "v1, v2"), (16, "v3, v4"), (64, "v5, v6"), (128, "the model's")):
    axis.annotate(text, (side, side / 4), (8, -8), textcoords="offset points", fontsize=8)
axis.set(
    xlabel="side of a block's tile of results",
    ylabel="flops for a byte\nof global memory",
    xlim=(0.7, 500),
    ylim=(0.12, 120),
)
pictures.show(figure)

# %% [markdown]
# ## On a card
#
# Where there is a card, this cell compiles the rungs for it and times them. 100% is the rate at which the card does
# multiply-adds and nothing else, measured in the same cell. PyTorch's line is *cuBLAS*, NVIDIA's own library of matrix
# products: the line to compare with.

# %%
found = timing.show_times(LADDER)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ### What the model's kernel adds
#
# The last rung is `matmul_forward` of `llm_numba/cuda/matmul.py`, whose float32 kernel is in `matmul_plain.py`. It is
# v6 with larger pieces and three more ideas:
#
# - **8 x 8 results for each thread**, as four pieces of 4 x 4 that lie half a tile apart, so that vector reads of
#   neighbouring threads stay neighbours.
# - **Two of each tile.** While the threads multiply with one pair, the numbers of the next step are already on their
#   way to registers; and as bring and use now work on different tiles, one of the two barriers goes.
# - **An order of the tiles.** Blocks that run at the same time own tiles that need the same rows, which they then
#   find in the card's cache.
# - **Parts.** Small results have too few tiles to keep a card busy. Then the sum over c is cut in parts, each with its
#   own blocks, whose results are added at the end, always in the same order.

# %%
pictures.source(matmul_cuda.matmul_forward, matmul_tensor_cores.multiply)

# %% [markdown]
# ## Tensor cores
#
# Since 2017, NVIDIA's cards have had units that do nothing but multiply small matrices: *tensor cores*. One
# instruction of a warp, `mma`, multiplies a 16 x 16 piece by a 16 x 8 piece and adds the result to a 16 x 8 piece:
# 16·16·8 = 2048 multiply-adds, where an ordinary instruction of a warp does 32.
#
# The price: the operands are short numbers. *bf16* is simply the upper half of a float32: the sign, all 8 bits of the
# exponent, and 7 of its 23 bits of fraction. It has float32's range and two to three digits. Products are added up in
# float32, so that the rounding of the inputs is almost all there is.

# %%
numbers = np.float32([np.pi, 1 / 3, 1000.7, 1e-30])
rounded = matmul_tensor_cores.bf16(numbers)
for x, bits in zip(numbers, rounded, strict=True):
    back = (np.uint32(bits) << np.uint32(16)).view(np.float32)
    print(f"{x:<12.7g} float32 {int(x.view(np.uint32)):032b}")
    print(f"{back:<12.7g} bf16    {int(bits):016b}, off by {abs(back / x - 1):.2%}")

# %% [markdown]
# ### Who holds what
#
# The pieces are not in any memory when the instruction starts: they lie in the *registers of the warp*, spread over
# its 32 threads by a fixed rule. Let `lane` be a thread's number in its warp, g = lane // 4 and q = lane % 4. It has
#
# - of the first piece, rows g and g + 8, and of these the columns 2q, 2q + 1, 2q + 8 and 2q + 9: eight numbers;
# - of the second piece, column g, and of it the rows 2q, 2q + 1, 2q + 8 and 2q + 9: four numbers;
# - of the result, rows g and g + 8, and of these the columns 2q and 2q + 1: four numbers.
#
# Two bf16 share a register, so that the operands take six registers, and the sums, in float32, four. The picture shows
# the rule; it is drawn from what the threads of our first kernel, below, read and write.

# %%
PRODUCT = matmul_tensor_cores.PRODUCT
one = tracing.simulate(matmul_tensor_cores.multiply_v1, **problem.arguments(PRODUCT.problem, dict(R=16, C=16, OC=8)))

figure, axes = pictures.new(1, 3, width=9, height=4.2, width_ratios=[16, 8, 8])
for axis, name, title in zip(axes, ("a", "b", "out"), ("a, 16 x 16", "b, 16 x 8", "out, 16 x 8"), strict=True):
    held = np.zeros(one.arrays[name][1], int)
    for access in one.accesses:
        if access.array == name:
            held[access.index] = access.lane
    held = held.T if name == "b" else held  # b lies in memory with its columns as rows
    axis.imshow(held, cmap="viridis")
    for (y, x), lane in np.ndenumerate(held):
        axis.text(x, y, lane, ha="center", va="center", fontsize=6, color="white" if lane < 20 else "black")
    axis.set(title=title, xticks=[0, 7], yticks=[0, 7, 8, 15])
axes[1].set(xticks=[0, 7])
figure.suptitle("which thread holds which number", fontsize=10)
pictures.show(figure)

# %% [markdown]
# The simulator has no tensor cores. So the rungs' file has a stand-in, in plain Python: it puts the two pieces
# together from all threads' registers, and gives each thread its four results. It is the rule above, once more, as a
# program (`halves` takes a register apart). On a card, the name `mma` stands for the instruction itself.

# %%
pictures.source(matmul_tensor_cores.mma)

# %% [markdown]
# ### v1: a warp, a piece
#
# A block is one warp, and owns 16 x 8 results. In each step of 16 channels every thread fetches its share of both
# operands from global memory, and `mma` does the rest. `pair` puts two neighbours into a register, and zeros where
# the matrix has ended. (Here the operands are called `a` and `b`, and `out` stays float32. NumPy has no bf16, so that
# the arrays hold the bits as `uint16`; `<< 16` moves them to the upper half of a register. `@device` marks a function
# that kernels call.)

# %%
pictures.source(matmul_tensor_cores.pair, matmul_tensor_cores.kernel_v1)

# %% [markdown]
# ### v2: tiles, once more
#
# The old trick, one level up again: now the *warp* owns 2 x 4 pieces. A share of `a` that was fetched serves 4
# instructions, one of `b` 2. For eight `mma` a thread fetches 2·4 + 4·2 = 16 registers, where v1 fetches 8·6 = 48.

# %%
pictures.source(matmul_tensor_cores.kernel_v2)

# %%
ladder.check(PRODUCT)
print()
terms = PRODUCT.flops(**PRODUCT.counted) // 2
for rung in PRODUCT.rungs[:-1]:
    numbers, sectors = reads(counting.count(ladder.trace_of(rung, PRODUCT)), "global")
    print(f"{rung.__name__}: {numbers / terms:.4f} reads of global memory for each multiply-add, {sectors:,} sectors")

# %% [markdown]
# ### The model's
#
# A tensor core is so fast that feeding it is all the work. The kernel in `llm_numba/cuda/matmul_mma.py` has the tiles
# in shared memory that you know, 128 x 256 results for each block of eight warps, and besides:
#
# - **Copies in the background** (`cp.async`): 16 bytes at a time go from global to shared memory without passing
#   through registers, while the warps multiply. Four tiles of each operand take turns: one is used, the others are
#   on their way.
# - **`ldmatrix`**: one instruction reads four 8 x 8 pieces from shared memory and deals them out to the threads as
#   `mma` wants them. The share that v1 puts together with eight reads of 2 bytes comes in one.
# - **Chunks that are shuffled.** Instead of columns to spare, chunks of 16 bytes change places within a row, by an
#   exclusive or with the row's number: no bank conflicts, and no room lost.
#
# These instructions exist on cards only. In the simulator, `multiply` takes the ordinary kernel, with bf16 operands,
# and that is what `check` has held against float64 above; on a card, where rows are multiples of 8 numbers, it takes
# the tensor cores.
#
# 100% is here what `mma` alone reaches on the card, with nothing to fetch. (Hopper cards have a further instruction,
# `wgmma`, that goes beyond; cuBLAS uses it there, so that its line may be above 100%.)

# %%
found = timing.show_times(PRODUCT)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ### Your turn, again
#
# Deal out a matrix as `mma` wants it: the rule above, written by you. It is a matter of indices only, and of edges.

# %%
exercise.show("mma_shares")

# %%
exercise.check("mma_shares")

# %% [markdown]
# ## Into a real training run
#
# Every rung has the op's signature, and so it can take its place in a run on a card (in float32, which is what the
# rungs compute with), which then says how long both take and how far they are apart:
#
# ```sh
# V6=lessons/rungs/matmul_cuda.py:matmul_forward_v6
# python -m llm_numba.train --device cuda --preset nano --use matmul_forward=$V6
# ```
#
# ## To take away
#
# - The flops of a matrix product are given. What differs is how often its numbers are fetched.
# - Think of a warp's step: its reads should lie side by side in global memory, in different banks in shared memory.
# - Fetch a tile together and use it many times; and then the same again, one level nearer: from global to shared
#   memory, from shared memory to registers.
# - Tensor cores change the unit of work from a number to a small matrix, and the question stays the same: how to feed
#   them.
#
# To read on: NVIDIA's [CUTLASS](https://github.com/NVIDIA/cutlass) documents the same hierarchy of tiles; the layout of
# `mma`'s pieces is in the PTX ISA, section "Matrix fragments for mma.m16n8k16".
