# %% [markdown]
# # Softmax and cross-entropy, in one reading less
#
# At its end, GPT-2 has for every token a row of 50,257 numbers, the *logits*: one for each token of the vocabulary,
# the larger, the likelier it comes next. The **softmax** makes probabilities of them, the **cross-entropy** says how
# surprised they are by the token that did come, and that surprise, averaged, is the loss that training makes smaller.
#
# **The goal** of this lesson is the op `fused_classifier` of the model: from logits to losses and to the gradient, in
# the place of the logits themselves. On the way there are three things worth knowing for life:
#
# * why the formula of the books fails in float32, and the one line that mends it;
# * the *online softmax*, which needs one reading of a row where everybody takes two, and on which flash attention
#   rests (lesson 05);
# * why it can pay to compute a number twice instead of remembering it.

# %%
import numpy as np

from llm_numba.lessons import exercise, ladder, pictures, timing
from rungs import softmax_cpu, softmax_cuda

# %% [markdown]
# ## Why this layer matters
#
# It is a small formula on the largest tensor of the model. For a batch of $B$ texts with $T$ tokens each, the logits
# are $B \cdot T$ rows, each padded from $V = 50{,}257$ to $V_p = 50{,}304$ numbers, a multiple of 64, which suits the
# matmul that makes them. Let us see what that is in bytes, beside the activations that go from layer to layer.

# %%
B, T, C, V, Vp = 4, 1024, 768, 50257, 50304
print(f"logits      (B, T, Vp): {4 * B * T * Vp / 2**20:6,.0f} MiB")
print(f"activations (B, T, C):  {4 * B * T * C / 2**20:6,.0f} MiB")

# %% [markdown]
# Who writes softmax, loss and gradient as layers of their own, each with its result in memory, has several arrays of
# that size. Who does it in one op has the logits, and nothing else.
#
# ## The mathematics
#
# Let $x$ be a row of logits and $y$ the token that really came. Then
#
# $$ p_v = \frac{e^{x_v}}{\sum_u e^{x_u}}, \qquad \text{loss} = -\log p_y = \log \sum_u e^{x_u} - x_y . $$
#
# The $p_v$ are positive and add up to 1, so they can be read as probabilities. A loss of 0 means that the model was
# certain and right; one that knows nothing gives each token $1/V$ and pays $\log V$.
#
# For the gradient, differentiate the second form of the loss. The logarithm of the sum has the derivative $e^{x_v} /
# \sum_u e^{x_u}$, which is $p_v$ again, and $x_y$ has the derivative 1 at $v = y$ and 0 elsewhere:
#
# $$ \frac{\partial\, \text{loss}}{\partial x_v} = p_v - [v = y] . $$
#
# That is one of the prettiest gradients there are: *what the model believes minus what was true*. With a row of $B
# \cdot T$ losses averaged, each has the weight $1 / (B T)$; the op calls that number `dloss`, and multiplies by it.
#
# Believe no formula that you can measure. A *finite difference* moves one logit a little up, a little down, and looks
# at what the loss does; in float64, so that rounding stays out of it.

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
# The red token is the one that came. Its gradient is negative: the next step, which goes against the gradient, lifts
# its logit, and pushes down all others, the more the more the model believed in them. The bars of a gradient add up
# to zero: adding the same number to all logits changes nothing.
#
# ## Overflow, and the one line that mends it
#
# The largest number of float32 is about $3.4 \cdot 10^{38}$, and $e^{x}$ is beyond it from $x \approx 88.7$ on. What
# is beyond becomes `inf`, and `inf / inf` is `nan`, *not a number*, which from then on spoils everything it meets.
# Logits above 88 are no rarity in a young model with a large learning rate.
#
# But we just saw that a number may be added to all logits without a change. So take off the largest of them, $m =
# \max_v x_v$:
#
# $$ p_v = \frac{e^{x_v - m}}{\sum_u e^{x_u - m}}, \qquad \text{loss} = \log \sum_u e^{x_u - m} + (m - x_y) . $$
#
# Now every exponent is at most 0, every $e^{\cdot}$ at most 1, and the sum is between 1 and $V$. Nothing can
# overflow. What underflows to 0 was too small to count beside the 1.

