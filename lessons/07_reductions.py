# %% [markdown]
# # Reductions: many numbers become one
#
# **Goal.** To add up numbers with many hands, without losing any, fast, and with the same bits every time. It sounds
# like nothing. It is where parallel programs go wrong most often: a sum is written by everybody.
#
# **Where it comes up.** Three times in every training step:
#
# - the *norm of the gradients* is the root of one sum over all of them; where it is too large, they are made smaller;
# - the *embedding's gradient*: a token stands at many places of a text, and each hands its gradient to the same row;
# - the gradients of LayerNorm's *weight and bias*, and of every bias: sums over all rows.
#
# **What you need.** Lesson 01: `prange`, and of CUDA threads, blocks, warps, shared memory and the barrier
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
# On paper, $a + (b + c) = (a + b) + c$. In a computer each addition rounds to the nearest number that there is: a
# float32 has 24 binary digits, about 7 decimal ones. A small number that is added to a large one loses its last digits,
# and which ones it loses depends on what stood there already. So **the result of a sum depends on the order of its
# additions.**
#
# Here are the same 10,000 numbers, in float32, added up in many different orders, one after the other. The dashed line
# is the exact sum.

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
# None of these is wrong. But if a program adds in an order that changes from run to run, because whoever comes first
# adds first, then two runs of the same training differ in the last digit of one number. A thousand steps later they are
# two different models, and whether a change of the code changed anything can no longer be seen by looking. This project
# therefore asks for **the same bits from the same input, whatever the number of threads**. It is called being
# *deterministic*, and we shall see what it costs.
#
# ### A tree is not only parallel
#
# Some orders are also better than others. Adding one after the other, *sequentially*, the sum gets large and each
# further number is rounded at the scale of the sum: n roundings, each larger than the one before. A *tree* adds pairs,
# then pairs of these sums, and so on: each number goes through $\log_2 n$ additions only. Between the two lies what the
# CPU's rungs will do: *blocks* that are added up sequentially, and then the blocks' sums.


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
for i, (add, label) in enumerate(((sequential, "one after the other"), (blocks, "blocks of 256"), (tree, "tree"))):
    errors = []
    for n in sizes:
        drawn = [rng.random(n, np.float32) for _ in range(sized(20, 5))]
        errors.append(np.mean([abs(float(add(x)) / x.sum(dtype=np.float64) - 1) for x in drawn]))
    axis.loglog(sizes, np.maximum(errors, 1e-9), marker="o", markersize=3, color=pictures.COLOURS[i], label=label)
axis.axhline(2**-24, color="0.5", linestyle="--", linewidth=1)
axis.set_title("dashed: half a unit in the last place of a float32", fontsize=8, color="0.4")
axis.set(xlabel="numbers added up", ylabel="relative error, float32")
axis.legend(frameon=False)
pictures.show(figure)

# %% [markdown]
# A third way is to add in a wider type. The square of a float32 is exact in float64, which has 53 digits, and there a
# sum of a billion of them still has more than a float32 can show. The norm is one number, computed once a step; it is
# taken in float64.
#
# ## The norm, on a CPU
#
# The sum to be computed is $\sum_i g_i^2$ over all gradients. It reads every gradient once and writes one number, so
# the limit is the speed at which memory can be read.
#
# ### v1: one core

# %%
pictures.source(oracle.global_norm_squared, reductions_cpu.global_norm_squared_v1)

# %% [markdown]
# ### All cores, and why `+=` races
#
# Now `prange` instead of `range`, and the result is written where it belongs at once. It looks harmless.

# %%
pictures.source(reductions_cpu.global_norm_squared_racing)

# %% [markdown]
# But `out[0] += x` is not one action. It is three: *read* `out[0]`, *add*, *write* `out[0]`. If two cores read the same
# old value, each adds its own number, and the second to write wipes out what the first has added:
#
# ```
# core 0: reads 10            adds 3   writes 13
# core 1:          reads 10            adds 5   writes 15      3 is lost
# ```
#
# This is a *race*: the result depends on who comes first. What is lost differs from run to run, and where the cores
# happen not to work at the same moment it is nothing at all. That is what makes races hard to find by testing. So we do
# not rely on bad luck: the lessons' recorder runs the function as plain Python, notes who reads and writes what, and
# needs only *one* run to see that two iterations meet at an element. The cell after it runs the compiled function, with
# whatever luck this machine has.

# %%
given = arguments(reductions_cpu.NORM.problem, dict(n=97))
print(faults.faults(tracing.simulate_cpu(reductions_cpu.global_norm_squared_racing, **given))[0])

