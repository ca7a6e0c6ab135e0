# %% [markdown]
# # Matrix multiplication on a GPU
#
# **Goal.** The product of two matrices, from the naive kernel to the one that the model trains with, and then the same
# on tensor cores. This one op has almost all of a training step's arithmetic, so nothing else is worth as much effort.
#
# **What you need.** Python and NumPy, and from lesson 01 the section "A GPU in five minutes": a kernel describes what
# one *thread* does; threads are grouped into *blocks*; 32 threads of a block are a *warp* and execute each instruction
# together; *global* memory is large and slow to reach, and moves in *sectors* of 32 bytes, so a warp's reads should be
# contiguous, or *coalesced*; *shared* memory belongs to a block and is close. You need no GPU: the kernels run in a
# simulator that records every access.
#
# **How to read it.** Each rung (`matmul_forward_v1`, `_v2`, ...) adds one idea. For each we count the memory accesses
# of its threads. The counts explain the times, which are measured if there is a GPU.

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
# A linear layer maps R rows of C elements, the *channels*, to R rows of OC elements (R is B·T: every token of every
# sequence in the batch is a row). Each output channel $o$ has a row of weights:
#
# $$ \mathrm{out}_{r,o} = \sum_{c=0}^{C-1} \mathrm{inp}_{r,c}\; \mathrm{weight}_{o,c} + \mathrm{bias}_o $$
#
# Note the layout of the matrices: `inp` is (R, C) and `weight` (OC, C), so the sum runs along the rows of *both*. The
# elements of a row are contiguous in memory.

# %%
pictures.source(oracle.matmul_forward)

# %% [markdown]
# Each of the R·OC results takes C multiplications and C additions: $2\,R\,C\,OC$ *flops* (floating-point operations). A
# multiplication and the following addition are one hardware instruction, a *multiply-add*. The matrices have only
# $R\,C + OC\,C + R\,OC$ elements. So each element is used many times: an element of `inp` in OC results, an element of
# `weight` in R of them.
#
# This is the theme of the lesson. The flops are fixed; **how often an element is fetched for them is up to us.** A
# naive kernel fetches two elements, 8 bytes, for every multiply-add: 2 flops per 8 bytes, an *arithmetic intensity* of
# 0.25. The next cell prints, for three of GPT-2's linear layers and 4096 tokens, the arithmetic intensity if each
# element moved between memory and the cores only once.

# %%
for name, R, C, OC in (
    ("attention's first layer", 4096, 768, 3 * 768),
    ("MLP, up", 4096, 768, 4 * 768),
    ("MLP, down", 4096, 4 * 768, 768),
):
    flops, elements = 2 * R * C * OC, R * C + OC * C + R * OC
    best = flops / (4 * elements)
    print(f"{name:>23}: {1e-9 * flops:5.1f} Gflop; flops per byte: naive {2 / 8}, at best {best:.0f}")

# %% [markdown]
# ## v1: one thread per result
#
# The formula, with a thread for each (r, o). `cuda.grid(2)` returns a thread's position in the grid of all threads, in
# two dimensions, x and y. Consecutive threads of a warp differ in x, and here that is `r`. The rung below the kernel
# launches enough blocks of 32 x 4 threads to cover all results: `blocks_for(n, m)` is n / m, rounded up. (`launch`
# flattens B and T into R and launches the kernel on `stream()`, the queue in which all of the project's kernels run.
# `bias` may be absent, hence `with_bias`. `scratch` is temporary memory for the op: only the last rung uses it.)

# %%
pictures.source(matmul_cuda.kernel_v1, matmul_cuda.matmul_forward_v1, matmul_cuda.launch)

# %% [markdown]
# Every rung below is run once in the simulator, on small matrices, and all accesses are recorded. In the picture each
# line is one step of a warp, and each square one element of `inp`, coloured by the thread that reads it. Grey are the
# 32-byte sectors that have to be moved.