# %%
pictures.source(softmax_cpu.softmax_overflowing)
row = np.array([1, 2, 3], np.float32)
for shift in (0, 80, 90):
    with np.errstate(over="ignore", invalid="ignore"):
        print(f"{row + shift} -> {softmax_cpu.softmax_overflowing(row + shift)}")

# %%
shifts = np.arange(-120, 121, 1, dtype=np.float32)
row = rng.standard_normal(64).astype(np.float32)
exact = np.log(np.exp(row.astype(np.float64)).sum())
errors = {"log(sum(exp(x)))": [], "m + log(sum(exp(x - m)))": []}
with np.errstate(over="ignore", divide="ignore"):
    for shift in shifts:
        moved = row + shift
        top = moved.max()
        errors["log(sum(exp(x)))"].append(np.log(np.exp(moved).sum()) - shift - exact)
        errors["m + log(sum(exp(x - m)))"].append(top + np.log(np.exp(moved - top).sum()) - shift - exact)
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
    xlabel="number added to all logits",
    ylabel="error of the log-sum-exp",
    title="Grey: the formula of the books is inf",
)
axis.legend(frameon=False, fontsize=8)
pictures.show(figure)

# %% [markdown]
# Two things to take from the picture. In the grey parts the plain formula has no answer at all: on the right the sum
# overflows, on the left all of it underflows to 0, whose logarithm is $-\infty$. And even on good ground, near its
# left edge, it is the worse one: very small numbers of float32 have few digits left.
#
# The other one's steps up to both sides are the rounding of the logits themselves. A float32 near 100 comes in steps
# of about $8 \cdot 10^{-6}$, and a result that is near 100 can be no finer.
#
# ## The rungs on a CPU
#
# All rungs have the signature of the model's op. What stands before the arrow is written:
#
# `logits (B, T, Vp), losses (B, T) <- targets (B, T), dloss, vocab_size, write_dlogits`
#
# where with `write_dlogits` the logits are overwritten by their gradient, zero in the padding. Without it, as when a
# model is only evaluated, the losses alone are wanted.
#
# ### Rung 1: three layers
#
# First as anyone would write it, and as frameworks do when nobody tells them otherwise: a softmax that keeps its
# probabilities, the losses, then the gradient. Count what goes through memory *a logit*, in numbers of 4 bytes: the
# softmax reads 1 and writes 1, the gradient reads that and writes 1: 4 in all. (The softmax's own three loops go over
# a row of 200 KB, which stays in a core's cache meanwhile.)

# %%
pictures.source(softmax_cpu.fused_classifier_v1)

# %% [markdown]
# ### Rung 2: an exponential without branches
#
# `math.exp` is a call into the C library, for one number at a time, with tests inside for all that is special. A core
# could do 8 or 16 numbers in one instruction (lesson 02), but not through a call. So the model brings its own `exp`,
# which is made of additions and multiplications, and one shift of bits:
#
# $$ e^x = 2^n \cdot e^r, \qquad n = \lfloor x / \ln 2 + \tfrac12 \rfloor, \qquad r = x - n \ln 2 . $$
#
# No $r$ is larger than $\tfrac12 \ln 2$. For so small an $r$ a polynomial of degree 7 is right to the last digit of
# float32. And $2^n$ costs nothing: a float's exponent *is* $n$, eight bits of it, so that $n + 127$ is shifted to
# where they stand.

# %%
from llm_numba.cpu.jit import exp  # noqa: E402

pictures.source(exp)

# %%
x = np.linspace(-87, 0, 5001, dtype=np.float32)
with np.errstate(all="ignore"):
    own = np.array([exp.py_func(number) for number in x], np.float64)
relative = own / np.exp(x.astype(np.float64)) - 1
figure, axis = pictures.new(width=8, height=2.4)
axis.plot(x, relative, ".", markersize=1.5, color="C0")
axis.axhspan(-(2.0**-24), 2.0**-24, color="0.88", zorder=0)
axis.set(xlabel="x", ylabel="relative error", title="The polynomial's error; grey: half a step of float32")
pictures.show(figure)
print(f"largest relative error: {np.abs(relative).max():.1e}")