# %%
given = arguments(reductions_cpu.NORM.problem, dict(n=sized(1 << 24, 1 << 14)))
print(f"right:  {np.sum(given['grads'].astype(np.float64) ** 2):.3f}")
for _ in range(5):
    reductions_cpu.global_norm_squared_racing(*given.values())
    print(f"racing: {given['out'][0]:.3f}")

# %% [markdown]
# (If about half of it is missing: the compiler, which knows nothing of other cores, lets each of two cores add up in a
# register and write at the end. The last to write wins, and the other's whole work is lost.)
#
# ### v2: a sum for each thread
#
# The way out is always the same: **give every number that is written one owner.** Let each thread add up its share in a
# variable of its own, and in the end add the few shares. Numba does this by itself where it sees that a parallel loop
# only adds to a local variable. So this looks like v1, with one `p` more:

# %%
pictures.source(reductions_cpu.global_norm_squared_v2)

# %% [markdown]
# ### v3: blocks that do not know the threads
#
# v2 is right. But its order of additions depends on how many threads there are, and so do its last
# bits. v3 cuts the numbers into blocks of a fixed size. Whoever computes a block, its sum is the same. The blocks' sums
# get places of their own, in `scratch`, and are added in order. Two threads or two hundred, it is the same tree of
# additions.

# %%
pictures.source(reductions_cpu.global_norm_squared_v3)

# %% [markdown]
# Python shows the bits of a float with `hex()`. The next cell takes both functions with each number of threads that
# this machine has. (With one thread only there is nothing to compare.)

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
# The last rung is the model's. It has v3's blocks; within a block it lets the compiler regroup the sum, so that a
# vector register holds several sums at a time. That is a fixed order too: it was chosen when the function was compiled.

# %%
ladder.check(reductions_cpu.NORM)
found = timing.show_times(reductions_cpu.NORM)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# What does determinism cost? v3 has one number in 16384 more to write than v2; the table says whether that can be seen.
#
# ## The norm, on a GPU
#
# On a CPU there are a handful of owners. A GPU has a hundred thousand threads, and reading memory fast needs all of
# them, so "a sum for each thread" leaves a hundred thousand sums. How to bring these together is what the rungs are
# about.
#
# ### v1: atomics
#
# For sums that all write, the hardware offers *atomic* additions: read, add and write as one action, that nobody can
# step into. `cuda.atomic.add(out, 0, x)` adds x to `out[0]`, and nothing is lost. A thread for each number, one atomic
# addition each: correct at once. (`clear_kernel` sets `out[0]` to zero first.)

# %%
pictures.source(reductions_cuda.norm_kernel_v1, reductions_cuda.global_norm_squared_v1)

# %% [markdown]
# Correct, yes. But at one address only one atomic addition can happen at a time: a hundred thousand threads stand in
# one queue, and it is as if the card had one core. And who comes first adds first: the order, and so the last bits,
# change from run to run.
#
# ### v2: first alone
#
# A thread first adds up EACH numbers in a register of its own: no queue, and EACH times fewer atomics. It takes numbers
# that are THREADS apart, so that the 32 threads of a warp read 32 neighbours at a time.

# %%
pictures.source(reductions_cuda.sum_of_thread, reductions_cuda.norm_kernel_v2)

# %% [markdown]
# ### v3: a tree in shared memory
#
# The threads of a block see each other's numbers in *shared memory*. Each puts its sum there. Then thread 0 adds thread
# 1's number to its own, thread 2 thread 3's, and so on; next, thread 0 adds what thread 2 has, thread 4 what thread 6
# has; after $\log_2$ THREADS rounds the block's sum is at place 0. Between two rounds all must wait for each other, or
# somebody reads a place before it is ready. Only thread 0 goes to the queue.

# %%
pictures.source(reductions_cuda.norm_kernel_v3)