# %%
traces = {rung.__name__: ladder.trace_of(rung, LADDER) for rung in LADDER.rungs[:-1]}
print("recorded at", ladder.format_sizes(LADDER.counted))
v1 = traces["matmul_forward_v1"]
pictures.show(
    pictures.draw_warp(v1, "inp", steps=6, title="v1, inp: consecutive threads read elements that are C apart")
)
pictures.show(pictures.draw_warp(v1, "weight", steps=6, title="v1, weight: all threads read the same element"))

# %% [markdown]
# The accesses to `weight` are good: all threads read the same element at a time (in the picture the last one's colour
# hides the others'), and it is fetched once and broadcast to all. But for `inp` each thread reads an element of a
# different row, and each of these is in a different sector. Eight elements are moved for each one that is used.
#
# Could we swap the roles, so that consecutive threads differ in `o`? Then the accesses to `inp` would be good and those
# to `weight` bad. In this layout each thread's result needs a row of `inp` and a row of `weight`, and whichever way we
# arrange the threads, they go *across* the rows of one of the two.
#
# ## v2: coalesced
#
# The channels are what is contiguous in memory. So let the threads of a warp take consecutive *channels*: the warp
# works on one result at a time, and thread `lane` takes the channels lane, lane + 32, and so on. Each thread then has
# only a partial sum. The partial sums of 32 results are kept in shared memory, and at the end thread `lane` adds up
# those of result `lane`. Between the two is `cuda.syncthreads()`, the barrier: no thread reads a partial sum before all
# have been written.

# %%
pictures.source(matmul_cuda.kernel_v2)

# %%
v2 = traces["matmul_forward_v2"]
pictures.show(pictures.draw_warp(v2, "inp", steps=6, title="v2, inp: consecutive threads read consecutive elements"))
pictures.show(pictures.draw_warp(v2, "weight", steps=6, title="v2, weight: the same; each step reads the next row"))


# %%
def reads(counted, space):
    """(elements that the threads read from this memory, sectors moved), without the bias."""
    found = [c for c in counted if c.space == space and c.kind == "read" and c.array != "bias"]
    return sum(c.accesses for c in found), sum(c.sectors for c in found)


counted = {name: counting.count(trace) for name, trace in traces.items()}
for name in ("matmul_forward_v1", "matmul_forward_v2"):
    elements, sectors = reads(counted[name], "global")
    print(f"{name}: reads {elements:,} elements of inp and weight, which moves {sectors:,} sectors")

# %% [markdown]
# The reads are now perfectly coalesced, but there are as many as before. Each multiply-add still requests two elements
# from global memory. (A row of `inp` is read again for each of the 32 results. A GPU's caches will serve many of these
# reads, as they do for v1. The counts here ignore caches: they count what is *requested*.)
#
# ## v3: tiles in shared memory
#
# To request less, an element that has been fetched must be used for several results. The threads of a block share their
# shared memory; so let a block own a *tile* of TILE x TILE results. It needs TILE rows of `inp` and TILE rows of
# `weight`, and it walks along them in steps of TILE channels:
#
# - **load:** the threads copy a tile of `inp` and a tile of `weight` to shared memory, one element of each per thread;
#   consecutive threads copy consecutive channels, so this is coalesced;
# - **compute:** the block has TILE x TILE threads, indexed by `cuda.threadIdx.x` and `.y`. Thread (y, x) owns the
#   result in row y and column x of the tile. It goes through row y of one tile and row x of the other.
#
# The thread that fetches an element and the threads that use it are no longer the same: this is what v1 lacked.

# %%
figure, axis = pictures.new(width=6.5, height=4.2)
blue, orange = pictures.COLOURS[0], pictures.COLOURS[1]


def box(x, y, width, height, **style):
    axis.add_patch(Rectangle((x, y), width, height, **{"facecolor": "none", "edgecolor": "0.5", **style}))


box(0, 0, 8, 6)  # inp
box(9, 7, 6, 8)  # weight, transposed
box(9, 0, 6, 6)  # out
for k in range(4):  # the steps
    box(2 * k, 2, 2, 2, facecolor=blue, alpha=0.8 if k == 1 else 0.15)
    box(11, 13 - 2 * k, 2, 2, facecolor=orange, alpha=0.8 if k == 1 else 0.15)