# %% [markdown]
# The rung itself: the same three layers, with that `exp`, and with leave to add up in any order (`reassoc`, lesson
# 01), as otherwise the sum would still be taken one number at a time.

# %%
pictures.source(softmax_cpu.softmax_row, softmax_cpu.fused_classifier_v2)

# %% [markdown]
# ### Rung 3: a row at a time, and nothing kept
#
# Now that arithmetic is cheap, memory is what is left to save. The gradient of a row needs only this row's
# probabilities. So finish each row while it is in the cache: its largest, its sum, its loss, its gradient, in the
# logits' own place. A logit is read once and written once, 2 numbers instead of 4, and the array of probabilities is
# gone.
#
# The price: $e^{x_v - m}$ is computed twice, once for the sum and once for the gradient, because nobody keeps it.
# **Computing twice can be cheaper than remembering**; remember that for lesson 05, where it saves not half but nearly
# everything.

# %%
pictures.source(softmax_cpu.classify_row, softmax_cpu.fused_classifier_v3)

# %% [markdown]
# ### Rung 4: all cores
#
# A row knows nothing of the others, so `prange` may share the rows out. Each row of `logits` and each of the `losses`
# has one owner: no race.

# %%
pictures.source(softmax_cpu.fused_classifier_v4)

# %% [markdown]
# ### The last rung: the model's
#
# Imported, not copied. It has one idea more. The loop for the largest looks innocent, but a maximum of floats is
# awkward: what should `max(nan, 1)` be? LLVM, the compiler under Numba, keeps to the order of the comparisons, and
# takes one number at a time. The bits of a float, read as a whole number, are in the same order as the floats are
# (once those of negative numbers are flipped), and a maximum of whole numbers has no such doubts.

# %%
from llm_numba.cpu.jit import largest  # noqa: E402

pictures.source(largest, softmax_cpu.fused_classifier)

# %% [markdown]
# And it takes the loss in float64. Why? With logits in the hundreds, $m - x_y$ can be large and $\log \text{total}$
# small, and a sum in float32 has some seven digits for both together. Here the model was sure of one token, and
# another came; the second number is what a float32 makes of it:

# %%
total, gap = np.float32(1.00001), np.float32(400)
print(f"float64: {np.log(np.float64(total)) + np.float64(gap):.8f}")
print(f"float32: {float(np.log(total) + gap):.8f}")

# %% [markdown]
# ### Right?
#
# Every rung is held against NumPy in float64, at sizes that fit no tile and no register: 1, 3, 97, 257. The logits
# are up to some hundreds, so that a rung that overflows would not pass.

# %%
ladder.check(softmax_cpu.CLASSIFIER)

# %% [markdown]
# ### Fast?
#
# The limit is memory: a read and a write of each logit, $2 \cdot 4 \cdot B T V_p$ bytes, at the rate at which this
# machine updates a large array in place. Where PyTorch is installed its own cross-entropy, forward and backward,
# stands beside.

# %%
found = timing.show_times(softmax_cpu.CLASSIFIER)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# Each bar is a rung; longer is better. If the last one stays well below the dashed line on your machine, then memory
# is not what it waits for: two exponentials and a few passes through the cache for each logit keep a few cores busy,
# and only many cores together ask for more than memory gives.
#
# ## The online softmax
#
# All of our rungs go over a row three times: for the largest, for the sum, for the gradient. In a CPU's cache a pass
# is cheap. On a GPU a row often comes from memory again each time. Can the first two be one?
#
# It seems not: the sum needs $m$, and $m$ is known at the row's end only. But suppose we are at some place of the
# row, and know the largest so far, $m$, and the sum so far, $s = \sum e^{x_u - m}$. Now comes a new number $x$. If it
# is not larger than $m$, add $e^{x - m}$. If it is, the new largest is $m' = x$, and all that was summed so far
# belongs to the wrong one. But it is wrong by the *same factor* everywhere:
#
# $$ \sum_u e^{x_u - m'} = e^{m - m'} \sum_u e^{x_u - m} . $$
#
# So one multiplication puts it right. For both cases together:
#
# $$ m' = \max(m, x), \qquad s' = s \cdot e^{m - m'} + e^{x - m'} . $$
#
# Start with $m = -\infty$, $s = 0$. This is Milakov and Gimelshein's observation of 2018 (arXiv:1805.02867). Follow
# it along a row:

