# %% [markdown]
# # Layer normalisation, by hand
#
# **Goal.** One layer of GPT-2, the whole way: the formula, the forward pass, the backward pass derived on paper and
# held against finite differences, a fast function for the CPU, and a CUDA kernel that you will have followed thread
# by thread. It is the smallest layer in which all of a neural network's questions come up at once, which is why we
# begin with it.
#
# **What you need.** Python and NumPy. What a GPU is, we say when we get there, and you need none: the CUDA kernels
# below run in a simulator. If there is a card in your machine, the same cells also time them on it.
#
# **How to read a ladder.** For each op we write the plainest function first and then improve it, one idea at a time.
# Each step is a *rung*: `layernorm_forward_v1`, `_v2`, and so on. Every rung is checked against the same formula in
# float64 (NumPy's double precision), then all are timed. The last rung is the function that the model trains with.
# The rungs stand in the folder `rungs` beside this notebook; `pictures.source` shows them as they stand there, so
# that what you read is what runs. `exact` has all of the model's ops in NumPy.

# %%
import numpy as np

from llm_numba import oracle
from llm_numba.lessons import counting, exercise, faults, ladder, pictures, sized, timing, tracing
from rungs import layernorm_cpu, layernorm_cuda

rng = np.random.default_rng(1)

# %% [markdown]
# ## Why normalise at all
#
# GPT-2 is a stack of layers that all add to one array, the *residual stream*: `x = x + layer(x)`. If a layer's output
# is about as large as its input, the numbers grow by a constant factor at each addition, so after 24 layers they are
# thousands of times larger, and gradients with them. Layer normalisation stands before each layer and hands it a copy
# of `x` in which every row has mean 0 and standard deviation 1. What a layer adds then always has about the same
# size, and the stream grows by a little, not by a factor.
#
# The next cell plays this with 24 random layers. The vertical axis is logarithmic.

# %%
C = 256
layers = [rng.standard_normal((C, C)) / np.sqrt(C) for _ in range(24)]


def normalised(x):
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)


without, with_norm = [rng.standard_normal((64, C))], [rng.standard_normal((64, C))]
for W in layers:
    without.append(without[-1] + without[-1] @ W)
    with_norm.append(with_norm[-1] + normalised(with_norm[-1]) @ W)

figure, axis = pictures.new(width=6.5, height=2.8)
axis.semilogy([x.std() for x in without], color=pictures.COLOURS[1], label="x = x + x @ W")
axis.semilogy([x.std() for x in with_norm], color=pictures.COLOURS[0], label="x = x + normalised(x) @ W")
axis.set(xlabel="layers", ylabel="standard deviation of x")
axis.legend(frameon=False)
pictures.show(figure)

# %% [markdown]
# ## The formula
#
# The input is an array `inp` of shape (B, T, C): B texts in a batch, T tokens in each, and C numbers, the *channels*,
# for every token. Layer normalisation treats each of the B·T rows of C numbers by itself. For a row $x$ it computes
# the mean and the variance, and from the variance `rstd`, the reciprocal of the standard deviation:
#
# $$ m = \frac1C \sum_c x_c \qquad v = \frac1C \sum_c (x_c - m)^2 \qquad r = \frac{1}{\sqrt{v + \varepsilon}} $$
#
# $\varepsilon = 10^{-5}$ only keeps a row of equal numbers from being divided by zero. Then each number is moved and
# scaled, which gives `norm`; and, so that the network can undo what normalisation took away where it pays, each
# channel is multiplied by a *weight* and moved by a *bias* of its own, which are learned:
#
# $$ \hat x_c = (x_c - m)\, r \qquad y_c = w_c\, \hat x_c + b_c $$
#
# In NumPy, for all rows at once, that is three lines. They are the *oracle* of this lesson: run in float64, they say
# what every rung has to compute.

# %%
pictures.source(oracle.layernorm_forward, oracle.normalise)

# %%
rows = np.stack([rng.normal(6, 0.5, 48), rng.normal(-2, 3, 48), np.linspace(-9, -4, 48)])[None]  # (1, 3, 48)
out, mean, rstd = np.empty_like(rows), np.empty((1, 3)), np.empty((1, 3))
oracle.layernorm_forward(out, mean, rstd, rows, np.ones(48), np.zeros(48))

