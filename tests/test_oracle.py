"""The oracle: each gradient against finite differences of its forward, and the whole model against PyTorch."""

import importlib
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
from comparing import assert_close
from test_model import assert_near, by_layer, error, golden, logits_of, parameter_gradients  # noqa: F401
from training import (
    compute_gradients,
    copy_of,
    groups_of,
    loss_of,
    random_batch,
    random_parameters,
    set_parameters,
    train_step,
)

from llm_numba import oracle
from llm_numba.arena import Arena
from llm_numba.models.gpt2 import GPT2
from llm_numba.ops import CONTRACT, Ops

B, T, C, NH = 2, 5, 6, 3
ORACLE = Ops(**vars(oracle))
SIXTEEN_DIGITS = 1e-13  # a few hundred roundings of 1e-16


def exact_run(model, B, T):
    groups = oracle.in_float64(groups_of(ORACLE, model, B, T))
    arena = Arena(groups, model, "keep", ORACLE)
    m = arena.training()
    m.limits[...] = np.inf
    return SimpleNamespace(ops=ORACLE, model=model, arena=arena, m=m, updates=0)


@pytest.mark.parametrize("file", CONTRACT)
def test_contract(file):
    """Every op, with the parameters of the CPU's op."""
    cpu = importlib.import_module(f"llm_numba.cpu.{file}")
    for name in CONTRACT[file]:
        ops = [getattr(module, name) for module in (cpu, oracle)]
        signatures = [list(inspect.signature(getattr(op, "py_func", op)).parameters) for op in ops]
        assert signatures[0] == signatures[1], name


def test_every_tensor_is_float64():
    model = GPT2(T, 7, 2, NH, C)
    arena = exact_run(model, B, T).arena
    assert {x.dtype.name for x in arena.tensors.values()} == {"float64", "int32", "uint8"}


# ---------------------------------------------------------------------------------------------------------------------
# each op; arrays that are written start as NaN, those that accumulate as 1


@pytest.fixture
def normal(rng):
    return lambda *shape: rng.standard_normal(shape)


def written(*shape):
    return np.full(shape, np.nan)


def finite_difference(f, x, dout, step=1e-5):
    """The gradient of sum(f(x) * dout) with respect to x, by central differences.

    Truncation loses about step**2 = 1e-10 of the third derivative, rounding 1e-16 / step = 1e-11 of the sum.
    """
    x = np.array(x, np.float64)
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        middle = x[i]
        x[i] = middle + step
        above = np.sum(f(x) * dout)
        x[i] = middle - step
        below = np.sum(f(x) * dout)
        x[i] = middle
        gradient[i] = (above - below) / (2 * step)
    return gradient


def assert_gradient(gradient, f, x, dout=1.0, tolerance=1e-8):
    assert_close("gradient", gradient, finite_difference(f, x, dout), tolerance)


def first_of(op, shape, *arguments):
    """The first array that an op writes."""
    out = written(*shape)
    getattr(oracle, op)(out, *arguments)
    return out


def test_encoder(normal, rng):
    wte, wpe, dout = normal(7, C), normal(T + 2, C), normal(B, T, C)
    tokens = rng.integers(0, 3, (B, T), dtype=np.int32)
    dwte, dwpe = np.ones((7, C)), np.ones((T + 2, C))
    oracle.encoder_backward(dwte, dwpe, dout, tokens, None)
    assert_gradient(dwte - 1, lambda x: first_of("encoder_forward", dout.shape, tokens, x, wpe), wte, dout)
    assert_gradient(dwpe - 1, lambda x: first_of("encoder_forward", dout.shape, tokens, wte, x), wpe, dout)