# %%
row = np.concatenate([rng.standard_normal(20), 2 + rng.standard_normal(20), rng.standard_normal(20)])
tops, totals = [], []
top, total = -np.inf, 0.0
for number in row:
    before, top = top, max(top, number)
    total = total * np.exp(before - top) + np.exp(number - top)
    tops.append(top)
    totals.append(total)
assert np.isclose(total, np.exp(row - row.max()).sum())

figure, axes = pictures.new(2, 1, width=8, height=3.6, sharex=True)
axes[0].plot(row, ".", color="0.6", label="numbers of the row")
axes[0].step(range(row.size), tops, where="post", color="C3", label="m, the largest so far")
axes[0].legend(frameon=False, fontsize=8, loc="upper left")
axes[1].step(range(row.size), totals, where="post", color="C0", label="s, the sum so far")
for place in np.flatnonzero(np.diff(tops)) + 1:
    axes[1].axvline(place, color="C3", linewidth=0.6, alpha=0.6)
axes[1].axhline(np.exp(row - row.max()).sum(), color="0.4", linestyle="--", linewidth=1, label="what two passes give")
axes[1].legend(frameon=False, fontsize=8, ncols=2)
axes[1].set(xlabel="place in the row")
pictures.show(figure)

# %% [markdown]
# At each red line a new largest number appears: all that was summed so far shrinks at once, and then the new one
# counts 1. At the end it is the sum that two passes find.
#
# The pairs $(m, s)$ of two pieces of a row can be merged by the same thought, whatever their order:
#
# $$ m = \max(m_1, m_2), \qquad s = s_1 e^{m_1 - m} + s_2 e^{m_2 - m} . $$
#
# So the threads of a block can each take a share of a row, and merge what they have in a tree. Then there is no end
# to what can be split up.


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
# In short what lessons 01 and 03 had: a *kernel* is run by many threads at once, in *blocks*; 32 threads of a block,
# a *warp*, do each instruction together. What a warp reads from global memory at a time comes in *sectors* of 32
# bytes: 32 neighbouring floats are 4 sectors, 32 floats that lie far apart are 32. *Shared memory* is a small, fast
# memory of each block, and `syncthreads` a *barrier*: nobody goes on before all have come.
#
# ### Rung 1: a thread owns a row
#
# The CPU's three loops, by as many threads as there are rows.

# %%
pictures.source(softmax_cuda.kernel_v1)

# %% [markdown]
# ### Rung 2: a block owns a row
#
# The threads of a block take the logits in turn: thread 0 those at 0, THREADS, 2 THREADS, ..., thread 1 their
# neighbours. The largest of all, and then the sum, are found in shared memory, in halves: half of the threads combine
# their number with one of the other half, then a quarter, until one number is left.

# %%
pictures.source(softmax_cuda.max_of_block, softmax_cuda.kernel_v2, softmax_cuda.write_gradient)

# %% [markdown]
# What does that change? Here is what the first warp reads, one row of the picture for each of its first accesses,
# with a coloured square for each thread, and in grey the sectors that must be moved for it. First rung 1, then rung
# 2:

# %%
trace_v1 = ladder.trace_of(softmax_cuda.fused_classifier_v1, softmax_cuda.CLASSIFIER)
pictures.show(pictures.draw_warp(trace_v1, "logits", steps=6, title="v1: each thread in a row of its own"))
trace_v2 = ladder.trace_of(softmax_cuda.fused_classifier_v2, softmax_cuda.CLASSIFIER)
pictures.show(pictures.draw_warp(trace_v2, "logits", steps=6, title="v2: all threads side by side in one row"))

# %% [markdown]
# In rung 1 the squares of an access lie a whole row apart, and each pulls in a sector, of which it needs an eighth.
# In rung 2 nothing is moved that is not needed. (The lonely read is the target's logit, which one thread wants for
# the loss.)
#
# ### Rung 3: the online softmax
#
# Each thread goes over its share once, and keeps its pair. Then the block needs the largest of the tops, each thread
# puts its sum right for it, and the sums are added up: the merging of pairs, done for all at once. Three readings of
# a logit have become two.