# %%
def draw_tree(axis, title, pairs_of):
    """16 numbers at the top; a line from each number to where it is added."""
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
draw_tree(axes[0], "v3: neighbours", lambda row: [(t, t + 2**row) for t in range(0, 16, 2 ** (row + 1))])
draw_tree(axes[1], "v4: folded in the middle", lambda row: [(t, t + 8 // 2**row) for t in range(8 // 2**row)])
pictures.show(figure)

# %% [markdown]
# ### v4: fold it in the middle
#
# A warp's 32 threads act together: an instruction that a single one of them needs takes the time of all. In v3 the
# threads that still work are spread out, every second, every fourth one: every warp has some of them and goes along to
# the end, mostly idle. So let the first half of the threads add what the second half has, then the first quarter: those
# who work stay side by side, and whole warps are done after the first rounds. It also reads neighbouring places, and
# that suits shared memory, which is made of 32 *banks*: a 4-byte word in each, in turn. A bank gives one word at a
# time. Words side by side come from different banks, in one *turn*; words that are 2, 4 or 8 apart share banks, and the
# warp waits for 2, 4 or 8 turns. (A float64 is two words, so that 32 of them take two turns at best.)

# %%
pictures.source(reductions_cuda.sum_of_block, reductions_cuda.norm_kernel_v4)

# %%
for rung in (reductions_cuda.global_norm_squared_v3, reductions_cuda.global_norm_squared_v4):
    trace = ladder.trace_of(rung, reductions_cuda.NORM)
    title = f"{rung.__name__}: which places the second warp of the first block touches"
    pictures.show(pictures.draw_warp(trace, "shared", launch=1, warp=1, steps=20, title=title))

# %% [markdown]
# The picture shows the second warp of a block of two, threads 32 to 63: an access of the warp a line. In v3 it comes
# back, round after round, for fewer and fewer of its threads. In v4 it writes its numbers, and is done: the first warp
# alone reads them and goes on. (Its one look at place 0 is for the block's sum, at the end.)
#
# ### v5: no queue at all
#
# What is left is one atomic addition for each block: no longer slow, but still in whatever order the blocks end. So
# each block writes its sum to a place of its own, and a second kernel, a single block, adds these in its own fixed
# tree. The end of the first kernel is the barrier between the two: that all blocks have written is certain only then.
# It is v3 of the CPU's ladder, with one more level.

# %%
pictures.source(reductions_cuda.norm_kernel_v5, reductions_cuda.sum_kernel, reductions_cuda.global_norm_squared_v5)

# %% [markdown]
# The check runs in the simulator, which sees races. Atomics do not race with each other, and are not complained of.

# %%
ladder.check(reductions_cuda.NORM)

# %%
traces = {ladder.title(rung): ladder.trace_of(rung, reductions_cuda.NORM) for rung in reductions_cuda.NORM.rungs}
atomics = {name: sum(access.kind == "atomic" for access in trace.accesses) for name, trace in traces.items()}
figure, axis = pictures.new(width=8, height=2.6)
drawn = axis.barh(range(len(atomics)), list(atomics.values()), color=[pictures.colour_of(name) for name in atomics])
axis.bar_label(drawn, padding=3, fontsize=8)
axis.set(yticks=range(len(atomics)), yticklabels=map(pictures.short, atomics), xlabel="additions in one queue")
axis.invert_yaxis()
pictures.show(figure)

# %%
pictures.show(pictures.draw_counts({name: counting.total(trace) for name, trace in traces.items()}))

# %% [markdown]
# All rungs read the same gradients. What they differ in is what happens afterwards: v1 and v2 in the queue, v3 and v4
# in shared memory. (The model's own kernel adds the 32 numbers of a warp by *shuffles*, in which a thread reads
# another's register. The simulator does not know them, and puts something simpler in their place: the last bars on the
# right are the stand-in's, not the card's.)

# %%
found = timing.show_times(reductions_cuda.NORM)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ## The embedding's gradient
#
# The first layer of the model looks things up: row t of a text gets the *embedding* of its token, row `tokens[b, t]` of
# the table `wte`, plus that of its position, `wpe[t]`. Backwards, each row of gradients goes where the number came
# from:
#
# $$ dwte_{v} \mathrel{+}= \sum_{(b,t):\ tokens_{bt} = v} dout_{bt} \qquad dwpe_t \mathrel{+}= \sum_b dout_{bt} $$
#
# It is a reduction whose groups are told by the data: nobody knows beforehand how many rows a token gets. In all
# languages a few tokens are everywhere and most are rare. Take as text the source of this project's float64 formulas,
# and as tokens its letters:

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
# Where a loop over the rows is shared out, these meet: two positions with a space each add to the space's row.

# %%
pictures.source(reductions_cpu.encoder_backward_racing)
given = arguments(reductions_cpu.ENCODER.problem, dict(B=2, T=5, C=2, Vp=4))
print(faults.faults(tracing.simulate_cpu(reductions_cpu.encoder_backward_racing, **given))[0])

# %% [markdown]
# Nothing is said of `dwpe`, and rightly so: row t of it is written by iteration t alone.
#
# ### On a CPU: v1 and v2
#
# v1 goes through the rows on one core. v2 looks for an owner, and finds one in the direction that does not depend on
# the data: the *channels*. Channel c of the whole table belongs to whoever has channel c. He goes through all rows in
# order, so the order of the additions is fixed, too.

# %%
pictures.source(reductions_cpu.encoder_backward_v1, reductions_cpu.encoder_backward_v2)

# %% [markdown]
# But look at what v2 reads: one number of 4 bytes from each row, and each time a line of 64 bytes has to be fetched for
# it. The model's own function, the last rung, gives each task 64 channels side by side: four whole lines, and a loop
# over channels inside, for which there are vector instructions. Same owners, in larger pieces.

# %%
ladder.check(reductions_cpu.ENCODER)
found = timing.show_times(reductions_cpu.ENCODER)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# ### Your turn, first
#
# Write it yourself, without a look at `llm_numba/cpu/encoder.py`: open `exercises/embedding_gradient.py`, put your code
# where it raises `NotImplementedError`, save, and run the cell with `check` again.

# %%
exercise.show("embedding_gradient")

# %%
exercise.check("embedding_gradient")

# %% [markdown]
# ### On a GPU
#
# Again the simplest is an atomic addition for each number (v1), and here the queues are many: each is only as long as
# its token is common. But float32 sums in a changing order are what we do not want. v2 is the CPU's idea, a thread for
# each channel: fixed order, but a card has a hundred times more threads than GPT-2 has channels, and all others look
# on.
#
# v3 gives a token's row a block of its own, which looks for its token in the whole batch. Now there are plenty of
# owners. But each of them reads all the tokens, also those, and they are most of the 50,000, that do not occur at all.

# %%
pictures.source(reductions_cuda.encoder_kernel_v1, reductions_cuda.encoder_kernel_v2, reductions_cuda.dwte_kernel_v3)

# %% [markdown]
# The model's own kernel turns it around: a block for each *position* of the batch. It looks at the tokens before it; if
# its token has stood there already, then that position's block is the owner, and this one leaves. Otherwise it is the
# owner: it makes a list of all later positions with its token, in order, and adds up those rows. Tokens that do not
# occur have no block, and each that does has exactly one. It is in `llm_numba/cuda/encoder.py`, and worth reading. (In
# the simulator its blocks have four threads only, so that it can be run at all. That is why its accesses look scattered
# in the picture: on a card whole warps read side by side.)

# %%
ladder.check(reductions_cuda.ENCODER)
pictures.show(pictures.draw_counts(ladder.counts(reductions_cuda.ENCODER)))
found = timing.show_times(reductions_cuda.ENCODER)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ## LayerNorm's weights
#
# The third reduction: `dweight[c]` is a sum over all rows of $dy_c\,\hat x_c$ (lesson 01). In the same pass over the
# rows the input's gradient is made, and that wants an owner for each *row*, while `dweight` wants one for each
# *channel*. Both at once there cannot be. The way out is v3's, once more: the rows are cut into pieces, in a number
# that does not depend on the threads; each piece has a `dweight` of its own, a *share*, in scratch; and a second loop,
# or kernel, adds the shares up, a channel to an owner, in order. This is the GPU's:

# %%
from llm_numba.cuda.layernorm import add_shares_kernel  # noqa: E402

pictures.source(add_shares_kernel)

# %% [markdown]
# Its twin on the CPU, run with every number of threads: the same bits.

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
# ## What to take along
#
# | | loses nothing | same bits each time | many hands |
# |---|---|---|---|
# | `+=` from everywhere | no | no | yes |
# | atomic additions | yes | no | yes, but for the queue |
# | a sum for each thread | yes | only with as many threads | yes |
# | fixed pieces, each with an owner, then a fixed tree | yes | yes | yes |
#
# Before you write a parallel loop, ask of every number that it writes: *who owns it?* If the answer is "it depends",
# cut the work along another direction, or give each piece a place of its own and add the places up.
#
# ## Your turn, once more
#
# Write the second half of LayerNorm's reduction, or the first half of any bias's: sums of columns, on a GPU.

# %%
exercise.show("column_sums")

# %%
exercise.check("column_sums")

# %% [markdown]
# ## To go on
#
# - In `norm_kernel_v3`, what goes wrong if the `syncthreads` is put inside the `if`? Try it in a copy: the check says
#   it.
# - Write the embedding's gradient with the rows sorted by token first (`np.argsort(..., kind="stable")`): each token's
#   rows are then neighbours. What does the sorting cost, and why must it be stable?
# - `numba.set_num_threads` changed the last bits of v2. Which of NumPy's functions do the same on your machine?
#   `np.dot` of two long vectors is a candidate.
