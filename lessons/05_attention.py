# %% [markdown]
# # Attention, and the matrix that need not be there
#
# All other layers of GPT-2 look at one token at a time. **Attention** is where a token looks at those before it. For
# that it compares itself with each of them, and $T$ tokens make $T \times T$ comparisons: a matrix that grows with
# the square of the text's length.
#
# **The goal**: the op `attention_forward` of the model and its backward, on a CPU and on a GPU, as *flash attention*:
# the same numbers, but the matrix is never there. What it takes is the online softmax of lesson 04, and the thought
# that computing twice can be cheaper than remembering.

# %%
import math

import numpy as np

from llm_numba import oracle
from llm_numba.cpu import naive
from llm_numba.lessons import exercise, ladder, pictures, timing
from rungs import attention_cpu, attention_cuda

# %% [markdown]
# ## The mathematics
#
# Each token comes as a row of $C$ numbers. A matmul (lesson 02) makes three such rows of it: a *query* $q$, what the
# token is looking for; a *key* $k$, what it offers to those who look; and a *value* $v$, what it hands over to them.
# The rows are cut into `NH` *heads* of $HS = C / NH$ channels; each head does the following on its own, with its part
# of the rows.
#
# The *score* of query $t$ with key $s$ says how well the two fit:
#
# $$ S_{ts} = \frac{q_t \cdot k_s}{\sqrt{HS}} . $$
#
# The root keeps scores from growing with the number of channels. A token must not see those after it, which it is to
# predict: only $s \le t$ count. That is called *causal*. A softmax over these makes *weights* of a row of scores, and
# with them the values are averaged:
#
# $$ P_{ts} = \frac{e^{S_{ts}}}{\sum_{u \le t} e^{S_{tu}}}, \qquad y_t = \sum_{s \le t} P_{ts}\, v_s . $$
#
# In NumPy that is four lines. Here is one head's matrix of weights, for random queries and keys.

# %%
rng = np.random.default_rng(4)
T, HS = 24, 16
q, k, v = rng.standard_normal((3, T, HS))
S = np.where(np.tri(T, dtype=bool), 2 * q @ k.T / math.sqrt(HS), -np.inf)
P = np.exp(S - S.max(axis=1, keepdims=True))
P /= P.sum(axis=1, keepdims=True)
y = P @ v

figure, axis = pictures.new(width=4.6, height=3.6)
image = axis.imshow(np.where(np.tri(T, dtype=bool), P, np.nan), cmap="viridis")
figure.colorbar(image, label="weight")
axis.set(xlabel="key s", ylabel="query t", title="A row adds up to 1; above the diagonal: nothing")
pictures.show(figure)

# %% [markdown]
# ## What the matrix costs
#
# There is one for each text of the batch, each head and each layer; and the backward wants the weights again, so that
# all of them would have to be kept until then. For GPT-2 with 12 layers and 12 heads, one text at a time:

# %%
lengths = np.array([256, 512, 1024, 2048, 4096, 8192, 16384])
matrices = 4.0 * 12 * 12 * lengths**2
numbers = 4.0 * 12 * 12 * lengths
rows = 4.0 * 12 * 4 * 768 * lengths
figure, axis = pictures.new(width=7, height=2.8)
for values, name in ((matrices, "weights: T x T"), (rows, "q, k, v and the output"), (numbers, "one number a query")):
    axis.loglog(lengths, values / 2**20, "o-", base=2, label=name, markersize=4)
axis.set(xlabel="T, tokens of a text", ylabel="MiB", xticks=lengths, xticklabels=lengths)
axis.legend(frameon=False, fontsize=8)
pictures.show(figure)
print(f"T = 1024: {matrices[2] / 2**20:,.0f} MiB of weights, {numbers[2] / 2**20:.1f} MiB for one number a query")

# %% [markdown]
# The lowest line is what flash attention keeps: of each row of the matrix its *log-sum-exp*, $L_t = \log \sum_{s \le
# t} e^{S_{ts}}$, one number. From it and a score any weight can be made again when it is wanted, as
#
# $$ P_{ts} = e^{S_{ts} - L_t} . $$
#
# ## The rungs on a CPU
#
# All have the op's signature: `out (B, T, C), lse (B, NH, T) <- qkv (B, T, 3*C), num_heads, num_kv_heads, scratch`. A
# row of `qkv` holds the query, key and value of all heads, `lse` receives the log-sum-exps, and `scratch` is memory to
# work in. (Some models have fewer key and value heads than query heads; GPT-2 has as many, and so do the rungs.) The
# cores divide the heads among them.
#
# ### Rung 1: the formula
#
# All scores of a head, all weights, all outputs: three loops, which hand each other the matrix.

