# %% [markdown]
# # Reductions: from many elements to one
#
# **Goal.** Add up many elements in parallel: without losing any, fast, and with the same bits every time. It sounds
# trivial, but it is where parallel programs go wrong most often, because many threads want to write the same sum.
#
# **Where it occurs.** Three times in every training step:
#
# - the *gradient norm* is the square root of one sum over all gradients; if it is too large, the gradients are scaled
#   down;
# - the *embedding's gradient*: a token occurs at many positions of a text, and each position adds its gradient to the
#   same row;
# - the gradients of LayerNorm's *weight and bias*, and of every bias: sums over all rows.
#
# **Prerequisites.** Lesson 01: `prange`, and the CUDA terms thread, block, warp, shared memory and the barrier
# `syncthreads`.

# %%
import inspect
from collections import Counter

import numba
import numpy as np

from llm_numba import oracle
from llm_numba.lessons import counting, exercise, faults, ladder, pictures, sized, timing, tracing
from llm_numba.lessons.problem import arguments
from rungs import reductions_cpu, reductions_cuda

rng = np.random.default_rng(7)

# %% [markdown]
# ## A sum has an order
#
# On paper, $a + (b + c) = (a + b) + c$. A computer rounds each result to the nearest representable value: a float32 has
# 24 binary digits, about 7 decimal ones. When a small value is added to a large one, its last digits are lost, and
# which ones depends on the sum so far. So **the result of a sum depends on the order of its additions.**
#
# The next cell adds the same 10,000 float32 values one by one in many different orders. The dashed line is the exact
# sum.

# %%
numbers = rng.standard_normal(10_000).astype(np.float32)
right = numbers.astype(np.float64).sum()
sums = np.array([np.cumsum(rng.permutation(numbers))[-1] for _ in range(sized(2000, 300))])

figure, axis = pictures.new(width=7, height=2.6)
axis.hist(sums - right, bins=50, color=pictures.COLOURS[0])
axis.axvline(0, color="0.3", linestyle="--", linewidth=1)
axis.set(xlabel="sum in float32, minus the exact sum", ylabel="orders")
pictures.show(figure)
print(f"{len(sums)} orders, {len(set(sums))} different results, all of them near {right:.4f}")

# %% [markdown]
# None of these results is wrong. But suppose a program adds in an order that changes from run to run, because whichever
# thread arrives first adds first. Then two runs of the same training differ in the last digit of one value. A thousand
# steps later they are two different models, and you can no longer see whether a change to the code changed anything.
# This project therefore requires **the same bits from the same input, for any number of threads**. Such a program is
# *deterministic*. Below we will see what that costs.
#
# ### A tree is not only parallel
#
# Some orders are also more accurate than others. Adding one element after the other, *sequentially*, makes the sum
# large, and each further element is rounded at the scale of the sum: n roundings, each larger than the one before. A
# *tree* adds pairs, then pairs of these sums, and so on: each element goes through only $\log_2 n$ additions. The CPU
# rungs will do something in between: sequential sums of *blocks*, and then the sum of the blocks' sums.


# %%
def sequential(x):
    return np.cumsum(x)[-1]


def tree(x):
    while x.size > 1:
        x = x[::2] + x[1::2]
    return x[0]


def blocks(x):
    return sequential(np.cumsum(x.reshape(-1, min(256, x.size)), axis=1)[:, -1])


sizes = [2**k for k in range(4, sized(21, 15))]
figure, axis = pictures.new(width=7, height=3)
for i, (add, label) in enumerate(((sequential, "sequential"), (blocks, "blocks of 256"), (tree, "tree"))):
    errors = []
    for n in sizes:
        drawn = [rng.random(n, np.float32) for _ in range(sized(20, 5))]
        errors.append(np.mean([abs(float(add(x)) / x.sum(dtype=np.float64) - 1) for x in drawn]))
    axis.loglog(sizes, np.maximum(errors, 1e-9), marker="o", markersize=3, color=pictures.COLOURS[i], label=label)
