# %% [markdown]
# # Memory-bound layers: GELU, the residual stream, fusion
#
# **Goal.** To look at a layer and say, before anything is measured, how fast it can be at best: by counting bytes.
# Then to write the layers of GPT-2 that do little arithmetic, GELU and the residual addition, so that they move the
# bytes that have to be moved, and no others.
#
# **What you need.** Lesson 01: LayerNorm, `@njit` and `prange`, and what a CUDA kernel, a warp, a sector and a
# coalesced read are.

# %%
import math

import numpy as np

from llm_numba import oracle
from llm_numba.cpu.jit import exp
from llm_numba.cpu.residual import residual_backward
from llm_numba.lessons import counting, exercise, ladder, pictures, timing, tracing
from rungs import gelu_cpu, gelu_cuda, residual_cpu, residual_cuda

rng = np.random.default_rng(6)
COLOURS = pictures.COLOURS

# %% [markdown]
# ## Two limits
#
# A machine has two speeds: how many floating-point operations (*flops*) it does in a second, $F$, and how many bytes
# it moves between memory and its cores in a second, $W$. A layer that has to do $f$ flops and to move $b$ bytes takes
# at least
#
# $$ \max\Big(\frac{f}{F}, \frac{b}{W}\Big) $$
#
# If the first is larger, the layer is *compute-bound*; if the second, it is *memory-bound*. Which of the two it is
# depends on two quotients: $f/b$, the layer's flops for a byte, and $F/W$, the machine's, which is called its
# *balance*. A machine of balance 50 needs 50 operations for every byte, or else its arithmetic waits for memory.
#
# Take the forward pass of one of GPT-2's blocks with $C$ channels, and one token. (A token is a row of $C$ numbers;
# attention's work between tokens is left out here, lesson 05 is about it.) The four matrix products hold $3C^2$,
# $C^2$, $4C^2$ and $4C^2$ weights, with a multiplication and an addition for each: $24C^2$ flops. The rest of the
# block is
#
# - GELU, a function of one number, on $4C$ numbers;
# - twice: add what a layer has computed to the residual stream, and normalise the sum for the next layer.
#
# The products need more than a hundred times as many flops as this rest. How long does it take, then? That depends on
# how often its numbers travel. We shall see three ways to write it, with the following numbers read or written for a
# token:
#
# | | GELU | twice residual and LayerNorm | together |
# |---|---:|---:|---:|
# | a pass over memory for each operator | 22 · 4C | 2 · 7C | 102C |
# | a pass for each layer | 2 · 4C | 2 · 5C | 18C |
# | residual and LayerNorm in one pass | 2 · 4C | 2 · 4C | 16C |
#
# The picture has the machine's balance on its horizontal axis. The vertical one is the share of the block's shortest
# time, arithmetic and travel added up, in which the rest keeps the arithmetic waiting.

# %%
C = 768  # of GPT-2's smallest model
balance = np.logspace(0, 3, 100)
figure, axis = pictures.new(width=7, height=3)
for i, (label, numbers) in enumerate((("a pass for each operator", 102), ("a pass for each layer", 18), ("fused", 16))):
    waiting = 4 * numbers * C * balance  # bytes, as the flops that the machine could have done meanwhile
    axis.plot(balance, waiting / (waiting + 24 * C * C), label=label, color=COLOURS[i])
peaks = timing.peaks("cpu")
if peaks["flops"]:
    here = peaks["flops"] / peaks["copy"]
    print(f"this machine: {1e-9 * peaks['flops']:.0f} GFLOP/s, {1e-9 * peaks['copy']:.0f} GB/s, balance {here:.0f}")
    axis.axvline(here, color="0.4", linestyle="--", linewidth=1)
    axis.text(here, 0.93, " this machine", fontsize=8, color="0.3")
axis.set(xscale="log", xlabel="balance: flops for a byte", ylabel="share of the time", ylim=(0, 1))
axis.legend(frameon=False, loc="center left")
pictures.show(figure)