# %%
pictures.source(naive.attention_forward)

# %% [markdown]
# ### Rung 2: along the rows
#
# The last loop of rung 1 runs down a column of the values: each number lies `3*C` floats after the one before, in
# another cache line. And the sums are taken one number at a time. Now each innermost loop goes along a row of memory:
# a score is a product of two rows (`dot` may add up in any order), and an output is a sum of rows, each times its
# weight.
#
# `row_of` is a detail with weight: it takes a token's row by its indices, so that Numba knows that its numbers are
# neighbours. For a row of a slice, such as `k[s]` above, it does not.

# %%
pictures.source(attention_cpu.row_of, attention_cpu.add_scaled, attention_cpu.forward_head_v2)

# %% [markdown]
# ### Rung 3: no matrix
#
# Now the online softmax. A query goes over the keys, `KEYS` of them at a time. It has the largest score so far $m$,
# the sum of the weights so far, $\ell = \sum e^{S - m}$, and the values weighed so far, $o = \sum e^{S - m} v$. When
# a larger score appears, lesson 04's thought holds for both sums: they are wrong by the same factor everywhere, $e^{m
# - m'}$, and one multiplication puts them right:
#
# $$ \ell' = \ell\, e^{m - m'} + \sum_{s} e^{S_s - m'}, \qquad o' = o\, e^{m - m'} + \sum_{s} e^{S_s - m'} v_s . $$
#
# At the end $y = o / \ell$ and $L = m + \log \ell$. Of the $T^2$ weights, `KEYS` exist at a time.

# %%
pictures.source(attention_cpu.forward_head_v3, attention_cpu.attention_forward_v3)

# %% [markdown]
# (At the first piece there is nothing yet to shrink.) See it happen: a query that goes over its keys in three pieces,
# and what it would answer after each of them. The answers are those of a softmax over the keys seen so far, and the
# last one is the whole.

# %%
scores, top, total, sums = 3 * q[-1] @ k.T / math.sqrt(HS), -np.inf, 0.0, np.zeros(HS)
figure, axes = pictures.new(1, 3, width=9, height=2.2, sharey=True)
for axis, piece in zip(axes, np.split(np.arange(T), 3), strict=True):
    before, top = top, max(top, scores[piece].max())
    shrink, weights = np.exp(before - top), np.exp(scores[piece] - top)
    total, sums = total * shrink + weights.sum(), sums * shrink + weights @ v[piece]
    seen = np.exp(scores[: piece[-1] + 1] - top)
    axis.bar(range(seen.size), seen / seen.sum(), color=["C0" if s in piece else "0.7" for s in range(seen.size)])
    assert np.allclose(sums / total, seen / seen.sum() @ v[: seen.size])
    axis.set(title=f"sums before shrink by {shrink:.2f}", xlabel="key s", xlim=(-1, T))
axes[0].set(ylabel="weight so far")
pictures.show(figure)

# %% [markdown]
# ### The last rung: the model's
#
# Rungs 2 and 3 read a key, multiply it with one query, and forget it. The model takes a few queries at once, and a
# strip of keys: then each number that was read serves several products, which stay in registers. It is lesson 02's
# register tile, and attention's two products are matmuls. As a tile of queries is small, their rows of scores stay in
# the cache as they are, however long, and the online softmax is not even needed: *not having the matrix* is what
# counts, not the way to it.

# %%
from llm_numba.cpu import attention  # noqa: E402

pictures.source(attention.forward_head)

# %% [markdown]
# Right, at awkward sizes, against float64; and how fast? The limit is arithmetic: $B \cdot T^2 \cdot C$ multiply-adds
# in all, as two products take $HS$ of them for each of the $T^2 / 2$ scores that are seen; each counts as two
# operations.