figure, (before, after) = pictures.new(1, 2, width=8.5, height=2.6)
for row in range(3):
    label = f"row {row}: mean {mean[0, row]:.1f}, rstd {rstd[0, row]:.2f}"
    before.plot(rows[0, row], color=pictures.COLOURS[row], linewidth=1.2, label=label)
    after.plot(out[0, row], color=pictures.COLOURS[row], linewidth=1.2)
before.set(title="inp: three rows", xlabel="channel")
after.set(title="out, with weight 1 and bias 0", xlabel="channel")
before.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.28))
pictures.show(figure)

# %% [markdown]
# The forward pass keeps `mean` and `rstd`, two numbers a row, because the backward pass will want them and would
# otherwise have to compute them again.
#
# ## The forward pass on a CPU
#
# ### v1: the loops
#
# We write loops, which in plain Python would be slow, and let [Numba](https://numba.pydata.org) compile them: `@njit`
# turns the function into machine code when it is first called. The results go into arrays that the caller has
# allocated, destinations first, as for all ops here: a training step then allocates nothing.

# %%
pictures.source(layernorm_cpu.layernorm_forward_v1)

# %% [markdown]
# ### v2: nothing but float32
#
# The model's numbers are float32: 4 bytes each, half of Python's float64. But `0.0`, `C` and `1e-5` in v1 are of
# Python's kinds, and a float32 that meets a float64 is converted. So v1 computes in float64 without ever saying so.
# v2 wraps every constant. `ZERO`, `ONE` and `EPSILON` are `np.float32(0)` and so on. `x` and `y` are views of one
# row: reading `x[c]` is then one step in memory, not the sum of three products of indices.

# %%
pictures.source(layernorm_cpu.layernorm_forward_v2)

# %% [markdown]
# ### v3: sums in any order
#
# A core has *vector registers*: one instruction adds 4, 8 or 16 float32 numbers (it depends on the processor) to as
# many others. The last loop of v2 is compiled to such instructions, as its results have nothing to do with one
# another. The two sums are not: floating-point addition rounds, `(a + b) + c` may differ from `a + (b + c)` in the
# last digit, and a compiler does not change results behind your back. With 16 running sums instead of one it would
# have to.
#
# So we allow it. In `fastmath={"reassoc", "contract", "nsz"}` the first says that sums may be regrouped, the second
# that a product and a sum may become one instruction, the third that the sign of a zero does not matter. The full
# `fastmath=True` would also promise that there are no infinities and no NaNs, and then a run that goes astray could
# not be noticed. The lines of the function stay as they are.

# %%
pictures.text("```python\n" + '@njit(fastmath={"reassoc", "contract", "nsz"})  # the lines of v2 follow\n' + "```")

# %% [markdown]
# ### v4: all cores
#
# `prange` instead of `range`, with `parallel=True`, shares the iterations out among the cores. That is right only
# where no iteration writes what another one reads or writes. Here it is plain: iteration `row` writes row `row` of
# `out`, `mean` and `rstd`, and only reads the rest. **Each output has one owner**: this is the rule by which every
# parallel loop in this project is built.

# %%
pictures.source(layernorm_cpu.layernorm_forward_v4)

# %% [markdown]
# ### Right first, then fast
#
# `ladder.check` runs every rung at awkward shapes: a single number, 3, 97 and 257 channels, which no vector register
# divides. It compares all results with the oracle in float64, looks whether a rung has written beyond its arrays or
# changed an input, and says what is wrong in words.

# %%
ladder.check(layernorm_cpu.FORWARD)

# %% [markdown]
# How fast can it be at best? A row is read once and a row is written: at least 2·4·B·T·C bytes have to move between
# memory and the cores, whatever the program does in between. The arithmetic is next to nothing; such an op is called
# *memory-bound*. So the limit is the speed at which this machine can copy one large array into another, which the
# next cell measures first. The last column compares with PyTorch's own LayerNorm, where PyTorch is installed.
#
# (Is a share above 100%? Then the arrays fit into the processor's *cache*, the small fast memory beside its cores,
# and did not have to come from memory each time; the copies that the limit is measured with are too large for that.)

