"""The ops in NumPy: against the formulas of reference.py, against differences of the loss, and against PyTorch."""

import importlib
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import reference
from test_model import assert_near, by_layer, error, golden, logits_of, parameter_gradients  # noqa: F401
from training import compute_gradients, copy_of, loss_of, random_batch, random_parameters, set_parameters, train_step

from llm_numba import oracle
from llm_numba.arena import Arena, training_groups
from llm_numba.models.config import GPT2Config
from llm_numba.ops import CONTRACT

B, T, C, NH = 2, 5, 6, 3
SIXTEEN_DIGITS = 1e-13  # a few hundred roundings of 1e-16


def exact_run(config, B, T):
    groups = oracle.in_float64(training_groups(config, B, T, oracle, "reuse"))
    arena = Arena(groups, config, "keep", oracle)
    m = arena.training()
    m.limits[...] = np.inf
    return SimpleNamespace(ops=oracle, arena=arena, m=m, updates=0)


def assert_equal(name, got, expected):
    reference.assert_close(name, got, expected, SIXTEEN_DIGITS * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("file", CONTRACT)
def test_the_contract(file):
    """Every op, with the arguments of the CPU's."""
    cpu = importlib.import_module(f"llm_numba.cpu.{file}")
    for name in CONTRACT[file]:
        ops = [getattr(module, name) for module in (cpu, oracle)]
        signatures = [list(inspect.signature(getattr(op, "py_func", op)).parameters) for op in ops]
        assert signatures[0] == signatures[1], name


def test_every_number_is_a_float64():
    config = GPT2Config(T, 7, 2, NH, C)
    arena = exact_run(config, B, T).arena
    assert {x.dtype.name for x in arena.tensors.values()} == {"float64", "int32", "uint8"}


# ---------------------------------------------------------------------------------------------------------------------
# each op against its formula; what is written starts as NaN, what accumulates as 1


@pytest.fixture
def normal(rng):
    return lambda *shape: rng.standard_normal(shape)


def written(*shape):
    return np.full(shape, np.nan)


def test_encoder(normal, rng):
    wte, wpe, dout = normal(7, C), normal(T + 2, C), normal(B, T, C)
    tokens = rng.integers(0, 3, (B, T), dtype=np.int32)
    out, dwte, dwpe = written(B, T, C), np.ones((7, C)), np.ones((T + 2, C))
    oracle.encoder_forward(out, tokens, wte, wpe)
    oracle.encoder_backward(dwte, dwpe, dout, tokens)
    assert_equal("out", out, reference.encoder_forward(tokens, wte, wpe))
    for got, expected in zip((dwte, dwpe), reference.encoder_backward(dout, tokens, wte, wpe), strict=True):
        assert_equal("backward", got, 1 + expected)


def test_layernorm(normal):
    inp, weight, bias, dout = normal(B, T, C), normal(C), normal(C), normal(B, T, C)
    out, mean, rstd = written(B, T, C), written(B, T), written(B, T)
    oracle.layernorm_forward(out, mean, rstd, inp, weight, bias)
    for got, expected in zip((out, mean, rstd), reference.layernorm_forward(inp, weight, bias), strict=True):
        assert_equal("forward", got, expected)
    gradients = np.ones((B, T, C)), np.ones(C), np.ones(C)
    oracle.layernorm_backward(*gradients, dout, inp, weight, mean, rstd, None, True)
    expected = reference.layernorm_backward(dout, inp, weight, bias)
    for got, gradient in zip(gradients, expected, strict=True):
        assert_equal("backward", got, 1 + gradient)
    oracle.layernorm_backward(*gradients, dout, inp, weight, mean, rstd, None, False)
    for got, gradient in zip(gradients, (1 + 2 * expected[0], *expected[1:]), strict=True):
        assert_equal("not accumulating", got, gradient)


@pytest.mark.parametrize("with_bias", [True, False])
def test_matmul(normal, with_bias):
    inp, weight, bias, dout = normal(B, T, C), normal(4, C), normal(4) if with_bias else None, normal(B, T, 4)
    out, dinp, dweight, dbias = written(B, T, 4), written(B, T, C), np.ones((4, C)), np.ones(4) if with_bias else None
    oracle.matmul_forward(out, inp, weight, bias, None)
    oracle.matmul_backward(dinp, dweight, dbias, dout, inp, weight, None, True)
    assert_equal("out", out, reference.matmul_forward(inp, weight, bias))
    expected = reference.matmul_backward(dout, inp, weight)
    assert_equal("dinp", dinp, expected[0])
    assert_equal("dweight", dweight, 1 + expected[1])
    if with_bias:
        assert_equal("dbias", dbias, 1 + expected[2])
    oracle.matmul_backward(dinp, dweight, dbias, dout, inp, weight, None, False)
    assert_equal("dweight, not accumulating", dweight, expected[1])
    if with_bias:
        assert_equal("dbias, not accumulating", dbias, expected[2])


@pytest.mark.parametrize("scale", [1, 1000])  # scores whose exponentials would overflow
def test_attention(normal, scale):
    qkv, dout = normal(B, T, 3 * C), normal(B, T, C)
    qkv[..., : 2 * C] *= np.sqrt(scale)
    out, att, dqkv = written(B, T, C), written(B, NH, T), written(B, T, 3 * C)
    oracle.attention_forward(out, att, qkv, NH, None)
    oracle.attention_backward(dqkv, dout, out, att, qkv, NH, None)
    expected, weights = reference.attention_forward(qkv, NH)
    q, k, _ = (reference.split_heads(x, NH) for x in np.split(qkv, 3, axis=-1))
    first_scores = (q * k[:, :, :1]).sum(-1) / np.sqrt(C // NH)
    tolerance = SIXTEEN_DIGITS * scale * np.sqrt(scale)
    reference.assert_close("out", out, expected, tolerance)
    reference.assert_close("dqkv", dqkv, reference.attention_backward(dout, qkv, NH), tolerance)
    with np.errstate(divide="ignore"):  # a weight is e**(score - log-sum-exp)
        first = np.where(weights[..., 0] > 0, first_scores - np.log(weights[..., 0]), att)
    reference.assert_close("att", att, first, tolerance)


def test_attention_with_a_cache(normal):
    """In pieces of 2, 1 and 2 tokens it is what it is in one."""
    qkv, out, cache = normal(B, T, 3 * C), written(B, T, C), written(B, T + 3, 2, C)
    for start, stop in (0, 2), (2, 3), (3, 5):
        oracle.attention_cached_forward(out[:, start:stop], cache, qkv[:, start:stop], [start], NH)
    assert_equal("out", out, reference.attention_forward(qkv, NH)[0])
    assert_equal("cache", cache[:, :T].reshape(B, T, 2 * C), qkv[..., C:])
    assert np.isnan(cache[:, T:]).all()


def test_gelu_and_residual(normal):
    inp, dout, out, dinp = 3 * normal(B, T, C), normal(B, T, C), written(B, T, C), written(B, T, C)
    oracle.gelu_forward(out, inp)
    oracle.gelu_backward(dinp, inp, dout)
    assert_equal("out", out, reference.gelu_forward(inp))
    assert_equal("dinp", dinp, reference.gelu_backward(dout, inp))
    weight, bias, normed, mean, rstd = normal(C), normal(C), written(B, T, C), written(B, T), written(B, T)
    oracle.residual_layernorm_forward(out, normed, mean, rstd, inp, dout, weight, bias)
    oracle.residual_backward(dinp, dout)
    assert_equal("residual", out, inp + dout)
    for got, expected in zip((normed, mean, rstd), reference.layernorm_forward(out, weight, bias), strict=True):
        assert_equal("normalised", got, expected)
    assert_equal("dinp", dinp, dout)


@pytest.mark.parametrize("write", [True, False])
def test_classifier(normal, rng, write):
    before, targets, losses = normal(B, T, 9), rng.integers(0, 7, (B, T), dtype=np.int32), written(B, T)
    logits = before.copy()
    oracle.fused_classifier(logits, losses, targets, 0.3, 7, write)
    assert_equal("losses", losses, reference.classifier_forward(before, targets, 7))
    assert_equal("logits", logits, reference.classifier_backward(0.3, before, targets, 7) if write else before)
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


def test_adamw(normal, rng):
    n, decays = 5 * 64, np.array([1, 0, 0, 1, 1], np.uint8)
    params, grads, m, v = normal(n), normal(n), normal(n), normal(n) ** 2
    rates, scale = (np.array([1e-2]), 0.9, 0.95, 1e-8, 0.1, np.array([3])), np.array([0.5])
    expected = reference.adamw_update(params, grads, m, v, decays, *rates, scale)
    oracle.adamw_update(params, None, grads, m, v, decays, *rates, None, scale)
    for got, value in zip((params, m, v), expected, strict=True):
        assert_equal("adamw_update", got, value)
    before = params.copy()
    oracle.adamw_update(params, None, grads, m, v, decays, *rates, None, np.array([-1.0]))
    assert (params == before).all()
    norm = np.empty(1)
    oracle.global_norm_squared(norm, grads, None)
    assert norm[0] == pytest.approx(np.linalg.norm(grads) ** 2, rel=SIXTEEN_DIGITS)


# ---------------------------------------------------------------------------------------------------------------------
# the whole model


def test_every_gradient_is_a_difference_of_losses():
    """Central differences lose step**2 = 1e-10 of the third derivative, and 1e-16 / step = 1e-11 of the loss."""
    rng, V, step = np.random.default_rng(3), 5, 1e-5
    config = GPT2Config(3, V, 2, 2, 4)
    run, batch = exact_run(config, 2, 3), random_batch(config, 2, 3, rng)
    set_parameters(run.arena, random_parameters(config, rng))
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
    """PyTorch in float64, whose tensors were rounded once to float32, by at most 6e-8; losses and norms were not."""
    run = exact_run(golden.config, *golden.batch[0].shape)
    set_parameters(run.arena, golden.parameters)
    assert error(logits_of(run, golden.batch), golden.logits) < 6e-8
    assert compute_gradients(run, [golden.batch]) == pytest.approx(golden.loss[0], rel=1e-14)
    expected = by_layer(golden.config, golden.gradients)
    assert_near(by_layer(golden.config, parameter_gradients(run)), expected, 6e-8)

    losses, norms = zip(*[train_step(run, golden.batch) for _ in golden.losses], strict=True)
    assert losses == pytest.approx(golden.losses, rel=1e-12)
    assert norms == pytest.approx(golden.norms, rel=1e-12)
    after, V = copy_of(run, "parameters"), golden.config.vocab_size
    after["wte"] = after["wte"][:V]
    # the keys' bias has a gradient of 0: its rounding, divided by itself, moves it at random
    keys = slice(golden.config.channels, 2 * golden.config.channels)
    after["qkvb"][:, keys] = golden.after["qkvb"][:, keys]
    assert_near(by_layer(golden.config, after), by_layer(golden.config, golden.after), 6e-8)
