"""Our side of the benchmark, op by op: inputs, a call, and what a few of its results must be.

Each function here is named after the op it builds and returns a Case. Before a case is timed its results are compared
with float64 NumPy on a few rows and columns: a fast wrong op is not worth a number. Everything lies in the device's
memory; what is compared is read from there first (`ops.to_host`, which on the CPU copies nothing).
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16
import numpy as np

from llm_numba.arena import RUN
from llm_numba.models.config import GPT2Config

# of the largest expected number; an op that is right loses about 1e-6, or half a unit of bf16, 2**-9, once or twice
TOLERANCES = {"float32": 1e-4, "bfloat16": 2**-7}
BETA1, BETA2, EPS, RATE, DECAY = 0.9, 0.95, 1e-8, 0.1, 0.1
PERIOD = 1 << 24  # numbers; a larger tensor has the same again and again


class Case(NamedTuple):
    run: Callable
    expect: Callable  # after the first run: pairs of (what it wrote, what it should have)
    flops: int = 0  # of an op whose limit is arithmetic ...
    nbytes: int = 0  # ... or the bytes that one whose limit is memory moves, and
    pattern: str = ""  # how: a key of peak_bandwidth


class Sizes(NamedTuple):
    """What the ops are timed at."""

    rows: int  # B*T of the ops whose limit is memory
    matmul_rows: tuple[int, ...]
    attention: tuple[tuple[int, int], ...]  # B, T
    classifier_rows: int


# rows: at 768 channels 48 MiB an activation, four times that inside the MLP; a card's L2 cache holds as much
CPU = Sizes(16384, (256, 1024), ((4, 64), (4, 256), (4, 1024)), 1024)
CARD = Sizes(65536, (4096, 16384), ((4, 1024), (32, 1024)), 4096)
SIMULATED = Sizes(64, (9,), ((1, 8),), 8)
SIZES = {"cpu": CPU, "cuda": CARD, "cudasim": SIMULATED}


def op_list(config: GPT2Config, at: Sizes):
    """(op, its sizes) of every case. The sizes, by keyword, are those of the functions below and of torch_side."""
    C, V, Vp, NH = config.channels, config.vocab_size, config.padded_vocab_size, config.num_heads
    T = min(config.max_seq_len, at.rows)
    wide, activation = dict(B=at.rows // T, T=T, C=4 * C), dict(B=at.rows // T, T=T, C=C)
    predicted = min(T, at.classifier_rows)
    cases = [
        (f"matmul_{way}", dict(R=R, C=a, OC=b, bias=b != Vp))
        for way in ("forward", "backward")
        for R in at.matmul_rows
        for a, b in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, Vp))
    ]
    cases += [
        (f"attention_{way}", dict(B=B, T=T, C=C, NH=NH)) for way in ("forward", "backward") for B, T in at.attention
    ]
    return cases + [
        ("layernorm_forward", activation),
        ("layernorm_backward", activation),
        ("gelu_forward", wide),
        ("gelu_backward", wide),
        ("residual_layernorm_forward", activation),
        ("encoder_forward", dict(**activation, Vp=Vp)),
        ("encoder_backward", dict(**activation, Vp=Vp)),
        ("fused_classifier", dict(B=at.classifier_rows // predicted, T=predicted, V=V, Vp=Vp)),
        ("global_norm_squared", dict(n=Vp * C)),
        ("adamw_update", dict(n=Vp * C)),
    ]


def build(ops: SimpleNamespace, op: str, sizes: dict, config: GPT2Config, dtype: str = "float32") -> Case:
    """The case of an op, run once and found right; an op whose results are wrong is an AssertionError.

    dtype: of parameters and activations; gradients of parameters, what AdamW keeps, and sums are float32.
    """
    scratch = zeros(ops, ops.scratch_size(config, sizes.get("B", 1), sizes.get("R", sizes.get("T", 1))))
    bench = SimpleNamespace(
        **vars(ops), scratch=scratch, rng=np.random.default_rng(0), dtype=dtype, itemsize=np.dtype(dtype).itemsize
    )
    case = BUILDERS[op](bench, **sizes)
    case.run()
    for got, expected in case.expect():
        error, largest = np.abs(got - expected).max(), np.abs(expected).max()
        assert error <= TOLERANCES[dtype] * largest, (
            f"{op} {sizes}: differs from NumPy by {error:.3g}, of at most {largest:.3g}"
        )
    return case


def zeros(ops, *shape: int, dtype: str = "float32"):
    """Aligned as the arena's tensors are."""
    return ops.view(ops.allocate(math.prod(shape) * np.dtype(dtype).itemsize), 0, shape, dtype)