# %%
found = timing.show_times(layernorm_cpu.FORWARD)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# The green bar is the function that the model uses, imported from `llm_numba/cpu/layernorm.py`. It is v4, with the
# loops in functions of their own, so that only the two sums are allowed to be regrouped.
#
# ## The backward pass, on paper
#
# Training needs the gradient: by how much does the loss $L$ change when a number changes a little? The layers above
# hand us `dout`, the derivatives $\partial L/\partial y_c$, which we write $dy_c$. We owe the derivatives by weight,
# bias and input. Only the chain rule is needed, and one row at a time.
#
# **Bias and weight.** From $y_c = w_c \hat x_c + b_c$, and as every row uses the same $w$ and $b$, all rows add up:
#
# $$ db_c = \sum_{\text{rows}} dy_c \qquad dw_c = \sum_{\text{rows}} dy_c\, \hat x_c $$
#
# **Through the weight.** The derivative that arrives at $\hat x_c$ is $d\hat x_c = w_c\, dy_c$. (In the code:
# `dnorm`.)
#
# **Through the normalisation.** Here is the one difficulty: $x_j$ acts on *every* $\hat x_i$ of its row, since it is
# part of the mean and of the variance. Step by step:
#
# $$ \frac{\partial m}{\partial x_j} = \frac1C \qquad
#    \frac{\partial v}{\partial x_j} = \frac2C (x_j - m) \qquad
#    \frac{\partial r}{\partial x_j} = -\frac12 (v+\varepsilon)^{-3/2}\, \frac{\partial v}{\partial x_j}
#      = -\frac{r^3}{C} (x_j - m) = -\frac{r^2}{C}\, \hat x_j $$
#
# (In the second, $m$ depends on $x_j$ too, but its share is $-\frac2C \cdot \frac1C\sum_i (x_i - m) = 0$.) With the
# product rule, and $\delta_{ij}$ for 1 where $i = j$ and 0 elsewhere:
#
# $$ \frac{\partial \hat x_i}{\partial x_j}
#    = r \Big(\delta_{ij} - \frac1C\Big) + (x_i - m) \Big(-\frac{r^2}{C}\, \hat x_j\Big)
#    = r \Big(\delta_{ij} - \frac1C - \frac1C\, \hat x_i \hat x_j\Big) $$
#
# **Put together.** $dx_j = \sum_i d\hat x_i\, \partial \hat x_i / \partial x_j$ is
#
# $$ dx_j = r \Big( d\hat x_j - \underbrace{\frac1C \sum_i d\hat x_i}_{\text{average of } d\hat x}
#    - \hat x_j \underbrace{\frac1C \sum_i d\hat x_i\, \hat x_i}_{\text{average of } d\hat x\, \hat x} \Big) $$
#
# Two averages over the row, and then a formula for each channel: not C·C derivatives, but a few passes over C
# numbers.
#
# The picture shows the matrix $\partial \hat x_i/\partial x_j$ for a row of 16 channels, and beside it what it does:
# the gradient that leaves has nothing left along the row's constant direction, nor along $\hat x$ itself. It cannot:
# adding a constant to a row, or scaling it, does not change the output, so there is nothing to be gained by it.

# %%
n = 16
x = rng.normal(3, 2, n)
r = 1 / np.sqrt(x.var() + 1e-5)
xhat = (x - x.mean()) * r
jacobian = r * (np.eye(n) - 1 / n - np.outer(xhat, xhat) / n)
arriving = rng.standard_normal(n)  # dnorm
leaving = jacobian.T @ arriving  # dinp

figure, (matrix, bars) = pictures.new(1, 2, width=8.5, height=3)
largest = np.abs(jacobian).max()
drawn = matrix.imshow(jacobian, cmap="RdBu", vmin=-largest, vmax=largest)
matrix.set(
    title=r"derivative of norm$_i$ by inp$_j$", xlabel="j", ylabel="i", xticks=[0, 5, 10, 15], yticks=[0, 5, 10, 15]
)
figure.colorbar(drawn, ax=matrix)
directions = {"all ones": np.ones(n), "norm": xhat, "anything else": rng.standard_normal(n)}
for i, (label, g) in enumerate((("dnorm, arriving", arriving), ("dinp, leaving", leaving))):
    along = [abs(g @ d) / (np.linalg.norm(g) * np.linalg.norm(d)) for d in directions.values()]
    drawn = bars.bar(np.arange(3) + 0.4 * i, along, 0.38, label=label, color=pictures.COLOURS[i])
    bars.bar_label(drawn, fmt="%.2f", fontsize=8)
