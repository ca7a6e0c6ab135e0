# %% [markdown]
# # Softmax and cross-entropy, with one pass less
#
# At its end, GPT-2 has a row of 50,257 *logits* for every token: one for each token of the vocabulary, the larger, the
# more likely it comes next. The **softmax** turns them into probabilities. The **cross-entropy** measures how surprised
# the model is by the token that actually came. That surprise, averaged, is the loss that training minimises.
#
# **The goal** of this lesson is the model's op `fused_classifier`: from logits to losses and to the gradient, which
# overwrites the logits. On the way there are three ideas that are useful far beyond it:
#
# * why the textbook formula fails in float32, and the one line that fixes it;
# * the *online softmax*, which needs one pass over a row where the usual method takes two, and on which flash attention
#   is based (lesson 05);
# * why it can be faster to compute a value twice than to store it.

# %%
import numpy as np

from llm_numba.lessons import exercise, ladder, pictures, timing
from rungs import softmax_cpu, softmax_cuda

# %% [markdown]
# ## Why this layer matters
#
# It is a small formula on the largest tensor of the model. For a batch of $B$ sequences of $T$ tokens, the logits are
# $B \cdot T$ rows, each padded from $V = 50{,}257$ to $V_p = 50{,}304$ elements, a multiple of 128, which suits the
# matmul that computes them. Here is their size in bytes, compared with the activations that go from layer to layer.

# %%
B, T, C, V, Vp = 4, 1024, 768, 50257, 50304
print(f"logits      (B, T, Vp): {4 * B * T * Vp / 2**20:6,.0f} MiB")
print(f"activations (B, T, C):  {4 * B * T * C / 2**20:6,.0f} MiB")

# %% [markdown]
# If softmax, loss and gradient are separate layers, each with its result in memory, there are several arrays of that
# size. If they are one op, there are the logits and nothing else.
#
# ## The mathematics
#
# Let $x$ be a row of logits and $y$ the token that actually came. Then
#
# $$ p_v = \frac{e^{x_v}}{\sum_u e^{x_u}}, \qquad \text{loss} = -\log p_y = \log \sum_u e^{x_u} - x_y . $$
#
# The $p_v$ are positive and add up to 1, so they can be read as probabilities. A loss of 0 means that the model was
# certain and right. A model that knows nothing gives each token $1/V$, and its loss is $\log V$.
#
# For the gradient, differentiate the second form of the loss. The logarithm of the sum has the derivative
# $e^{x_v} / \sum_u e^{x_u}$, which is $p_v$ again, and $x_y$ has the derivative 1 at $v = y$ and 0 elsewhere:
#
# $$ \frac{\partial\, \text{loss}}{\partial x_v} = p_v - [v = y] . $$
#
# This is a remarkably simple gradient: *what the model predicted minus what was true*. If $B \cdot T$ losses are
# averaged, each has the weight $1 / (B T)$. The op calls that factor `dloss` and multiplies by it.
#
# Let us verify the formula. A *finite difference* moves one logit a little up and a little down, and measures how the
# loss changes; in float64, so that rounding does not interfere.

# %%
rng = np.random.default_rng(1)
x, y, little = rng.standard_normal(12) * 1.5, 4, 1e-6


def loss_of(x):
    return np.log(np.exp(x).sum()) - x[y]


p = np.exp(x) / np.exp(x).sum()
gradient = p - (np.arange(x.size) == y)
measured = [(loss_of(x + little * e) - loss_of(x - little * e)) / (2 * little) for e in np.eye(x.size)]
print(f"largest difference: {np.abs(gradient - measured).max():.1e}")
assert np.allclose(gradient, measured, atol=1e-8)

figure, axes = pictures.new(1, 3, width=9, height=2.4)
for axis, values, title in zip(axes, (x, p, gradient), ("logits x", "softmax p", "gradient p - onehot"), strict=True):
    axis.bar(range(x.size), values, color=["C3" if v == y else "C0" for v in range(x.size)])
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.set(title=title, xlabel="token v", xticks=range(0, x.size, 2))
pictures.show(figure)