def blank(ops, *shape: int):
    """Zeros in the precision of the run."""
    return zeros(ops, *shape, dtype=ops.dtype)


def normal(ops, *shape: int, dtype: str = ""):
    """Normally distributed numbers, in the precision of the run or in this dtype."""
    out = zeros(ops, *shape, dtype=dtype or ops.dtype)
    flat, n = out.reshape(-1), math.prod(shape)
    first = flat[: min(n, PERIOD)]
    ops.to_device(first, ops.rng.standard_normal(min(n, PERIOD), np.float32))
    for start in range(PERIOD, n, PERIOD):
        stop = min(n, start + PERIOD)
        ops.copy(flat[start:stop], first[: stop - start])
    return out


def some(n: int) -> np.ndarray:
    """A few of 0 to n - 1, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, 7).astype(int))


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def part(x: np.ndarray, rows, columns) -> np.ndarray:
    """These rows and columns of x, in float64."""
    return wide(x[np.ix_(rows, columns)])


def matmul_forward(ops, R, C, OC, bias):
    inp, weight, out = normal(ops, 1, R, C), normal(ops, OC, C), blank(ops, 1, R, OC)
    biases, r, o = normal(ops, OC) if bias else None, some(R), some(OC)

    def expect():
        expected = wide(ops.to_host(inp)[0, r]) @ wide(ops.to_host(weight)[o]).T
        return [(part(ops.to_host(out)[0], r, o), expected + (ops.to_host(biases)[o] if bias else 0))]

    return Case(lambda: ops.matmul_forward(out, inp, weight, biases, ops.scratch), expect, flops=2 * R * C * OC)


def matmul_backward(ops, R, C, OC, bias):
    inp, weight, dout = normal(ops, 1, R, C), normal(ops, OC, C), normal(ops, 1, R, OC)
    dinp, dweight, dbias = blank(ops, 1, R, C), zeros(ops, OC, C), zeros(ops, OC) if bias else None
    r, c, o = some(R), some(C), some(OC)

    def run():
        ops.matmul_backward(dinp, dweight, dbias, dout, inp, weight, ops.scratch, False)

    def expect():
        x, dy = ops.to_host(inp)[0], ops.to_host(dout)[0]
        columns = wide(dy[:, o])
        yield part(ops.to_host(dinp)[0], r, c), wide(dy[r]) @ wide(ops.to_host(weight)[:, c])
        yield part(ops.to_host(dweight), o, c), columns.T @ wide(x[:, c])
        if bias:
            yield ops.to_host(dbias)[o], columns.sum(axis=0)

    return Case(run, expect, flops=4 * R * C * OC)


def attention_forward(ops, B, T, C, NH):
    qkv, out, lse = normal(ops, B, T, 3 * C), blank(ops, B, T, C), zeros(ops, B, NH, T)
    HS = C // NH

    def expect():
        weights, _, _, v = one_head(ops.to_host(qkv[B - 1]), HS)
        return [(ops.to_host(out)[-1, :, -HS:], weights @ v)]

    return Case(lambda: ops.attention_forward(out, lse, qkv, NH, NH, ops.scratch), expect, flops=2 * B * T * T * C)


def attention_backward(ops, B, T, C, NH):
    qkv, out, lse, dout = normal(ops, B, T, 3 * C), blank(ops, B, T, C), zeros(ops, B, NH, T), normal(ops, B, T, C)
    dqkv, HS = blank(ops, B, T, 3 * C), C // NH
    ops.attention_forward(out, lse, qkv, NH, NH, ops.scratch)

    def expect():
        p, q, k, v = one_head(ops.to_host(qkv[B - 1]), HS)
        got, dy = ops.to_host(dqkv)[-1], wide(ops.to_host(dout)[-1, :, -HS:])
        dp = dy @ v.T
        dscores = p * (dp - (p * dp).sum(axis=1, keepdims=True)) / math.sqrt(HS)
        for i, expected in enumerate((dscores @ k, dscores.T @ q, p.T @ dy)):
            yield got[:, i * C + C - HS : i * C + C], expected

    return Case(
        lambda: ops.attention_backward(dqkv, dout, out, lse, qkv, NH, NH, ops.scratch),
        expect,
        flops=4 * B * T * T * C,
    )


def one_head(qkv, HS):
    """A sequence's last head in float64: its softmax (T, T), and its q, k, v (T, HS), from qkv (T, 3*C)."""
    q, k, v = (wide(x[:, -HS:]) for x in np.split(qkv, 3, axis=-1))
    scores = np.where(np.tri(len(q), dtype=bool), q @ k.T / math.sqrt(HS), -np.inf)
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True), q, k, v


