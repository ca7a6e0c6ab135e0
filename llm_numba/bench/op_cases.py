"""Our side of the benchmark, op by op: inputs, a call, and what a few of its results must be.

Each function here is named after the op it builds and returns a Case. Before a case is timed its results are compared
with float64 NumPy on a few rows and columns: a fast wrong op is not worth a number.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from llm_numba.config import GPT2Config

TOLERANCE = 1e-4  # of the largest expected number; an op that is right loses about 1e-6
BETA1, BETA2, EPS, RATE, DECAY = 0.9, 0.95, 1e-8, 0.1, 0.1


class Case(NamedTuple):
    run: Callable
    expect: Callable  # after the first run: pairs of (what it wrote, what it should have)
    flops: int = 0  # of an op whose limit is arithmetic ...
    nbytes: int = 0  # ... or the bytes that one whose limit is memory moves, and
    pattern: str = ""  # how: a key of peak_bandwidth


def op_list(config: GPT2Config, rows: int = 16384, matmul_rows=(256, 1024), attention_T=(64, 256, 1024)):
    """(op, its sizes) of every case. The sizes, by keyword, are those of the functions below and of torch_side.

    rows: B*T of the ops whose limit is memory; at 768 channels 48 MiB an activation, four times that inside the MLP.
    """
    C, V, Vp, NH = config.channels, config.vocab_size, config.padded_vocab_size, config.num_heads
    T = min(config.max_seq_len, rows)
    wide, activation = dict(B=rows // T, T=T, C=4 * C), dict(B=rows // T, T=T, C=C)
    cases = [
        (f"matmul_{way}", dict(R=R, C=a, OC=b, bias=b != Vp))
        for way in ("forward", "backward")
        for R in matmul_rows
        for a, b in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, Vp))
    ]
    cases += [(f"attention_{way}", dict(B=4, T=T, C=C, NH=NH)) for way in ("forward", "backward") for T in attention_T]
    return cases + [
        ("layernorm_forward", activation),
        ("layernorm_backward", activation),
        ("gelu_forward", wide),
        ("gelu_backward", wide),
        ("residual_forward", activation),
        ("encoder_forward", dict(**activation, Vp=Vp)),
        ("encoder_backward", dict(**activation, Vp=Vp)),
        ("fused_classifier", dict(B=1, T=T, V=V, Vp=Vp)),
        ("global_norm_squared", dict(n=Vp * C)),
        ("adamw_update", dict(n=Vp * C)),
    ]


def build(ops: SimpleNamespace, op: str, sizes: dict, config: GPT2Config) -> Case:
    """The case of an op, run once and found right; an op whose results are wrong is an AssertionError."""
    scratch = zeros(ops, ops.scratch_size(config, 1, sizes.get("R", sizes.get("T", 1))))
    case = BUILDERS[op](SimpleNamespace(**vars(ops), scratch=scratch, rng=np.random.default_rng(0)), **sizes)
    case.run()
    for got, expected in case.expect():
        error, largest = np.abs(got - expected).max(), np.abs(expected).max()
        assert error <= TOLERANCE * largest, (
            f"{op} {sizes}: differs from NumPy by {error:.3g}, of at most {largest:.3g}"
        )
    return case


def zeros(ops, *shape: int, dtype: str = "float32") -> np.ndarray:
    """Aligned as the arena's tensors are."""
    return ops.view(ops.allocate(math.prod(shape) * np.dtype(dtype).itemsize), 0, shape, dtype)


def normal(ops, *shape: int) -> np.ndarray:
    out = zeros(ops, *shape)
    ops.rng.standard_normal(dtype=np.float32, out=out)
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
    inp, weight, out = normal(ops, 1, R, C), normal(ops, OC, C), zeros(ops, 1, R, OC)
    biases, r, o = normal(ops, OC) if bias else None, some(R), some(OC)

    def expect():
        expected = wide(inp[0, r]) @ wide(weight[o]).T + (biases[o] if bias else 0)
        return [(part(out[0], r, o), expected)]

    return Case(lambda: ops.matmul_forward(out, inp, weight, biases, ops.scratch), expect, flops=2 * R * C * OC)


def matmul_backward(ops, R, C, OC, bias):
    inp, weight, dout = normal(ops, 1, R, C), normal(ops, OC, C), normal(ops, 1, R, OC)
    dinp, dweight, dbias = zeros(ops, 1, R, C), zeros(ops, OC, C), zeros(ops, OC) if bias else None
    r, c, o = some(R), some(C), some(OC)

    def run():
        ops.matmul_backward(dinp, dweight, dbias, dout, inp, weight, ops.scratch)

    def expect():
        columns = wide(dout[0][:, o])
        yield part(dinp[0], r, c), wide(dout[0, r]) @ wide(weight[:, c])
        yield part(dweight, o, c), columns.T @ wide(inp[0][:, c])
        if bias:
            yield dbias[o], columns.sum(axis=0)

    return Case(run, expect, flops=4 * R * C * OC)


