# %% [markdown]
# # Attention without the T x T matrix
#
# Every other layer of GPT-2 works on one token at a time. **Attention** lets each token read from the tokens before it.
# To do that, it compares every token with all earlier tokens. For $T$ tokens these are $T \times T$ comparisons: a
# matrix that grows with the square of the sequence length.
#
# **Goal.** Write the model's op `attention_forward` and its backward, on a CPU and on a GPU, as *flash attention*: the
# same result, without ever storing the matrix. It needs the online softmax of lesson 04 and one idea: computing
# something twice can be cheaper than storing it.

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
# Each token is a row of $C$ elements. A matmul (lesson 02) turns it into three rows: a *query* $q$, which says what the
# token is looking for; a *key* $k$, which says what it offers; and a *value* $v$, the information it passes on. The
# rows are split into `NH` *heads* of $HS = C / NH$ channels. Each head does the following with its part of the rows,
# independently of the other heads.
#
# The *score* of query $t$ and key $s$ measures how well the two match:
#
# $$ S_{ts} = \frac{q_t \cdot k_s}{\sqrt{HS}} . $$
#
# Dividing by the square root keeps the scores from growing with the number of channels. A token must not see later
# tokens, because it has to predict them. So only keys with $s \le t$ count; this is called *causal* attention. A
# softmax turns each row of scores into *weights*, and the output is the weighted average of the values:
#
# $$ P_{ts} = \frac{e^{S_{ts}}}{\sum_{u \le t} e^{S_{tu}}}, \qquad y_t = \sum_{s \le t} P_{ts}\, v_s . $$
#
# In NumPy this takes four lines. The picture shows one head's weights for random queries and keys. (The factor 2 in the
# code makes the random scores larger, so that the weights differ more visibly.)

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
axis.set(xlabel="key s", ylabel="query t", title="Each row sums to 1; future keys are masked")
pictures.show(figure)

# %% [markdown]
# ## What the matrix costs
#
# There is one such matrix per sequence, head and layer. The backward pass needs the weights again, so all of them would
# have to be stored until then. For GPT-2 with 12 layers and 12 heads, and one sequence:

# %%
lengths = np.array([256, 512, 1024, 2048, 4096, 8192, 16384])
matrices = 4.0 * 12 * 12 * lengths**2
numbers = 4.0 * 12 * 12 * lengths
rows = 4.0 * 12 * 4 * 768 * lengths
figure, axis = pictures.new(width=7, height=2.8)
for values, name in (
    (matrices, "weights: T x T"),
    (rows, "q, k, v and the output"),
    (numbers, "one element per query"),
):
    axis.loglog(lengths, values / 2**20, "o-", base=2, label=name, markersize=4)
axis.set(xlabel="T, sequence length", ylabel="MiB", xticks=lengths, xticklabels=lengths)
axis.legend(frameon=False, fontsize=8)
pictures.show(figure)
print(f"T = 1024: {matrices[2] / 2**20:,.0f} MiB of weights, {numbers[2] / 2**20:.1f} MiB for one element per query")

# %% [markdown]
# The lowest line is what flash attention stores: one element per row of the matrix, its *log-sum-exp* $L_t = \log
# \sum_{s \le t} e^{S_{ts}}$. Any weight can be recomputed from it and the score:
#
# $$ P_{ts} = e^{S_{ts} - L_t} . $$
#
# ## The rungs on a CPU
#
# All rungs have the op's signature: `out (B, T, C), lse (B, NH, T) <- qkv (B, T, 3*C), num_heads, num_kv_heads,
# scratch`. A row of `qkv` holds the query, key and value of all heads, `lse` receives the log-sum-exps, and `scratch`
# is temporary memory. (Some models have fewer key and value heads than query heads; GPT-2 and these rungs have equally
# many.) The heads are distributed over the cores.
#
# ### Rung 1: the formula
#
# Three loops compute all scores of a head, then all weights, then all outputs. The matrix connects them.

# %%
pictures.source(naive.attention_forward)

# %% [markdown]
# ### Rung 2: walk along the rows
#
# The last loop of rung 1 walks down a column of the values: consecutive elements are `3*C` floats apart, each in
# another cache line. And each sum is computed one element at a time. In rung 2 every innermost loop walks along a row
# in memory: a score is a dot product of two rows (`dot` may add in any order), and an output is a weighted sum of rows.
#
# `row_of` matters more than it seems. It selects a token's row by its indices, so Numba knows that the row is
# contiguous. For a row of a slice, such as `k[s]` above, Numba does not know that.

# %%
pictures.source(attention_cpu.row_of, attention_cpu.add_scaled, attention_cpu.forward_head_v2)