bars.set(title="how much of a gradient lies along", ylabel="|cosine|")
bars.set_xticks(np.arange(3) + 0.2, list(directions))
bars.set_ylim(0, 0.7)
bars.legend(frameon=False, fontsize=8)
pictures.show(figure)

# %% [markdown]
# ## Is it right? Finite differences
#
# Paper is patient. There is a test that needs none of the derivation: move one number of the input by $+h$ and by
# $-h$, run the forward pass for both, and see how the loss changes:
#
# $$ \frac{\partial L}{\partial x_j} \approx \frac{L(x_j + h) - L(x_j - h)}{2h} $$
#
# As loss we take $L = \sum dy_c\, y_c$ with random $dy$, whose derivative by $y$ is just $dy$. How small should $h$
# be? The formula's own error falls with $h^2$. But the two losses are nearly equal, their difference is small, and
# the rounding of each, divided by a small $2h$, grows. The best $h$ lies between, and the picture shows where. In
# float32, the precision of our rungs, finite differences are never good to more than about four digits. That is why
# the oracle computes in float64, and why we compare rungs with the oracle and the oracle with finite differences.


# %%
def loss(inp, weight, bias, dout, dtype):
    out, mean, rstd = np.empty_like(inp), np.empty(inp.shape[:2], dtype), np.empty(inp.shape[:2], dtype)
    oracle.layernorm_forward(out, mean, rstd, inp, weight, bias)
    return (out * dout).sum(dtype=dtype)


shape = (1, 4, 32)
inp, dout = rng.normal(1, 2, shape), rng.standard_normal(shape)
weight, bias = rng.standard_normal(32), rng.standard_normal(32)
mean, rstd = inp.mean(axis=-1), 1 / np.sqrt(inp.var(axis=-1) + 1e-5)
dinp, dweight, dbias = np.zeros(shape), np.zeros(32), np.zeros(32)
oracle.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, None, True)


def error(h, dtype):
    """Of finite differences, over all of dinp, in shares of its largest number."""
    given = [x.astype(dtype) for x in (inp, weight, bias, dout)]
    estimate = np.zeros(shape)
    for index in np.ndindex(shape):
        up, down = given[0].copy(), given[0].copy()
        up[index] += dtype(h)
        down[index] -= dtype(h)
        difference = loss(up, *given[1:], dtype) - loss(down, *given[1:], dtype)
        estimate[index] = difference / (2 * h)
    return np.abs(estimate - dinp).max() / np.abs(dinp).max()


steps = np.logspace(-9, 0, sized(19, 7))
figure, axis = pictures.new(width=6.5, height=3)
for i, dtype in enumerate((np.float32, np.float64)):
    errors = [max(error(h, dtype), 1e-16) for h in steps]
    axis.loglog(steps, errors, marker="o", markersize=3, color=pictures.COLOURS[i], label=dtype.__name__)
    print(f"{dtype.__name__}: best with h = {steps[np.argmin(errors)]:.0e}, then off by {min(errors):.0e}")
axis.set(xlabel="h", ylabel="error of finite differences", ylim=(1e-12, 1e2))
axis.legend(frameon=False)
pictures.show(figure)

# %% [markdown]
# `dweight` and `dbias` are checked in the same way, and then the whole backward pass stands on two legs.

# %%
for name, gradient in (("dweight", dweight), ("dbias", dbias)):
    estimate = np.zeros(32)
    for c in range(32):
        h = np.zeros(32)
        h[c] = 1e-5
        moved = {"dweight": (weight + h, bias, weight - h, bias), "dbias": (weight, bias + h, weight, bias - h)}[name]
        up, down = loss(inp, *moved[:2], dout, np.float64), loss(inp, *moved[2:], dout, np.float64)
        estimate[c] = (up - down) / 2e-5
    print(f"{name}: off by {np.abs(estimate - gradient).max() / np.abs(gradient).max():.0e} of the largest number")
    assert np.allclose(estimate, gradient, rtol=1e-6, atol=1e-8)