def attention_forward(ops, B, T, C, NH):
    qkv, out, att = normal(ops, B, T, 3 * C), zeros(ops, B, T, C), zeros(ops, B, NH, T, T)
    HS = C // NH

    def expect():
        att, _, _, v = one_head(qkv, HS)
        return [(out[-1, :, -HS:], att @ v)]

    return Case(lambda: ops.attention_forward(out, att, qkv, NH, ops.scratch), expect, flops=2 * B * T * T * C)


def attention_backward(ops, B, T, C, NH):
    qkv, out, att, dout = normal(ops, B, T, 3 * C), zeros(ops, B, T, C), zeros(ops, B, NH, T, T), normal(ops, B, T, C)
    dqkv, HS = zeros(ops, B, T, 3 * C), C // NH
    ops.attention_forward(out, att, qkv, NH, ops.scratch)

    def expect():
        p, q, k, v = one_head(qkv, HS)
        dy = wide(dout[-1, :, -HS:])
        dp = dy @ v.T
        dscores = p * (dp - (p * dp).sum(axis=1, keepdims=True)) / math.sqrt(HS)
        for i, expected in enumerate((dscores @ k, dscores.T @ q, p.T @ dy)):
            yield dqkv[-1, :, i * C + C - HS : i * C + C], expected

    return Case(
        lambda: ops.attention_backward(dqkv, dout, out, att, qkv, NH, ops.scratch), expect, flops=4 * B * T * T * C
    )


def one_head(qkv, HS):
    """The last sequence's last head in float64: its softmax (T, T), and its q, k, v (T, HS)."""
    q, k, v = (wide(x[:, -HS:]) for x in np.split(qkv[-1], 3, axis=-1))
    scores = np.where(np.tri(len(q), dtype=bool), q @ k.T / math.sqrt(HS), -np.inf)
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True), q, k, v


def layernorm_forward(ops, B, T, C):
    inp, weight, bias = normal(ops, B, T, C), normal(ops, C), normal(ops, C)
    out, mean, rstd, t = zeros(ops, B, T, C), zeros(ops, B, T), zeros(ops, B, T), some(T)

    def expect():
        return [(out[-1, t], normalised(wide(inp[-1, t]))[0] * weight + bias)]

    return Case(
        lambda: ops.layernorm_forward(out, mean, rstd, inp, weight, bias),
        expect, nbytes=8 * B * T * C, pattern="copy",
    )  # fmt: skip


def layernorm_backward(ops, B, T, C):
    inp, weight, bias, dout = normal(ops, B, T, C), normal(ops, C), normal(ops, C), normal(ops, B, T, C)
    dinp, dweight, dbias, t = zeros(ops, B, T, C), zeros(ops, C), zeros(ops, C), some(T)
    mean, rstd = zeros(ops, B, T), zeros(ops, B, T)
    ops.layernorm_forward(zeros(ops, B, T, C), mean, rstd, inp, weight, bias)

    def expect():
        norm, scale = normalised(wide(inp[-1, t]))
        dnorm = wide(dout[-1, t]) * weight
        yield dinp[-1, t], scale * (dnorm - average(dnorm) - norm * average(dnorm * norm))
        c = some(C)
        yield dweight[c], (wide(dout[..., c]) * (inp[..., c] - mean[..., None]) * rstd[..., None]).sum(axis=(0, 1))
        yield dbias[c], wide(dout[..., c]).sum(axis=(0, 1))

    return Case(
        lambda: ops.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, ops.scratch),
        expect, nbytes=16 * B * T * C, pattern="update",
    )  # fmt: skip


def average(x):
    return x.mean(axis=-1, keepdims=True)


def normalised(x):
    """x with mean 0 and variance 1 in each row, and the factors that made it so."""
    centred = x - average(x)
    rstd = 1 / np.sqrt(average(centred**2) + 1e-5)
    return centred * rstd, rstd


def gelu_forward(ops, B, T, C):
    inp, out, t = normal(ops, B, T, C), zeros(ops, B, T, C), some(T)

    def expect():
        x = wide(inp[-1, t])
        return [(out[-1, t], x / (1 + np.exp(-2 * gelu_u(x))))]

    return Case(lambda: ops.gelu_forward(out, inp), expect, nbytes=8 * B * T * C, pattern="copy")


