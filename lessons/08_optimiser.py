# %% [markdown]
# # The optimiser: AdamW, and 2-byte elements
#
# **Goal.** Understand and write the last op of a training step, which has the gradient of every parameter and updates
# the parameters. First comes the formula; for each of its parts you will see what goes wrong without it. Then come its
# kernels, which are memory-bound like those of lesson 06. The last question is how few bytes a parameter can have.
# Speed alone does not answer it: in short formats small updates get lost. You will see why, and two remedies.
#
# **Prerequisites.** Lessons 01 and 06.

# %%
import numpy as np
from ml_dtypes import bfloat16

from llm_numba.arena import RUN
from llm_numba.cpu.adamw import adamw_update
from llm_numba.lessons import counting, exercise, ladder, pictures, sized, timing, tracing
from rungs import adamw_cpu, adamw_cuda

rng = np.random.default_rng(8)
COLOURS = pictures.COLOURS

# %% [markdown]
# ## Down a valley
#
# The loss is a function of all parameters, and its gradient $g$ points uphill. *Gradient descent* takes a step in the
# opposite direction, $\eta$ (the *learning rate*) times as long as the gradient:
#
# $$ w \leftarrow w - \eta\, g $$
#
# The next cell shows the smallest landscape in which this works badly: two parameters, and a valley that is a thousand
# times as steep across as along. The learning rate must be small, or the steps are thrown out of the valley sideways.
# Along the valley it is then far too small.
#
# Two ideas help. **Momentum**: average the gradients of the last steps. Components that change their sign from step to
# step, across the valley, average out. Components that stay the same, along the valley, add up.
#
# $$ m \leftarrow \beta_1 m + (1 - \beta_1)\, g $$
#
# is such an average, a *moving average*: the weight of a gradient shrinks by a factor of $\beta_1$ per step. With
# $\beta_1 = 0.9$, about the last ten gradients count. **A scale per parameter**: average the squares of the gradients
# in the same way,
#
# $$ v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2 $$
#
# and divide by the square root. Each parameter's step is then measured in units of its gradient's typical size, and it
# no longer matters whether a direction is steep or flat. Both ideas together are *Adam*:
#
# $$ w \leftarrow w - \eta\, \frac{\hat m}{\sqrt{\hat v} + \epsilon} $$
#
# (The hats are explained below. $\epsilon = 10^{-8}$ avoids $0/0$ for a parameter whose gradient is zero.)


# %%
def gradient(w):
    """Gradient of the loss (w[0]**2 + 1000 * w[1]**2) / 2."""
    return w * np.array([1.0, 1000.0])


def walk(step, steps):
    """The path from one corner of the valley; step(w, g, state, t) -> the new w."""
    path, state = [np.array([-2.0, 0.2])], {}
    for t in range(1, steps + 1):
        path.append(step(path[-1], gradient(path[-1]), state, t))
    return np.array(path)


def descent(w, g, state, t):
    return w - 0.0019 * g


def momentum(w, g, state, t):
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    return w - 0.02 * state["m"]


def adam(w, g, state, t):
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.95 * state.get("v", 0) + 0.05 * g**2
    mhat, vhat = state["m"] / (1 - 0.9**t), state["v"] / (1 - 0.95**t)
    return w - 0.15 * mhat / (np.sqrt(vhat) + 1e-8)


a, b = np.meshgrid(np.linspace(-2.1, 0.7, 200), np.linspace(-0.25, 0.25, 100))
figure, axes = pictures.new(1, 3, width=10, height=2.8, sharey=True)
for axis, step in zip(axes, (descent, momentum, adam), strict=True):
    path = walk(step, 40)
    axis.contourf(a, b, np.log10((a**2 + 1000 * b**2) / 2 + 1e-3), 12, cmap="Greys", vmin=-3, vmax=6)
    axis.plot(path[:, 0], path[:, 1], ".-", color=COLOURS[0], linewidth=1, markersize=3)
    axis.plot(0, 0, "+", color=COLOURS[1], markersize=10)
    axis.set(title=f"{step.__name__}, 40 steps", xlim=(-2.1, 0.7), ylim=(-0.25, 0.25), xlabel="w[0]")
    print(f"{step.__name__:>8}: ends {np.hypot(*path[-1]):.2f} from the minimum")