axis.axhline(2**-24, color="0.5", linestyle="--", linewidth=1)
axis.set_title("dashed: half a unit in the last place of a float32", fontsize=8, color="0.4")
axis.set(xlabel="number of elements", ylabel="relative error, float32")
axis.legend(frameon=False)
pictures.show(figure)

# %% [markdown]
# A third way is to add in a wider type. The square of a float32 is exact in float64, which has 53 binary digits, and
# even a sum of a billion such squares is more accurate than a float32 can represent. The gradient norm is a single
# value that is computed once per step, so it is computed in float64.
#
# ## The norm on a CPU
#
# We want the sum $\sum_i g_i^2$ over all gradients. It reads every gradient once and writes one element, so the limit
# is the read bandwidth of memory.
#
# ### v1: one core

# %%
pictures.source(oracle.global_norm_squared, reductions_cpu.global_norm_squared_v1)

# %% [markdown]
# ### All cores, and why `+=` races
#
# Now replace `range` by `prange` and write the result directly to its destination. It looks harmless.

# %%
pictures.source(reductions_cpu.global_norm_squared_racing)

# %% [markdown]
# But `out[0] += x` is not one operation. It is three: *read* `out[0]`, *add*, *write* `out[0]`. If two cores read the
# same old value, each adds its own element, and the second write overwrites the first:
#
# ```
# core 0: reads 10            adds 3   writes 13
# core 1:          reads 10            adds 5   writes 15      3 is lost
# ```
#
# This is a *race*: the result depends on the timing. How much is lost differs from run to run, and if the cores do not
# happen to work at the same moment, nothing is lost. That makes races hard to find by testing. So we do not rely on bad
# luck: the lessons' recorder runs the function as plain Python, records who reads and writes what, and needs only *one*
# run to see that two iterations access the same element. The cell after it runs the compiled function; its result
# depends on this machine's timing.

# %%
given = arguments(reductions_cpu.NORM.problem, dict(n=97))
print(faults.faults(tracing.simulate_cpu(reductions_cpu.global_norm_squared_racing, **given))[0])

# %%
given = arguments(reductions_cpu.NORM.problem, dict(n=sized(1 << 24, 1 << 14)))
print(f"exact:  {np.sum(given['grads'].astype(np.float64) ** 2):.3f}")
for _ in range(5):
    reductions_cpu.global_norm_squared_racing(*given.values())
    print(f"racing: {given['out'][0]:.3f}")

# %% [markdown]
# (If about half of the sum is missing: the compiler knows nothing about other cores. It lets each core sum in a
# register and write at the end. The last write wins, and the other core's whole work is lost.)
#
# ### v2: one sum per thread
#
# The solution is always the same: **give every element that is written exactly one owner.** Each thread adds up its
# share in a private variable, and the few partial sums are added at the end. Numba does this by itself when it sees
# that a parallel loop only adds to a local variable. So the code looks like v1 with one more `p`:

# %%
pictures.source(reductions_cpu.global_norm_squared_v2)

# %% [markdown]
# ### v3: blocks that do not depend on the threads
#
# v2 is correct. But its order of additions depends on the number of threads, and so do its last bits. v3 splits the
# elements into blocks of a fixed size. A block's sum is the same whichever thread computes it. The blocks' sums are
# stored separately, in `scratch`, and added in order. With two threads or two hundred, the additions form the same
# tree.

# %%
pictures.source(reductions_cpu.global_norm_squared_v3)

# %% [markdown]
# In Python, `hex()` shows the bits of a float. The next cell runs both functions with every number of threads that this
# machine has. (With a single thread there is nothing to compare.)

# %%
given = arguments(reductions_cpu.NORM.problem, dict(n=sized(1_000_003, 100_003)))
most = numba.get_num_threads()
for rung in (reductions_cpu.global_norm_squared_v2, reductions_cpu.global_norm_squared_v3):
    bits = []
    for threads in range(1, min(most, 8) + 1):
        numba.set_num_threads(threads)
        rung(*given.values())
        bits.append(float(given["out"][0]).hex())
        print(f"{rung.__name__}, {threads} threads: {bits[-1]}")
    numba.set_num_threads(most)