# %% [markdown]
# The red token is the one that came. Its gradient is negative: the next step, which goes against the gradient, raises
# its logit and lowers all others, the more likely ones more. The elements of the gradient add up to zero, because
# adding the same constant to all logits changes nothing.
#
# ## Overflow, and the one line that fixes it
#
# The largest float32 is about $3.4 \cdot 10^{38}$, and $e^{x}$ exceeds it from $x \approx 88.7$ on. The result is then
# `inf`, and `inf / inf` is `nan`, *not a number*, which makes every later result `nan` too. Logits above 88 are not
# rare in a young model with a large learning rate.
#
# But we just saw that a constant may be added to all logits without any effect. So subtract the largest of them,
# $m = \max_v x_v$:
#
# $$ p_v = \frac{e^{x_v - m}}{\sum_u e^{x_u - m}}, \qquad \text{loss} = \log \sum_u e^{x_u - m} + (m - x_y) . $$
#
# Now every exponent is at most 0, every $e^{\cdot}$ at most 1, and the sum is between 1 and $V$. Nothing can overflow.
# A term that underflows to 0 was too small to matter beside the 1.

# %%
pictures.source(softmax_cpu.softmax_overflowing)
row = np.array([1, 2, 3], np.float32)
for shift in (0, 80, 90):
    with np.errstate(over="ignore", invalid="ignore"):
        print(f"{row + shift} -> {softmax_cpu.softmax_overflowing(row + shift)}")

# %%
shifts = np.arange(-120, 121, 1, dtype=np.float32)
row = rng.standard_normal(64).astype(np.float32)
expected = np.log(np.exp(row.astype(np.float64)).sum())
errors = {"log(sum(exp(x)))": [], "m + log(sum(exp(x - m)))": []}
with np.errstate(over="ignore", divide="ignore"):
    for shift in shifts:
        moved = row + shift
        top = moved.max()
        errors["log(sum(exp(x)))"].append(np.log(np.exp(moved).sum()) - shift - expected)
        errors["m + log(sum(exp(x - m)))"].append(top + np.log(np.exp(moved - top).sum()) - shift - expected)
figure, axis = pictures.new(width=8, height=2.8)
for i, (name, values) in enumerate(errors.items()):
    values = np.abs(np.array(values, np.float64))
    kept = np.where(np.isfinite(values), np.maximum(values, 1e-8), np.nan)
    axis.semilogy(shifts, kept, color=f"C{i}", label=name, linewidth=2 - i)
lost = ~np.isfinite(errors["log(sum(exp(x)))"])
for side in (shifts < 0, shifts > 0):
    if (lost & side).any():
        axis.axvspan(shifts[lost & side].min(), shifts[lost & side].max(), color="0.9")
axis.set(
    xlabel="constant added to all logits",
    ylabel="error of the log-sum-exp",
    title="grey: the textbook formula gives inf",
)
axis.legend(frameon=False, fontsize=8)
pictures.show(figure)

# %% [markdown]
# The picture shows two things. In the grey areas the textbook formula has no result at all: on the right the sum
# overflows, on the left every term underflows to 0, whose logarithm is $-\infty$. And even in between, near its left
# edge, it is less accurate: very small float32 values have few digits left.
#
# The steps of the other curve, up to both sides, are the rounding of the logits themselves. Float32 values near 100 are
# about $8 \cdot 10^{-6}$ apart, and a result near 100 cannot be more accurate.
#
# ## The rungs on a CPU
#
# All rungs have the signature of the model's op. The arrays before the arrow are written:
#
# `logits (B, T, Vp), losses (B, T) <- targets (B, T), dloss, vocab_size, write_dlogits`
#
# With `write_dlogits` the logits are overwritten by their gradient, zero in the padding. Without it only the losses are
# computed, as when a model is evaluated.
#
# ### Rung 1: three layers
#
# First the naive way, which is also what frameworks do by default: a softmax that keeps its probabilities, the losses,
# then the gradient. Count the memory traffic *per logit*, in elements of 4 bytes: the softmax reads 1 and writes 1, the
# gradient reads 1 and writes 1: 4 in total. (The three loops of the softmax go over a row of 200 KB, which stays in a
# core's cache in the meantime.)