axes[0].set_ylabel("w[1]")
pictures.show(figure)

# %% [markdown]
# Look at Adam's first steps: both coordinates move by the same amount, although one gradient is a hundred times the
# other. As long as a gradient keeps its size and sign, $\hat m / \sqrt{\hat v}$ is $\pm 1$: **a step of Adam changes
# each parameter by about $\eta$, however large the gradient is.** If the loss is multiplied by a thousand, nothing
# changes:

# %%
path = walk(adam, 40)
louder = walk(lambda w, g, state, t: adam(w, 1000 * g, state, t), 40)
print(f"the paths differ by {np.abs(path - louder).max():.0e} at most")

# %% [markdown]
# ## What the hats are for
#
# Both averages start at 0, so an average over ten or twenty steps is too small at first. After $t$ steps with a
# constant gradient, $m = (1 - \beta_1^t)\, g$ and $v = (1 - \beta_2^t)\, g^2$. Hence the *bias correction*:
#
# $$ \hat m = \frac{m}{1 - \beta_1^t} \qquad \hat v = \frac{v}{1 - \beta_2^t} $$
#
# Is a step without the correction too short or too long? That depends. $m$ is too small by a factor of $1 - \beta_1^t$,
# and the square root of $v$, by which it is divided, by a factor of $\sqrt{1 - \beta_2^t}$. With Adam's usual $\beta_2
# = 0.999$ the second factor is the smaller one for a long time, so the first steps, when the least is known, are the
# longest. With $\beta_2 = 0.95$, which GPT-3 and this project use, the two nearly cancel after the first few steps. The
# picture shows the length of a step in units of $\eta$, for a constant gradient.

# %%
t = np.arange(1, 201)
figure, axis = pictures.new(width=6.5, height=2.8)
for i, beta2 in enumerate((0.95, 0.999)):
    axis.plot(t, (1 - 0.9**t) / np.sqrt(1 - beta2**t), color=COLOURS[i], label=f"not corrected, beta2 = {beta2}")
axis.plot(t, np.ones(t.size), color="0.4", linestyle="--", linewidth=1, label="corrected")
axis.set(xscale="log", xlabel="step t", ylabel="length of a step / learning rate", ylim=(0, None))
axis.legend(frameon=False)
pictures.show(figure)

# %% [markdown]
# ## Weight decay, and why it is separate
#
# Parameters that contribute nothing should fade away, so that the model does not rely on accidents. *Weight decay*
# makes each parameter a little smaller in each step. In plain gradient descent there are two equivalent ways to do
# that: add $\frac{\lambda}{2} w^2$ to the loss, and so $\lambda w$ to the gradient, or subtract $\eta \lambda w$ from
# the parameter. In Adam they are not equivalent, because Adam divides the gradient by its typical size, and a decay
# that is part of the gradient is divided too. Parameters with large gradients would hardly decay, and those with small
# gradients would decay at full step length.
#
# AdamW (the W stands for weight decay) keeps the decay out of the gradient; it is *decoupled*:
#
# $$ w \leftarrow w - \eta \Big( \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda\, w \Big) $$
#
# The experiment: 400 parameters start at 1, and their gradients are pure noise, large for some and small for others.
# Each line is the mean of the 400. All of them should follow the same curve: $(1 - \eta\lambda)^t$.


# %%
def fade(noise, decoupled, steps, rate=0.003, decay=0.3):
    w, m, v, means = np.ones(400), np.zeros(400), np.zeros(400), []
    for t in range(1, steps + 1):
        g = noise * rng.standard_normal(400) + (0 if decoupled else decay * w)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + (decay * w if decoupled else 0))
        means.append(w.mean())
    return means


