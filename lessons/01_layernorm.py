# %% [markdown]
# # Layer normalisation, by hand
#
# **Goal.** One layer of GPT-2 from start to finish: the formula, the forward pass, the backward pass derived on paper
# and checked against finite differences, a fast function for the CPU, and a CUDA kernel that you follow thread by
# thread. It is the smallest layer that raises all the questions of a neural network, which is why we begin with it.
#
# **What you need.** Python and NumPy. We explain GPUs when we get there, and you do not need one: the CUDA kernels
# below run in a simulator. If your machine has a GPU, the same cells also time them on it.
#
# **How to read a ladder.** For each op we write the naive function first and then improve it, one idea at a time. Each
# step is a *rung*: `layernorm_forward_v1`, `_v2`, and so on. Every rung is checked against the same formula in float64
# (NumPy's double precision), then all are timed. The last rung is the function that the model trains with. The rungs
# are in the folder `rungs` beside this notebook, and `pictures.source` shows them as they are there, so the code that
# you read is the code that runs. The module `oracle` has all of the model's ops in NumPy.

# %%
import numpy as np

from llm_numba import oracle
from llm_numba.lessons import counting, exercise, faults, ladder, pictures, sized, timing, tracing
from rungs import layernorm_cpu, layernorm_cuda

rng = np.random.default_rng(1)

# %% [markdown]
# ## Why normalise?
#
# GPT-2 is a stack of layers that all add to one array, the *residual stream*: `x = x + layer(x)`. If a layer's output
# is about as large as its input, the values grow by a constant factor at each addition, so after 24 layers they are
# thousands of times larger, and so are the gradients. Layer normalisation runs before each layer and passes it a copy
# of `x` in which every row has mean 0 and standard deviation 1. Then what a layer adds always has about the same size,
# and the stream grows by an increment, not by a factor.
#
# The next cell demonstrates this with 24 random layers. The vertical axis is logarithmic.

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
# The input is an array `inp` of shape (B, T, C): B sequences in a batch, T tokens in each, and C elements, the
# *channels*, for every token. Layer normalisation treats each of the B·T rows of C elements separately. For a row $x$
# it computes the mean and the variance, and from the variance `rstd`, the reciprocal of the standard deviation:
#
# $$ m = \frac1C \sum_c x_c \qquad v = \frac1C \sum_c (x_c - m)^2 \qquad r = \frac{1}{\sqrt{v + \varepsilon}} $$
#
# $\varepsilon = 10^{-5}$ only prevents a division by zero if all elements of a row are equal. Then each element is
# shifted and scaled, which gives `norm`. So that the network can undo the normalisation where that helps, each channel
# is multiplied by its own learned *weight* and shifted by its own learned *bias*:
#
# $$ \hat x_c = (x_c - m)\, r \qquad y_c = w_c\, \hat x_c + b_c $$
#
# In NumPy, for all rows at once, that is three lines. They are the *oracle* of this lesson: run in float64, they give
# the expected result for every rung.

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
# The forward pass keeps `mean` and `rstd`, two values per row, because the backward pass needs them and would otherwise
# have to compute them again.
#
# ## The forward pass on a CPU
#
# ### v1: the loops
#
# We write loops, which would be slow in plain Python, and let [Numba](https://numba.pydata.org) compile them: `@njit`
# turns the function into machine code when it is first called. The results go into arrays that the caller has
# allocated. All ops here take their outputs first, in this way, so a training step allocates nothing.

# %%
pictures.source(layernorm_cpu.layernorm_forward_v1)

# %% [markdown]
# ### v2: only float32
#
# The model uses float32: 4 bytes per element, half of Python's float64. But `0.0`, `C` and `1e-5` in v1 are Python
# numbers, and Numba converts a float32 that meets a float64. So v1 silently computes in float64. v2 wraps every
# constant: `ZERO`, `ONE` and `EPSILON` are `np.float32(0)` and so on. `x` and `y` are views of one row: reading `x[c]`
# is then one step in memory instead of a sum of three products of indices.

# %%
pictures.source(layernorm_cpu.layernorm_forward_v2)

