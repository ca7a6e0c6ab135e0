# %% [markdown]
# # Memory-bound layers: GELU, the residual stream, fusion
#
# **Goal.** Count bytes to find out how fast a layer can be at best, before measuring anything. Then write the layers of
# GPT-2 that do little arithmetic, GELU and the residual addition, so that they move only the bytes that must be moved.
#
# **Prerequisites.** Lesson 01: LayerNorm, `@njit` and `prange`, and the CUDA terms kernel, warp, sector and coalesced
# read.

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
# A machine has two speeds: the number of floating-point operations it performs per second, $F$ (in FLOP/s), and the
# number of bytes it moves between memory and its cores per second, $W$ (its *bandwidth*). A layer that needs $f$ FLOPs
# and moves $b$ bytes takes at least
#
# $$ \max\Big(\frac{f}{F}, \frac{b}{W}\Big) $$
#
# If the first term is larger, the layer is *compute-bound*. If the second is larger, it is *memory-bound*. Two ratios
# decide which: the layer's *arithmetic intensity* $f/b$, its FLOPs per byte, and the machine's *balance* $F/W$ (the
# *ridge point* of the roofline). On a machine with a balance of 50, a layer needs 50 operations per byte, or its
# arithmetic waits for memory.
#
# Consider the forward pass of one GPT-2 block with $C$ channels, for one token. (A token is a row of $C$ elements.
# Attention's work between tokens is left out; lesson 05 covers it.) The four matmuls have $3C^2$, $C^2$, $4C^2$ and
# $4C^2$ weights, with one multiplication and one addition each: $24C^2$ FLOPs. The rest of the block is
#
# - GELU, an element-wise function, on $4C$ elements;
# - twice: add a layer's output to the residual stream and normalise the sum for the next layer.
#
# The matmuls need more than a hundred times as many FLOPs as the rest. So how long does the rest take? That depends on
# how often its elements move. We will see three ways to write it, with these numbers of elements read or written per
# token:
#
# | | GELU | twice residual and LayerNorm | together |
# |---|---:|---:|---:|
# | a pass over memory for each operator | 22 · 4C | 2 · 7C | 102C |
# | a pass for each layer | 2 · 4C | 2 · 5C | 18C |
# | residual and LayerNorm in one pass | 2 · 4C | 2 · 4C | 16C |
#
# The horizontal axis of the picture is the machine's balance. The vertical axis is the share of the block's minimum
# time (arithmetic plus data movement) that goes into moving the data of these layers.

# %%
C = 768  # of GPT-2's smallest model
balance = np.logspace(0, 3, 100)
figure, axis = pictures.new(width=7, height=3)
for i, (label, numbers) in enumerate((("a pass for each operator", 102), ("a pass for each layer", 18), ("fused", 16))):
    waiting = 4 * numbers * C * balance  # bytes, as FLOPs that the machine could do in the same time
    axis.plot(balance, waiting / (waiting + 24 * C * C), label=label, color=COLOURS[i])
peaks = timing.peaks("cpu")
if peaks["flops"]:
    here = peaks["flops"] / peaks["copy"]
    print(f"this machine: {1e-9 * peaks['flops']:.0f} GFLOP/s, {1e-9 * peaks['copy']:.0f} GB/s, balance {here:.0f}")
    axis.axvline(here, color="0.4", linestyle="--", linewidth=1)
    axis.text(here, 0.93, " this machine", fontsize=8, color="0.3")
axis.set(xscale="log", xlabel="balance, FLOPs per byte", ylabel="share of the time", ylim=(0, 1))
axis.legend(frameon=False, loc="center left")
pictures.show(figure)

# %% [markdown]
# The more arithmetic a machine can do per byte, the more its speed depends on the layers that hardly compute. Large
# GPUs with matrix units are far to the right of this picture, so writing these layers well is essential there. (The
# number of channels matters too: the matmuls grow with $C^2$, the rest with $C$.)
#
# ## GELU
#
# Between the two matmuls of its feed-forward layer, GPT-2 applies the *Gaussian error linear unit* to every element:
# $x$ times the probability that a normally distributed variable is below $x$. Large values pass unchanged, very
# negative ones become 0, with a smooth transition between them. GPT-2 uses this approximation, which is accurate to a
# thousandth:
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
right.set(title="error of the tanh form, in thousandths", xlabel="x")
pictures.show(figure)