def layernorm_forward(ops, B, T, C):
    inp, weight, bias = normal(ops, B, T, C), normal(ops, C), normal(ops, C)
    out, mean, rstd, t = blank(ops, B, T, C), zeros(ops, B, T), zeros(ops, B, T), some(T)

    def expect():
        norm, _ = normalised(wide(ops.to_host(inp)[-1, t]))
        return [(ops.to_host(out)[-1, t], norm * ops.to_host(weight) + ops.to_host(bias))]

    return Case(
        lambda: ops.layernorm_forward(out, mean, rstd, inp, weight, bias),
        expect, nbytes=2 * ops.itemsize * B * T * C, pattern="copy",
    )  # fmt: skip


def layernorm_backward(ops, B, T, C):
    inp, weight, bias, dout = normal(ops, B, T, C), normal(ops, C), normal(ops, C), normal(ops, B, T, C)
    dinp, dweight, dbias, t = blank(ops, B, T, C), zeros(ops, C), zeros(ops, C), some(T)
    mean, rstd = zeros(ops, B, T), zeros(ops, B, T)
    ops.layernorm_forward(blank(ops, B, T, C), mean, rstd, inp, weight, bias)

    def expect():
        x, dy = ops.to_host(inp), ops.to_host(dout)
        norm, scale = normalised(wide(x[-1, t]))
        dnorm = wide(dy[-1, t]) * ops.to_host(weight)
        yield ops.to_host(dinp)[-1, t], scale * (dnorm - average(dnorm) - norm * average(dnorm * norm))
        c, means, rstds = some(C), ops.to_host(mean)[..., None], ops.to_host(rstd)[..., None]
        yield ops.to_host(dweight)[c], (wide(dy[..., c]) * (x[..., c] - means) * rstds).sum(axis=(0, 1))
        yield ops.to_host(dbias)[c], wide(dy[..., c]).sum(axis=(0, 1))

    return Case(
        lambda: ops.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, ops.scratch, False),
        expect, nbytes=4 * ops.itemsize * B * T * C, pattern="update",
    )  # fmt: skip


def average(x):
    return x.mean(axis=-1, keepdims=True)


def normalised(x):
    """x with mean 0 and variance 1 in each row, and the factors that made it so."""
    centred = x - average(x)
    rstd = 1 / np.sqrt(average(centred**2) + 1e-5)
    return centred * rstd, rstd


def gelu_forward(ops, B, T, C):
    inp, out, t = normal(ops, B, T, C), blank(ops, B, T, C), some(T)

    def expect():
        x = wide(ops.to_host(inp)[-1, t])
        return [(ops.to_host(out)[-1, t], x / (1 + np.exp(-2 * gelu_u(x))))]

    return Case(lambda: ops.gelu_forward(out, inp), expect, nbytes=2 * ops.itemsize * B * T * C, pattern="copy")


def gelu_backward(ops, B, T, C):
    inp, dout, dinp, t = normal(ops, B, T, C), normal(ops, B, T, C), blank(ops, B, T, C), some(T)

    def expect():
        x = wide(ops.to_host(inp)[-1, t])
        s, slope = 1 / (1 + np.exp(-2 * gelu_u(x))), 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
        return [(ops.to_host(dinp)[-1, t], ops.to_host(dout)[-1, t] * (s + x * s * (1 - s) * slope))]

    return Case(lambda: ops.gelu_backward(dinp, inp, dout), expect, nbytes=3 * ops.itemsize * B * T * C, pattern="add")


def gelu_u(x):
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def residual_layernorm_forward(ops, B, T, C):
    residual, out, mean, rstd = blank(ops, B, T, C), blank(ops, B, T, C), zeros(ops, B, T), zeros(ops, B, T)
    a, b, weight, bias = normal(ops, B, T, C), normal(ops, B, T, C), normal(ops, C), normal(ops, C)
    t = some(T)

    def expect():
        total = wide(ops.to_host(a)[-1, t]) + ops.to_host(b)[-1, t]
        yield ops.to_host(residual)[-1, t], total
        yield ops.to_host(out)[-1, t], normalised(total)[0] * ops.to_host(weight) + ops.to_host(bias)

    return Case(
        lambda: ops.residual_layernorm_forward(residual, out, mean, rstd, a, b, weight, bias),
        expect, nbytes=4 * ops.itemsize * B * T * C, pattern="add",
    )  # fmt: skip