steps = sized(1500, 300)
figure, axes = pictures.new(1, 2, width=9, height=2.8, sharey=True)
for axis, decoupled in zip(axes, (False, True), strict=True):
    for i, noise in enumerate((0.1, 1, 10)):
        axis.plot(fade(noise, decoupled, steps), color=COLOURS[i], label=f"gradients of size {noise}")
    axis.plot(
        (1 - 0.003 * 0.3) ** np.arange(steps), color="0.4", linestyle="--", linewidth=1, label="(1 - rate * decay)**t"
    )
    axis.set(title="decoupled: AdamW" if decoupled else "decay in the gradient", xlabel="step t")
axes[0].set(ylabel="mean of 400 parameters", ylim=(-0.1, 1.05))
axes[1].legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8)
pictures.show(figure)

# %% [markdown]
# Not all parameters decay. GPT-2's matrices do. Biases and LayerNorm's weights do not: they are few, and pulling a
# scale of 1 towards 0 makes no sense. All parameters are in one long array, one tensor after the other (lesson 00). A
# flag per *run* of 64 parameters says whether the run decays: the array `decays`. Every tensor starts at a new run.
#
# The op has one more input: it first multiplies every gradient by the scalar `grad_scale`. If the gradient of all
# parameters together, as one long vector, is longer than a given maximum, it is scaled down to that length. This is
# *gradient clipping*. If `grad_scale` is negative, the op skips the whole step, because the loss or the gradient is not
# finite or is an outlier.
#
# ## Exercise: one step of AdamW
#
# You now have all parts of the formula.

# %%
exercise.show("adamw_step")

# %%
exercise.check("adamw_step")

# %% [markdown]
# ## The op on a CPU
#
# The minimum number of bytes per parameter: read the parameter, the gradient, $m$ and $v$; write the parameter, $m$ and
# $v$. That is 7 elements, 28 bytes, for about twenty operations: the op is memory-bound, and every byte counts. GPT-2's
# smallest model has 124 million parameters, so this op alone moves 3.5 gigabytes per step.
#
# ### v1: NumPy
#
# One pass per operator, as in lesson 06. The arguments are the op's: values that change from step to step, such as the
# learning rate, are arrays with one element. So a recorded step can run again with another value in the same place;
# lesson 09 returns to this. `master` and `seed` are explained in the second half of this lesson; the CPU's op ignores
# them.

# %%
pictures.source(adamw_cpu.adamw_update_v1)

# %% [markdown]
# ### v2: one loop
#
# The loop is fused. But `beta1` and similar arguments are Python floats, which are float64, so everything computed with
# them is float64: a vector register holds half as many elements, and each element is converted back and forth. And
# `decays[i // RUN]` is looked up for every parameter.

# %%
pictures.source(adamw_cpu.adamw_update_v2)

# %% [markdown]
# ### v3: float32, and runs
#
# All constants are converted to float32 first. What is the same for a run is decided once per run, so the inner loop
# has no branches and the compiler can vectorise it.

# %%
pictures.source(adamw_cpu.adamw_update_v3)

# %% [markdown]
# The model's function, `llm_numba/cpu/adamw.py`, is v3 on all cores, in blocks of 256 runs.

# %%
ladder.check(adamw_cpu.UPDATE)

# %%
found = timing.show_times(adamw_cpu.UPDATE)
pictures.show(pictures.draw_times(found))

# %% [markdown]
# ## The op on a GPU
#
# v1 uses one kernel per line of the formula, and each kernel starts from memory again. v2 is a single kernel in which a
# thread owns a parameter and everything that belongs to it: four elements are loaded, three are stored, and everything
# in between stays in registers.

# %%
pictures.source(adamw_cuda.mean_kernel, adamw_cuda.mean_square_kernel, adamw_cuda.move_kernel)

# %%
pictures.source(adamw_cuda.adamw_kernel)

# %%
ladder.check(adamw_cuda.UPDATE)

# %% [markdown]
# The model's kernel processes several parameters per thread and supports more formats, as described below. The next
# cell shows the bytes that each rung moves per parameter, array by array:


# %%
def bytes_moved(trace):
    """(array, kind) -> bytes that the threads access per parameter."""
    found = [c for c in counting.count(trace) if c.array in ARRAYS]
    assert all(c.coalesced == c.instructions for c in found), "uncoalesced accesses would move more bytes"
    arrays = trace.arrays
    return {(c.array, c.kind): c.accesses * arrays[c.array][2].itemsize / arrays[c.array][1][0] for c in found}


def draw_bytes(moved):
    """Stacked bars of name -> bytes_moved(...): one colour per array; writes are hatched."""
    figure, axis = pictures.new(width=9, height=1.5 + 0.4 * len(moved))
    left = np.zeros(len(moved))
    for kind in ("read", "write"):
        for i, array in enumerate(ARRAYS):
            width = np.array([found.get((array, kind), 0) for found in moved.values()])
            style = dict(color=COLOURS[i], edgecolor="white", hatch="//" if kind == "write" else None)
            if width.any():
                axis.barh(range(len(moved)), width, 0.7, left=left, label=f"{kind} {array}", **style)
            left += width
    for row, total in enumerate(left):
        axis.text(total + 0.3, row, f"{total:.0f}", va="center", fontsize=9)
    axis.set(yticks=range(len(moved)), yticklabels=map(pictures.short, moved), xlabel="bytes moved per parameter")
    axis.set_xlim(0, 45)
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.45, 1.0))
    return figure


ARRAYS = "params", "grads", "m", "v", "master"
moved = {ladder.title(r): bytes_moved(ladder.trace_of(r, adamw_cuda.UPDATE)) for r in adamw_cuda.UPDATE.rungs}
pictures.show(draw_bytes(moved))

# %%
found = timing.show_times(adamw_cuda.UPDATE)
if found:
    pictures.show(pictures.draw_times(found))

# %% [markdown]
# ## Half the bytes: bfloat16
#
# A float32 has a sign, 8 exponent bits, which select the two powers of two that the value lies between, and 23 mantissa
# bits, which say where between them. *bfloat16*, bf16 for short, is its upper half: the sign, the same 8 exponent bits,
# and 7 mantissa bits instead of 23. It covers the same range, from $10^{-38}$ to $10^{38}$, but it has only 128 values
# between 1 and 2: two or three decimal digits.
#
# The matrix units of GPUs multiply bf16 many times faster than float32, and only half the bytes move. So it is
# attractive to store parameters in bf16. What can go wrong?

# %%
x = np.float32(0.0213)
bits = f"{x.view(np.uint32):032b}"
print(f"{x:.9f} as float32: {bits[0]} {bits[1:9]} {bits[9:16]} {bits[16:]}")
near = np.float32(bfloat16(x))
bits = f"{near.view(np.uint32):032b}"
print(f"{near:.9f} as bf16:    {bits[0]} {bits[1:9]} {bits[9:16]}")
print(f"the next larger bf16 is {np.float32(np.nextafter(bfloat16(x), bfloat16(1))):.9f}")

# %% [markdown]
# ### Small steps get lost
#
# A step of AdamW is about $\eta$ long. If that is less than half the distance to the next bf16, then parameter plus
# step, rounded to the nearest bf16, *is the parameter*. The step is lost. So are the next one and all that follow,
# although a thousand of them would have moved the parameter far. The picture shows half the distance from each value to
# the next one, and the lengths of steps. Below it are GPT-2's initial parameters, normally distributed with standard
# deviation 0.02.

# %%
sizes = np.logspace(-5, 1, 2000).astype(np.float32)
gap = sizes.astype(bfloat16).view(np.uint16)
gap = (gap + np.uint16(1)).view(bfloat16).astype(np.float32) - gap.view(bfloat16).astype(np.float32)
figure, (top, bottom) = pictures.new(2, 1, width=7, height=4.2, sharex=True, height_ratios=(3, 1))
top.loglog(sizes, gap / 2, color=COLOURS[0], label="half the distance to the next bf16")
top.loglog(sizes, np.spacing(sizes) / 2, color=COLOURS[2], label="... to the next float32")
weights = np.abs(0.02 * rng.standard_normal(100_000)).astype(np.float32)
half = np.exp2(np.floor(np.log2(np.maximum(weights, 1e-30))) - 8)  # 7 bits: the distance is 2**-7 of the power of two
for i, rate in enumerate((1e-3, 1e-4, 1e-5)):
    top.axhline(
        rate,
        color=COLOURS[1],
        linestyle=("-", "--", ":")[i],
        linewidth=1,
        label=f"a step, learning rate {rate:.0e}",
    )
    print(f"rate {rate:.0e}: a step is lost for {np.mean(half > rate):.0%} of these parameters")
