"""The ops that the benchmark times: inputs, a call, and expected results.

Each function is named after the op it builds and returns a Case. Before an op is timed, a few rows and columns of its
results are compared with the float64 oracle. All tensors are in device memory; `host` copies what is compared.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16
import numpy as np

from llm_numba import oracle
from llm_numba.arena import RUN
from llm_numba.models.gpt2 import GPT2
from llm_numba.ops import Ops

# relative to the largest expected element; a correct op is off by about 1e-6, or by one or two bf16 roundings of 2**-9
TOLERANCES = {"float32": 1e-4, "bfloat16": 2**-7}
BETA1, BETA2, EPS, RATE, DECAY = 0.9, 0.95, 1e-8, 0.1, 0.1
PERIOD = 1 << 24  # elements; a larger tensor repeats them
SCRATCH = object()  # stands for scratch memory of the size that an op needs


class Case(NamedTuple):
    run: Callable
    expect: Callable  # called after the first run: pairs (result, expected)
    flops: int = 0  # if the op is compute-bound
    nbytes: int = 0  # if it is memory-bound
    pattern: str = ""  # of these bytes: a key of peak_bandwidth


class Sizes(NamedTuple):
    """The sizes at which ops and training steps are timed on a device."""

    rows: int  # B*T of memory-bound ops
    matmul_rows: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]  # (B, T) of training steps and attention
    classifier_rows: int


# rows: larger than the caches: at 768 channels an activation takes 48 MiB on the CPU, 192 MiB (fp32) on a GPU
CPU = Sizes(16384, (256, 1024), ((4, 64), (4, 256), (4, 1024)), 1024)
GPU = Sizes(65536, (4096, 16384), ((4, 1024), (32, 1024)), 4096)
SIMULATED = Sizes(64, (9,), ((1, 8),), 8)
SIZES = {"cpu": CPU, "cuda": GPU, "cudasim": SIMULATED}


def shapes_within(at: Sizes, model: GPT2) -> list[tuple[int, int]]:
    """The shapes, shortened to the model's context."""
    return list(dict.fromkeys((B, min(T, model.max_seq_len)) for B, T in at.shapes))


def op_list(model: GPT2, at: Sizes):
    """(op, sizes) of every case; the sizes are keyword arguments of the functions below and of those in torch_side."""
    C, V, Vp, NH = model.channels, model.vocab_size, model.padded_vocab_size, model.num_heads
    T = min(model.max_seq_len, at.rows)
    shapes = shapes_within(at, model)
    wide, activation = dict(B=at.rows // T, T=T, C=4 * C), dict(B=at.rows // T, T=T, C=C)
    predicted = min(T, at.classifier_rows)
    cases = [
        (f"matmul_{way}", dict(R=R, C=a, OC=b, bias=b != Vp))
        for way in ("forward", "backward")
        for R in at.matmul_rows
        for a, b in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, Vp))
    ]
    cases += [("matmul_gelu_forward", dict(R=R, C=C, OC=4 * C)) for R in at.matmul_rows]
    cases += [("gelu_matmul_backward", dict(R=R, C=4 * C, OC=C)) for R in at.matmul_rows]
    cases += [(f"attention_{way}", dict(B=B, T=T, C=C, NH=NH)) for way in ("forward", "backward") for B, T in shapes]
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


def build(ops: Ops, op: str, sizes: dict, dtype: str = "float32") -> Case:
    """The case of an op, run once and checked. Errors: AssertionError if a result is wrong.

    dtype: of parameters and activations; parameter gradients, AdamW's state and sums are float32.
    """
    bench = SimpleNamespace(
        **vars(with_scratch(ops)),
        scratch=SCRATCH,
        rng=np.random.default_rng(0),
        dtype=dtype,
        itemsize=np.dtype(dtype).itemsize,
    )
    case = BUILDERS[op](bench, **sizes)
    case.run()
    for got, expected in case.expect():
        error, largest = np.abs(got - expected).max(), np.abs(expected).max()
        assert error <= TOLERANCES[dtype] * largest, (
            f"{op} {sizes}: differs from the oracle by {error:.3g}; the largest element is {largest:.3g}"
        )
    return case