box(11, 2, 2, 2, facecolor="0.35")
axis.annotate("", (4.9, 1.7), (2.1, 1.7), arrowprops=dict(arrowstyle="->", color="0.3"))
axis.annotate("", (10.7, 10.1), (10.7, 12.9), arrowprops=dict(arrowstyle="->", color="0.3"))
axis.text(0.1, 5.4, "inp (R, C)")
axis.text(9.1, 15.2, "weight (OC, C), transposed")
axis.text(9.1, 5.4, "out (R, OC)")
axis.text(12, 1.4, "a block's tile", ha="center", fontsize=8)
words = """A block walks along c.
Each step loads two tiles
(dark) into shared memory.
Each of their elements is
used for TILE results."""
axis.text(0.2, 10.5, words, va="center")
axis.set(xlim=(-0.3, 15.3), ylim=(-0.3, 16), aspect="equal")
axis.axis("off")
pictures.show(figure)

# %% [markdown]
# A step loads $2\,\mathrm{TILE}^2$ elements and does $\mathrm{TILE}^3$ multiply-adds with them: $2/\mathrm{TILE}$ reads
# of global memory for each, instead of 2.
#
# Each step needs two barriers. The first, between load and compute: no thread uses a tile before it is complete. The
# second, between compute and the next load: no thread overwrites a tile while another thread still uses it. And no
# thread may exit early, even if it owns no result at the edge of the matrix: a barrier waits for all threads of the
# block, and these threads also load elements.
#
# ### Exercise: the tile kernel
#
# Write this kernel yourself before you read ours: it is the best exercise there is on GPUs, and you now know everything
# that you need. Complete the function in `lessons/exercises/matmul_tile.py`. `show` prints the specification and, when
# your kernel runs, draws what its first warp reads of `weight`. `check` explains what is wrong: which element, which
# thread, which line. Try leaving out each of the two barriers.

# %%
exercise.show("matmul_tile")

# %%
exercise.check("matmul_tile")

# %% [markdown]
# ### Our solution
#
# (It contains the solution of the exercise.) The function makes a kernel for a *pitch*, the distance between the rows
# of a tile in shared memory. For v3 that is TILE: the rows are contiguous.

# %%
pictures.source(matmul_cuda.tile_kernel)
TILE = matmul_cuda.TILE
print(f"in the simulator: TILE = {TILE}, so a block has {TILE**2} threads; on a GPU: TILE = 16, {16**2} threads")

# %% [markdown]
# ## v4: one column of padding
#
# Shared memory has a rule of its own. It is divided into 32 *banks*: word 0 is in bank 0, word 1 in bank 1, and word 32
# in bank 0 again. A bank serves one word at a time. If the threads of a warp read words from 32 different banks, or the
# same word, all of them are served in one pass. If they read n different words from one bank, the request takes n
# passes: an n-way *bank conflict*.
#
# Look at `weight_tile[x, k]`. Threads with consecutive x read elements that are a row apart. With rows of 16 elements,
# as on a GPU, that is bank 0, 16, 0, 16, and so on: two banks serve all requests.
#
# The cure only costs a little memory: rows of 17 elements, of which the last is never used. Consecutive x then differ
# by 17 banks, and all of them fall into different banks. In the kernel only the pitch changes.

# %%
pictures.text("```python\nkernel_v3, kernel_v4 = tile_kernel(TILE), tile_kernel(TILE + 1)\n```")


# %%
def conflict(n):
    return f"{n}-way bank conflict" if n > 1 else "no bank conflict"