# %% [markdown]
# ## Your turn
#
# Write `dinp` yourself, as a function of the CPU. Open `exercises/layernorm_dinp.py` beside this notebook, or copy it
# to a file of your own, replace the line that raises `NotImplementedError`, save, and run the cell with `check`
# again. It runs your function as plain Python first, with every read and write recorded, so that it can tell you
# which index was out of bounds, or that two iterations of a parallel loop meet at one element; then compiled.
#
# One thing to know beforehand: in this project `dinp` *accumulates*: `+=`, not `=`. The residual stream is added to
# by several layers, so its gradient is a sum with a term from each.

# %%
exercise.show("layernorm_dinp")

# %%
exercise.check("layernorm_dinp")

# %% [markdown]
# ## The backward pass on a CPU
#
# (It contains the solution of the exercise.)
#
# ### v1: row after row, on one core
#
# The first loop over a row sums the two averages, the second writes the row of `dinp` and adds the row's share to
# `dweight` and `dbias`. A row fits into the core's cache, so `dinp`, `inp` and `dout` come from memory once.
# (`scratch` is memory that an op may use as it likes, and `accumulate` says whether the gradients of parameters are
# added to what is there, as in a training step of several batches, or written.)

# %%
pictures.source(layernorm_cpu.layernorm_backward_v1)

# %% [markdown]
# ### A race
#
# Now the same for all cores. Is it enough to write `prange`? Here is that function. Do you see it?

# %%
pictures.source(layernorm_cpu.layernorm_backward_racing)

# %% [markdown]
# `dweight[c] += ...` reads, adds and writes. Two cores that do so for the same `c` at the same time may both read the
# old value, and then one of the two additions is lost. Nothing crashes, and often nothing even looks wrong: such a
# *race* shows itself when it likes. So we do not wait for it. The next cell runs the function as plain Python,
# records who touches what, and looks for two iterations that meet at one element of which at least one writes.

# %%
given = layernorm_cpu.backward_inputs(rng, B=1, T=3, C=4)
for words in faults.faults(tracing.simulate_cpu(layernorm_cpu.layernorm_backward_racing, **given)):
    print(words)

# %% [markdown]
# ### v2: an owner for every sum
#
# The rule helps: each output has one owner. `dinp` is owned by rows. `dweight` and `dbias` are sums over rows, and
# are owned by channels. So v2 has two loops: one over rows, one over channels. Nothing races. But look at the table
# below, how slow it is: the owner of a channel walks down a column, and neighbours in a column lie C numbers apart.
# Memory is fetched in *cache lines* of 64 bytes, that is 16 float32 numbers, of which it then uses one.

# %%
pictures.source(layernorm_cpu.layernorm_backward_v2)

# %% [markdown]
# ### v3: owners of 64 channels
#
# The second loop once more, each iteration with 64 neighbouring channels: it now uses all of every line that it
# fetches, and the inner loop is made of vector instructions. `inp` and `dout` are still read twice, once in each
# loop.

# %%
pictures.source(layernorm_cpu.layernorm_backward_v3)

# %% [markdown]
# ### The model's
#
# The last rung reads them once, and yet nothing races: it cuts the rows in at most 64 pieces, each of which adds up
# its own `dweight` and `dbias` in memory that nobody else writes (this is what `scratch` is for), and a second, short
# loop adds up the pieces. The number of pieces does not depend on the number of cores. So the sums are made in the
# same order on every machine, and a run gives the same bits on 1 core and on 64.

# %%
pictures.source(layernorm_cpu.layernorm_backward)