# %%
pictures.source(softmax_cpu.fused_classifier_v1)

# %% [markdown]
# ### Rung 2: an exponential without branches
#
# `math.exp` is a call into the C library, for one element at a time, with branches for all special cases. A core could
# do 8 or 16 elements with one instruction (lesson 02), but not through a call. So the model has its own `exp`, which
# consists of additions, multiplications and one shift of bits:
#
# $$ e^x = 2^n \cdot e^r, \qquad n = \lfloor x / \ln 2 + \tfrac12 \rfloor, \qquad r = x - n \ln 2 . $$
#
# $r$ is at most $\tfrac12 \ln 2$. For such a small $r$ a polynomial of degree 7 is accurate to the last digit of
# float32. And $2^n$ costs almost nothing: the exponent field of a float, eight bits, *is* $n$ plus 127, so a shift puts
# $n + 127$ there.

# %%
from llm_numba.cpu.jit import exp  # noqa: E402

pictures.source(exp)

# %%
x = np.linspace(-87, 0, 5001, dtype=np.float32)
with np.errstate(all="ignore"):
    values = np.array([exp.py_func(element) for element in x], np.float64)
relative = values / np.exp(x.astype(np.float64)) - 1
figure, axis = pictures.new(width=8, height=2.4)
axis.plot(x, relative, ".", markersize=1.5, color="C0")
axis.axhspan(-(2.0**-24), 2.0**-24, color="0.88", zorder=0)
axis.set(xlabel="x", ylabel="relative error", title="error of the polynomial; grey: half a float32 step")
pictures.show(figure)
print(f"largest relative error: {np.abs(relative).max():.1e}")

# %% [markdown]
# The rung itself: the same three layers, with that `exp`, and with permission to sum in any order (`reassoc`, lesson
# 01), because otherwise the sum would still be computed one element at a time.

# %%
pictures.source(softmax_cpu.softmax_row, softmax_cpu.fused_classifier_v2)

# %% [markdown]
# ### Rung 3: one row at a time, and nothing stored
#
# Now that the arithmetic is cheap, memory traffic is what is left to save. The gradient of a row needs only this row's
# probabilities. So finish each row while it is in the cache: its maximum, its sum, its loss, and its gradient, in place
# of the logits. A logit is read once and written once, 2 elements instead of 4, and the array of probabilities is gone.
#
# The price: $e^{x_v - m}$ is computed twice, once for the sum and once for the gradient, because it is not stored.
# **Computing twice can be cheaper than storing.** Lesson 05 uses the same idea, and there it saves not half but nearly
# all of the traffic.

# %%
pictures.source(softmax_cpu.classify_row, softmax_cpu.fused_classifier_v3)

# %% [markdown]
# ### Rung 4: all cores
#
# The rows are independent, so `prange` can distribute them. Each row of `logits` and each element of `losses` has one
# owner: no race.

# %%
pictures.source(softmax_cpu.fused_classifier_v4)

# %% [markdown]
# ### The last rung: the model's op
#
# Imported, not copied. It has one more idea. The loop for the maximum looks harmless, but a maximum of floats is
# awkward: what should `max(nan, 1)` be? LLVM, the compiler behind Numba, preserves the order of the comparisons and
# processes one element at a time. The bits of a float, read as an integer, have the same order as the floats (once
# those of negative values are flipped), and a maximum of integers has no such special cases.