top.legend(frameon=False, fontsize=7, ncols=2, loc="upper left")
top.set(ylabel="distance", ylim=(1e-11, 1e2))
bottom.hist(weights, bins=np.logspace(-5, 1, 100), color="0.6")
bottom.set(xlabel="magnitude of a parameter", yticks=[], ylabel="count")
pictures.show(figure)

# %% [markdown]
# ### Stochastic rounding
#
# Steps get lost because the nearest value is always the same one. Suppose we choose at random instead: a value that
# lies a quarter of the way from one bf16 to the next is rounded up with a probability of a quarter, and down otherwise.
# A single result has a larger error than before. But *on average* it is exact,
#
# $$ E[\mathrm{round}(x)] = x $$
#
# so no steps are lost: if the next value is a hundred steps away, one step in a hundred moves the parameter, by a
# hundred times its length. This is called *stochastic rounding*. It is unbiased.
#
# In bits it is remarkably short. bf16 is the upper half of a float32. The lower half says how far the value is on its
# way to the next bf16. Add 16 random bits to the lower half: if the sum carries into the upper half, the value is
# rounded up. Then clear the lower half.


# %%
def nearest(x):
    return x.astype(bfloat16).astype(np.float32)


def stochastically(x):
    bits = x.view(np.uint32) + rng.integers(0, 1 << 16, x.shape, np.uint32)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


start, rate = nearest(np.full(200, 0.02, np.float32)), np.float32(1e-5)
full, lost, dice, paths = start, start, start, []
for _ in range(sized(1000, 200)):
    full, lost, dice = full + rate, nearest(lost + rate), stochastically(dice + rate)
    paths.append((full[0], lost[0], dice.mean(), dice[0], dice[1]))
paths = np.array(paths)
figure, axis = pictures.new(width=7, height=3)
axis.plot(paths[:, 3], color=COLOURS[2], linewidth=0.6, alpha=0.6, label="stochastic rounding, one parameter")
axis.plot(paths[:, 4], color=COLOURS[4], linewidth=0.6, alpha=0.6, label="... and another one")
axis.plot(paths[:, 2], color=COLOURS[0], label="stochastic rounding, mean of 200")
axis.plot(paths[:, 0], color="0.2", linestyle="--", linewidth=1, label="float32")
axis.plot(paths[:, 1], color=COLOURS[1], label="nearest bf16")
axis.set(xlabel="steps of 1e-5 each", ylabel="parameter")
axis.legend(frameon=False, fontsize=8)
pictures.show(figure)

# %% [markdown]
# ### Master weights
#
# The other remedy is to keep two copies. The *master weights* are float32, and the optimiser updates these. After each
# step they are rounded to the nearest bf16 for the forward and backward pass. Nothing is lost, because small steps add
# up in the master weights until the rounded copy changes. This costs 4 bytes of memory per parameter, and 6 more bytes
# are moved (the master weights are read and written, but the bf16 parameters no longer need to be read).
#
# The model's kernel supports all three: float32, bf16 with stochastic rounding, and bf16 with master weights. The
# simulator counts the bytes of each:

# %%
n = 256
given = adamw_cuda.inputs(rng, n)
bf16 = nearest(given["params"]).astype(bfloat16).view(np.uint16)  # Numba has no bf16 arrays
ways = {
    "float32": {},
    "bf16, stochastic rounding": dict(params=bf16),
    "bf16 with master weights": dict(params=bf16, master=given["params"]),
}
model = adamw_cuda.UPDATE.rungs[-1]
moved = {way: bytes_moved(tracing.simulate(model, **{**given, **own})) for way, own in ways.items()}
pictures.show(draw_bytes(moved))