# %% [markdown]
# ### v3: sums in any order
#
# A core has *vector registers*: one instruction adds 4, 8 or 16 float32 elements (depending on the processor) to as
# many others. The compiler uses such instructions for the last loop of v2, because its iterations are independent. It
# does not for the two sums: floating-point addition rounds, `(a + b) + c` may differ from `a + (b + c)` in the last
# digit, and a compiler must not change results unless you allow it. With 16 partial sums instead of one it would.
#
# So we allow it. In `fastmath={"reassoc", "contract", "nsz"}`, the first flag allows regrouping sums, the second allows
# fusing a product and a sum into one instruction, and the third ignores the sign of zero. The full `fastmath=True`
# would also assume that there are no infinities and no NaNs, and then a diverging run could not be detected. The body
# of the function does not change.

# %%
pictures.text("```python\n" + '@njit(fastmath={"reassoc", "contract", "nsz"})  # the lines of v2 follow\n' + "```")

# %% [markdown]
# ### v4: all cores
#
# `prange` instead of `range`, with `parallel=True`, distributes the iterations over the cores. That is correct only if
# no iteration writes what another one reads or writes. Here it clearly holds: iteration `row` writes row `row` of
# `out`, `mean` and `rstd`, and only reads everything else. **Each output has one owner**: every parallel loop in this
# project follows this rule.

# %%
pictures.source(layernorm_cpu.layernorm_forward_v4)

# %% [markdown]
# ### First correct, then fast
#
# `ladder.check` runs every rung at awkward shapes: a single element, and 3, 97 and 257 channels, which no vector
# register divides. It compares all results with the oracle in float64, checks that no rung writes outside its arrays or
# changes an input, and prints the first error that it finds.

# %%
ladder.check(layernorm_cpu.FORWARD)

# %% [markdown]
# How fast can it be at best? A row is read once and a row is written, so at least 2·4·B·T·C bytes have to move between
# memory and the cores, whatever the program does in between. There is hardly any arithmetic; such an op is called
# *memory-bound*. So the limit is the speed at which this machine can copy one large array to another, which the next
# cell measures first. The last column compares with PyTorch's own LayerNorm, if PyTorch is installed.
#
# (A share above 100% means that the arrays fit into the processor's *cache*, the small fast memory beside its cores,
# and did not have to come from memory each time. The copies that measure the limit are too large for that.)

# %%
found = timing.show_times(layernorm_cpu.FORWARD)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# The green bar is the function that the model uses, imported from `llm_numba/cpu/layernorm.py`. It is v4 with its loops
# in separate functions, so that only the two sums may be regrouped.
#
# ## The backward pass, on paper
#
# Training needs the gradient: how much does the loss $L$ change when an element changes a little? The layers above give
# us `dout`, the derivatives $\partial L/\partial y_c$, which we write $dy_c$. We need the derivatives with respect to
# weight, bias and input. All it takes is the chain rule, one row at a time.
#
# **Bias and weight.** From $y_c = w_c \hat x_c + b_c$, and since every row uses the same $w$ and $b$, all rows add up:
#
# $$ db_c = \sum_{\text{rows}} dy_c \qquad dw_c = \sum_{\text{rows}} dy_c\, \hat x_c $$
#
# **Through the weight.** The derivative with respect to $\hat x_c$ is $d\hat x_c = w_c\, dy_c$. (In the code: `dnorm`.)
#
# **Through the normalisation.** This is the only difficulty: $x_j$ affects *every* $\hat x_i$ of its row, since it is
# part of the mean and of the variance. Step by step:
#
# $$ \frac{\partial m}{\partial x_j} = \frac1C \qquad
#    \frac{\partial v}{\partial x_j} = \frac2C (x_j - m) \qquad
#    \frac{\partial r}{\partial x_j} = -\frac12 (v+\varepsilon)^{-3/2}\, \frac{\partial v}{\partial x_j}
#      = -\frac{r^3}{C} (x_j - m) = -\frac{r^2}{C}\, \hat x_j $$
#
# (In the second, $m$ depends on $x_j$ too, but that term is $-\frac2C \cdot \frac1C\sum_i (x_i - m) = 0$.) With the
# product rule, and $\delta_{ij}$ for 1 if $i = j$ and 0 otherwise:
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
# Two averages over the row, and then a formula for each channel: not C·C derivatives, but a few passes over C elements.
#
# The picture shows the matrix $\partial \hat x_i/\partial x_j$ for a row of 16 channels, and beside it its effect: the
# resulting gradient has no component along the constant direction of the row, nor along $\hat x$. It cannot have one:
# adding a constant to a row, or scaling it, does not change the output, so the loss does not change either.