# %%
ladder.check(attention_cpu.FORWARD)
found = timing.show_times(attention_cpu.FORWARD)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# Compare rungs 2 and 3: the same products, and some work more for the rescaling. On a CPU one head's matrix finds
# room in a large cache, so what rung 3 saves is memory rather than time. Register tiles are what makes it fast. On a
# GPU that will be another story.
#
# ## The backward
#
# From behind comes $dy_t$, the gradient of the loss with respect to each output. Go back through the formulas one by
# one. From $y_t = \sum_s P_{ts} v_s$:
#
# $$ dv_s = \sum_{t \ge s} P_{ts}\, dy_t, \qquad dP_{ts} = dy_t \cdot v_s . $$
#
# Through the softmax, as in lesson 04's second exercise:
#
# $$ dS_{ts} = P_{ts} \Big( dP_{ts} - \sum_u P_{tu}\, dP_{tu} \Big) . $$
#
# The sum seems to need all of a row of weights before the first $dS$ can be made. It does not. Put $dP$ in:
#
# $$ \sum_u P_{tu}\, (dy_t \cdot v_u) = dy_t \cdot \sum_u P_{tu} v_u = dy_t \cdot y_t =: \delta_t , $$
#
# a product of two rows that are there anyway. (That is from the paper on FlashAttention: Dao et al. 2022,
# arXiv:2205.14135.) And through the scores:
#
# $$ \sqrt{HS}\; dq_t = \sum_{s \le t} dS_{ts}\, k_s, \qquad \sqrt{HS}\; dk_s = \sum_{t \ge s} dS_{ts}\, q_t . $$
#
# So from $q_t$, $k_s$, $v_s$, $dy_t$ and the two numbers $L_t$ and $\delta_t$, all that belongs to the pair $(t, s)$
# can be made on the spot. In NumPy, and beside it a finite difference, in float64:

# %%
dy = rng.standard_normal((T, HS))
qkv, out, lse, dqkv = (
    np.concatenate([q, k, v], axis=1)[None],
    np.empty((1, T, HS)),
    np.empty((1, 1, T)),
    np.empty((1, T, 3 * HS)),
)
oracle.attention_forward(out, lse, qkv, 1, 1, None)
oracle.attention_backward(dqkv, dy[None], out, lse, qkv, 1, 1, None)


def loss_of(moved):
    y = np.empty_like(out)
    oracle.attention_forward(y, np.empty_like(lse), moved, 1, 1, None)
    return (y * dy).sum()


for t, c, name in ((3, 5, "dq"), (3, HS + 5, "dk"), (3, 2 * HS + 5, "dv")):
    step = np.zeros_like(qkv)
    step[0, t, c] = 1e-5
    measured = (loss_of(qkv + step) - loss_of(qkv - step)) / 2e-5
    print(f"{name}[{t}, 5]: {dqkv[0, t, c]: .8f}, by a finite difference {measured: .8f}")
    assert abs(dqkv[0, t, c] - measured) < 1e-6

# %%
pictures.source(oracle.attention_backward)

# %% [markdown]
# ### Two rungs and the model's
#
# The first makes two matrices of each head, the weights and $dS$, and then the products. The second makes both for a
# query and `KEYS` keys at a time, uses them for all three gradients, and forgets them. The model's (`cpu/attention.py`)
# does that for blocks of queries and keys, on register tiles.
#
# Who owns what? $dk_s$ and $dv_s$ collect from all queries after $s$, so that two cores at two queries of a head
# would race. Here a core has a whole head, and all sums in it.

# %%
pictures.source(attention_cpu.backward_head_v1, attention_cpu.backward_head_v2, attention_cpu.attention_backward_v2)

# %%
ladder.check(attention_cpu.BACKWARD)
found = timing.show_times(attention_cpu.BACKWARD)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# The table counts four products, $dv$, $dP$, $dq$, $dk$; the scores that are made again are a fifth, which is not
# counted as work: it is the price of not remembering.
#
# ## The rungs on a GPU
#
# ### Rung 1: three kernels and a matrix
#
# A kernel each for scores, weights, outputs. A kernel's registers and shared memory are gone when it ends, so they
# must hand each other the matrix through global memory: it is written, read, read and written by the softmax, and
# read again.

# %%
pictures.source(attention_cuda.scores_kernel, attention_cuda.softmax_kernel, attention_cuda.values_kernel)