def draw_banks(axis, words, title):
    """A column for each bank, with a square for each word that the warp reads from it."""
    height = [0] * 32
    for word in sorted(set(words)):
        bank = word % 32
        axis.add_patch(Rectangle((bank + 0.1, height[bank] + 0.1), 0.8, 0.8, color=pictures.COLOURS[0]))
        height[bank] += 1
    axis.set(xlim=(0, 32), ylim=(0, 8.4), xlabel="bank", title=f"{title}: {conflict(max(height))}")
    axis.set(xticks=[0, 8, 16, 24, 32], yticks=[0, 4, 8])


figure, axes = pictures.new(1, 2, width=9, height=2.6, sharey=True)
for axis, rung, pitch in zip(axes, ("v3", "v4"), (16, 17), strict=True):
    draw_banks(axis, [x * pitch for x in range(16)], f"{rung}, rows of {pitch} elements")
axes[0].set_ylabel("words read from a bank")
figure.suptitle("one request of a warp: weight_tile[x, 0] for all x", fontsize=9)
pictures.show(figure)

# %% [markdown]
# (With the simulator's rows of 8 elements it is a 2-way conflict, as you will see in the counts. And the sum at the end
# of v2, down the columns of an array with rows of 32 elements? All 32 elements are in one bank: a 32-way conflict, and
# the same cure helps. We leave that one to you.)
#
# ## v5: register tiles
#
# Shared memory is close, but not free. v4 reads two elements of it for each multiply-add: it has moved the naive
# kernel's pattern one level up. So we use the same trick one level up. A thread's own variables are in *registers*,
# which are available at once. Let a thread own not one result but 4 x 4 of them: it reads 4 elements of one tile and 4
# of the other, and does 16 multiply-adds with them. That is half a read for each, instead of two.
#
# `cuda.local.array` is an array private to a thread. If its size and all its indices are known at compile time, it
# lives in registers. The sixteen results of a thread are SIDE apart, so that at each read consecutive threads read
# consecutive elements. For that the tiles are now transposed in shared memory, with a row for each channel; `bring`
# transposes them while loading. (Four elements of padding per row: a warp loads 8 channels of 4 rows at once, and these
# now fall into 32 different banks.)
#
# The block's tile grows with it: BIG = 4·SIDE results on each side. So there are also fewer requests to global memory.

# %%
pictures.source(matmul_cuda.bring, matmul_cuda.kernel_v5)
SIDE, BIG, DEPTH, OWN = matmul_cuda.SIDE, matmul_cuda.BIG, matmul_cuda.DEPTH, matmul_cuda.OWN
print(f"in the simulator: SIDE = {SIDE}, BIG = {BIG}, DEPTH = {DEPTH}; on a GPU: SIDE = 16, BIG = 64")

# %% [markdown]
# ## v6: vectorised loads
#
# One instruction can read 16 bytes of shared memory, four consecutive elements, instead of 4 bytes. So let a thread's 4
# x 4 results be adjacent: then its four elements of a tile are adjacent too, and one instruction reads them. For 16
# multiply-adds a thread now issues 2 requests instead of 8. That matters because an SM issues only a limited number of
# instructions per cycle: a load takes the place of a multiply-add.
#
# `load_float4(tile, row, column)` is that instruction. It needs an address that is a multiple of 16 bytes. So the rows
# have four elements of padding, as before, and the arrays are aligned to 16 bytes (the 16 in `cuda.shared.array`).

# %%
pictures.source(matmul_cuda.kernel_v6)

# %% [markdown]
# ## Correct, at awkward sizes
#
# Every rung is compared with the formula in float64: single elements, and 3, 97 and 257, which no tile divides. In the
# simulator the check also finds races, indices out of bounds, shared memory that is read before it is written, and
# barriers that some threads never reach. The last line is the function that the model uses.

# %%
ladder.check(LADDER)

# %% [markdown]
# ## Why each rung is faster, without a GPU
#
# On the left: the elements that the threads request from global memory, and the sectors that this moves. On the right:
# the requests that warps make to shared memory, and the passes that these take because of bank conflicts. First from v1
# to v3, where global memory is what changes; then from v3 to v6, with other scales.