assert len(set(bits)) == 1, "v3 must have the same bits with any number of threads"

# %% [markdown]
# The last rung is the model's. It uses v3's blocks; within a block it lets the compiler reorder the sum, so that a
# vector register holds several partial sums. This order is fixed too: the compiler chose it when it compiled the
# function.

# %%
ladder.check(reductions_cpu.NORM)
found = timing.show_times(reductions_cpu.NORM)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# What does determinism cost? Compared with v2, v3 writes one more element per block of 16384. Compare v2 and v3 in the
# table to see whether that is visible. The model's version has the same fixed blocks, and its sums are vectorised: a
# fixed order need not be slow.
#
# ## The norm on a GPU
#
# A CPU has a handful of owners. A GPU has a hundred thousand threads and needs all of them to read memory at full
# speed, so "one sum per thread" leaves a hundred thousand sums. The rungs differ in how they combine them.
#
# ### v1: atomics
#
# For sums that many threads write, the hardware offers *atomic* additions: read, add and write as one operation that no
# other thread can interrupt. `cuda.atomic.add(out, 0, x)` adds x to `out[0]`, and nothing is lost. With one thread and
# one atomic addition per element, the result is correct right away. (`clear_kernel` first sets `out[0]` to zero.)

# %%
pictures.source(reductions_cuda.norm_kernel_v1, reductions_cuda.global_norm_squared_v1)

# %% [markdown]
# It is correct, but only one atomic addition can happen at an address at a time. A hundred thousand threads wait in one
# queue, as if the GPU had a single core. And whichever thread comes first adds first: the order, and with it the last
# bits, change from run to run.
#
# ### v2: private sums first
#
# Each thread first adds up EACH elements in a register, without any queue. This needs EACH times fewer atomics. Its
# elements are THREADS apart, so that the 32 threads of a warp read 32 consecutive elements at a time: the reads are
# coalesced.

# %%
pictures.source(reductions_cuda.sum_of_thread, reductions_cuda.norm_kernel_v2)

# %% [markdown]
# ### v3: a tree in shared memory
#
# The threads of a block can exchange data through *shared memory*. Each thread stores its sum there. Then thread 0 adds
# the sum of thread 1 to its own, thread 2 that of thread 3, and so on. In the next round thread 0 adds the sum of
# thread 2, thread 4 that of thread 6. After $\log_2$ THREADS rounds element 0 contains the block's sum. Between two
# rounds all threads must wait for each other, or one of them reads an element before it is ready. Only thread 0
# executes an atomic addition.

# %%
pictures.source(reductions_cuda.norm_kernel_v3)


# %%
def draw_tree(axis, title, pairs_of):
    """16 elements at the top; lines lead to where each of them is added."""
    step, rows = 1, 4
    for row in range(rows):
        for to, other in pairs_of(row):
            axis.plot([other, to], [row, row + 1], color=pictures.COLOURS[1], linewidth=1.2)
            axis.plot([to, to], [row, row + 1], color=pictures.COLOURS[0], linewidth=1.6)
            axis.plot(to, row + 1, "o", color=pictures.COLOURS[0], markersize=5)
        step *= 2
    axis.plot(range(16), [0] * 16, "o", color="0.6", markersize=4)
    axis.set(xlim=(-0.7, 15.7), ylim=(rows + 0.4, -0.5), xticks=range(16), yticks=range(rows + 1), xlabel="thread")
    axis.set_yticklabels(["sums", *(f"round {row + 1}" for row in range(rows))])
    axis.set_title(title)