@pytest.mark.parametrize("accumulate", [True, False])
def test_layernorm(normal, accumulate):
    inp, weight, bias, dout = normal(B, T, C), normal(C), normal(C), normal(B, T, C)

    def forward(inp, weight, bias):
        return first_of("layernorm_forward", inp.shape, mean, rstd, inp, weight, bias)

    mean, rstd = written(B, T), written(B, T)
    out = forward(inp, weight, np.zeros(C)) / weight
    assert_close("mean", out.mean(axis=-1), np.zeros((B, T)), SIXTEEN_DIGITS)
    assert_close("variance", out.var(axis=-1), 1 - 1e-5 * rstd**2, SIXTEEN_DIGITS)
    dinp, dweight, dbias = np.ones((B, T, C)), np.ones(C), np.ones(C)
    oracle.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean.copy(), rstd.copy(), None, accumulate)
    # the third derivative of a row's normalisation reaches some hundreds
    assert_gradient(dinp - 1, lambda x: forward(x, weight, bias), inp, dout, 1e-7)
    assert_gradient(dweight - accumulate, lambda x: forward(inp, x, bias), weight, dout)
    assert_gradient(dbias - accumulate, lambda x: forward(inp, weight, x), bias, dout)


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_matmul(normal, with_bias, accumulate):
    inp, weight, bias, dout = normal(B, T, C), normal(4, C), normal(4) if with_bias else None, normal(B, T, 4)

    def forward(inp, weight, bias):
        return first_of("matmul_forward", dout.shape, inp, weight, bias, None)

    dinp, dweight, dbias = written(B, T, C), np.ones((4, C)), np.ones(4) if with_bias else None
    oracle.matmul_backward(dinp, dweight, dbias, dout, inp, weight, None, accumulate)
    assert_gradient(dinp, lambda x: forward(x, weight, bias), inp, dout)
    assert_gradient(dweight - accumulate, lambda x: forward(inp, x, bias), weight, dout)
    if with_bias:
        assert_gradient(dbias - accumulate, lambda x: forward(inp, weight, x), bias, dout)


@pytest.mark.parametrize("accumulate", [True, False])
def test_gelu_between_matmuls(normal, accumulate):
    """The MLP of a Transformer, differentiated from its output back to the input of GELU."""
    inp, dout = normal(B, T, 4), normal(B, T, 4)
    weight1, bias1, weight2, bias2 = normal(C, 4), normal(C), normal(4, C), normal(4)
    active, pre = written(B, T, C), written(B, T, C)
    oracle.matmul_gelu_forward(active, pre, inp, weight1, bias1, None)
    dpre, dweight, dbias = written(B, T, C), np.ones((4, C)), np.ones(4)
    oracle.gelu_matmul_backward(dpre, dweight, dbias, dout, active, weight2, pre, None, accumulate)

    def mlp(shift, weight, bias):
        active = first_of("matmul_gelu_forward", pre.shape, written(*pre.shape), inp, weight1, bias1 + shift, None)
        return first_of("matmul_forward", dout.shape, active, weight, bias, None)

    assert_gradient(dpre, lambda x: mlp(x, weight2, bias2), np.zeros((B, T, C)), dout)
    assert_gradient(dweight - accumulate, lambda x: mlp(0, x, bias2), weight2, dout)
    assert_gradient(dbias - accumulate, lambda x: mlp(0, weight2, x), bias2, dout)


def attention(qkv, NH, NKV):
    """out and lse."""
    HS = qkv.shape[-1] // (NH + 2 * NKV)
    out, lse = written(*qkv.shape[:2], NH * HS), written(len(qkv), NH, qkv.shape[1])
    oracle.attention_forward(out, lse, qkv, NH, NKV, None)
    return out, lse