# %% [markdown]
# ### The minimum number of bytes
#
# The op computes `out` from `inp`. Each element must be read once and each result written once: 2 elements of 4 bytes,
# 8 bytes per element. No program can do with less. This is the yardstick.
#
# ### v1: NumPy, and counting bytes
#
# This is GELU in NumPy.

# %%
pictures.source(gelu_cpu.gelu_forward_v1)

# %% [markdown]
# It is only two lines, but each operator is a separate loop over the whole array. `inp * inp` reads two arrays and
# writes a third, a *temporary*, which the next operator reads again. If the arrays do not fit in the cache (the small
# fast memory next to a core), each access is a trip to memory and back.
#
# We can count these trips. NumPy lets an array subclass intercept every operator. This one records how many arrays are
# read and written, and then runs the operator as usual.

# %%
moved = []


class Counted(np.ndarray):
    """An array that records what each operator reads and writes."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        result = getattr(ufunc, method)(*(np.asarray(x) for x in inputs), **options)
        moved.append((ufunc.__name__, sum(np.ndim(x) > 0 for x in inputs)))
        if out:
            np.asarray(out[0])[...] = result
        return result.view(Counted)


small = rng.standard_normal(1000, np.float32)
gelu_cpu.gelu_forward_v1(np.empty_like(small), small.view(Counted))
reads, writes = sum(arrays for _, arrays in moved), len(moved)
print(f"{len(moved)} operators read {reads} and write {writes} elements per element of the result")
print(f"bytes per element: {4 * (reads + writes)}; minimum: 8")

figure, axis = pictures.new(width=7.5, height=2.8)
names = [f"{i + 1}. {name}" for i, (name, _) in enumerate(moved)] + ["minimum"]
read = [4 * arrays for _, arrays in moved] + [4]
axis.barh(names, read, color=COLOURS[0], label="bytes read")
axis.barh(names, [4] * len(names), left=read, color=COLOURS[1], label="bytes written")
axis.invert_yaxis()
axis.set(xlabel="bytes per element", title="NumPy's GELU, operator by operator")
axis.set_xlim(0, 16)
axis.legend(frameon=False, loc="lower right")
pictures.show(figure)

# %% [markdown]
# These are the 22 elements of the table above. (NumPy writes some results over temporaries that are no longer needed.
# That saves memory, but no trips.)
#
# ### v2: the same operators, one piece at a time
#
# The operators are fine; the distance between them is the problem. If we give NumPy 4096 elements at a time, the output
# of one operator is still in the core's cache when the next one reads it. Only the first read of `inp` and the last
# write of `out` go to memory.

# %%
pictures.source(gelu_cpu.gelu_forward_v2)

# %% [markdown]
# ### v3: one loop
#
# A compiled loop goes further. Between reading an element and writing its result, everything stays in *registers*, the
# few storage locations inside a core on which it computes. There are no temporaries at all. Combining operators so that
# intermediate results never reach memory is called *fusion*.

# %%
pictures.source(gelu_cpu.gelu_forward_v3)

# %% [markdown]
# ### v4: no function call
#
# The number of bytes is now minimal, and yet v3 can be slower than v2. `math.tanh` is a C library function that takes
# one element. A core that could process 8 or 16 elements with one vector instruction has to call it for each of them.
# The loop is compute-bound after all, because it computes badly.
#
# So we rewrite the formula. From $\tanh u = \frac{1 - e^{-2u}}{1 + e^{-2u}}$ it follows that
#
# $$ \tfrac12 x\,(1 + \tanh u) = \frac{x}{1 + e^{-2u}} $$
#
# and `exp` is the project's own: a polynomial without function calls or branches, so that the compiler can vectorise
# the whole loop. (`error_model="numpy"` makes a division by zero return infinity. Python's exception would need a
# branch.)

# %%
pictures.source(gelu_cpu.gelu_forward_v4)

# %%
pictures.source(exp)

# %% [markdown]
# ### The model's version: all cores
#
# On most machines one core cannot use the full memory bandwidth. The last rung, `llm_numba/cpu/gelu.py`, is v4 with the
# rows distributed over the cores, and with the constants multiplied in advance.

# %%
pictures.source(gelu_cpu.gelu_forward)

# %%
ladder.check(gelu_cpu.FORWARD)

# %% [markdown]
# The limit, 100%, is the speed at which this machine copies a large array, which also reads and writes each element
# once. The rate uses the 8 bytes per element that are necessary, no matter how many more a rung moves.

# %%
found = timing.show_times(gelu_cpu.FORWARD)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# ## Exercise: the gradient
#
# Given `dout`, the derivative of the loss with respect to `out`, the backward pass computes the derivative with respect
# to `inp`. By the product rule, and because the derivative of $\tanh u$ is $1 - \tanh^2 u$:
#
# $$ \frac{d}{dx}\, \tfrac12 x (1 + \tanh u) = \tfrac12 (1 + \tanh u) + \tfrac12\, x\, (1 - \tanh^2 u)\, \frac{du}{dx}
#    \qquad \frac{du}{dx} = \sqrt{2/\pi}\, (1 + 3 \cdot 0.044715\, x^2) $$
#
# The minimum number of bytes: `inp` and `dout` are read, `dinp` is written, 12 bytes per element. Note what is *not*
# read: neither `out` nor $\tanh u$. The forward pass could have stored them. In a memory-bound op, recomputing them is
# cheaper than loading them, and storing them would also take memory between the two passes.
#
# Finite differences agree with the formula, as in lesson 01:

# %%
h, points = 1e-5, rng.normal(0, 2, 1000)
up, down, gradient = np.empty(1000), np.empty(1000), np.empty(1000)
oracle.gelu_forward(up, points + h)
oracle.gelu_forward(down, points - h)
oracle.gelu_backward(gradient, points, np.ones(1000))
print(f"largest error {np.abs((up - down) / (2 * h) - gradient).max():.0e}")
assert np.allclose((up - down) / (2 * h), gradient, atol=1e-8)

# %%
exercise.show("gelu_backward")

# %%
exercise.check("gelu_backward")

# %% [markdown]
# ## The residual stream: fusing two layers
#
# Each layer of GPT-2 adds its output to the residual stream, and LayerNorm prepares the sum for the next layer:
#
# $$ \text{residual} = \text{inp1} + \text{inp2} \qquad \text{out} = \text{layernorm}(\text{residual}) $$
#
# Both results are needed: `out` by the next layer, `residual` by the addition after that. So the minimum is two
# elements read and two written, 16 bytes per element. (`mean` and `rstd`, two elements per row, and the weight and
# bias, which all rows share, do not count.)
#
# ### v1: one pass per line of the formula
#
# This version follows the formulas: the sums; the means; the variances, stored as reciprocal square roots; the results.
# These are four loops, each over the whole array and on all cores. (`mean_of` and `rstd_of` are the sums of lesson 01.)
#
# Count the accesses per element: the first loop reads two elements and writes one, the second and third read one each,
# the last reads one and writes one. That makes 7.

# %%
pictures.source(residual_cpu.add, residual_cpu.means, residual_cpu.rstds, residual_cpu.scale_and_shift)
pictures.source(residual_cpu.residual_layernorm_forward_v1)

# %% [markdown]
# ### v2: one pass per layer
#
# LayerNorm as in lesson 01 finishes one row before it starts the next. A row of a few kilobytes stays in the cache
# meanwhile. The addition accesses 3 elements per element, LayerNorm 2. That makes 5.

# %%
pictures.source(residual_cpu.residual_layernorm_forward_v2)

# %% [markdown]
# ### v3: one pass
#
# The addition writes the sum and LayerNorm reads it. If one loop does both for a row, it reads the sum from the cache.
# That makes 4, the minimum. The model's function does the same.

# %%
pictures.source(residual_cpu.one_pass)

# %%
ladder.check(residual_cpu.FORWARD)

# %%
found = timing.show_times(residual_cpu.FORWARD)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# ### Does the count predict the time?
#
# If only memory bandwidth matters, the time of a rung is its bytes divided by the bandwidth. The picture shows the time
# of each rung, relative to the last one, over the number of elements it moves. The line is the prediction. A rung above
# the line is also slowed down by something else. A rung below the line saves part of its memory traffic because a large
# cache holds a good part of the arrays. So the count is a guide, not a measurement.

# %%
numbers = np.array([7, 5, 4, 4])
seconds = np.array([found["rows"][ladder.title(rung)] for rung in residual_cpu.FORWARD.rungs])
figure, axis = pictures.new(width=5.5, height=3)
axis.plot([0, 7.5], [0, 7.5 / 4], color="0.6", linestyle="--", linewidth=1, label="predicted by the bytes")
places = ("v1", 0), ("v2", 0), ("v3", 8), ("the model's", -12)
for n, share, (name, place) in zip(numbers, seconds / seconds[-1], places, strict=True):
    axis.plot(n, share, "o", color=COLOURS[2 if name == "the model's" else 0])
    axis.annotate(name, (n, share), (7, place - 3), textcoords="offset points", fontsize=8)
axis.set(xlabel="elements read or written per element", ylabel="time", xlim=(0, 8), ylim=(0, None))
axis.legend(frameon=False)
pictures.show(figure)

# %% [markdown]
# ### The fastest op
#
# The gradient of a sum goes to both of its terms unchanged: `dinp1 = dinp2 = dout`. A copy would move 2 elements per
# element. The model moves none: the second gradient *shares* the memory of the first, and the op checks whether that is
# the case. A layer can be fused away completely.

# %%
pictures.source(residual_backward)

# %% [markdown]
# ## On a GPU
#
# A GPU's balance is higher, so all of this matters more. Two things are new: *which* thread accesses which element, and
# how many loads are in flight at a time.
#
# ### GELU v1: a thread owns 8 consecutive elements
#
# A CPU core would like this best: 8 consecutive elements, 32 bytes. `blocks_for(n, m)` is the number of blocks of `m`
# that cover `n`; `gelu` is the formula of v4. (`min` prevents the exponential from overflowing.)

# %%
pictures.source(gelu_cuda.gelu, gelu_cuda.kernel_v1, gelu_cuda.gelu_forward_v1)

# %% [markdown]
# ### GELU v2: a thread owns one element
#
# Remember lesson 01: what matters is what the 32 threads of a warp access *at the same time*. In v1 thread 0 reads
# element 0, thread 1 reads element 8, and so on: the 32 loads touch 32 different 32-byte sectors. If each thread reads
# one element, the warp reads 32 consecutive elements, which are 4 sectors. The loads are *coalesced*.

# %%
pictures.source(gelu_cuda.kernel_v2)

# %%
for rung in (gelu_cuda.gelu_forward_v1, gelu_cuda.gelu_forward_v2):
    trace = ladder.trace_of(rung, gelu_cuda.FORWARD)
    title = f"{rung.__name__}: what a warp reads, step by step"
    pictures.show(pictures.draw_warp(trace, "inp", steps=8, title=title))

# %% [markdown]
# v1 does not waste all of this traffic: its next seven steps need the same 32 sectors, and if the GPU's caches still
# hold them, they are not loaded again. But caches are small, and thousands of threads compete for them.
#
# ### GELU v3: eight loads in flight
#
# v2 moves the minimum number of bytes. If it does not reach the bandwidth limit, it is because of waiting. A load from
# a GPU's memory (HBM) takes hundreds of clock cycles, its *latency*. To move $W$ bytes per second with a latency of $t$
# seconds,
#
# $$ W \cdot t $$
#
# bytes must be in flight at any time, just as the content of a pipe is its flow times the time that the flow takes to
# pass through it. Keeping enough loads in flight is called *latency hiding*. A thread of v2 issues one load and then
# waits for it, so all bytes in flight come from other threads, and the number of threads on an SM is limited.
#
# v3 gives each thread 8 elements, THREADS apart, so that each load of a warp is still coalesced, and it issues all 8
# loads before it needs the first result. It uses two loops for that: the compiler cannot move a load ahead of an
# earlier store, because it does not know that `out` and `inp` do not overlap.

# %%
pictures.source(gelu_cuda.kernel_v3)

# %% [markdown]
# The recording shows the order of loads (`r`) and stores (`w`) of one thread; a run of `r` is what can be in flight at
# once. (In the simulator the model's kernel gives a thread 2 elements instead of 8, to keep it fast.)

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
# v2, v3 and the model's version look the same in this picture: it counts what is moved, not how long the threads wait
# for it. On a GPU the next cell measures the difference.

# %%
found = timing.show_times(gelu_cuda.FORWARD)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ## Residual and LayerNorm on a GPU
#
# The same three ideas as on the CPU, with registers instead of the cache. v1 launches two kernels, and the second one
# reads the sum as often as the formula mentions it. v2's second kernel is the model's LayerNorm, which reads a row once
# and keeps it in the registers of its threads. v3 is a single kernel: it writes the sum and never reads it.
#
# (`block_sum` adds one element per thread over a block, like `sum_of_block` in lesson 01; this one is the model's.
# Lesson 07 is about such sums. `cuda.local.array` is an array that is private to a thread; here it is kept in
# registers.)

# %%
pictures.source(residual_cuda.add_kernel, residual_cuda.normalise_kernel, residual_cuda.residual_layernorm_forward_v1)

# %%
pictures.source(residual_cuda.make_kernel_v3)

# %%
ladder.check(residual_cuda.FORWARD)

# %% [markdown]
# Now count the sectors per array and divide by the number of elements. A sector holds 8 elements, so an array that is
# accessed once counts as 1. The weight and the bias are left out: every row reads them, but they are the same few
# kilobytes, which stay in the cache.


# %%
def elements_moved(trace):
    """(array, kind) -> elements moved per element of the large arrays, counted in whole sectors."""
    sizes = {name: math.prod(shape) for name, (space, shape, _) in trace.arrays.items() if space == "global"}
    per_sector = counting.SECTOR // 4
    return {
        (c.array, c.kind): c.sectors * per_sector / sizes[c.array]
        for c in counting.count(trace)
        if c.space == "global" and sizes[c.array] == max(sizes.values())
    }


moved = {
    ladder.title(r): elements_moved(ladder.trace_of(r, residual_cuda.FORWARD)) for r in residual_cuda.FORWARD.rungs
}
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
    yticks=range(len(moved)), yticklabels=map(pictures.short, moved), xlabel="elements moved per element; minimum: 4"
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
# When nothing more can be left out, the elements themselves can become smaller. With 2 bytes instead of 4, this
# lesson's memory traffic halves. The model's kernels support this with *bfloat16*, the upper half of a float32 (lesson
# 08 explains what it costs). They convert each element to float32 after loading it, compute in float32, and round the
# result. For NumPy such an array has the dtype `uint16`.

# %%
n = 1024
for dtype in (np.float32, np.uint16):
    trace = tracing.simulate(gelu_cuda.gelu_forward, out=np.zeros((1, 1, n), dtype), inp=np.zeros((1, 1, n), dtype))
    sectors = counting.total(trace)["global sectors"]
    each = f"{counting.SECTOR * sectors / n:.0f} bytes per element"
    print(f"{np.dtype(dtype).itemsize} bytes per element of the array: {sectors} sectors, {each}")

# %% [markdown]
# ## Exercise: bias and GELU
#
# The matmul before GELU adds a bias to each column. Fuse this addition with GELU, in a kernel with a grid of fixed
# size, so that each thread moves on through the array until nothing is left: a *grid-stride loop*. `check` finds races
# and elements that were never written.

# %%
exercise.show("bias_gelu")

# %%
exercise.check("bias_gelu")

# %% [markdown]
# ## Why not fuse everything?
#
# The matmul can also apply GELU to its results while they are in registers, without a separate pass. In the model this
# is one op, `matmul_gelu_forward`. But its version for the CPU is a matmul followed by GELU. Training needs GELU's
# *input* again in the backward pass, so the matmul has to write it anyway, and GELU's output too: of three elements
# only one is saved. On a CPU that is little beside the time of the product. On a GPU, where tensor cores make the
# product short, it is worth the longer kernel. To find out whether a fusion pays, count first and measure afterwards.
#
# ## Summary
#
# - Count the bytes that a layer *needs*: each input read once, each output written once. Divide by the bandwidth: no
#   program is faster than that.
# - Count the bytes that it *moves*. The ratio of the two is what fusion can gain.
# - Few bytes are not enough. On a CPU the loop must be vectorised; on a GPU loads must be coalesced, with enough of
#   them in flight.
# - What is cheap to recompute need not be stored.
#
# Sources: Hendrycks and Gimpel 2016, *Gaussian Error Linear Units*,
# [arXiv:1606.08415](https://arxiv.org/abs/1606.08415); He et al. 2015, *Deep Residual Learning*,
# [arXiv:1512.03385](https://arxiv.org/abs/1512.03385); Williams, Waterman and Patterson 2009, *Roofline: an insightful
# visual performance model for multicore architectures*, CACM 52(4).