# %% [markdown]
# Is the kernel's rounding fair? Take a few hundred identical parameters with identical gradients. In float32 there is
# one right answer, and the mean of the kernel's results should be close to it, while rounding to the nearest bf16 would
# leave them unchanged. The random bits are computed from the parameter's index, the step and a seed by a *hash*, a
# function that mixes bits until they look random. So a run produces the same bits each time.

# %%
n = sized(512, 128)
given = {
    **adamw_cuda.inputs(rng, n),
    "learning_rate": np.array([2e-5], np.float32),
    "decays": np.zeros(n // RUN, np.uint8),
}
for name, value in dict(params=nearest(np.float32([0.02]))[0], grads=1, m=0, v=0).items():
    given[name] = np.full(n, value, np.float32)
given["step"][0] = 1
right = tracing.simulate(model, **given).results["params"][0]
bf16 = given["params"].astype(bfloat16).view(np.uint16)
got = tracing.simulate(model, **{**given, "params": bf16}).results["params"].view(bfloat16).astype(np.float32)
print(f"before {given['params'][0]:.6f}, in float32 {right:.6f}, nearest bf16 {nearest(right[None])[0]:.6f}")
print(f"the kernel's mean {got.mean():.6f}; its values: {', '.join(f'{x:.6f}' for x in np.unique(got))}")

from llm_numba.cuda.adamw import random_bits, round_stochastically  # noqa: E402

pictures.source(round_stochastically, random_bits)

# %% [markdown]
# ## Do the averages need float32?
#
# $m$ and $v$ make up 16 of the 28 bytes that move. Why not halve these too? Because of $v \leftarrow \beta_2 v +
# (1-\beta_2) g^2$. With $\beta_2 = 0.999$ and a gradient that has become small, $v$ should shrink by a thousandth per
# step. The distance between adjacent bf16 values is more than $\frac{1}{256}$ of the value. A thousandth is less than
# half of that, so the nearest bf16 is the same value again: $v$ can grow but never shrink, and the parameter's steps
# stay small. With $\beta_2 = 0.95$ it should shrink by a twentieth, which is more than the distance, and it does. So
# whether bf16 works depends on a hyperparameter that seems to have nothing to do with rounding. The model keeps both
# averages in float32.

# %%
figure, axis = pictures.new(width=6.5, height=2.8)
steps = np.arange(sized(2000, 500))
for i, beta2 in enumerate((0.999, 0.95)):
    v, kept = np.float32(1), []
    for _ in steps:
        kept.append(v)
        v = np.float32(bfloat16(np.float32(beta2) * v))
    axis.plot(steps, kept, color=COLOURS[i], label=f"bf16, beta2 = {beta2}")
    axis.plot(steps, beta2**steps, color=COLOURS[i], linestyle="--", linewidth=1, label=f"float32, beta2 = {beta2}")
axis.set(xlabel="steps without a gradient", ylabel="v", yscale="log", ylim=(1e-3, 2))
axis.legend(frameon=False, fontsize=8)
pictures.show(figure)

# %% [markdown]
# ## Four training runs
#
# Now apply all of this to a real, if small, training run: a network with one hidden layer learns to imitate another
# network of the same kind. The optimiser is the model's own op, and the learning rate decays to a hundredth, as in real
# runs. The forward and backward pass see only the rounded parameters; everything else is identical, including all
# random numbers.


# %%
IN, HIDDEN, OUT = 32, 64, 8


def split(w):
    """The two matrices of a flat array of parameters."""
    return w[: IN * HIDDEN].reshape(IN, HIDDEN), w[IN * HIDDEN :].reshape(HIDDEN, OUT)


def loss_and_gradient(w, x, y):
    first, second = split(w)
    h = np.maximum(x @ first, 0)
    error = h @ second - y
    dh = (error @ second.T) * (h > 0)
    return float((error**2).mean()), np.concatenate([(x.T @ dh).ravel(), (h.T @ error).ravel()]) / len(x)


def train(way, steps):
    """The loss of every step; way: "float32", "nearest", "stochastic" or "master"."""
    batches = np.random.default_rng(1)
    size = IN * HIDDEN + HIDDEN * OUT  # whole runs of 64
    teacher, w = 0.15 * batches.standard_normal((2, size), np.float32)
    m, v, losses = np.zeros(size, np.float32), np.zeros(size, np.float32), []
    no_decay, rate, number = np.zeros(size // RUN, np.uint8), np.zeros(1, np.float32), np.zeros(1, np.int32)
    seen = w if way == "float32" else nearest(w)
    if way != "master":
        w = seen.copy()
    for t in range(steps):
        x = batches.standard_normal((128, IN), np.float32)
        y = np.maximum(x @ split(teacher)[0], 0) @ split(teacher)[1]
        loss, grads = loss_and_gradient(seen, x, y)
        rate[0], number[0] = 3e-3 * 0.01 ** (t / steps), t + 1
        adamw_update(w, None, grads, m, v, no_decay, rate, 0.9, 0.95, 1e-8, 0.0, number, None, np.ones(1, np.float32))
        if way in ("nearest", "stochastic"):
            w[:] = nearest(w) if way == "nearest" else stochastically(w)
        seen = nearest(w) if way == "master" else w
        losses.append(loss)
    return losses


steps = sized(4000, 150)
figure, axis = pictures.new(width=7.5, height=3.2)
labels = {
    "nearest": "bf16, nearest",
    "stochastic": "bf16, stochastic rounding",
    "master": "bf16 with master weights",
    "float32": "float32",
}
for i, (way, label) in enumerate(labels.items()):
    losses = np.array(train(way, steps))
    smooth = losses.reshape(-1, steps // 50).mean(axis=1)
    axis.semilogy(np.linspace(0, steps, 50), smooth, color=COLOURS[(1, 4, 0, 2)[i]], label=label)
    print(f"{label:>26}: mean loss of the last steps {losses[-steps // 10 :].mean():.1e}")
axis.set(xlabel="step", ylabel="loss")
axis.legend(frameon=False, fontsize=8)
pictures.show(figure)

# %% [markdown]
# With rounding to the nearest bf16 the loss first falls like the others, while the steps are long. Then the learning
# rate decays, steps become shorter than half the distance to the next value, one parameter after the other stops, and
# the loss stays where it is. Nothing crashes; the training just seems to have converged. Stochastic rounding continues
# to improve, with some noise, because each parameter is on one of the two values next to its ideal position. With
# master weights the run is almost identical to float32, although the forward and backward pass see only bf16.
#
# ## Exercise: stochastic rounding
#
# The core of it as a kernel: four lines, and one trap.

# %%
exercise.show("round_stochastically")

# %%
exercise.check("round_stochastically")

# %% [markdown]
# ## Into a real training run
#
# Replace the model's op by a rung in a whole training run:
#
# ```sh
# python -m llm_numba.train --preset nano --use adamw_update=lessons/rungs/adamw_cpu.py:adamw_update_v2
# ```
#
# ## Summary
#
# - A step of Adam changes each parameter by about the learning rate, whatever the gradient's size. The bias corrections
#   keep that true at the start, and the decoupled decay keeps the decay independent of the gradient's size.
# - The op moves 28 bytes per parameter and hardly computes: one pass, and nothing is read twice.
# - A sum of many small terms needs more digits than the terms. Keep it in float32 (master weights, the two averages),
#   or round so that the mean is right (stochastic rounding).
#
# Sources: Kingma and Ba 2014, *Adam*, [arXiv:1412.6980](https://arxiv.org/abs/1412.6980); Loshchilov and Hutter 2017,
# *Decoupled Weight Decay Regularization*, [arXiv:1711.05101](https://arxiv.org/abs/1711.05101); Gupta et al. 2015,
# *Deep Learning with Limited Numerical Precision*, [arXiv:1502.02551](https://arxiv.org/abs/1502.02551); Micikevicius
# et al. 2017, *Mixed Precision Training*, [arXiv:1710.03740](https://arxiv.org/abs/1710.03740).