@pytest.mark.parametrize("NKV", [1, 2, 3, 6])
def test_attention(normal, NKV):
    NH, HS = 6, 2
    qkv, dout, dqkv = normal(2, 3, (NH + 2 * NKV) * HS), normal(2, 3, NH * HS), written(2, 3, (NH + 2 * NKV) * HS)
    out, lse = attention(qkv, NH, NKV)
    oracle.attention_backward(dqkv, dout, out, lse, qkv, NH, NKV, None)
    assert_gradient(dqkv, lambda x: attention(x, NH, NKV)[0], qkv, dout)
    # as many kv heads as query heads, each a copy of its group's
    q, k, v = np.split(qkv, [NH * HS, (NH + NKV) * HS], axis=-1)
    copies = [x.reshape(2, 3, NKV, HS).repeat(NH // NKV, axis=2).reshape(2, 3, NH * HS) for x in (k, v)]
    for got, expected in zip((out, lse), attention(np.concatenate([q, *copies], axis=-1), NH, NH), strict=True):
        assert_close("copied kv heads", got, expected, SIXTEEN_DIGITS)
    # the weights, with which the values give out
    weights = written(2, NH, 3, 3)
    oracle.attention_weights(weights, lse, qkv, NH, NKV)
    assert (np.triu(weights, 1) == 0).all()
    values = copies[1].reshape(2, 3, NH, HS)
    assert_close("weights", np.einsum("bhts,bshi->bthi", weights, values).reshape(2, 3, -1), out, SIXTEEN_DIGITS)


@pytest.mark.parametrize("NKV", [1, 3])
def test_attention_with_a_cache(normal, NKV):
    """In steps of 2, 1 and 2 tokens the result is that of one step."""
    HS = C // NH
    qkv, out, cache = normal(B, T, (NH + 2 * NKV) * HS), written(B, T, C), written(B, T + 3, 2, NKV * HS)
    for start, stop in (0, 2), (2, 3), (3, 5):
        oracle.attention_cached_forward(out[:, start:stop], cache, qkv[:, start:stop], [start], NH, NKV)
    assert_close("out", out, attention(qkv, NH, NKV)[0], SIXTEEN_DIGITS)
    assert (cache[:, :T].reshape(B, T, 2 * NKV * HS) == qkv[..., C:]).all()
    assert np.isnan(cache[:, T:]).all()


def test_softmax_does_not_overflow():
    probabilities, log_sum_exp = oracle.softmax(np.array([1000.0, 1000.0, -np.inf]))
    assert (probabilities == [0.5, 0.5, 0]).all()
    assert log_sum_exp == pytest.approx(1000 + np.log(2), rel=SIXTEEN_DIGITS)


def test_gelu(normal):
    inp, dout, dinp = 3 * normal(B, T, C), normal(B, T, C), written(B, T, C)
    oracle.gelu_backward(dinp, inp, dout)
    assert_gradient(dinp, lambda x: first_of("gelu_forward", x.shape, x), inp, dout)


def test_residual(normal):
    inp1, inp2, dinp, weight, bias = normal(B, T, C), normal(B, T, C), written(B, T, C), normal(C), normal(C)
    residual, *got = (written(*shape) for shape in ((B, T, C), (B, T, C), (B, T), (B, T)))
    oracle.residual_layernorm_forward(residual, *got, inp1, inp2, weight, bias)
    assert (residual == inp1 + inp2).all()
    expected = [written(*x.shape) for x in got]
    oracle.layernorm_forward(*expected, residual, weight, bias)
    assert all((x == y).all() for x, y in zip(got, expected, strict=True))
    oracle.residual_backward(dinp, inp1)
    assert (dinp == inp1).all()


@pytest.mark.parametrize("write", [True, False])
def test_classifier(normal, rng, write):
    before, targets, losses = normal(B, T, 9), rng.integers(0, 7, (B, T), dtype=np.int32), written(B, T)
    logits = before.copy()
    oracle.fused_classifier(logits, losses, targets, 0.3, 7, write)
    probabilities = np.exp(before[..., :7]) / np.exp(before[..., :7]).sum(axis=-1, keepdims=True)
    picked = np.take_along_axis(probabilities, targets[..., None], axis=-1)[..., 0]
    assert_close("losses", losses, -np.log(picked), SIXTEEN_DIGITS)
    if write:

        def losses_of(x):
            out = written(B, T)
            oracle.fused_classifier(x, out, targets, 0.3, 7, False)
            return out

        assert_gradient(logits, losses_of, before, 0.3)
    else:
        assert (logits == before).all()
    loss = np.array([2.0])
    oracle.add_mean(loss, losses, 0.25)
    assert loss[0] == pytest.approx(2 + 0.25 * losses.mean(), rel=SIXTEEN_DIGITS)


@pytest.mark.parametrize(
    "loss, norm, limits, highest, scale",
    [
        (1, 2, (np.inf, np.inf), 1, 0.5),
        (1, 2, (1, 2), 0, 1),
        (1, 2, (1, 2), 3, 1),
        (1, 2, (0.9, np.inf), 1, -1),
        (1, 2, (np.inf, 1.9), 1, -1),
        (np.nan, 2, (np.inf, np.inf), 1, -1),
        (1, np.inf, (np.inf, np.inf), 1, -1),
        (1, 2, (np.nan, np.inf), 1, -1),
    ],
)
def test_clip(loss, norm, limits, highest, scale):
    grad_scale = np.array([7.0])
    oracle.clip(grad_scale, np.array([loss]), np.array([norm**2.0]), np.array(limits), highest)
    assert grad_scale[0] == scale


def test_adamw_and_norm(normal):
    """Against PyTorch's AdamW below; here what a training run does not reach."""
    n, decays = 2 * 64, np.array([1, 0], np.uint8)
    params, grads, m, v = normal(n), normal(n), normal(n), normal(n) ** 2
    before = params.copy()
    rates = decays, np.array([1e-2]), 0.9, 0.95, 1e-8, 0.1, np.array([3]), None
    oracle.adamw_update(params, None, grads, m, v, *rates, np.array([-1.0]))
    assert (params == before).all()
    # without a gradient and a mean, only the decay of the first run is left
    oracle.adamw_update(params, None, np.zeros(n), np.zeros(n), v, *rates, np.array([1.0]))
    assert_close("params", params, before * np.repeat([1 - 1e-2 * 0.1, 1], 64), SIXTEEN_DIGITS)
    norm = np.empty(1)
    oracle.global_norm_squared(norm, grads, None)
    assert norm[0] == pytest.approx(np.linalg.norm(grads) ** 2, rel=SIXTEEN_DIGITS)


# ---------------------------------------------------------------------------------------------------------------------
# the whole model


def test_every_gradient_is_a_difference_of_losses():
    rng, V, step = np.random.default_rng(3), 5, 1e-5
    model = GPT2(3, V, 2, 2, 4)
    run, batch = exact_run(model, 2, 3), random_batch(model, 2, 3, rng)
    set_parameters(run.arena, random_parameters(model, rng))
    loss = compute_gradients(run, [batch])
    assert loss == loss_of(run, batch)
    for name, gradient in parameter_gradients(run).items():
        x = run.arena.tensors["parameters", name][: V if name == "wte" else None]
        for i in np.ndindex(x.shape):
            middle = x[i]
            x[i] = middle + step
            above = loss_of(run, batch)
            x[i] = middle - step
            below = loss_of(run, batch)
            x[i] = middle
            assert gradient[i] == pytest.approx((above - below) / (2 * step), abs=1e-8), (name, i)


def test_against_pytorch(golden):  # noqa: F811
    """PyTorch in float64. Its tensors were rounded to float32, by at most 6e-8; its losses and norms were not."""
    run = exact_run(golden.model, *golden.batch[0].shape)
    set_parameters(run.arena, golden.parameters)
    assert error(logits_of(run, golden.batch), golden.logits) < 6e-8
    assert compute_gradients(run, [golden.batch]) == pytest.approx(golden.loss[0], rel=1e-14)
    expected = by_layer(golden.model, golden.gradients)
    assert_near(by_layer(golden.model, parameter_gradients(run)), expected, 6e-8)

    losses, norms = zip(*[train_step(run, golden.batch) for _ in golden.losses], strict=True)
    assert losses == pytest.approx(golden.losses, rel=1e-12)
    assert norms == pytest.approx(golden.norms, rel=1e-12)
    after, V = copy_of(run, "parameters"), golden.model.vocab_size
    after["wte"] = after["wte"][:V]
    # the gradient of the keys' bias is 0; AdamW divides its rounding error by itself, which moves the bias at random
    keys = slice(golden.model.channels, 2 * golden.model.channels)
    after["qkvb"][:, keys] = golden.after["qkvb"][:, keys]
    assert_near(by_layer(golden.model, after), by_layer(golden.model, golden.after), 6e-8)
