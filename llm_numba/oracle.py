"""The ops in plain NumPy, each as short as its formula: in float64 they say what the other backends have to compute.

This module stands where `get_ops` would give the functions of a device: Arena(in_float64(groups), config, plan, exact).
An op calculates in the precision of its arrays, so that in an arena of float32 it shows what rounding alone may change.
Arguments and results are those of the CPU's ops, whose docstrings give the shapes; a formula's source stands there too.
"""

import math

import numpy as np

from llm_numba.arena import RUN, Groups, TensorSpec
from llm_numba.cpu.memory import allocate, available_memory, copy, to_device, to_host, view, zero  # noqa: F401
from llm_numba.models.config import GPT2Config


def in_float64(groups: Groups) -> Groups:
    """The groups with float64 for every float32."""
    return {
        group: [spec._replace(dtype="float64") if spec.dtype == "float32" else spec for spec in specs]
        for group, specs in groups.items()
    }


def attention_specs(config: GPT2Config, B: int, T: int, plan: str) -> list[TensorSpec]:
    """What attention_forward leaves for attention_backward: one number a query, under any plan."""
    return [TensorSpec("att", (B, config.num_heads, T), "float32", per_layer=True)]


def scratch_size(config: GPT2Config, B: int, T: int) -> int:
    """None: NumPy takes what it needs from elsewhere."""
    return 0


def encoder_forward(out, tokens, wte, wpe):
    out[...] = wte[tokens] + wpe[: tokens.shape[1]]


def encoder_backward(dwte, dwpe, dout, tokens):
    np.add.at(dwte, tokens, dout)  # a token may stand in many rows
    dwpe[: tokens.shape[1]] += dout.sum(axis=0)


def layernorm_forward(out, mean, rstd, inp, weight, bias):
    mean[...] = inp.mean(axis=-1)
    rstd[...] = 1 / np.sqrt(inp.var(axis=-1) + 1e-5)
    out[...] = normalise(inp, mean, rstd) * weight + bias


def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, scratch, accumulate):
    """Through the mean and the variance, which depend on inp too."""
    norm, dnorm = normalise(inp, mean, rstd), dout * weight
    through_mean, through_variance = average(dnorm), norm * average(dnorm * norm)
    dinp += (dnorm - through_mean - through_variance) * rstd[..., None]
    put(dweight, (dout * norm).sum(axis=(0, 1)), accumulate)
    put(dbias, dout.sum(axis=(0, 1)), accumulate)


def put(total, share, accumulate):
    total[...] = total + share if accumulate else share


def normalise(inp, mean, rstd):
    return (inp - mean[..., None]) * rstd[..., None]


def average(x):
    """Of each row: (B, T, C) -> (B, T, 1)."""
    return x.mean(axis=-1, keepdims=True)


def matmul_forward(out, inp, weight, bias, scratch):
    out[...] = inp @ weight.T
    if bias is not None:
        out += bias


def matmul_backward(dinp, dweight, dbias, dout, inp, weight, scratch, accumulate):
    dinp[...] = dout @ weight
    put(dweight, np.tensordot(dout, inp, axes=((0, 1), (0, 1))), accumulate)
    if dbias is not None:
        put(dbias, dout.sum(axis=(0, 1)), accumulate)


def attention_forward(out, att, qkv, num_heads, scratch):
    """out = softmax(q kT / sqrt(HS)) v, att = the log-sum-exp of each query's scores."""
    q, k, v = heads(qkv, 3, num_heads)
    weights, log_sum_exp = softmax(scores(q, k))
    heads(out, 1, num_heads)[0] = weights @ v
    att[...] = log_sum_exp


def attention_backward(dqkv, dout, out, att, qkv, num_heads, scratch):
    """Through out = p v, p = softmax(scores), scores = q kT / sqrt(HS), from the last to the first."""
    (q, k, v), (dq, dk, dv) = heads(qkv, 3, num_heads), heads(dqkv, 3, num_heads)
    (y,), (dy,) = heads(out, 1, num_heads), heads(dout, 1, num_heads)
    p = np.exp(scores(q, k) - att[..., None])
    dv[...] = p.swapaxes(-1, -2) @ dy
    dp = dy @ v.swapaxes(-1, -2)
    dscores = p * (dp - (dy * y).sum(axis=-1, keepdims=True)) / math.sqrt(q.shape[-1])
    dq[...] = dscores @ k
    dk[...] = dscores.swapaxes(-1, -2) @ q