# %% [markdown]
# ### Rung 3: no matrix
#
# Rung 3 uses the online softmax. A query processes `KEYS` keys at a time. It keeps the largest score so far $m$, the
# sum of the weights so far $\ell = \sum e^{S - m}$, and the weighted sum of the values so far $o = \sum e^{S - m} v$.
# When a larger score $m'$ appears, both sums are wrong by the same factor, as in lesson 04, and a multiplication by
# $e^{m - m'}$ corrects them:
#
# $$ \ell' = \ell\, e^{m - m'} + \sum_{s} e^{S_s - m'}, \qquad o' = o\, e^{m - m'} + \sum_{s} e^{S_s - m'} v_s . $$
#
# At the end $y = o / \ell$ and $L = m + \log \ell$. Of the $T^2$ weights, only `KEYS` exist at any time.

# %%
pictures.source(attention_cpu.forward_head_v3, attention_cpu.attention_forward_v3)

# %% [markdown]
# (The first piece has nothing to rescale.) The next picture shows one query that processes its keys in three pieces,
# and the weights after each piece. After each piece they are the softmax over the keys seen so far, and after the last
# one they are the final weights.

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
    axis.set(title=f"earlier sums times {shrink:.2f}", xlabel="key s", xlim=(-1, T))
axes[0].set(ylabel="weight so far")
pictures.show(figure)

# %% [markdown]
# ### The last rung: the model's
#
# Rungs 2 and 3 read a key, multiply it with one query, and discard it. The model's version processes several queries
# and a strip of keys at once, so each element it loads is used in several products. This is the register tile of lesson
# 02: attention's two products are matmuls. A tile of queries is small, so its rows of scores stay in the cache however
# long they are, and the online softmax is not needed. What counts is *not storing the matrix*, not how that is done.

# %%
from llm_numba.cpu import attention  # noqa: E402

pictures.source(attention.forward_head)

# %% [markdown]
# Check all rungs against float64 at awkward sizes, then time them. The limit is arithmetic: two products with $HS$
# multiply-adds for each of the $T^2 / 2$ visible scores make $B \cdot T^2 \cdot C$ multiply-adds in total. Each counts
# as two FLOPs.

# %%
ladder.check(attention_cpu.FORWARD)
found = timing.show_times(attention_cpu.FORWARD)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# Compare rungs 2 and 3: they compute the same products, and rung 3 also rescales. On a CPU one head's matrix fits in a
# large cache, so rung 3 saves memory rather than time. Register tiles make the difference in speed. On a GPU this is
# different, as you will see below.
#
# ## The backward pass
#
# The backward pass starts from $dy_t$, the gradient of the loss with respect to each output, and goes back through the
# formulas one by one. From $y_t = \sum_s P_{ts} v_s$:
#
# $$ dv_s = \sum_{t \ge s} P_{ts}\, dy_t, \qquad dP_{ts} = dy_t \cdot v_s . $$
#
# Through the softmax, as in the second exercise of lesson 04:
#
# $$ dS_{ts} = P_{ts} \Big( dP_{ts} - \sum_u P_{tu}\, dP_{tu} \Big) . $$
#
# The sum seems to need a whole row of weights before the first $dS$ can be computed. It does not. Substitute $dP$:
#
# $$ \sum_u P_{tu}\, (dy_t \cdot v_u) = dy_t \cdot \sum_u P_{tu} v_u = dy_t \cdot y_t =: \delta_t , $$
#
# which is a dot product of two rows that are already available. (This is from the FlashAttention paper: Dao et al.
# 2022, arXiv:2205.14135.) Finally, through the scores:
#
# $$ \sqrt{HS}\; dq_t = \sum_{s \le t} dS_{ts}\, k_s, \qquad \sqrt{HS}\; dk_s = \sum_{t \ge s} dS_{ts}\, q_t . $$
#
# So $q_t$, $k_s$, $v_s$, $dy_t$ and the two scalars $L_t$ and $\delta_t$ are enough to compute everything for the pair
# $(t, s)$ on the fly. The next cell compares the oracle's gradients in float64 with finite differences.

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
    print(f"{name}[{t}, 5]: {dqkv[0, t, c]: .8f}, finite difference {measured: .8f}")
    assert abs(dqkv[0, t, c] - measured) < 1e-6

# %%
pictures.source(oracle.attention_backward)

# %% [markdown]
# ### Two rungs and the model's version
#
# The first rung computes two matrices per head, the weights and $dS$, and then the products. The second computes both
# for one query and `KEYS` keys at a time, uses them for all three gradients, and discards them. The model's version
# (`cpu/attention.py`) does the same for blocks of queries and keys, with register tiles.
#
# Who owns which sum? $dk_s$ and $dv_s$ collect contributions from all queries from $s$ on, so two cores that work on
# different queries of the same head would race. Here each core owns a whole head and all of its sums.

# %%
pictures.source(attention_cpu.backward_head_v1, attention_cpu.backward_head_v2, attention_cpu.attention_backward_v2)

# %%
ladder.check(attention_cpu.BACKWARD)
found = timing.show_times(attention_cpu.BACKWARD)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# The table counts four products: $dv$, $dP$, $dq$ and $dk$. Recomputing the scores is a fifth one. It is not counted as
# work; it is the price of not storing the weights.
#
# ## The rungs on a GPU
#
# ### Rung 1: three kernels and a matrix
#
# One kernel each computes the scores, the weights and the outputs. Registers and shared memory do not outlive a kernel,
# so the matrix must pass through global memory: the first kernel writes it, the softmax reads and writes it, and the
# last kernel reads it again.