# %%
from llm_numba.cpu.jit import largest  # noqa: E402

pictures.source(largest, softmax_cpu.fused_classifier)

# %% [markdown]
# It also computes the loss in float64. Why? With logits in the hundreds, $m - x_y$ can be large and $\log \text{total}$
# small, and a float32 sum has about seven digits for both together. Here the model was sure of one token and another
# one came. The second value is what float32 gives:

# %%
total, gap = np.float32(1.00001), np.float32(400)
print(f"float64: {np.log(np.float64(total)) + np.float64(gap):.8f}")
print(f"float32: {float(np.log(total) + gap):.8f}")

# %% [markdown]
# ### Correct?
#
# Every rung is compared with NumPy in float64, at sizes that fit no tile and no register: 1, 3, 97, 257. The logits go
# up to several hundred, so a rung that overflows would fail.

# %%
ladder.check(softmax_cpu.CLASSIFIER)

# %% [markdown]
# ### Fast?
#
# The limit is memory: a read and a write of each logit, $2 \cdot 4 \cdot B T V_p$ bytes, at the rate at which this
# machine updates a large array in place. If PyTorch is installed, its cross-entropy, forward and backward, is timed
# too.

# %%
found = timing.show_times(softmax_cpu.CLASSIFIER)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# Each bar is a rung; longer is better. If the last one stays well below the dashed line on your machine, it is not
# memory-bound there: two exponentials and a few passes through the cache per logit keep a few cores busy, and only many
# cores together request more than memory can deliver.
#
# ## The online softmax
#
# All of our rungs go over a row three times: for the maximum, for the sum, for the gradient. In a CPU's cache a pass is
# cheap. On a GPU a row often comes from memory again each time. Can the first two passes be one?
#
# It seems not: the sum needs $m$, and $m$ is known only at the end of the row. But suppose we are in the middle of the
# row, and know the largest element so far, $m$, and the sum so far, $s = \sum e^{x_u - m}$. Now comes a new element
# $x$. If it is not larger than $m$, add $e^{x - m}$. If it is, the new maximum is $m' = x$, and the sum so far was
# computed with the old one. But it is wrong by the *same factor* in every term:
#
# $$ \sum_u e^{x_u - m'} = e^{m - m'} \sum_u e^{x_u - m} . $$
#
# So one multiplication corrects it. For both cases together:
#
# $$ m' = \max(m, x), \qquad s' = s \cdot e^{m - m'} + e^{x - m'} . $$
#
# Start with $m = -\infty$, $s = 0$. This is the observation of Milakov and Gimelshein, 2018 (arXiv:1805.02867). Follow
# it along a row:

# %%
row = np.concatenate([rng.standard_normal(20), 2 + rng.standard_normal(20), rng.standard_normal(20)])
tops, totals = [], []
top, total = -np.inf, 0.0
for element in row:
    before, top = top, max(top, element)
    total = total * np.exp(before - top) + np.exp(element - top)
    tops.append(top)
    totals.append(total)
assert np.isclose(total, np.exp(row - row.max()).sum())

figure, axes = pictures.new(2, 1, width=8, height=3.6, sharex=True)
axes[0].plot(row, ".", color="0.6", label="elements of the row")
axes[0].step(range(row.size), tops, where="post", color="C3", label="m, the maximum so far")
axes[0].legend(frameon=False, fontsize=8, loc="upper left")
axes[1].step(range(row.size), totals, where="post", color="C0", label="s, the sum so far")
for index in np.flatnonzero(np.diff(tops)) + 1:
    axes[1].axvline(index, color="C3", linewidth=0.6, alpha=0.6)
axes[1].axhline(np.exp(row - row.max()).sum(), color="0.4", linestyle="--", linewidth=1, label="result of two passes")
axes[1].legend(frameon=False, fontsize=8, ncols=2)
axes[1].set(xlabel="index in the row")
pictures.show(figure)