def gelu_backward(ops, B, T, C):
    inp, dout, dinp, t = normal(ops, B, T, C), normal(ops, B, T, C), zeros(ops, B, T, C), some(T)

    def expect():
        x = wide(inp[-1, t])
        s, slope = 1 / (1 + np.exp(-2 * gelu_u(x))), 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
        return [(dinp[-1, t], dout[-1, t] * (s + x * s * (1 - s) * slope))]

    return Case(lambda: ops.gelu_backward(dinp, inp, dout), expect, nbytes=12 * B * T * C, pattern="add")


def gelu_u(x):
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def residual_forward(ops, B, T, C):
    out, a, b, t = zeros(ops, B, T, C), normal(ops, B, T, C), normal(ops, B, T, C), some(T)
    return Case(
        lambda: ops.residual_forward(out, a, b),
        lambda: [(out[-1, t], wide(a[-1, t]) + b[-1, t])], nbytes=12 * B * T * C, pattern="add",
    )  # fmt: skip


def encoder_forward(ops, B, T, C, Vp):
    out, wte, wpe, tokens, t = zeros(ops, B, T, C), normal(ops, Vp, C), normal(ops, T, C), draw(ops, Vp, B, T), some(T)
    return Case(
        lambda: ops.encoder_forward(out, tokens, wte, wpe),
        lambda: [(out[-1, t], wide(wte[tokens[-1, t]]) + wpe[t])], nbytes=4 * (2 * B * T * C + T * C), pattern="copy",
    )  # fmt: skip


def encoder_backward(ops, B, T, C, Vp):
    dwte, dwpe, dout, tokens = zeros(ops, Vp, C), zeros(ops, T, C), normal(ops, B, T, C), draw(ops, Vp, B, T)

    def expect():
        for token in tokens[-1, some(T)]:
            yield dwte[token], wide(dout[tokens == token]).sum(axis=0)
        yield dwpe[some(T)], wide(dout[:, some(T)]).sum(axis=0)

    return Case(lambda: ops.encoder_backward(dwte, dwpe, dout, tokens), expect, nbytes=20 * B * T * C, pattern="update")


def draw(ops, V, *shape):
    """Token ids below V."""
    tokens = zeros(ops, *shape, dtype="int32")
    tokens[...] = ops.rng.integers(0, V, shape)
    return tokens


def fused_classifier(ops, B, T, V, Vp):
    logits, losses, targets, t = normal(ops, B, T, Vp), zeros(ops, B, T), draw(ops, V, B, T), some(T)
    before, dloss = wide(logits[-1, t, :V]), 1 / (B * T)

    def expect():
        e = np.exp(before - before.max(axis=-1, keepdims=True))
        p, hit = e / e.sum(axis=-1, keepdims=True), np.arange(V) == targets[-1, t][:, None]
        yield losses[-1, t], -np.log(p[hit])
        yield logits[-1, t, :V], (p - hit) * dloss

    return Case(
        lambda: ops.fused_classifier(logits, losses, targets, dloss, V, True),
        expect, nbytes=8 * B * T * Vp, pattern="update",
    )  # fmt: skip


def global_norm_squared(ops, n):
    grads, out = normal(ops, n), zeros(ops, 1, dtype="float64")
    return Case(
        lambda: ops.global_norm_squared(out, grads, ops.scratch),
        lambda: [(out, np.array([(wide(grads) ** 2).sum()]))], nbytes=4 * n, pattern="read",
    )  # fmt: skip


def adamw_update(ops, n):
    param, grad, m, v = normal(ops, n), normal(ops, n), zeros(ops, n), zeros(ops, n)
    rate, step, scale = zeros(ops, 1), zeros(ops, 1, dtype="int32"), zeros(ops, 1)
    rate[0], step[0], scale[0] = RATE, 1, 0.5
    i = some(n)
    before = wide(param[i])

    def expect():  # after one step from zero, the means that AdamW corrects are the gradient and its square
        g = 0.5 * wide(grad[i])
        yield m[i], (1 - BETA1) * g
        yield v[i], (1 - BETA2) * g**2
        yield param[i], before - RATE * (g / (np.abs(g) + EPS) + DECAY * before)

    return Case(
        lambda: ops.adamw_update(param, grad, m, v, rate, BETA1, BETA2, EPS, DECAY, step, scale),
        expect, nbytes=28 * n, pattern="update",
    )  # fmt: skip


BUILDERS = {
    f.__name__: f
    for f in (
        matmul_forward, matmul_backward, attention_forward, attention_backward, layernorm_forward, layernorm_backward,
        gelu_forward, gelu_backward, residual_forward, encoder_forward, encoder_backward, fused_classifier,
        global_norm_squared, adamw_update,
    )
}  # fmt: skip