# %% [markdown]
# The more arithmetic a machine has for each byte, the more the layers that hardly compute decide about its speed.
# Large GPUs with their matrix units stand far on the right of this picture. There, to write these layers well is not
# a refinement. (The number of channels counts too: products grow with $C^2$, the rest with $C$.)
#
# ## GELU
#
# Between the two products of its feed-forward layer, GPT-2 passes every number through the *Gaussian error linear
# unit*: $x$, weighed with the probability that a number drawn from the normal distribution is below $x$. Large
# numbers pass, very negative ones become 0, and between the two the change is smooth. GPT-2 computes the probability
# in this form, which is within a thousandth of it:
#
# $$ \mathrm{gelu}(x) = \tfrac12\, x\, (1 + \tanh u) \qquad u = \sqrt{2/\pi}\, (x + 0.044715\, x^3) $$

# %%
x = np.linspace(-4, 4, 401)
y, slope = np.empty_like(x), np.empty_like(x)
probability = np.array([0.5 * (1 + math.erf(a / math.sqrt(2))) for a in x])
oracle.gelu_forward(y, x)
oracle.gelu_backward(slope, x, np.ones_like(x))

figure, (left, right) = pictures.new(1, 2, width=8.5, height=2.8)
left.plot(x, y, color=COLOURS[0], label="gelu(x)")
left.plot(x, slope, color=COLOURS[1], label="its derivative")
left.plot(x, np.maximum(x, 0), color="0.7", linestyle="--", linewidth=1, label="max(x, 0)", zorder=0)
left.legend(frameon=False)
left.set(title="GELU", xlabel="x", ylim=(-0.5, 3))
right.plot(x, 1000 * (y - x * probability), color=COLOURS[2])
right.set(title="tanh's form less the exact one, in thousandths", xlabel="x")
pictures.show(figure)

# %% [markdown]
# ### Bytes needed
#
# `out` is to be computed from `inp`. Each number has to be read once and each result to be written once: 2 numbers of
# 4 bytes, 8 bytes an element. No program can do with less. That is the yardstick.
#
# ### v1: NumPy, and bytes counted
#
# Here is how one writes it in NumPy.

# %%
pictures.source(gelu_cpu.gelu_forward_v1)

# %% [markdown]
# Two lines; but each operator in them is a loop of its own over the whole array. `inp * inp` reads two arrays and
# writes a third one, a *temporary*, which the next operator reads again. If the arrays do not fit into the cache (the
# small fast memory beside a core), each of these is a journey to memory and back.
#
# We need not guess how many there are. NumPy lets an array say what an operator shall do with it; this one notes how
# many arrays are read and written, and then does as always.

# %%
moved = []