# %%
pictures.source(attention_cuda.scores_kernel, attention_cuda.softmax_kernel, attention_cuda.values_kernel)

# %% [markdown]
# ### Rung 2: one kernel, one query per thread
#
# With the online softmax nothing has to be passed on. A thread owns a query. The query, its sums and its output are
# private to the thread (`cuda.local.array`), and a score exists only for a moment. The matrix is gone from global
# memory.

# %%
pictures.source(attention_cuda.make_kernel_v2)

# %% [markdown]
# ### Rung 3: tiles of keys and values in shared memory
#
# In rung 2 every thread reads every key it needs from global memory. But all queries of a block need the same keys. So
# the threads of a block load `KEYS` rows of keys and values into shared memory together, with coalesced reads. After a
# barrier each thread uses them for its query. A second barrier follows before the next tile replaces them. Each key is
# loaded once for all queries of the block.

# %%
pictures.source(attention_cuda.make_kernel_v3)

# %% [markdown]
# All threads of a warp read the same element of shared memory at the same time. This is a *broadcast*: one access
# serves the whole warp, without bank conflicts.
#
# ### The last rung: the model's
#
# A block owns a tile of queries. Each thread owns several scores of it, so that each element read from shared memory is
# used in several products, like the register tiles of lesson 03. Each read fetches four consecutive elements. (`GROUP`
# is the number of query heads that share a key and value head: 1 in GPT-2.)

# %%
from llm_numba.cuda import attention_simt  # noqa: E402

pictures.source(attention_simt.forward_kernel)

# %%
ladder.check(attention_cuda.FORWARD)

# %% [markdown]
# Now count, for one head and 32 queries, the accesses to global memory, the 32-byte sectors they touch, and the
# accesses to shared memory.

# %%
counts = ladder.counts(attention_cuda.FORWARD)
pictures.show(pictures.draw_counts(counts))
one, two, three = (counts[f"attention_forward_v{i}"] for i in (1, 2, 3))
print(f"accesses to global memory: v1 / v2 = {one['global accesses'] / two['global accesses']:.1f}, "
      f"v2 / v3 = {two['global accesses'] / three['global accesses']:.1f}")  # fmt: skip
assert one["global accesses"] > two["global accesses"] > three["global accesses"]

# %% [markdown]
# From rung 1 to rung 2 the matrix disappears. From rung 2 to rung 3 most of the remaining accesses move to shared
# memory, which is many times faster. (The model's kernel pads small heads to 16 channels and uses tiny blocks in the
# simulator, so its counts here are higher than on a GPU. The counts do not model caches.)
#
# The first picture shows where the first warp of rung 1 reads and writes the matrix, which is in `scratch`:

# %%
trace = ladder.trace_of(attention_cuda.attention_forward_v1, attention_cuda.FORWARD)
pictures.show(pictures.draw_warp(trace, "scratch", launch=1, title="v1, softmax: each thread owns a row"))
trace = ladder.trace_of(attention_cuda.attention_forward_v3, attention_cuda.FORWARD)
pictures.show(
    pictures.draw_warp(trace, "qkv", steps=24, title="v3: each thread reads its query, then tiles of keys and values")
)

# %%
found = timing.show_times(attention_cuda.FORWARD)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ### The backward pass on a GPU
#
# Many blocks work on the same head, so ownership matters even more: $dq_t$ is a sum over keys, $dk_s$ and $dv_s$ are
# sums over queries. The model uses two kernels. In the first, a block owns keys and loops over the queries that see
# them. In the second, a block owns queries and loops over their keys. Each weight is computed twice, but no two blocks
# ever add to the same element, so the result has the same bits every time. (Lesson 07 shows the alternative, atomics,
# and what they cost.)

# %%
pictures.source(attention_simt.dkv_kernel, attention_simt.dq_kernel)

# %% [markdown]
# ## In a real training run
#
# `--use` can replace the model's attention with your own. Try it with rung 1, which is in `cpu/naive.py`:
#
# ```sh
# python -m llm_numba.train --preset nano --use attention_forward=llm_numba.cpu.naive:attention_forward
# ```
#
# ## Exercise: attention in one pass over the keys
#
# Write rung 3 with a single key at a time. The three updates of the online softmax are yours. (If you have not done
# exercise 2 of lesson 04 yet: it is the other half of this lesson's mathematics.)

# %%
exercise.show("attention_online")

# %%
exercise.check("attention_online")

# %% [markdown]
# ## Summary
#
# - The formula contains a $T \times T$ matrix, but the computation does not need to store it. A weighted average over a
#   softmax can be built up piece by piece.
# - One stored element per row of weights is enough. Everything else can be recomputed.
# - Give each sum one owner, even if something has to be computed twice.