# %% [markdown]
# ### Rung 2: one kernel, and a query for each thread
#
# With the online softmax nothing has to be handed over. A thread owns a query; its query, its sums and its output are
# in registers (`cuda.local.array`), and a score lives for a moment. The matrix is gone from global memory.

# %%
pictures.source(attention_cuda.make_kernel_v2)

# %% [markdown]
# ### Rung 3: tiles of keys and values in shared memory
#
# In rung 2 every thread asks global memory for every key it sees. But the queries of a block want the same keys. So
# the block fetches `KEYS` rows of keys and values together, side by side, into shared memory; a barrier; each thread
# makes of them what it needs; a barrier, before the next ones take their place. A key is fetched once for all queries
# of the block.

# %%
pictures.source(attention_cuda.make_kernel_v3)

# %% [markdown]
# All threads of a warp read the same number of shared memory at a time, which a bank gives to all of them in one
# turn.
#
# ### The last rung: the model's
#
# A block of threads owns a tile of queries; a thread owns several scores of it, so that each number from shared
# memory serves several products, as in lesson 03's register tiles. It reads four neighbours at once.

# %%
from llm_numba.cuda import attention as model_attention  # noqa: E402

pictures.source(model_attention.make_forward_kernel)

# %%
ladder.check(attention_cuda.FORWARD)

# %% [markdown]
# Now count, for one head and 32 queries: what the threads ask of global memory, how many sectors of 32 bytes that
# takes, and what they ask of shared memory.

# %%
counts = ladder.counts(attention_cuda.FORWARD)
pictures.show(pictures.draw_counts(counts))
one, two, three = (counts[f"attention_forward_v{i}"] for i in (1, 2, 3))
print(f"numbers asked of global memory: v1 / v2 = {one['global accesses'] / two['global accesses']:.1f}, "
      f"v2 / v3 = {two['global accesses'] / three['global accesses']:.1f}")  # fmt: skip
assert one["global accesses"] > two["global accesses"] > three["global accesses"]

# %% [markdown]
# From rung 1 to 2 the matrix is gone. From 2 to 3 what is left moves to shared memory, which is many times as fast.
# (The model's kernel pads small heads to 16 channels and has tiny blocks in the simulator, so that its counts here
# are larger than a card's. Counts know no cache either.)
#
# Where the first warp of rung 1 writes, and reads, the matrix (it lies in `scratch`):

# %%
trace = ladder.trace_of(attention_cuda.attention_forward_v1, attention_cuda.FORWARD)
pictures.show(pictures.draw_warp(trace, "scratch", launch=1, title="v1, softmax: each thread in a row of its own"))
trace = ladder.trace_of(attention_cuda.attention_forward_v3, attention_cuda.FORWARD)
pictures.show(
    pictures.draw_warp(trace, "qkv", steps=24, title="v3: first each thread its query, then tiles of keys and values")
)

# %%
found = timing.show_times(attention_cuda.FORWARD)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ### And the backward there
#
# Many blocks work on one head, and now the question of owners is a serious one: $dq_t$ collects over keys, $dk_s$ and
# $dv_s$ over queries. The model has two kernels. In the first a block owns keys, and goes over the queries that see
# them; in the second it owns queries, and goes over their keys. So each weight is made twice, and no two blocks ever
# add to the same number: the result has the same bits every time. (Lesson 07 has the alternative, and what it costs.)

# %%
pictures.source(model_attention.make_backward_kernels)

# %% [markdown]
# ## In a real training run
#
# `--use` puts an attention of your own into a training run. Try it with rung 1, which is in `cpu/naive.py`:
#
# ```sh
# python -m llm_numba.train --preset nano --use attention_forward=llm_numba.cpu.naive:attention_forward
# ```
#
# ## Exercise: attention in one pass over the keys
#
# Rung 3 with a single key at a time: the three updates of the online softmax are yours. (Lesson 04's exercise 2 is
# the other half of this lesson's mathematics, if you have not done it yet.)

# %%
exercise.show("attention_online")

# %%
exercise.check("attention_online")

# %% [markdown]
# ## What to take along
#
# * The formula has a $T \times T$ matrix; the computation needs none. A sum over a softmax can be built up piece by
#   piece.
# * Of a row of weights one number need be kept. The rest can be made again.
# * Give each sum one owner, even if something must then be computed twice.