# %%
ladder.check(layernorm_cpu.BACKWARD)
found = timing.show_times(layernorm_cpu.BACKWARD)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# ## A GPU, in five minutes
#
# A GPU has many cores, the *multiprocessors* (a large card has more than a hundred), and each of them juggles many
# hundreds of threads. You write a *kernel*: a function that says what **one thread** does. It is started with a
# number of threads, and each of them finds out who it is:
#
# - threads come in *blocks*; a thread knows its number in its block, `cuda.threadIdx.x`, and its block's number,
#   `cuda.blockIdx.x`; all blocks together are the *grid*, and `cuda.grid(1)` is a thread's number in the whole grid;
# - `kernel[blocks, threads](out, inp)` starts it with so many blocks of so many threads.
#
# There are three kinds of memory:
#
# - *global* memory: gigabytes, where the arrays lie; every thread sees it, and it is far away;
# - *shared* memory: some tens of kilobytes that the threads of one block have in common, and near;
# - *registers*: a thread's own variables, at once there.
#
# One more fact decides about speed. The hardware runs a block's threads in groups of 32, the *warps*, and the threads
# of a warp make the same step at the same time. When they read global memory, the warp's 32 reads are served
# together, in pieces of 32 bytes called *sectors* (8 float32 numbers). If the 32 numbers lie side by side, that is 4
# sectors. If they are far apart, it is 32 sectors, eight times as much to be moved, and seven eighths of it for
# nothing. Reads that lie together are called *coalesced*.
#
# Below, kernels run in Numba's simulator: each thread of the kernel is a thread of Python. It is slow, but it
# computes the same, and we can record everything.
#
# ### v1: a row for each thread
#
# The CPU's loops, and a thread for every row. `@cuda.jit` compiles a kernel; the function below it is the rung, which
# starts as many blocks of THREADS threads as it takes to have one for each row (`blocks_for` divides and rounds up;
# `reshape` makes the B·T rows of a batch one long list; `stream()` is the queue in which all of the model's kernels
# wait for the card). The last block may have threads to spare: hence `if row < inp.shape[0]`.

# %%
pictures.source(layernorm_cuda.kernel_v1, layernorm_cuda.layernorm_forward_v1)

# %% [markdown]
# Thread by thread: here is what the first three threads do first, for 32 rows of 64 channels.

# %%
v1 = ladder.trace_of(layernorm_cuda.layernorm_forward_v1, layernorm_cuda.FORWARD)
for thread in range(3):
    mine = [a for a in v1.accesses if a.block == (0, 0, 0) and a.lane == thread]
    first = ", ".join(f"{a.kind} {a.array}[{', '.join(map(str, a.index))}]" for a in mine[:4])
    print(f"thread {thread} of block 0: {first}, ... ({len(mine)} in all)")

# %% [markdown]
# Each of them walks along its row, and that looks orderly. But look at it as the hardware does: *at the same time*,
# thread 0 wants `inp[0, 0]`, thread 1 `inp[1, 0]`, thread 2 `inp[2, 0]`: numbers that lie C apart. In the picture,
# each line is one step of the warp, each square one number, coloured by the thread that wants it; grey are the
# sectors that have to be moved for it. Memory runs from left to right.

# %%
pictures.show(pictures.draw_warp(v1, "inp", steps=8, title="v1: what the 32 threads of a warp read, step after step"))

# %% [markdown]
# ### v2: a block for each row
#
# So let the 32 threads of a warp share a row: thread 0 takes channels 0, THREADS, 2·THREADS, ..., thread 1 takes 1,
# THREADS + 1, and so on. At each step the warp then reads 32 neighbours.
#
# The price: each thread has the sum of its own channels only, and the mean needs them all. The threads put their sums
# into shared memory and add them up in a *tree*: the first half of the threads add what the second half has, then the
# first quarter, and so on. Between two steps stands `cuda.syncthreads()`, a *barrier*: nobody goes on until all
# threads of the block have come there. Without it, a thread might read a sum that its neighbour has not written yet:
# a race.
#
# `cuda.shared.array` makes an array in shared memory, and `@cuda.jit(device=True)` a function that kernels call.

# %%
pictures.source(layernorm_cuda.sum_of_block, layernorm_cuda.kernel_v2)

# %%
v2 = ladder.trace_of(layernorm_cuda.layernorm_forward_v2, layernorm_cuda.FORWARD)
pictures.show(pictures.draw_warp(v2, "inp", steps=8, title="v2: the same number of reads, all of them side by side"))
pictures.show(pictures.draw_warp(v2, "shared", steps=14, title="v2: the tree in shared memory"))