def with_scratch(ops: Ops) -> Ops:
    """The same ops; an op that gets SCRATCH as an argument gets the memory that it needs."""

    def wrapper(name, op):
        needs, buffer = getattr(ops, f"{name}_scratch", None), []

        def call(*arguments):
            if not buffer:
                buffer.append(zeros(ops, max(1, needs(*(x for x in arguments if x is not SCRATCH)))))
            op(*(buffer[0] if x is SCRATCH else x for x in arguments))

        return call if needs else op

    return ops.wrap(wrapper)


def zeros(ops, *shape: int, dtype: str = "float32"):
    """Zeros, aligned like the arena's tensors."""
    return ops.view(ops.allocate(math.prod(shape) * np.dtype(dtype).itemsize), 0, shape, dtype)


def output(ops, *shape: int):
    """Zeros in the dtype of the run."""
    return zeros(ops, *shape, dtype=ops.dtype)


def normal(ops, *shape: int, dtype: str = ""):
    """Normally distributed elements in the dtype of the run, or in `dtype`."""
    out = zeros(ops, *shape, dtype=dtype or ops.dtype)
    flat, n = out.reshape(-1), math.prod(shape)
    first = flat[: min(n, PERIOD)]
    ops.to_device(first, ops.rng.standard_normal(min(n, PERIOD), np.float32))
    for start in range(PERIOD, n, PERIOD):
        stop = min(n, start + PERIOD)
        ops.copy(flat[start:stop], first[: stop - start])
    return out


def token_ids(ops, V, *shape):
    """Random token ids below V."""
    tokens = zeros(ops, *shape, dtype="int32")
    ops.to_device(tokens, ops.rng.integers(0, V, shape))
    return tokens


def some(n: int) -> np.ndarray:
    """A few indices below n, including the first and the last."""
    return np.unique(np.linspace(0, n - 1, 7).astype(int))


def host(ops, x, *index) -> np.ndarray:
    """x[index] on the host, in float64."""
    return ops.to_host(x)[index].astype(np.float64)


def blank(*shape: int) -> list[np.ndarray]:
    """Two arrays for `mean` and `rstd`, which are not compared."""
    return [np.empty(shape), np.empty(shape)]


def matmul_forward(ops, R, C, OC, bias):
    inp, weight, out = normal(ops, 1, R, C), normal(ops, OC, C), output(ops, 1, R, OC)
    biases, r, o = normal(ops, OC) if bias else None, some(R), some(OC)

    def expect():
        expected = host(ops, inp, 0, r) @ host(ops, weight, o).T
        return [(host(ops, out, 0, *np.ix_(r, o)), expected + (host(ops, biases, o) if bias else 0))]

    return Case(lambda: ops.matmul_forward(out, inp, weight, biases, ops.scratch), expect, flops=2 * R * C * OC)


def matmul_backward(ops, R, C, OC, bias):
    inp, weight, dout = normal(ops, 1, R, C), normal(ops, OC, C), normal(ops, 1, R, OC)
    dinp, dweight, dbias = output(ops, 1, R, C), zeros(ops, OC, C), zeros(ops, OC) if bias else None
    r, c, o = some(R), some(C), some(OC)

    def run():
        ops.matmul_backward(dinp, dweight, dbias, dout, inp, weight, ops.scratch, False)

    def expect():
        columns = host(ops, dout[0], slice(None), o)
        yield host(ops, dinp, 0, *np.ix_(r, c)), host(ops, dout, 0, r) @ host(ops, weight, slice(None), c)
        yield host(ops, dweight, *np.ix_(o, c)), columns.T @ host(ops, inp[0], slice(None), c)
        if bias:
            yield host(ops, dbias, o), columns.sum(axis=0)

    return Case(run, expect, flops=4 * R * C * OC)


def matmul_gelu_forward(ops, R, C, OC):
    inp, weight, bias = normal(ops, 1, R, C), normal(ops, OC, C), normal(ops, OC)
    out, pre, r, o = output(ops, 1, R, OC), output(ops, 1, R, OC), some(R), some(OC)

    def expect():
        linear = host(ops, inp, 0, r) @ host(ops, weight, o).T + host(ops, bias, o)
        expected = np.empty_like(linear)
        oracle.gelu_forward(expected, linear)
        yield host(ops, pre, 0, *np.ix_(r, o)), linear
        yield host(ops, out, 0, *np.ix_(r, o)), expected

    return Case(lambda: ops.matmul_gelu_forward(out, pre, inp, weight, bias, ops.scratch), expect, flops=2 * R * C * OC)