# %% [markdown]
# At each red line a new maximum appears: the sum so far shrinks at once, and the new element adds 1. At the end the
# result is the sum that two passes compute.
#
# The pairs $(m, s)$ of two pieces of a row can be merged in the same way, in any order:
#
# $$ m = \max(m_1, m_2), \qquad s = s_1 e^{m_1 - m} + s_2 e^{m_2 - m} . $$
#
# So each thread of a block can process a part of a row, and a tree reduction merges the results. A row can be split
# into any number of pieces.


# %%
def pair(x):
    return x.max(), np.exp(x - x.max()).sum()


def merge(one, other):
    top = max(one[0], other[0])
    return top, one[1] * np.exp(one[0] - top) + other[1] * np.exp(other[0] - top)


a, b, c = np.split(row, 3)
print("whole      ", *pair(row))
print("(a, b), c  ", *merge(merge(pair(a), pair(b)), pair(c)))
print("a, (c, b)  ", *merge(pair(a), merge(pair(c), pair(b))))

# %% [markdown]
# ## The rungs on a GPU
#
# A summary of lessons 01 and 03: a *kernel* is run by many threads at once, in *blocks*; 32 threads of a block, a
# *warp*, execute each instruction together. What a warp reads from global memory at a time moves in *sectors* of 32
# bytes: 32 contiguous floats are 4 sectors, 32 floats that are far apart are 32. *Shared memory* is a small, fast
# memory of each block, and `syncthreads` is a *barrier*: no thread continues until all have reached it.
#
# ### Rung 1: one thread per row
#
# The CPU's three loops, with as many threads as there are rows.

# %%
pictures.source(softmax_cuda.kernel_v1)

# %% [markdown]
# ### Rung 2: one block per row
#
# The threads of a block interleave the logits: thread 0 takes those at 0, THREADS, 2 THREADS, ..., thread 1 the ones
# after them. Two tree reductions in shared memory compute the maximum and then the sum: half of the threads combine
# their value with one of the other half, then a quarter, until one value is left.

# %%
pictures.source(softmax_cuda.max_of_block, softmax_cuda.kernel_v2, softmax_cuda.write_gradient)

# %% [markdown]
# What does that change? Here is what the first warp reads: one row of the picture for each of its first accesses, with
# a coloured square for each thread, and in grey the sectors that have to be moved. First rung 1, then rung 2:

# %%
trace_v1 = ladder.trace_of(softmax_cuda.fused_classifier_v1, softmax_cuda.CLASSIFIER)
pictures.show(pictures.draw_warp(trace_v1, "logits", steps=6, title="v1: each thread in a different row"))
trace_v2 = ladder.trace_of(softmax_cuda.fused_classifier_v2, softmax_cuda.CLASSIFIER)
pictures.show(pictures.draw_warp(trace_v2, "logits", steps=6, title="v2: all threads in one row, coalesced"))

# %% [markdown]
# In rung 1 the squares of an access are a whole row apart, and each moves a whole sector, of which it uses an eighth.
# In rung 2 everything that is moved is used. (The single read is the target's logit, which one thread needs for the
# loss.)
#
# ### Rung 3: the online softmax
#
# Each thread goes over its part once and keeps its pair. Then the block computes the largest of the maxima, each thread
# rescales its sum to it, and the sums are added: this merges the pairs of all threads at once. Three reads per logit
# have become two.

# %%
pictures.source(softmax_cuda.kernel_v3)

# %% [markdown]
# ### The last rung: the model's op
#
# Rung 3 multiplies by $e^{m - m'}$ for every element, although the maximum seldom changes. The model's kernel loads
# several elements of its part into registers at a time: one rescaling for all of them, and all their loads are in
# flight before the first one is needed, which hides latency. Its `exp` is the GPU's own instruction for $2^x$, after a
# multiplication by $\log_2 e$. `to_float` and `to_storage` convert from and to bf16, 16-bit elements (lesson 08); with
# float32 they do nothing.