# %%
counts = {name: counting.total(trace) for name, trace in traces.items()}
names = list(counts)
pictures.show(pictures.draw_counts({name: counts[name] for name in names[:3]}))
pictures.show(pictures.draw_counts({name: counts[name] for name in names[2:]}))

# %% [markdown]
# Three details. v2's requests to shared memory take many passes: the sums down the columns. v4's take a little more
# than one each, because the rows that a warp loads into a tile now overlap in a bank. And v6 moves more sectors than
# v5, though it requests the same elements: a thread's results are adjacent, so consecutive threads write 4 elements
# apart. That happens once per result, however many channels there are; with more channels than the few here it hardly
# matters.
#
# Divided by the number of multiply-adds, and compared with the predictions in the text above:

# %%
terms = LADDER.flops(**LADDER.counted) // 2
predicted = {
    "matmul_forward_v1": (2, 0), "matmul_forward_v2": (2, 32 / LADDER.counted["C"]),
    "matmul_forward_v3": (2 / TILE, 2), "matmul_forward_v4": (2 / TILE, 2),
    "matmul_forward_v5": (2 / BIG, 2 / OWN), "matmul_forward_v6": (2 / BIG, 2 / OWN / 4),
}  # fmt: skip
print(f"{'per multiply-add':<22} reads of global (predicted)   reads of shared (predicted)")
for name, (from_global, from_shared) in predicted.items():
    elements, shared = (reads(counted[name], space)[0] for space in ("global", "shared"))
    global_text, shared_text = f"({from_global:g})", f"({from_shared:g})"
    print(f"{name:<22} {elements / terms:15.4g} {global_text:>11} {shared / terms:17.4g} {shared_text:>11}")

# %% [markdown]
# The whole ladder is in this table: v2 makes the same reads cheaper, v3 requests less from global memory, v4 makes the
# reads of shared memory cheaper, v5 makes fewer of them, and v6 needs fewer instructions. A matrix product is fast if
# an element, once fetched, is used as often as there is room to keep it, at every level: memory, shared memory,
# registers.
#
# How large should a tile be? The larger the better for the reads, as the next picture shows. But a thread has at most
# 255 registers, a block 1024 threads, and an SM only so much shared memory: a thread that owns 8 x 8 results needs 64
# registers for the sums alone. Larger tiles also lower the *occupancy*, the number of warps that are resident on an SM.
# With fewer warps there is less *latency hiding*: less other work for the SM while some warps wait for memory.

# %%
sides = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])
figure, axis = pictures.new(width=6.5, height=2.8)
axis.loglog(sides, sides / 4, marker="o", markersize=4, color=pictures.COLOURS[0], base=2)
for side, text in ((1, "v1, v2"), (16, "v3, v4"), (64, "v5, v6"), (128, "the model's op")):
    axis.annotate(text, (side, side / 4), (8, -8), textcoords="offset points", fontsize=8)
axis.set(
    xlabel="side of a block's tile",
    ylabel="flops per byte\nof global memory",
    xlim=(0.7, 500),
    ylim=(0.12, 120),
)
pictures.show(figure)

# %% [markdown]
# ## On a GPU
#
# If there is a GPU, this cell compiles the rungs for it and times them. 100% is the rate at which the GPU does
# multiply-adds and nothing else, measured in the same cell. PyTorch's line is *cuBLAS*, NVIDIA's own library of matrix
# products: the one to compare with.

# %%
found = timing.show_times(LADDER)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ### What the model's kernel adds
#
# The last rung is `matmul_forward` of `llm_numba/cuda/matmul.py`, whose float32 kernel is in `matmul_simt.py`. It is v6
# with larger tiles and four more ideas:
#
# - **8 x 8 results per thread**, as four blocks of 4 x 4 that are half a tile apart, so that a warp still
#   reads consecutive vectors.
# - **Double buffering.** While the threads multiply one pair of tiles, the elements of the next step are already being
#   loaded into registers. Since load and compute now use different tiles, one of the two barriers is no longer needed.
# - **Grouped tiles.** Blocks that run at the same time own tiles that need the same rows, which they then find in the
#   L2 cache.
# - **Split-K.** Small results have too few tiles to fill a GPU. Then the sum over c is split, each split has its own
#   blocks, and their results are added at the end, always in the same order.