def gelu_matmul_backward(ops, R, C, OC):
    pre, inp, weight, dout = normal(ops, 1, R, C), output(ops, 1, R, C), normal(ops, OC, C), normal(ops, 1, R, OC)
    dpre, dweight, dbias = output(ops, 1, R, C), zeros(ops, OC, C), zeros(ops, OC)
    r, c, o = some(R), some(C), some(OC)
    ops.gelu_forward(inp, pre)

    def run():
        ops.gelu_matmul_backward(dpre, dweight, dbias, dout, inp, weight, pre, ops.scratch, False)

    def expect():
        expected = host(ops, dout, 0, r) @ host(ops, weight, slice(None), c)
        oracle.gelu_backward(expected, host(ops, pre, 0, *np.ix_(r, c)), expected)
        yield host(ops, dpre, 0, *np.ix_(r, c)), expected
        columns = host(ops, dout[0], slice(None), o)
        yield host(ops, dweight, *np.ix_(o, c)), columns.T @ host(ops, inp[0], slice(None), c)
        yield host(ops, dbias, o), columns.sum(axis=0)

    return Case(run, expect, flops=4 * R * C * OC)


def attention_forward(ops, B, T, C, NH):
    qkv, out, lse = normal(ops, B, T, 3 * C), output(ops, B, T, C), zeros(ops, B, NH, T)

    def expect():
        return [(last_head(ops, out, 1, NH), one_head(ops, qkv, NH)[0])]

    return Case(lambda: ops.attention_forward(out, lse, qkv, NH, NH, ops.scratch), expect, flops=2 * B * T * T * C)


def attention_backward(ops, B, T, C, NH):
    qkv, out, lse, dqkv = normal(ops, B, T, 3 * C), output(ops, B, T, C), zeros(ops, B, NH, T), output(ops, B, T, 3 * C)
    dout = normal(ops, B, T, C)
    ops.attention_forward(out, lse, qkv, NH, NH, ops.scratch)

    def expect():
        y, lse, x = one_head(ops, qkv, NH)
        expected = np.empty_like(x)
        oracle.attention_backward(expected, last_head(ops, dout, 1, NH), y, lse, x, 1, 1, None)
        got = last_head(ops, dqkv, 3, NH)
        return zip(np.split(got, 3, axis=-1), np.split(expected, 3, axis=-1), strict=True)  # dq, dk, dv

    return Case(
        lambda: ops.attention_backward(dqkv, dout, out, lse, qkv, NH, NH, ops.scratch),
        expect,
        flops=4 * B * T * T * C,
    )


def last_head(ops, x, parts: int, NH: int):
    """The last sequence's last head of x (B, T, parts*C), as (1, T, parts*HS) in float64."""
    rows = ops.to_host(x[x.shape[0] - 1])
    return rows.reshape(len(rows), parts, NH, -1)[:, :, -1].reshape(1, len(rows), -1).astype(np.float64)