class Counted(np.ndarray):
    """An array that notes what each operator reads and writes."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        result = getattr(ufunc, method)(*(np.asarray(x) for x in inputs), **options)
        moved.append((ufunc.__name__, sum(np.ndim(x) > 0 for x in inputs)))
        if out:
            np.asarray(out[0])[...] = result
        return result.view(Counted)


small = rng.standard_normal(1000, np.float32)
gelu_cpu.gelu_forward_v1(np.empty_like(small), small.view(Counted))
reads, writes = sum(arrays for _, arrays in moved), len(moved)
print(f"{len(moved)} operators read {reads} numbers an element and write {writes}")
print(f"bytes an element: {4 * (reads + writes)}; needed: 8")

figure, axis = pictures.new(width=7.5, height=2.8)
names = [f"{i + 1}. {name}" for i, (name, _) in enumerate(moved)] + ["needed"]
read = [4 * arrays for _, arrays in moved] + [4]
axis.barh(names, read, color=COLOURS[0], label="bytes read")
axis.barh(names, [4] * len(names), left=read, color=COLOURS[1], label="bytes written")
axis.invert_yaxis()
axis.set(xlabel="bytes an element", title="NumPy's GELU, operator after operator")
axis.set_xlim(0, 16)
axis.legend(frameon=False, loc="lower right")
pictures.show(figure)

# %% [markdown]
# These 22 numbers are the 22 of the table above. (NumPy saves memory, though not journeys, by writing some results
# over a temporary that is not needed any more.)
#
# ### v2: the same, piece by piece
#
# The operators are fine; the distance between them is not. If we give NumPy 4096 numbers at a time, then what one
# operator writes still lies in the core's cache when the next one reads it. Only the first read of `inp` and the last
# write of `out` are journeys to memory.

# %%
pictures.source(gelu_cpu.gelu_forward_v2)

# %% [markdown]
# ### v3: one loop
#
# A compiled loop goes further. Between reading a number and writing its result, everything lives in *registers*, the
# handful of places inside a core on which it computes. There are no temporaries at all. To join operators so that
# what lies between them never gets to memory is called *fusion*.

# %%
pictures.source(gelu_cpu.gelu_forward_v3)

# %% [markdown]
# ### v4: no call
#
# The bytes are now as few as can be, and yet v3 may even be slower than v2. `math.tanh` is a function of the C
# library that takes one number; a core that could compute 8 or 16 numbers with one vector instruction has to call it
# for each of them. The loop is bound by computing after all, by computing badly.
#
# So we compute differently. From $\tanh u = \frac{1 - e^{-2u}}{1 + e^{-2u}}$ follows
#
# $$ \tfrac12 x\,(1 + \tanh u) = \frac{x}{1 + e^{-2u}} $$
#
# and `exp` is the project's own: a polynomial, without a call and without an `if` that would have to branch, so that
# the compiler makes vector instructions of the whole loop. (`error_model="numpy"` says that a division by zero gives
# infinity and not Python's exception, which would be a branch.)

# %%
pictures.source(gelu_cpu.gelu_forward_v4)

# %%
pictures.source(exp)

# %% [markdown]
# ### The model's: all cores
#
# One core alone cannot keep the memory of most machines busy. The last rung, `llm_numba/cpu/gelu.py`, is v4 with rows
# shared out among the cores; the constants are multiplied beforehand.

# %%
pictures.source(gelu_cpu.gelu_forward)

# %%
ladder.check(gelu_cpu.FORWARD)

# %% [markdown]
# The limit, 100%, is the speed at which this machine copies a large array, which also reads a number and writes one.
# The rate counts the 8 bytes needed, whatever a rung moves beyond them.

# %%
found = timing.show_times(gelu_cpu.FORWARD)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# ## Your turn: the gradient
#
# Given `dout`, the derivative of the loss by `out`, the backward pass owes the derivative by `inp`. By the product
# rule, and as the derivative of $\tanh u$ is $1 - \tanh^2 u$:
#
# $$ \frac{d}{dx}\, \tfrac12 x (1 + \tanh u) = \tfrac12 (1 + \tanh u) + \tfrac12\, x\, (1 - \tanh^2 u)\, \frac{du}{dx}
#    \qquad \frac{du}{dx} = \sqrt{2/\pi}\, (1 + 3 \cdot 0.044715\, x^2) $$
#
# Bytes needed: `inp` and `dout` are read, `dinp` is written; 12 an element. Note what is *not* read: neither `out`
# nor $\tanh u$. They could have been kept in the forward pass. To compute them again is cheaper than to fetch them,
# where memory is what one waits for, and they would take up memory between the two passes as well.
#
# Finite differences agree with the paper, as in lesson 01:

# %%
h, points = 1e-5, rng.normal(0, 2, 1000)
up, down, gradient = np.empty(1000), np.empty(1000), np.empty(1000)
oracle.gelu_forward(up, points + h)
oracle.gelu_forward(down, points - h)
oracle.gelu_backward(gradient, points, np.ones(1000))
print(f"off by {np.abs((up - down) / (2 * h) - gradient).max():.0e} at most")
assert np.allclose((up - down) / (2 * h), gradient, atol=1e-8)

# %%
exercise.show("gelu_backward")

# %%
exercise.check("gelu_backward")

# %% [markdown]
# ## The residual stream: fusing two layers
#
# Each layer of GPT-2 adds its result to the residual stream, and LayerNorm prepares the sum for the next layer:
#
# $$ \text{residual} = \text{inp1} + \text{inp2} \qquad \text{out} = \text{layernorm}(\text{residual}) $$
#
# Both results are needed: `out` by the next layer, `residual` by the addition after that. So the bytes needed are two
# numbers read and two written, 16 bytes an element. (`mean` and `rstd`, two numbers for a whole row, and the weight
# and bias, which all rows share, do not count.)
#
# ### v1: a pass for each line of the formula
#
# This is how the formulas read: the sums; the means; the variances, of which the reciprocal roots are kept; the
# results. Four loops, each over the whole array and on all cores. (`mean_of` and `rstd_of` are the sums of lesson
# 01.)
#
# Count with me: the first loop reads two numbers an element and writes one, the second and the third read one each,
# the last reads one and writes one. That is 7.

# %%
pictures.source(residual_cpu.add, residual_cpu.means, residual_cpu.rstds, residual_cpu.scale_and_shift)
pictures.source(residual_cpu.residual_layernorm_forward_v1)

# %% [markdown]
# ### v2: a pass for each layer
#
# LayerNorm as it was in lesson 01 does all it has to with one row before it goes on to the next: a row of some
# kilobytes stays in the cache meanwhile. The addition is 3 numbers an element, LayerNorm 2. That is 5.

# %%
pictures.source(residual_cpu.residual_layernorm_forward_v2)

# %% [markdown]
# ### v3: one pass
#
# The sum is written by the addition and read by LayerNorm. If one loop does both for a row, the reading finds it in
# the cache. That is 4, the number needed. The model's function is the same in other words.

# %%
pictures.source(residual_cpu.one_pass)

# %%
ladder.check(residual_cpu.FORWARD)

# %%
found = timing.show_times(residual_cpu.FORWARD)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# ### Does the count foretell the time?
#
# If memory is all that matters, a rung's time is its bytes, divided by the speed of memory. Here is the time of each
# rung over the numbers it moves, in shares of the last one's; the line is what the count foretells. Where a rung lies
# above it, something else holds it up too; where it lies below, part of its journeys were saved by a cache large
# enough for a good part of the arrays.

# %%
numbers = np.array([7, 5, 4, 4])
seconds = np.array([found["rows"][ladder.title(rung)] for rung in residual_cpu.FORWARD.rungs])
figure, axis = pictures.new(width=5.5, height=3)
axis.plot([0, 7.5], [0, 7.5 / 4], color="0.6", linestyle="--", linewidth=1, label="foretold by the bytes")
places = ("v1", 0), ("v2", 0), ("v3", 8), ("the model's", -12)
for n, share, (name, place) in zip(numbers, seconds / seconds[-1], places, strict=True):
    axis.plot(n, share, "o", color=COLOURS[2 if name == "the model's" else 0])
    axis.annotate(name, (n, share), (7, place - 3), textcoords="offset points", fontsize=8)
axis.set(xlabel="numbers read or written for an element", ylabel="time", xlim=(0, 8), ylim=(0, None))
axis.legend(frameon=False)
pictures.show(figure)

# %% [markdown]
# ### The fastest op
#
# The gradient of a sum goes to both of its terms, unchanged: `dinp1 = dinp2 = dout`. A copy would move 2 numbers an
# element. The model moves none: it lets the second gradient *be* the first one's memory, and the op looks whether
# that is so. A layer can be fused away altogether.

# %%
pictures.source(residual_backward)

# %% [markdown]
# ## On a GPU
#
# A GPU's balance is higher, so what we have learned counts more. Two things are new: *which* thread takes which
# number, and how many reads are on their way at a time.
#
# ### GELU v1: a thread owns 8 neighbours
#
# A CPU's core would like this best: 8 numbers side by side, in 32 bytes. `blocks_for(n, m)` is the number of blocks
# of `m` that cover `n`; `gelu` is the formula of v4. (`min` keeps the exponential from overflowing.)

# %%
pictures.source(gelu_cuda.gelu, gelu_cuda.kernel_v1, gelu_cuda.gelu_forward_v1)

# %% [markdown]
# ### GELU v2: a thread owns a number
#
# Remember lesson 01: it matters what the 32 threads of a warp want *at the same time*. In v1, thread 0 wants number
# 0, thread 1 wants number 8, and so on: each of the 32 reads falls into another sector of 32 bytes. If each thread
# takes one number, a warp wants 32 neighbours, which are 4 sectors.

# %%
pictures.source(gelu_cuda.kernel_v2)

# %%
for rung in (gelu_cuda.gelu_forward_v1, gelu_cuda.gelu_forward_v2):
    trace = ladder.trace_of(rung, gelu_cuda.FORWARD)
    title = f"{rung.__name__}: what a warp reads, step after step"
    pictures.show(pictures.draw_warp(trace, "inp", steps=8, title=title))

# %% [markdown]
# v1 is not lost altogether: the same 32 sectors are wanted by the next seven steps too, and if the card's caches have
# kept them so long, they do not travel again. But caches are small, and thousands of threads want a place in them.
#
# ### GELU v3: eight numbers on their way at once
#
# v2 moves as few bytes as can be. What keeps it from the limit, if anything does, is waiting. A number from a card's
# memory takes hundreds of clock cycles to arrive, its *latency*. To move $W$ bytes a second with a latency of $t$
# seconds, at any time
#
# $$ W \cdot t $$
#
# bytes must be on their way, as the flow of a pipe times the time through it is what the pipe holds. A thread of v2
# asks for one number and can do nothing until it is there; all bytes on their way are those of other threads, and how
# many threads a card holds is limited.
#
# v3 gives a thread 8 numbers, THREADS apart, so that each read of a warp is still coalesced, and asks for all 8
# before it needs the first. Two loops are written for that: no read can move ahead of a write that the program puts
# first, since the compiler cannot know that `out` and `inp` are not the same memory.

# %%
pictures.source(gelu_cuda.kernel_v3)

# %% [markdown]
# The order in which one thread reads (`r`) and writes (`w`), from the recording; a run of `r` is what is on its way
# at once. (In the simulator, the model's kernel gives a thread 2 numbers and not 8, to have fewer of them to go
# through.)

# %%
for rung in gelu_cuda.FORWARD.rungs:
    trace = ladder.trace_of(rung, gelu_cuda.FORWARD)
    mine = [a.kind[0] for a in trace.accesses if a.block == (0, 0, 0) and a.lane == 5]
    print(f"{ladder.title(rung):40} {' '.join(mine)}")

# %%
ladder.check(gelu_cuda.FORWARD)

# %%
pictures.show(pictures.draw_counts(ladder.counts(gelu_cuda.FORWARD)))

# %% [markdown]
# v2, v3 and the model's are the same in this picture: the count knows what is moved, not how long it is waited for.
# On a card the next cell measures what is left between them.

# %%
found = timing.show_times(gelu_cuda.FORWARD)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ## Residual and LayerNorm on a GPU
#
# The same three ideas as on the CPU, with registers in the place of the cache: v1 starts two kernels, and the second
# reads the sum as often as the formula names it. v2's second kernel is the model's LayerNorm, which reads a row once
# and keeps it in its threads' registers. v3 is one kernel: it writes the sum and never reads it.
#
# (`block_sum` adds up a number of each thread of a block, as `sum_of_block` did in lesson 01; this one is the
# model's. Lesson 07 is about such sums. `cuda.local.array` is an array of a thread's own, which lives in registers.)

# %%
pictures.source(residual_cuda.add_kernel, residual_cuda.normalise_kernel, residual_cuda.residual_layernorm_forward_v1)

# %%
pictures.source(residual_cuda.make_kernel_v3)

# %%
ladder.check(residual_cuda.FORWARD)

# %% [markdown]
# Now we count sectors, array by array, and divide by the number of elements. A sector holds 8 numbers, so an array
# that is passed through once counts 1. The weight and the bias are left out: they are read for every row, but they
# are the same few kilobytes, which stay in the cache.


# %%
def numbers_moved(trace):
    """(array, kind) -> numbers moved for an element of the large arrays, whole sectors counted."""
    sizes = {name: math.prod(shape) for name, (space, shape, _) in trace.arrays.items() if space == "global"}
    per_sector = counting.SECTOR // 4
    return {
        (c.array, c.kind): c.sectors * per_sector / sizes[c.array]
        for c in counting.count(trace)
        if c.space == "global" and sizes[c.array] == max(sizes.values())
    }


moved = {ladder.title(r): numbers_moved(ladder.trace_of(r, residual_cuda.FORWARD)) for r in residual_cuda.FORWARD.rungs}
figure, axis = pictures.new(width=9, height=2.8)
parts = [("inp1", "read"), ("inp2", "read"), ("residual", "write"), ("residual", "read"), ("out", "write")]
left = np.zeros(len(moved))
for i, part in enumerate(parts):
    width = np.array([found.get(part, 0) for found in moved.values()])
    axis.barh(range(len(moved)), width, 0.7, left=left, color=COLOURS[i], label=f"{part[1]} {part[0]}")
    left += width
for row, total in enumerate(left):
    axis.text(total + 0.08, row, f"{total:.0f}", va="center", fontsize=9)
axis.axvline(4, color="0.3", linestyle="--", linewidth=1)
axis.set(
    yticks=range(len(moved)), yticklabels=map(pictures.short, moved), xlabel="numbers moved for an element; needed: 4"
)
axis.set_xlim(0, 8)
axis.invert_yaxis()
axis.legend(frameon=False, fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.45, 1.0))
pictures.show(figure)
assert [round(total) for total in left] == [7, 5, 4, 4]

# %%
found = timing.show_times(residual_cuda.FORWARD)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ## Half the bytes
#
# When nothing can be left out any more, what is left can be made smaller. A number of 2 bytes in the place of 4
# halves all that is moved in this lesson. The model's kernels take such numbers too: *bfloat16*, which is the
# upper half of a float32 (lesson 08 says what it costs). They widen it when it has been read, compute in float32, and
# narrow the result. For NumPy here it is an array of `uint16`.

# %%
n = 1024
for dtype in (np.float32, np.uint16):
    trace = tracing.simulate(gelu_cuda.gelu_forward, out=np.zeros((1, 1, n), dtype), inp=np.zeros((1, 1, n), dtype))
    sectors = counting.total(trace)["global sectors"]
    each = f"{counting.SECTOR * sectors / n:.0f} bytes an element"
    print(f"{np.dtype(dtype).itemsize} bytes a number: {sectors} sectors, {each}")

# %% [markdown]
# ## Your turn: a bias and GELU
#
# The product before GELU adds a bias to each of its columns. Fuse this addition with GELU, in a kernel whose grid has
# a fixed size, so that each thread goes on through the array until nothing is left: a *grid-stride loop*. `check`
# knows where threads meet, and which element nobody wrote.

# %%
exercise.show("bias_gelu")

# %%
exercise.check("bias_gelu")

# %% [markdown]
# ## Why not fuse everything?
#
# GELU could also be the last thing that the product before it does with its results, while they are in registers: no
# pass of its own at all. The model does not do so. Training needs GELU's *input* again in the backward pass, so that
# the product has to write it anyway, and GELU's result besides, and of the three numbers an element only one is
# saved; while the product's inner loop, which decides about most of a step's time, gets longer and needs more
# registers. Whether a fusion pays is found by counting first and measuring afterwards.
#
# ## To take away
#
# - Count the bytes that a layer *needs*: each input read once, each output written once. Divide by the machine's
#   bandwidth: that is its shortest time, and no cleverness beats it.
# - Count the bytes that it *moves*. The quotient of the two is what fusion can win.
# - Few bytes are not enough: on a CPU the loop must be made of vector instructions, on a GPU reads must be coalesced
#   and enough of them on their way at once.
# - What is cheap to compute again need not be kept.
#
# Sources: Hendrycks and Gimpel 2016, *Gaussian Error Linear Units*,
# [arXiv:1606.08415](https://arxiv.org/abs/1606.08415); He et al. 2015, *Deep Residual Learning*,
# [arXiv:1512.03385](https://arxiv.org/abs/1512.03385); Williams, Waterman and Patterson 2009, *Roofline: an
# insightful visual performance model for multicore architectures*, CACM 52(4).