# %%
pictures.source(softmax_cuda.kernel_v3)

# %% [markdown]
# ### The last rung: the model's
#
# Rung 3 multiplies by $e^{m - m'}$ at every number, although the largest seldom changes. The model's kernel takes
# several numbers of its share at a time, first into registers: one rescaling for all of them, and all their readings
# are under way before the first one is needed. Its `exp` is the card's own instruction for $2^x$, after a
# multiplication by $\log_2 e$. `to_float` and `to_storage` convert from and to bf16, 16-bit numbers (lesson
# 08); with float32 they do nothing.

# %%
from llm_numba.cuda.classifier import classifier_kernel  # noqa: E402

pictures.source(getattr(classifier_kernel, "fn", classifier_kernel))

# %% [markdown]
# Every rung in the simulator: right, and free of races, of reads of shared memory that nobody wrote, and of barriers
# that not all threads come to.

# %%
ladder.check(softmax_cuda.CLASSIFIER)

# %% [markdown]
# And now the counts, for 32 rows of 64 logits.

# %%
counts = ladder.counts(softmax_cuda.CLASSIFIER)
pictures.show(pictures.draw_counts(counts))
one, two, three = (counts[f"fused_classifier_v{i}"] for i in (1, 2, 3))
print(f"sectors, v1 / v2: {one['global sectors'] / two['global sectors']:.1f}")
print(f"numbers asked for, v2 / v3: {two['global accesses'] / three['global accesses']:.2f}")
assert one["global sectors"] > 5 * two["global sectors"] and three["global accesses"] < 0.8 * two["global accesses"]

# %% [markdown]
# From rung 1 to 2 the numbers asked for are about the same, the sectors are a fraction. From 2 to 3 one of four
# accesses to a logit is gone (three readings and a writing have become two and one). Shared memory is no bottleneck:
# each request takes one turn of its banks.
#
# These counts know no cache: on a card, the second reading of a row that was just read may be served from the L2
# cache, and rung 3 gains less than a quarter. (In the simulator the model's kernel has small blocks, and a stand-in
# for the exchange of numbers within a warp, so that its shared memory cannot be compared.)

# %%
found = timing.show_times(softmax_cuda.CLASSIFIER)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ## A rung in a real training run
#
# A rung is the op, so the model can use it. This says how long it takes in each step, and how far its results are
# from the model's own:
#
# ```sh
# python -m llm_numba.train --preset nano --use fused_classifier=lessons/rungs/softmax_cpu.py:fused_classifier_v3
# ```
#
# ## Exercise 1: merge the softmaxes of a block
#
# Rung 3 merges the pairs in two trees, one for the largest, one for the sum. One is enough: let the tree merge whole
# pairs. The hole is in `lessons/exercises/softmax_merge.py`; write your answer there, or define the kernel here and
# give it to `check` as a second argument.

# %%
exercise.show("softmax_merge")

# %%
exercise.check("softmax_merge")

# %% [markdown]
# ## Exercise 2: backwards through a softmax alone
#
# With the cross-entropy behind it, the softmax had that pretty gradient. In attention, in lesson 05, something else
# stands behind it, which hands back some gradient $dp$. The softmax's derivative is $\partial p_v / \partial x_u =
# p_v ([u = v] - p_u)$, since $x_u$ is in the numerator where $u = v$, and in the sum everywhere. Put into the chain
# rule,
#
# $$ dx_u = \sum_v dp_v\, p_v ([u = v] - p_u) = p_u \Big( dp_u - \sum_v p_v\, dp_v \Big) . $$
#
# (Try it with the $dp$ of the cross-entropy, which is $-1/p_y$ at $y$ and 0 elsewhere: the pretty one comes out.)

# %%
exercise.show("softmax_backward")

# %%
exercise.check("softmax_backward")

# %% [markdown]
# ## What to take along
#
# * Take the largest off before you exponentiate. It costs one pass, and it is the difference between a loss and a
#   `nan`.
# * A running sum may be in the wrong scale, as long as it is wrong by one factor. That makes the online softmax, and
#   merges pieces in any order.
# * Fuse what reads the same row; a number that is cheap to compute need not be remembered.