# %%
pictures.source(matmul_cuda.matmul_forward, matmul_tensor_cores.multiply)

# %% [markdown]
# ## Tensor cores
#
# Since 2017, NVIDIA's GPUs have had units that only multiply small matrices: *tensor cores*. One warp instruction,
# `mma`, multiplies a 16 x 16 matrix by a 16 x 8 matrix and adds the product to a 16 x 8 matrix: 16·16·8 = 2048
# multiply-adds, where an ordinary warp instruction does 32.
#
# The price: the operands have 16 bits. *bf16* is simply the upper half of a float32: the sign, all 8 bits of the
# exponent, and 7 of its 23 bits of mantissa. It has float32's range and two to three decimal digits. Products are
# summed in float32, so the rounding of the inputs is almost the only error.

# %%
values = np.float32([np.pi, 1 / 3, 1000.7, 1e-30])
rounded = matmul_tensor_cores.bf16(values)
for x, bits in zip(values, rounded, strict=True):
    back = (np.uint32(bits) << np.uint32(16)).view(np.float32)
    print(f"{x:<12.7g} float32 {int(x.view(np.uint32)):032b}")
    print(f"{back:<12.7g} bf16    {int(bits):016b}, relative error {abs(back / x - 1):.2%}")

# %% [markdown]
# ### Fragments: which thread holds what
#
# The matrices are not in memory when the instruction starts: they are in the *registers of the warp*, distributed over
# its 32 threads by a fixed rule. What one thread holds is its *fragment*. Let `lane` be a thread's index in its warp, g
# = lane // 4 and q = lane % 4. It holds
#
# - of the first matrix, rows g and g + 8, and of these the columns 2q, 2q + 1, 2q + 8 and 2q + 9: eight elements;
# - of the second matrix, column g, and of it the rows 2q, 2q + 1, 2q + 8 and 2q + 9: four elements;
# - of the result, rows g and g + 8, and of these the columns 2q and 2q + 1: four elements.
#
# Two bf16 elements share a register, so the operands take six registers, and the sums, in float32, four. The picture
# shows the rule; it is drawn from what the threads of our first kernel, below, read and write.

# %%
PRODUCT = matmul_tensor_cores.PRODUCT
one = tracing.simulate(matmul_tensor_cores.multiply_v1, **problem.arguments(PRODUCT.problem, dict(R=16, C=16, OC=8)))

figure, axes = pictures.new(1, 3, width=9, height=4.2, width_ratios=[16, 8, 8])
for axis, name, title in zip(axes, ("a", "b", "out"), ("a, 16 x 16", "b, 16 x 8", "out, 16 x 8"), strict=True):
    held = np.zeros(one.arrays[name][1], int)
    for access in one.accesses:
        if access.array == name:
            held[access.index] = access.lane
    held = held.T if name == "b" else held  # b is stored transposed
    axis.imshow(held, cmap="viridis")
    for (y, x), lane in np.ndenumerate(held):
        axis.text(x, y, lane, ha="center", va="center", fontsize=6, color="white" if lane < 20 else "black")
    axis.set(title=title, xticks=[0, 7], yticks=[0, 7, 8, 15])
axes[1].set(xticks=[0, 7])
figure.suptitle("which thread holds which element", fontsize=10)
pictures.show(figure)

# %% [markdown]
# The simulator has no tensor cores. So the rungs' file has a replacement in plain Python: it assembles the two matrices
# from all threads' registers, and gives each thread its four results. It is the rule above, written as a program
# (`halves` splits a register into its two elements). On a GPU, the name `mma` stands for the instruction itself.

# %%
pictures.source(matmul_tensor_cores.mma)