# %%
n = 16
x = rng.normal(3, 2, n)
r = 1 / np.sqrt(x.var() + 1e-5)
xhat = (x - x.mean()) * r
jacobian = r * (np.eye(n) - 1 / n - np.outer(xhat, xhat) / n)
incoming = rng.standard_normal(n)  # dnorm
resulting = jacobian.T @ incoming  # dinp

figure, (matrix, bars) = pictures.new(1, 2, width=8.5, height=3)
largest = np.abs(jacobian).max()
drawn = matrix.imshow(jacobian, cmap="RdBu", vmin=-largest, vmax=largest)
matrix.set(
    title=r"derivative of norm$_i$ by inp$_j$", xlabel="j", ylabel="i", xticks=[0, 5, 10, 15], yticks=[0, 5, 10, 15]
)
figure.colorbar(drawn, ax=matrix)
directions = {"all ones": np.ones(n), "norm": xhat, "a random direction": rng.standard_normal(n)}
for i, (label, g) in enumerate((("dnorm, incoming", incoming), ("dinp, resulting", resulting))):
    along = [abs(g @ d) / (np.linalg.norm(g) * np.linalg.norm(d)) for d in directions.values()]
    drawn = bars.bar(np.arange(3) + 0.4 * i, along, 0.38, label=label, color=pictures.COLOURS[i])
    bars.bar_label(drawn, fmt="%.2f", fontsize=8)
bars.set(title="component of a gradient along", ylabel="|cosine|")
bars.set_xticks(np.arange(3) + 0.2, list(directions))
bars.set_ylim(0, 0.7)
bars.legend(frameon=False, fontsize=8)
pictures.show(figure)

# %% [markdown]
# ## Is it correct? Finite differences
#
# Derivations contain mistakes. There is a test that does not need the derivation: move one element of the input by $+h$
# and by $-h$, run the forward pass for both, and see how the loss changes:
#
# $$ \frac{\partial L}{\partial x_j} \approx \frac{L(x_j + h) - L(x_j - h)}{2h} $$
#
# As the loss we take $L = \sum dy_c\, y_c$ with random $dy$, whose derivative with respect to $y$ is exactly $dy$. How
# small should $h$ be? The error of the formula falls with $h^2$. But the two losses are almost equal, so their
# difference is small, and their rounding errors, divided by a small $2h$, grow. The best $h$ lies in between, and the
# picture shows where. In float32, the precision of our rungs, finite differences are never accurate to more than about
# four digits. That is why the oracle computes in float64, and why we compare rungs with the oracle, and the oracle with
# finite differences.


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
    """The largest error of finite differences over dinp, relative to its largest element."""
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
    print(f"{dtype.__name__}: best with h = {steps[np.argmin(errors)]:.0e}, error {min(errors):.0e}")
axis.set(xlabel="h", ylabel="error of finite differences", ylim=(1e-12, 1e2))
axis.legend(frameon=False)
pictures.show(figure)

# %% [markdown]
# `dweight` and `dbias` are checked in the same way. Then the whole backward pass is confirmed twice: on paper and by
# measurement.

# %%
for name, gradient in (("dweight", dweight), ("dbias", dbias)):
    estimate = np.zeros(32)
    for c in range(32):
        h = np.zeros(32)
        h[c] = 1e-5
        moved = {"dweight": (weight + h, bias, weight - h, bias), "dbias": (weight, bias + h, weight, bias - h)}[name]
        up, down = loss(inp, *moved[:2], dout, np.float64), loss(inp, *moved[2:], dout, np.float64)
        estimate[c] = (up - down) / 2e-5
    relative = np.abs(estimate - gradient).max() / np.abs(gradient).max()
    print(f"{name}: largest error {relative:.0e}, relative to the largest element")
    assert np.allclose(estimate, gradient, rtol=1e-6, atol=1e-8)