figure, axes = pictures.new(1, 2, width=9, height=2.8)
draw_tree(axes[0], "v3: adjacent pairs", lambda row: [(t, t + 2**row) for t in range(0, 16, 2 ** (row + 1))])
draw_tree(axes[1], "v4: folded in half", lambda row: [(t, t + 8 // 2**row) for t in range(8 // 2**row)])
pictures.show(figure)

# %% [markdown]
# ### v4: fold in the middle
#
# The 32 threads of a warp execute the same instructions together: if a single one of them has work in a branch, the
# whole warp takes part. This is *divergence*. In v3 the active threads are spread out, every second, then every fourth
# thread. So in the first five rounds every warp takes part, with fewer and fewer of its threads active. In v4 the first
# half of the threads adds the second half's sums, then the first quarter adds the second quarter's. The active threads
# stay next to each other, and whole warps are finished after the first rounds.
#
# Which elements of shared memory a warp accesses together matters as well. Shared memory has 32 *banks*, and
# consecutive 4-byte words are in consecutive banks. A bank delivers one word at a time. If several threads of a warp
# access different words in the same bank, the accesses are serialised: a *bank conflict*, 8-way if 8 of them meet in
# one bank. Neither v3 nor v4 has such conflicts: in both, a warp accesses a span of at most 32 consecutive elements at
# a time. (A float64 occupies two words, so 32 of them always need two accesses.)

# %%
pictures.source(reductions_cuda.sum_of_block, reductions_cuda.norm_kernel_v4)

# %%
for rung in (reductions_cuda.global_norm_squared_v3, reductions_cuda.global_norm_squared_v4):
    trace = ladder.trace_of(rung, reductions_cuda.NORM)
    title = f"{rung.__name__}: elements accessed by the second warp of the first block"
    pictures.show(pictures.draw_warp(trace, "shared", launch=1, warp=1, steps=20, title=title))

# %% [markdown]
# The picture shows the second warp of a block of two warps, threads 32 to 63, with one access of the warp per line. In
# v3 this warp returns round after round for fewer and fewer of its threads. In v4 it writes its elements and is
# finished; only the first warp reads them and continues. (Its single read of element 0 is the block's sum, at the end.)
#
# ### v5: no atomics at all
#
# One atomic addition per block remains. It is no longer slow, but the order still depends on which block finishes
# first. So in v5 each block writes its sum to an element of its own, and a second kernel, a single block, adds these in
# a fixed tree. The end of the first kernel acts as the barrier between the two: only then is it certain that all blocks
# have written. This is v3 of the CPU's ladder with one more level.

# %%
pictures.source(reductions_cuda.norm_kernel_v5, reductions_cuda.sum_kernel, reductions_cuda.global_norm_squared_v5)

# %% [markdown]
# The check runs in the simulator, which detects races. Atomics do not race with each other and are not reported.

# %%
ladder.check(reductions_cuda.NORM)

# %%
traces = {ladder.title(rung): ladder.trace_of(rung, reductions_cuda.NORM) for rung in reductions_cuda.NORM.rungs}
atomics = {name: sum(access.kind == "atomic" for access in trace.accesses) for name, trace in traces.items()}
figure, axis = pictures.new(width=8, height=2.6)
drawn = axis.barh(range(len(atomics)), list(atomics.values()), color=[pictures.colour_of(name) for name in atomics])
axis.bar_label(drawn, padding=3, fontsize=8)
axis.set(yticks=range(len(atomics)), yticklabels=map(pictures.short, atomics), xlabel="atomic additions to one address")
axis.invert_yaxis()
pictures.show(figure)

# %%
pictures.show(pictures.draw_counts({name: counting.total(trace) for name, trace in traces.items()}))

# %% [markdown]
# All rungs read the same gradients. They differ in what happens afterwards: v1 and v2 spend their time on atomics, v3
# and v4 on shared memory. (The model's kernel adds the 32 elements of a warp with *shuffles*, in which a thread reads
# another thread's register. The simulator does not support them and uses a simpler substitute: the last bars on the
# right show the substitute, not the GPU.)
#
# In the times below, v3, v4 and v5 are close together: once the atomics are gone, the kernels are limited by reading
# the gradients, and the tree is a small part. So on a GPU determinism costs next to nothing here: compare v5 with v4.

# %%
found = timing.show_times(reductions_cuda.NORM)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ## The embedding's gradient
#
# The model's first layer is a lookup: row t of a text is the *embedding* of its token, row `tokens[b, t]` of the table
# `wte`, plus the embedding of its position, `wpe[t]`. In the backward pass each row of gradients goes back to the rows
# it came from:
#
# $$ dwte_{v} \mathrel{+}= \sum_{(b,t):\ tokens_{bt} = v} dout_{bt} \qquad dwpe_t \mathrel{+}= \sum_b dout_{bt} $$
#
# This is a reduction whose groups depend on the data: the number of rows per token is not known in advance. In every
# language a few tokens are frequent and most are rare. As an example, take the source code of this project's float64
# oracle as text and its characters as tokens:

# %%
text = inspect.getsource(oracle)
common = Counter(text).most_common(40)
figure, axis = pictures.new(width=8, height=2.4)
axis.bar(range(len(common)), [count for _, count in common], color=pictures.COLOURS[0])
axis.set_xticks(range(len(common)), [{" ": "space", "\n": "newline"}.get(c, c) for c, _ in common], fontsize=8)
axis.get_xticklabels()[0].set_rotation(90)
axis.get_xticklabels()[[c for c, _ in common].index("\n")].set_rotation(90)
axis.set(ylabel="rows for this token's gradient")
pictures.show(figure)
print(f"{len(text)} rows of gradients, {len(set(text))} different tokens")

# %% [markdown]
# If the loop over the rows runs in parallel, iterations meet: two positions with a space both add to the row of the
# space.

# %%
pictures.source(reductions_cpu.encoder_backward_racing)
given = arguments(reductions_cpu.ENCODER.problem, dict(B=2, T=5, C=2, Vp=4))
print(faults.faults(tracing.simulate_cpu(reductions_cpu.encoder_backward_racing, **given))[0])

# %% [markdown]
# There is no report about `dwpe`, and rightly so: only iteration t writes its row t.
#
# ### On a CPU: v1 and v2
#
# v1 processes the rows on one core. v2 looks for an owner and finds one in the direction that does not depend on the
# data: the *channels*. One task owns channel c of the whole table. It processes all rows in order, so the order of the
# additions is fixed as well.

# %%
pictures.source(reductions_cpu.encoder_backward_v1, reductions_cpu.encoder_backward_v2)

# %% [markdown]
# But look at what v2 reads: one element of 4 bytes per row, and for each of them a cache line of 64 bytes must be
# loaded. The model's function, the last rung, gives each task 64 consecutive channels: four whole cache lines, with an
# inner loop over channels that the compiler can vectorise. The principle is the same, with larger pieces.

# %%
ladder.check(reductions_cpu.ENCODER)
found = timing.show_times(reductions_cpu.ENCODER)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# ### Exercise: the embedding's gradient
#
# Write it yourself, without looking at `llm_numba/cpu/encoder.py`: open `exercises/embedding_gradient.py`, replace the
# `NotImplementedError` by your code, save the file, and run the cell with `check` again.

# %%
exercise.show("embedding_gradient")

# %%
exercise.check("embedding_gradient")

# %% [markdown]
# ### On a GPU
#
# Again the simplest version is one atomic addition per element (v1). This time there are many queues, and each is only
# as long as its token is frequent. But float32 sums in a changing order are what we want to avoid. v2 is the CPU's
# idea, one thread per channel: the order is fixed, but a GPU runs a hundred times more threads than GPT-2 has channels,
# and all others are idle.
#
# v3 gives each row of the table a block of its own, which searches the whole batch for its token. Now there are plenty
# of owners. But each of them reads all the tokens, including the blocks of tokens that do not occur at all, which are
# most of the 50,000.

# %%
pictures.source(reductions_cuda.encoder_kernel_v1, reductions_cuda.encoder_kernel_v2, reductions_cuda.dwte_kernel_v3)

# %% [markdown]
# The model's version first *sorts* the positions of the batch by their token, with a radix sort that keeps the order of
# equal tokens. The rows of a token are then neighbours in the list. The list is cut into pieces of 32, and one warp
# adds up each piece: every piece has one owner, all pieces are equally long, and the order of all additions is fixed by
# the tokens alone. A token that occurs more than 32 times, or lies on the border of two pieces, leaves partial sums,
# which a last kernel adds. It is all in `llm_numba/cuda/encoder.py`, and worth reading. (In the
# simulator its blocks have only a few threads, to keep it fast. That is why its accesses look scattered in the picture;
# on a GPU whole warps read consecutive elements.)
#
# In the times below, atomics (v1) are the fastest, because there are many queues. v2 and v3 are much slower, for the
# reasons above. The difference between v1 and the model's version is the price of determinism.

# %%
ladder.check(reductions_cuda.ENCODER)
pictures.show(pictures.draw_counts(ladder.counts(reductions_cuda.ENCODER)))
found = timing.show_times(reductions_cuda.ENCODER)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ## LayerNorm's weights
#
# The third reduction: `dweight[c]` is a sum over all rows of $dy_c\,\hat x_c$ (lesson 01). The same pass over the rows
# computes the input's gradient, which wants one owner per *row*, while `dweight` wants one owner per *channel*. Both at
# once is impossible. The solution is v3's again: split the rows into pieces, in a number that does not depend on the
# threads. Each piece has a `dweight` of its own in scratch, a *partial sum*. A second loop, or kernel, adds the partial
# sums in order, with one owner per channel. This is the GPU version:

# %%
from llm_numba.cuda.layernorm import add_shares_kernel  # noqa: E402

pictures.source(add_shares_kernel)

# %% [markdown]
# Its CPU twin, run with every number of threads, gives the same bits:

# %%
from llm_numba.cpu.layernorm import layernorm_backward, layernorm_backward_scratch  # noqa: E402

B, T, C = 2, 100, 64
inp, dout = rng.standard_normal((2, B, T, C), np.float32)
mean, rstd = inp.mean(axis=-1), 1 / inp.std(axis=-1)
results = set()
for threads in range(1, most + 1):
    numba.set_num_threads(threads)
    dinp, dweight, dbias = np.zeros((B, T, C), np.float32), np.zeros(C, np.float32), np.zeros(C, np.float32)
    arguments = dinp, dweight, dbias, dout, inp, np.ones(C, np.float32), mean, rstd
    scratch = np.empty(layernorm_backward_scratch(*arguments, True), np.float32)
    layernorm_backward(*arguments, scratch, True)
    results.add((dweight.tobytes(), dbias.tobytes()))
numba.set_num_threads(most)
print(f"1 to {most} threads: {len(results)} result")
assert len(results) == 1

# %% [markdown]
# ## Summary
#
# | | loses nothing | same bits each time | parallel |
# |---|---|---|---|
# | `+=` from all threads | no | no | yes |
# | atomic additions | yes | no | yes, except for the queue |
# | one sum per thread | yes | only with the same number of threads | yes |
# | fixed pieces, one owner each, then a fixed tree | yes | yes | yes |
#
# Before you write a parallel loop, ask about every element it writes: *who owns it?* If the answer is "it depends",
# split the work along another direction, or give each piece its own memory and add the results.
#
# ## Exercise: column sums
#
# Write the second half of LayerNorm's reduction, or the first half of any bias gradient: column sums on a GPU.

# %%
exercise.show("column_sums")

# %%
exercise.check("column_sums")

# %% [markdown]
# ## Further experiments
#
# - In `norm_kernel_v3`, what goes wrong if `syncthreads` is inside the `if`? Try it in a copy; the check reports it.
# - Write the embedding's gradient with the rows sorted by token first (`np.argsort(..., kind="stable")`), so that each
#   token's rows are adjacent. What does the sorting cost, and why must it be stable?
# - `numba.set_num_threads` changed the last bits of v2. Which NumPy functions do the same on your machine? `np.dot` of
#   two long vectors is a candidate.