# %% [markdown]
# ### v1: one warp, one tile
#
# A block is one warp and owns 16 x 8 results. In each step of 16 channels every thread loads its fragments of both
# operands from global memory, and `mma` does the rest. `pair` packs two consecutive elements into a register, with
# zeros beyond the edge of the matrix. (Here the operands are called `a` and `b`, and `out` stays float32. NumPy has no
# bf16, so the arrays hold the bits as `uint16`; `<< 16` moves them to the upper half of a register. `@device` marks a
# function that kernels call.)

# %%
pictures.source(matmul_tensor_cores.pair, matmul_tensor_cores.kernel_v1)

# %% [markdown]
# ### v2: register tiles, again
#
# The same trick, one level up again: now the *warp* owns 2 x 4 tiles. A fragment of `a`, once loaded, is used by 4
# instructions, a fragment of `b` by 2. For eight `mma` a thread loads 2·4 + 4·2 = 16 registers, where v1 loads 8·6 =
# 48.

# %%
pictures.source(matmul_tensor_cores.kernel_v2)

# %%
ladder.check(PRODUCT)
print()
terms = PRODUCT.flops(**PRODUCT.counted) // 2
for rung in PRODUCT.rungs[:-1]:
    elements, sectors = reads(counting.count(ladder.trace_of(rung, PRODUCT)), "global")
    print(f"{rung.__name__}: {elements / terms:.4f} reads of global memory per multiply-add, {sectors:,} sectors")

# %% [markdown]
# ### The model's op
#
# A tensor core is so fast that supplying it with data is the hard part. The kernel in `llm_numba/cuda/matmul_mma.py`
# has tiles in shared memory as above, 128 x 128 results for each block of four warps, and in addition:
#
# - **Asynchronous copies** (`cp.async`): 16 bytes at a time go from global to shared memory without passing through
#   registers, while the warps multiply. There are three buffers for the tiles of each operand: one is in use, the
#   others are being loaded.
# - **Two sets of fragments.** While `mma` multiplies one, the warp loads the other, so that neither waits.
# - **`ldmatrix`**: one instruction reads four 8 x 8 matrices from shared memory and distributes them to the threads as
#   `mma` needs them. It replaces the eight 2-byte reads with which v1 assembles a fragment.
# - **Swizzled offsets.** Instead of adding columns of padding, the kernel permutes the 16-byte chunks within a row, by
#   an exclusive or with the row index: no bank conflicts, and no memory wasted.
#
# These instructions exist on GPUs only. In the simulator, `multiply` is the function of `matmul_simt.py` instead, with
# bf16 operands, and that is what `check` has compared with float64 above.
#
# 100% is here what `mma` alone reaches on the GPU, without loads. (Hopper GPUs have a further instruction, `wgmma`,
# which is faster; cuBLAS uses it there, so its line may be above 100%.)

# %%
found = timing.show_times(PRODUCT)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ### Exercise: fragments
#
# Distribute a matrix as `mma` needs it: the rule above, written by you. It is only about indices and edges.

# %%
exercise.show("mma_fragments")

# %%
exercise.check("mma_fragments")

# %% [markdown]
# ## In a real training run
#
# Every rung has the op's signature, so it can replace the op in a run on a GPU (in float32, which is what the rungs
# compute with). The run then prints how long both take and how much their results differ:
#
# ```sh
# V6=lessons/rungs/matmul_cuda.py:matmul_forward_v6
# python -m llm_numba.train --device cuda --preset nano --use matmul_forward=$V6
# ```
#
# ## Summary
#
# - The flops of a matrix product are fixed. What differs is how often its elements are fetched.
# - Think of one step of a warp: its reads should be contiguous in global memory, and in different banks in shared
#   memory.
# - Fetch a tile together and use it many times; then do the same one level closer: from global to shared memory, from
#   shared memory to registers.
# - Tensor cores change the unit of work from an element to a small matrix. The question stays the same: how to supply
#   them with data.
#
# Further reading: NVIDIA's [CUTLASS](https://github.com/NVIDIA/cutlass) documents the same hierarchy of tiles. The
# layout of the fragments is in the PTX ISA, section "Matrix fragments for mma.m16n8k16".
