"""The oracle: every op in a few lines of NumPy. In float64 it defines the right result for the ops of every device.

The module can be used like the ops that `get_ops` returns: Arena(in_float64(groups), config, plan, oracle). An op
computes in the precision of its arrays, so in an arena of float32 it shows the error that rounding alone causes. It
leaves `scratch` alone: NumPy allocates what it needs.
Arguments and results are those of the CPU ops, whose docstrings give shapes and sources. tests/test_oracle.py checks
the gradients by finite differences and the whole against PyTorch.
"""

import math

import numpy as np

from llm_numba.arena import RUN, Groups
from llm_numba.cpu.memory import allocate, available_memory, copy, storage_dtype, to_device, to_host, view, zero  # noqa: F401
from llm_numba.cpu.sampler import sample_token  # noqa: F401


def in_float64(groups: Groups) -> Groups:
    """The groups with every float32 tensor as float64."""
    double = {"float32": "float64"}
    return {g: [s._replace(dtype=double.get(s.dtype, s.dtype)) for s in specs] for g, specs in groups.items()}


def encoder_forward(out, tokens, wte, wpe):
    out[...] = wte[tokens] + wpe[: tokens.shape[1]]


def encoder_forward_at(out, tokens, wte, wpe, position):
    encoder_forward(out, np.maximum(tokens, 0), wte, wpe[position[0] :])


def encoder_backward(dwte, dwpe, dout, tokens, scratch):
    np.add.at(dwte, tokens, dout)  # a token may occur many times
    dwpe[: tokens.shape[1]] += dout.sum(axis=0)


def layernorm_forward(out, mean, rstd, inp, weight, bias):
    mean[...] = inp.mean(axis=-1)
    rstd[...] = 1 / np.sqrt(inp.var(axis=-1) + 1e-5)
    out[...] = normalise(inp, mean, rstd) * weight + bias


def normalise(inp, mean, rstd):
    return (inp - mean[..., None]) * rstd[..., None]


def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, scratch, accumulate):
    """The mean and the variance depend on inp too, so gradients flow through both."""
    norm, dnorm = normalise(inp, mean, rstd), dout * weight
    through_mean = dnorm.mean(axis=-1, keepdims=True)
    through_variance = norm * (dnorm * norm).mean(axis=-1, keepdims=True)
    dinp += (dnorm - through_mean - through_variance) * rstd[..., None]
    store(dweight, (dout * norm).sum(axis=(0, 1)), accumulate)
    store(dbias, dout.sum(axis=(0, 1)), accumulate)


def store(total, gradient, accumulate):
    total[...] = total + gradient if accumulate else gradient


def matmul_forward(out, inp, weight, bias, scratch):
    out[...] = inp @ weight.T
    if bias is not None:
        out += bias


def matmul_backward(dinp, dweight, dbias, dout, inp, weight, scratch, accumulate):
    dinp[...] = dout @ weight
    store(dweight, np.tensordot(dout, inp, axes=((0, 1), (0, 1))), accumulate)
    if dbias is not None:
        store(dbias, dout.sum(axis=(0, 1)), accumulate)


def matmul_gelu_forward(out, pre, inp, weight, bias, scratch):
    matmul_forward(pre, inp, weight, bias, scratch)
    gelu_forward(out, pre)


def gelu_matmul_backward(dpre, dweight, dbias, dout, inp, weight, pre, scratch, accumulate):
    matmul_backward(dpre, dweight, dbias, dout, inp, weight, scratch, accumulate)
    gelu_backward(dpre, pre, dpre)


def attention_forward(out, lse, qkv, num_heads, num_kv_heads, scratch):
    """out = softmax(q kT / sqrt(HS)) v, lse = the log-sum-exp of each query's scores."""
    q, k, v = queries_keys_values(qkv, num_heads, num_kv_heads)
    weights, log_sum_exp = softmax(scores(q, k))
    grouped(out, num_heads, num_kv_heads)[...] = weights @ v
    lse[...] = log_sum_exp.reshape(lse.shape)


def attention_backward(dqkv, dout, out, lse, qkv, num_heads, num_kv_heads, scratch):
    """Back through out = p v, p = softmax(scores), scores = q kT / sqrt(HS); dk and dv sum over a group's queries."""
    q, k, v = queries_keys_values(qkv, num_heads, num_kv_heads)
    dq, dk, dv = queries_keys_values(dqkv, num_heads, num_kv_heads)
    y, dy = grouped(out, num_heads, num_kv_heads), grouped(dout, num_heads, num_kv_heads)
    p = np.exp(scores(q, k) - lse.reshape(*q.shape[:-1], 1))
    dv[...] = (p.swapaxes(-1, -2) @ dy).sum(axis=2, keepdims=True)
    dp = dy @ v.swapaxes(-1, -2)
    dscores = p * (dp - (dy * y).sum(axis=-1, keepdims=True)) / math.sqrt(q.shape[-1])
    dq[...] = dscores @ k
    dk[...] = (dscores.swapaxes(-1, -2) @ q).sum(axis=2, keepdims=True)


def attention_cached_forward(out, cache, qkv, position, num_heads, num_kv_heads):
    """Store the new keys and values in the cache; each query then attends to the cache up to its own token."""
    (B, T, C), KV = out.shape, cache.shape[3]
    start, end = position[0], position[0] + T
    cache[:, start:end] = qkv[..., C:].reshape(B, T, 2, KV)
    q, _, _ = queries_keys_values(qkv, num_heads, num_kv_heads)
    k, v = (grouped(cache[:, :end, part], num_kv_heads, num_kv_heads) for part in range(2))
    grouped(out, num_heads, num_kv_heads)[...] = softmax(scores(q, k))[0] @ v


def attention_weights(weights, lse, qkv, num_heads, num_kv_heads):
    q, k, _ = queries_keys_values(qkv, num_heads, num_kv_heads)
    weights[...] = np.exp(scores(q, k) - lse.reshape(*q.shape[:-1], 1)).reshape(weights.shape)


def queries_keys_values(qkv, num_heads, num_kv_heads):
    """Views of qkv: q (B, NKV, NH // NKV, T, HS), k and v (B, NKV, 1, T, HS)."""
    HS = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    C, KV = num_heads * HS, num_kv_heads * HS
    q, k, v = qkv[..., :C], qkv[..., C : C + KV], qkv[..., C + KV :]
    return grouped(q, num_heads, num_kv_heads), *(grouped(x, num_kv_heads, num_kv_heads) for x in (k, v))


def grouped(x, num_heads, num_kv_heads):
    """A view of x (B, T, num_heads*HS) as (B, NKV, num_heads // NKV, T, HS); writing to it writes to x."""
    B, T, _ = x.shape
    return x.reshape(B, T, num_kv_heads, num_heads // num_kv_heads, -1).transpose(0, 2, 3, 1, 4)


def scores(q, k):
    """(..., queries, keys), -inf where a key comes after its query. The last key belongs to the last query."""
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
    out[...] = 0.5 * inp * (1 + np.tanh(math.sqrt(2 / math.pi) * (inp + 0.044715 * inp**3)))


def gelu_backward(dinp, inp, dout):
    tanh = np.tanh(math.sqrt(2 / math.pi) * (inp + 0.044715 * inp**3))
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * inp**2)
    dinp[...] = dout * 0.5 * (1 + tanh + inp * (1 - tanh**2) * slope)


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