# %%
from llm_numba.cuda.classifier import classifier_kernel  # noqa: E402

pictures.source(getattr(classifier_kernel, "fn", classifier_kernel))

# %% [markdown]
# Every rung in the simulator: correct, and free of races, of reads of uninitialised shared memory, and of barriers that
# some threads do not reach.

# %%
ladder.check(softmax_cuda.CLASSIFIER)

# %% [markdown]
# And now the counts, for 32 rows of 64 logits.

# %%
counts = ladder.counts(softmax_cuda.CLASSIFIER)
pictures.show(pictures.draw_counts(counts))
one, two, three = (counts[f"fused_classifier_v{i}"] for i in (1, 2, 3))
print(f"sectors, v1 / v2: {one['global sectors'] / two['global sectors']:.1f}")
print(f"elements requested, v2 / v3: {two['global accesses'] / three['global accesses']:.2f}")
assert one["global sectors"] > 5 * two["global sectors"] and three["global accesses"] < 0.8 * two["global accesses"]

# %% [markdown]
# From rung 1 to 2 the requested elements are about the same, but the sectors are a fraction. From 2 to 3 one of four
# accesses to a logit is gone (three reads and a write have become two and one). Shared memory is no bottleneck: there
# are no bank conflicts.
#
# These counts ignore caches: on a GPU, the second read of a row that was just read may be served from the L2 cache, and
# then rung 3 gains less than a quarter. (In the simulator the model's kernel has small blocks, and a replacement for
# the warp shuffles, so its counts of shared memory cannot be compared.)

# %%
found = timing.show_times(softmax_cuda.CLASSIFIER)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# On an H200, rung 2 is 26 times as fast as rung 1, more than the sectors explain. At this size rung 1 launches only 16
# blocks, so most SMs are idle, and few warps hide the latency of memory.
#
# ## A rung in a real training run
#
# A rung has the op's signature, so the model can use it. This prints how long it takes in each step, and how much its
# results differ from the model's own:
#
# ```sh
# python -m llm_numba.train --preset nano --use fused_classifier=lessons/rungs/softmax_cpu.py:fused_classifier_v3
# ```
#
# ## Exercise 1: merge the softmaxes of a block
#
# Rung 3 merges the pairs with two tree reductions, one for the maximum and one for the sum. One is enough: let the tree
# merge whole pairs. The unfinished kernel is in `lessons/exercises/softmax_merge.py`. Write your answer there, or
# define the kernel here and pass it to `check` as the second argument.

# %%
exercise.show("softmax_merge")

# %%
exercise.check("softmax_merge")

# %% [markdown]
# ## Exercise 2: the gradient of softmax alone
#
# Followed by the cross-entropy, the softmax had that simple gradient. In attention, in lesson 05, something else
# follows it, which gives some gradient $dp$. The softmax's derivative is
# $\partial p_v / \partial x_u = p_v ([u = v] - p_u)$, since $x_u$ is in the numerator if $u = v$, and in the sum
# always. With the chain rule,
#
# $$ dx_u = \sum_v dp_v\, p_v ([u = v] - p_u) = p_u \Big( dp_u - \sum_v p_v\, dp_v \Big) . $$
#
# (Try it with the $dp$ of the cross-entropy, which is $-1/p_y$ at $y$ and 0 elsewhere: the simple gradient comes out.)

# %%
exercise.show("softmax_backward")

# %%
exercise.check("softmax_backward")

# %% [markdown]
# ## Summary
#
# * Subtract the maximum before you exponentiate. It costs one pass, and it is the difference between a loss and a
#   `nan`.
# * A running sum may have the wrong scale, as long as one factor corrects it. This gives the online softmax, and merges
#   pieces in any order.
# * Fuse ops that read the same row. A value that is cheap to compute need not be stored.