# %% [markdown]
# ## Exercise: `dinp`
#
# Write `dinp` yourself, as a CPU function. Open `exercises/layernorm_dinp.py` beside this notebook, or copy it to your
# own file. Replace the line that raises `NotImplementedError`, save, and run the cell with `check` again. It first runs
# your function as plain Python and records every read and write, so that it can report an index out of bounds, or two
# iterations of a parallel loop that access the same element. Then it runs the compiled function.
#
# One thing to know: in this project `dinp` *accumulates*: `+=`, not `=`. Several layers add to the residual stream, so
# its gradient is a sum with one term from each.

# %%
exercise.show("layernorm_dinp")

# %%
exercise.check("layernorm_dinp")

# %% [markdown]
# ## The backward pass on a CPU
#
# (This section contains the solution of the exercise.)
#
# ### v1: row after row, on one core
#
# The first loop over a row computes the two averages. The second writes the row of `dinp` and adds the row's
# contribution to `dweight` and `dbias`. A row fits into the core's cache, so `dinp`, `inp` and `dout` come from memory
# once. (`scratch` is temporary memory for the op. `accumulate` selects whether the parameters' gradients are added to
# their previous values, as in a training step of several batches, or overwritten.)

# %%
pictures.source(layernorm_cpu.layernorm_backward_v1)

# %% [markdown]
# ### A race
#
# Now the same on all cores. Is it enough to write `prange`? Here is that function. Can you see the problem?

# %%
pictures.source(layernorm_cpu.layernorm_backward_racing)

# %% [markdown]
# `dweight[c] += ...` reads, adds and writes. If two cores do so for the same `c` at the same time, both may read the
# old value, and one of the two additions is lost. Nothing crashes, and often nothing even looks wrong: such a *race*
# shows up unpredictably. So we do not wait for it. The next cell runs the function as plain Python, records all
# accesses, and looks for two iterations that access the same element, at least one of them writing.

# %%
given = layernorm_cpu.backward_inputs(rng, B=1, T=3, C=4)
for fault in faults.faults(tracing.simulate_cpu(layernorm_cpu.layernorm_backward_racing, **given)):
    print(fault)

# %% [markdown]
# ### v2: an owner for every sum
#
# The rule helps: each output has one owner. Rows own `dinp`. `dweight` and `dbias` are sums over rows, so channels own
# them. v2 therefore has two loops: one over rows, one over channels. Nothing races. But the table below shows how slow
# it is: the owner of a channel walks down a column, and consecutive elements of a column lie C elements apart. Memory
# moves in *cache lines* of 64 bytes, that is 16 float32 elements, and the loop uses only one of them.

# %%
pictures.source(layernorm_cpu.layernorm_backward_v2)

# %% [markdown]
# ### v3: 64 channels per owner
#
# The second loop again, but each iteration owns 64 consecutive channels: now it uses all of every line that it fetches,
# and the inner loop is vectorised. `inp` and `dout` are still read twice, once in each loop.

# %%
pictures.source(layernorm_cpu.layernorm_backward_v3)

# %% [markdown]
# ### The model's op
#
# The last rung reads them once, and still nothing races. It divides the rows into at most 64 pieces. Each piece sums
# its own `dweight` and `dbias` in memory that no other piece writes (this is what `scratch` is for), and a second,
# short loop adds up the pieces. The number of pieces does not depend on the number of cores. So the sums are made in
# the same order on every machine, and a run gives the same bits on 1 core and on 64.

# %%
pictures.source(layernorm_cpu.layernorm_backward)