# %% [markdown]
# Note that the recording finds `inp` read four times: once for the mean, twice in the square, once for the output. (A
# compiler joins two equal reads that follow each other; the simulator takes the program at its word.)
#
# ### v3: the row stays in registers
#
# The threads of a block together have room for the whole row in their registers: `cuda.local.array(each, float32)` is
# an array of a thread's own, and if its length is known when the kernel is compiled, and its indices too, it lives in
# registers. The row is read once, and everything else happens close by. As the length depends on C, there is a kernel
# for each C; `functools.cache` keeps it.

# %%
pictures.source(layernorm_cuda.make_kernel_v3)

# %% [markdown]
# ### Right, in the simulator
#
# The same check as before: every element against float64, at awkward shapes. For CUDA kernels it also looks for
# races, for indices out of bounds, for shared memory that is read before it was written, and for barriers that some
# threads never come to.

# %%
ladder.check(layernorm_cuda.FORWARD)

# %% [markdown]
# ### Why it is faster, without a GPU
#
# For each rung the picture counts what all threads ask of global memory, and how many sectors have to be moved for
# it. v1 and v2 ask for the same numbers; v2 moves about a sixth of the sectors. v3 does not ask twice. On the right
# stands shared memory, which v1 does not use. It is divided into 32 *banks*, each of which gives one number at a
# time: if the threads of a warp want different numbers from one bank they wait for one another, and the request takes
# more turns than one. Here it never does.
#
# Two things the count leaves out. A card has caches too, so that v1 finds part of its sectors there the next time.
# And the model's kernel adds up a warp's numbers by handing them from register to register (*shuffles*), which the
# simulator does not know and replaces by shared memory.

# %%
counts = ladder.counts(layernorm_cuda.FORWARD)
pictures.show(pictures.draw_counts(counts))

# %% [markdown]
# Array by array, for v1 and v2: how many instructions of warps, how many sectors they touch, how many would do, and
# how many instructions are coalesced.

# %%
for name, trace in (("v1", v1), ("v2", v2)):
    print(name)
    for c in counting.count(trace):
        if c.space == "global":
            print(
                f"  {c.array:>6} {c.kind:>5}: {c.instructions:3d} instructions, {c.sectors:4d} sectors, "
                f"{c.fewest:4d} would do, {c.coalesced:3d} coalesced"
            )

# %% [markdown]
# ### And on a card
#
# Where there is one, this cell compiles the same rungs for it and times them; where there is none, it shows what was
# measured elsewhere, if it was. The limit is again a copy of a large array.

# %%
found = timing.show_times(layernorm_cuda.FORWARD)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# The last rung is the model's own, `llm_numba/cuda/layernorm.py`: v3, with a block's size that fits C, sums by
# shuffles, and arrays that may also hold 16-bit numbers. Its backward is the one that you know from the CPU: pieces
# of the rows with sums of their own, and a second kernel that adds them up. Lesson 07 is about such sums.
#
# ## Your turn, again
#
# The first half of v2: the mean of each row, by a block of threads. `exercises/layernorm_mean.py` has the hole.
# `show` prints what is wanted, and, as soon as your kernel runs, draws what its first warp reads; `check` says what
# is wrong: the thread, the index, the race. Try what happens if you leave the barrier out.

# %%
exercise.show("layernorm_mean")

# %%
exercise.check("layernorm_mean")

# %% [markdown]
# ## Into a real training run
#
# Every rung has the op's signature, and so it can take its place in a run, which then says how long both take and how
# far they are apart:
#
# ```sh
# python -m llm_numba.train --preset nano --use layernorm_forward=lessons/rungs/layernorm_cpu.py:layernorm_forward_v1
# ```
#
# ## To take away
#
# - A backward pass is the chain rule, one step at a time; finite differences say whether you got it right.
# - Layer normalisation moves numbers and hardly computes: its limit is memory, so the fastest version reads
#   everything once.
# - Each output has one owner. Where a sum has many contributors, give each its own place and add up the places.
# - On a GPU, think of what the threads of a warp do *at the same time*, not of what one thread does in the course of
#   time.
#
# Source of the layer: Ba, Kiros, Hinton 2016, *Layer Normalization*,
# [arXiv:1607.06450](https://arxiv.org/abs/1607.06450).