def encoder_forward(ops, B, T, C, Vp):
    out, wte, wpe, tokens, t = blank(ops, B, T, C), normal(ops, Vp, C), normal(ops, T, C), draw(ops, Vp, B, T), some(T)

    def expect():
        looked_up = wide(ops.to_host(wte)[ops.to_host(tokens)[-1, t]])
        return [(ops.to_host(out)[-1, t], looked_up + ops.to_host(wpe)[t])]

    return Case(
        lambda: ops.encoder_forward(out, tokens, wte, wpe),
        expect, nbytes=ops.itemsize * (2 * B * T * C + T * C), pattern="copy",
    )  # fmt: skip


def encoder_backward(ops, B, T, C, Vp):
    dwte, dwpe, dout, tokens = zeros(ops, Vp, C), zeros(ops, T, C), normal(ops, B, T, C), draw(ops, Vp, B, T)
    drawn = ops.to_host(tokens)

    def expect():
        dy, got = ops.to_host(dout), ops.to_host(dwte)
        for token in drawn[-1, some(T)]:
            yield got[token], wide(dy[drawn == token]).sum(axis=0)
        yield ops.to_host(dwpe)[some(T)], wide(dy[:, some(T)]).sum(axis=0)

    touched = len(np.unique(drawn)) + T  # rows, read and written
    return Case(
        lambda: ops.encoder_backward(dwte, dwpe, dout, tokens),
        expect, nbytes=ops.itemsize * B * T * C + 8 * touched * C, pattern="update",
    )  # fmt: skip


def draw(ops, V, *shape):
    """Token ids below V."""
    tokens = zeros(ops, *shape, dtype="int32")
    ops.to_device(tokens, ops.rng.integers(0, V, shape))
    return tokens


def fused_classifier(ops, B, T, V, Vp):
    logits, losses, targets, t = normal(ops, B, T, Vp), zeros(ops, B, T), draw(ops, V, B, T), some(T)
    before, dloss = wide(ops.to_host(logits[B - 1])[t, :V]), 1 / (B * T)

    def expect():
        e = np.exp(before - before.max(axis=-1, keepdims=True))
        p, hit = e / e.sum(axis=-1, keepdims=True), np.arange(V) == ops.to_host(targets)[-1, t][:, None]
        yield ops.to_host(losses)[-1, t], -np.log(p[hit])
        yield ops.to_host(logits[B - 1])[t, :V], (p - hit) * dloss

    return Case(
        lambda: ops.fused_classifier(logits, losses, targets, dloss, V, True),
        expect, nbytes=2 * ops.itemsize * B * T * Vp, pattern="update",
    )  # fmt: skip


def global_norm_squared(ops, n):
    grads, out = normal(ops, n, dtype="float32"), zeros(ops, 1, dtype="float64")
    return Case(
        lambda: ops.global_norm_squared(out, grads, ops.scratch),
        lambda: [(ops.to_host(out), np.array([(wide(ops.to_host(grads)) ** 2).sum()]))], nbytes=4 * n, pattern="read",
    )  # fmt: skip


def adamw_update(ops, n):
    params, grads, m, v = normal(ops, n), normal(ops, n, dtype="float32"), zeros(ops, n), zeros(ops, n)
    master = zeros(ops, n) if ops.dtype != "float32" else None
    rate, step, seed, scale = zeros(ops, 1), zeros(ops, 1, dtype="int32"), zeros(ops, 1, dtype="int32"), zeros(ops, 1)
    decays, i = zeros(ops, n // RUN, dtype="uint8"), some(n)
    for tensor, value in ((rate, RATE), (step, 1), (scale, 0.5), (decays, 1)):
        ops.to_device(tensor, value)
    start = ops.to_host(params)
    before = wide(start[i])
    if master is not None:
        ops.to_device(master, start)

    def expect():  # after one step from zero, the means that AdamW corrects are the gradient and its square
        g = 0.5 * wide(ops.to_host(grads)[i])
        after = before - RATE * (g / (np.abs(g) + EPS) + DECAY * before)
        yield ops.to_host(m)[i], (1 - BETA1) * g
        yield ops.to_host(v)[i], (1 - BETA2) * g**2
        yield ops.to_host(params)[i], after
        if master is not None:
            yield ops.to_host(master)[i], after

    def run():
        ops.adamw_update(params, master, grads, m, v, decays, rate, BETA1, BETA2, EPS, DECAY, step, seed, scale)

    return Case(run, expect, nbytes=(28 if master is None else 30) * n, pattern="update")


BUILDERS = {
    f.__name__: f
    for f in (
        matmul_forward, matmul_backward, attention_forward, attention_backward,
        layernorm_forward, layernorm_backward, gelu_forward, gelu_backward, residual_layernorm_forward,
        encoder_forward, encoder_backward, fused_classifier, global_norm_squared, adamw_update,
    )
}  # fmt: skip