# %%
ladder.check(layernorm_cpu.BACKWARD)
found = timing.show_times(layernorm_cpu.BACKWARD)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# ## A GPU in five minutes
#
# A GPU has many cores, the *streaming multiprocessors* or SMs (a large GPU has more than a hundred), and each of them
# runs many hundreds of threads at a time. You write a *kernel*: a function that describes what **one thread** does. It
# is launched with a number of threads, and each thread can look up its index:
#
# - threads are grouped into *blocks*; a thread knows its index in its block, `cuda.threadIdx.x`, and the index of its
#   block, `cuda.blockIdx.x`; all blocks together are the *grid*, and `cuda.grid(1)` is a thread's index in the whole
#   grid;
# - `kernel[blocks, threads](out, inp)` launches that many blocks of that many threads.
#
# There are three kinds of memory:
#
# - *global* memory (HBM or GDDR): gigabytes, holds the arrays; every thread can access it, and it is slow to reach;
# - *shared* memory: some tens of kilobytes, shared by the threads of one block, and close to them;
# - *registers*: a thread's own variables, available at once.
#
# One more fact decides how fast a kernel is. The hardware runs a block's threads in groups of 32, the *warps*, and the
# threads of a warp execute the same instruction at the same time. When they read global memory, the warp's 32 reads are
# served together, in units of 32 bytes called *sectors* (8 float32 elements). If the 32 elements are contiguous, that
# is 4 sectors. If they are far apart, it is 32 sectors: eight times as much to move, of which seven eighths is wasted.
# An access to contiguous elements is called *coalesced*.
#
# Below, kernels run in Numba's simulator: each thread of the kernel is a Python thread. It is slow, but it computes the
# same results, and we can record everything.
#
# ### v1: one thread per row
#
# The CPU's loops, with one thread for every row. `@cuda.jit` compiles a kernel. The function below it is the rung,
# which launches enough blocks of THREADS threads to have one thread for each row (`blocks_for` divides and rounds up;
# `reshape` turns the B·T rows of a batch into one long list; `stream()` is the queue in which all of the model's
# kernels run). The last block may have more threads than rows: hence `if row < inp.shape[0]`.

# %%
pictures.source(layernorm_cuda.kernel_v1, layernorm_cuda.layernorm_forward_v1)

# %% [markdown]
# Thread by thread: here is what the first three threads do first, for 32 rows of 64 channels.

# %%
v1 = ladder.trace_of(layernorm_cuda.layernorm_forward_v1, layernorm_cuda.FORWARD)
for thread in range(3):
    accesses = [a for a in v1.accesses if a.block == (0, 0, 0) and a.lane == thread]
    first = ", ".join(f"{a.kind} {a.array}[{', '.join(map(str, a.index))}]" for a in accesses[:4])
    print(f"thread {thread} of block 0: {first}, ... ({len(accesses)} in total)")

# %% [markdown]
# Each of them walks along its row, and that looks orderly. But look at it as the hardware does: *at the same time*,
# thread 0 reads `inp[0, 0]`, thread 1 `inp[1, 0]`, thread 2 `inp[2, 0]`: elements that lie C apart. In the picture,
# each line is one step of the warp and each square one element, coloured by the thread that reads it. Grey are the
# sectors that have to be moved. Memory runs from left to right.

# %%
pictures.show(pictures.draw_warp(v1, "inp", steps=8, title="v1: what the 32 threads of a warp read at each step"))

# %% [markdown]
# ### v2: one block per row
#
# So let the 32 threads of a warp share a row: thread 0 takes channels 0, THREADS, 2·THREADS, ..., thread 1 takes 1,
# THREADS + 1, and so on. At each step the warp then reads 32 consecutive elements.
#
# The price: each thread has only the sum of its own channels, and the mean needs them all. The threads write their sums
# to shared memory and add them in a *tree reduction*: the first half of the threads add the sums of the second half,
# then the first quarter, and so on. Between two steps is `cuda.syncthreads()`, a *barrier*: no thread continues until
# all threads of the block have reached it. Without it, a thread might read a sum that another thread has not written
# yet: a race.
#
# `cuda.shared.array` creates an array in shared memory, and `@cuda.jit(device=True)` a function that kernels call.

# %%
pictures.source(layernorm_cuda.sum_of_block, layernorm_cuda.kernel_v2)

# %%
v2 = ladder.trace_of(layernorm_cuda.layernorm_forward_v2, layernorm_cuda.FORWARD)
pictures.show(pictures.draw_warp(v2, "inp", steps=8, title="v2: the same number of reads, all coalesced"))
pictures.show(pictures.draw_warp(v2, "shared", steps=14, title="v2: the tree reduction in shared memory"))