def attention_cached_forward(out, cache, qkv, position, num_heads):
    """The tokens at position, position + 1, ... look at the cache, which first gets their keys and values."""
    B, T, C = out.shape
    start, end = position[0], position[0] + T
    cache[:, start:end] = qkv[..., C:].reshape(B, T, 2, C)
    q, (k, v) = heads(qkv, 3, num_heads)[0], heads(cache[:, :end], 2, num_heads)
    heads(out, 1, num_heads)[0] = softmax(scores(q, k))[0] @ v


def heads(x, parts, num_heads):
    """A view of x, whose rows are `parts` times C channels, as (parts, B, NH, T, HS): writing to it writes to x."""
    return x.reshape(*x.shape[:2], parts, num_heads, -1).transpose(2, 0, 3, 1, 4)


def scores(q, k):
    """(..., queries, keys), -inf where a key comes after its query; the last key is the last query's own."""
    queries, keys = q.shape[-2], k.shape[-2]
    visible = np.tri(queries, keys, keys - queries, dtype=bool)
    return np.where(visible, q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), -math.inf)


def softmax(x):
    """(softmax(x), log(sum(e**x))) of each row."""
    top = x.max(axis=-1, keepdims=True)
    e = np.exp(x - top)
    total = e.sum(axis=-1, keepdims=True)
    return e / total, (top + np.log(total))[..., 0]


def gelu_forward(out, inp):
    out[...] = 0.5 * inp * (1 + np.tanh(gelu_argument(inp)))


def gelu_backward(dinp, inp, dout):
    tanh, slope = np.tanh(gelu_argument(inp)), math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * inp**2)
    dinp[...] = dout * 0.5 * (1 + tanh + inp * (1 - tanh**2) * slope)


def gelu_argument(x):
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def residual_layernorm_forward(residual, out, mean, rstd, inp1, inp2, weight, bias):
    residual[...] = inp1 + inp2
    layernorm_forward(out, mean, rstd, residual, weight, bias)


def residual_backward(dinp, dout):
    dinp[...] = dout


def fused_classifier(logits, losses, targets, dloss, vocab_size, write_dlogits):
    z, target = logits[..., :vocab_size], targets[..., None]
    probabilities, log_sum_exp = softmax(z)
    losses[...] = log_sum_exp - np.take_along_axis(z, target, axis=-1)[..., 0]
    if write_dlogits:
        z[...] = (probabilities - (np.arange(vocab_size) == target)) * dloss
        logits[..., vocab_size:] = 0


def add_mean(loss, losses, share):
    loss += share * losses.mean(dtype=np.float64)


def global_norm_squared(out, grads, scratch):
    out[...] = np.sum(np.square(grads, dtype=np.float64))


def clip(grad_scale, loss, grad_norm_squared, limits, highest):
    values = np.array([loss[0], math.sqrt(grad_norm_squared[0])])
    if not (np.isfinite(values) & (values <= limits)).all():
        grad_scale[...] = -1
    else:
        grad_scale[...] = highest / values[1] if 0 < highest < values[1] else 1


def adamw_update(
    params, master, grads, m, v, decays, learning_rate, beta1, beta2, eps, weight_decay, step, seed, grad_scale
):
    if grad_scale[0] < 0:
        return
    gradient = grads * grad_scale
    m[...] = beta1 * m + (1 - beta1) * gradient
    v[...] = beta2 * v + (1 - beta2) * gradient**2
    mhat, vhat = m / (1 - beta1 ** step[0]), v / (1 - beta2 ** step[0])
    decay = weight_decay * np.repeat(decays, RUN)
    params -= learning_rate * (mhat / (np.sqrt(vhat) + eps) + decay * params)