def one_head(ops, qkv, NH: int):
    """The oracle's out (1, T, HS) and lse (1, 1, T) of the last head, and that head's qkv (1, T, 3*HS)."""
    x = last_head(ops, qkv, 3, NH)
    out, lse = np.empty((1, x.shape[1], x.shape[2] // 3)), np.empty((1, 1, x.shape[1]))
    oracle.attention_forward(out, lse, x, 1, 1, None)
    return out, lse, x


def layernorm_forward(ops, B, T, C):
    inp, weight, bias = normal(ops, B, T, C), normal(ops, C), normal(ops, C)
    out, mean, rstd, t = output(ops, B, T, C), zeros(ops, B, T), zeros(ops, B, T), some(T)

    def expect():
        x = host(ops, inp, slice(-1, None), t)
        expected = np.empty_like(x)
        oracle.layernorm_forward(expected, *blank(*x.shape[:2]), x, host(ops, weight), host(ops, bias))
        return [(host(ops, out, slice(-1, None), t), expected)]

    return Case(
        lambda: ops.layernorm_forward(out, mean, rstd, inp, weight, bias),
        expect, nbytes=2 * ops.itemsize * B * T * C, pattern="copy",
    )  # fmt: skip


def layernorm_backward(ops, B, T, C):
    inp, weight, bias, dout = normal(ops, B, T, C), normal(ops, C), normal(ops, C), normal(ops, B, T, C)
    dinp, dweight, dbias = output(ops, B, T, C), zeros(ops, C), zeros(ops, C)
    mean, rstd = zeros(ops, B, T), zeros(ops, B, T)
    ops.layernorm_forward(output(ops, B, T, C), mean, rstd, inp, weight, bias)

    def expected(rows, c):
        """The oracle's dinp, dweight and dbias from these rows and channels; dinp needs all channels."""
        x = host(ops, inp, *rows, c)
        found = np.zeros_like(x), np.empty(x.shape[-1]), np.empty(x.shape[-1])
        statistics = host(ops, mean, *rows), host(ops, rstd, *rows)
        oracle.layernorm_backward(*found, host(ops, dout, *rows, c), x, host(ops, weight, c), *statistics, None, False)
        return found

    def expect():
        t, c, everything = (slice(-1, None), some(T)), some(C), slice(None)
        yield host(ops, dinp, *t), expected(t, everything)[0]
        _, weights, biases = expected((everything, everything), c)
        yield host(ops, dweight, c), weights
        yield host(ops, dbias, c), biases

    return Case(
        lambda: ops.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, ops.scratch, False),
        expect, nbytes=4 * ops.itemsize * B * T * C, pattern="update",
    )  # fmt: skip


def gelu_forward(ops, B, T, C):
    inp, out, t = normal(ops, B, T, C), output(ops, B, T, C), some(T)

    def expect():
        x = host(ops, inp, -1, t)
        expected = np.empty_like(x)
        oracle.gelu_forward(expected, x)
        return [(host(ops, out, -1, t), expected)]

    return Case(lambda: ops.gelu_forward(out, inp), expect, nbytes=2 * ops.itemsize * B * T * C, pattern="copy")


def gelu_backward(ops, B, T, C):
    inp, dout, dinp, t = normal(ops, B, T, C), normal(ops, B, T, C), output(ops, B, T, C), some(T)

    def expect():
        x = host(ops, inp, -1, t)
        expected = np.empty_like(x)
        oracle.gelu_backward(expected, x, host(ops, dout, -1, t))
        return [(host(ops, dinp, -1, t), expected)]

    return Case(lambda: ops.gelu_backward(dinp, inp, dout), expect, nbytes=3 * ops.itemsize * B * T * C, pattern="add")


def residual_layernorm_forward(ops, B, T, C):
    residual, out, mean, rstd = output(ops, B, T, C), output(ops, B, T, C), zeros(ops, B, T), zeros(ops, B, T)
    a, b, weight, bias = normal(ops, B, T, C), normal(ops, B, T, C), normal(ops, C), normal(ops, C)

    def expect():
        x, y = (host(ops, term, slice(-1, None), some(T)) for term in (a, b))
        total, norm = np.empty_like(x), np.empty_like(x)
        parameters = host(ops, weight), host(ops, bias)
        oracle.residual_layernorm_forward(total, norm, *blank(*x.shape[:2]), x, y, *parameters)
        yield host(ops, residual, slice(-1, None), some(T)), total
        yield host(ops, out, slice(-1, None), some(T)), norm

    return Case(
        lambda: ops.residual_layernorm_forward(residual, out, mean, rstd, a, b, weight, bias),
        expect, nbytes=4 * ops.itemsize * B * T * C, pattern="add",
    )  # fmt: skip


def encoder_forward(ops, B, T, C, Vp):
    out, wte, wpe, tokens = output(ops, B, T, C), normal(ops, Vp, C), normal(ops, T, C), token_ids(ops, Vp, B, T)
    t = some(T)

    def expect():
        return [(host(ops, out, -1, t), host(ops, wte, ops.to_host(tokens)[-1, t]) + host(ops, wpe, t))]

    return Case(
        lambda: ops.encoder_forward(out, tokens, wte, wpe),
        expect, nbytes=ops.itemsize * (2 * B * T * C + T * C), pattern="copy",
    )  # fmt: skip


def encoder_backward(ops, B, T, C, Vp):
    dwte, dwpe, dout, tokens = zeros(ops, Vp, C), zeros(ops, T, C), normal(ops, B, T, C), token_ids(ops, Vp, B, T)
    drawn = ops.to_host(tokens)

    def expect():
        for token in drawn[-1, some(T)]:
            yield host(ops, dwte, token), host(ops, dout, drawn == token).sum(axis=0)
        yield host(ops, dwpe, some(T)), host(ops, dout, slice(None), some(T)).sum(axis=0)

    touched = len(np.unique(drawn)) + T  # rows that are read and written
    return Case(
        lambda: ops.encoder_backward(dwte, dwpe, dout, tokens, ops.scratch),
        expect, nbytes=ops.itemsize * B * T * C + 8 * touched * C, pattern="update",
    )  # fmt: skip


def fused_classifier(ops, B, T, V, Vp):
    logits, losses, targets, t = normal(ops, B, T, Vp), zeros(ops, B, T), token_ids(ops, V, B, T), some(T)
    before, dloss = ops.to_host(logits[B - 1])[t].astype(np.float64), 1 / (B * T)

    def expect():
        gradient, loss = before.copy(), np.empty(len(t))
        oracle.fused_classifier(gradient, loss, ops.to_host(targets)[-1, t], dloss, V, True)
        yield host(ops, losses, -1, t), loss
        yield ops.to_host(logits[B - 1])[t, :V].astype(np.float64), gradient[:, :V]

    return Case(
        lambda: ops.fused_classifier(logits, losses, targets, dloss, V, True),
        expect, nbytes=2 * ops.itemsize * B * T * Vp, pattern="update",
    )  # fmt: skip


def global_norm_squared(ops, n):
    grads, out = normal(ops, n, dtype="float32"), zeros(ops, 1, dtype="float64")

    def expect():
        expected = np.empty(1)
        oracle.global_norm_squared(expected, ops.to_host(grads), None)
        return [(ops.to_host(out), expected)]

    return Case(lambda: ops.global_norm_squared(out, grads, ops.scratch), expect, nbytes=4 * n, pattern="read")


def adamw_update(ops, n):
    params, grads, m, v = normal(ops, n), normal(ops, n, dtype="float32"), zeros(ops, n), zeros(ops, n)
    master = zeros(ops, n) if ops.dtype != "float32" else None
    rate, step, seed, scale = zeros(ops, 1), zeros(ops, 1, dtype="int32"), zeros(ops, 1, dtype="int32"), zeros(ops, 1)
    decays, i = zeros(ops, n // RUN, dtype="uint8"), np.r_[:RUN, n - RUN : n]  # the first and the last run
    for tensor, value in ((rate, RATE), (step, 1), (scale, 0.5), (decays, 1)):
        ops.to_device(tensor, value)
    start = ops.to_host(params)
    before = start[i].astype(np.float64)
    if master is not None:
        ops.to_device(master, start)

    def expect():
        after, means, squares = before.copy(), np.zeros(i.size), np.zeros(i.size)
        scalars = np.array([RATE]), BETA1, BETA2, EPS, DECAY, np.array([1]), None, np.array([0.5])
        oracle.adamw_update(after, None, host(ops, grads, i), means, squares, np.ones(2, np.uint8), *scalars)
        yield host(ops, m, i), means
        yield host(ops, v, i), squares
        yield host(ops, params, i), after
        if master is not None:
            yield host(ops, master, i), after

    def run():
        ops.adamw_update(params, master, grads, m, v, decays, rate, BETA1, BETA2, EPS, DECAY, step, seed, scale)

    return Case(run, expect, nbytes=(28 if master is None else 30) * n, pattern="update")


BUILDERS = {
    f.__name__: f
    for f in (
        matmul_forward, matmul_gelu_forward, matmul_backward, gelu_matmul_backward,
        attention_forward, attention_backward,
        layernorm_forward, layernorm_backward, gelu_forward, gelu_backward, residual_layernorm_forward,
        encoder_forward, encoder_backward, fused_classifier, global_norm_squared, adamw_update,
    )
}  # fmt: skip