# %% [markdown]
# Note that the recording shows `inp` read four times: once for the mean, twice in the square, once for the output. (A
# compiler merges two equal reads that follow each other; the simulator executes both.)
#
# ### v3: the row stays in registers
#
# Together the threads of a block can hold the whole row in their registers: `cuda.local.array(each, float32)` is an
# array private to a thread, and if its length and its indices are known at compile time, it lives in registers. The row
# is read once, and everything else happens in registers and shared memory. Since the length depends on C, there is a
# kernel for each C; `functools.cache` keeps it.

# %%
pictures.source(layernorm_cuda.make_kernel_v3)

# %% [markdown]
# ### Correct, in the simulator
#
# The same check as before: every element against float64, at awkward shapes. For CUDA kernels it also finds races,
# indices out of bounds, shared memory that is read before it is written, and barriers that some threads never reach.

# %%
ladder.check(layernorm_cuda.FORWARD)

# %% [markdown]
# ### Why it is faster, without a GPU
#
# For each rung the picture counts the elements that all threads request from global memory, and the sectors that have
# to be moved for them. v1 and v2 request the same elements; v2 moves about a sixth of the sectors. v3 requests each
# element only once. On the right is shared memory, which v1 does not use. It is divided into 32 *banks*, each of which
# serves one word at a time. If the threads of a warp access different words of one bank, that is a *bank conflict*, and
# the request takes more than one pass. Here there are none.
#
# The count leaves out two things. A GPU has caches too, so v1 finds some of its sectors there the next time. And the
# model's kernel adds a warp's elements with *shuffles*, which exchange registers within a warp; the simulator does not
# support them and uses shared memory instead.

# %%
counts = ladder.counts(layernorm_cuda.FORWARD)
pictures.show(pictures.draw_counts(counts))

# %% [markdown]
# Array by array, for v1 and v2: how many instructions the warps execute, how many sectors they touch, how many would be
# enough, and how many instructions are coalesced.

# %%
for name, trace in (("v1", v1), ("v2", v2)):
    print(name)
    for c in counting.count(trace):
        if c.space == "global":
            print(
                f"  {c.array:>6} {c.kind:>5}: {c.instructions:3d} instructions, {c.sectors:4d} sectors, "
                f"{c.fewest:4d} would be enough, {c.coalesced:3d} coalesced"
            )

# %% [markdown]
# ### On a GPU
#
# If there is a GPU, this cell compiles the same rungs for it and times them; if not, it shows times measured on another
# machine. The limit is again a copy of a large array.

# %%
found = timing.show_times(layernorm_cuda.FORWARD)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# The last rung is the model's own, `llm_numba/cuda/layernorm.py`: v3, with a block size that fits C, sums by shuffles,
# and arrays that may also have 16-bit elements. Its backward is the one that you know from the CPU: pieces of the rows
# with their own sums, and a second kernel that adds them up. Lesson 07 is about such sums.
#
# ## Exercise: the mean of each row
#
# This is the first half of v2: the mean of each row, with one block per row. The unfinished kernel is in
# `exercises/layernorm_mean.py`. `show` prints the specification and, as soon as your kernel runs, draws what its first
# warp reads. `check` explains what is wrong: the thread, the index, the race. Try what happens if you leave out the
# barrier.

# %%
exercise.show("layernorm_mean")

# %%
exercise.check("layernorm_mean")

# %% [markdown]
# ## In a real training run
#
# Every rung has the op's signature, so it can replace the op in a run, which then prints how long both take and how
# much their results differ:
#
# ```sh
# python -m llm_numba.train --preset nano --use layernorm_forward=lessons/rungs/layernorm_cpu.py:layernorm_forward_v1
# ```
#
# ## Summary
#
# - A backward pass is the chain rule, one step at a time. Finite differences tell you whether you got it right.
# - Layer normalisation moves data and computes little: it is memory-bound, so the fastest version reads everything
#   once.
# - Each output has one owner. If a sum has many contributors, give each its own partial sum and add those up.
# - On a GPU, think of what the threads of a warp do *at the same time*, not of what one thread does over time.
#
# Source of the layer: Ba, Kiros, Hinton 2016, *Layer Normalization*,
# [arXiv:1607.06450](https://arxiv.org/abs/1607.06450).
