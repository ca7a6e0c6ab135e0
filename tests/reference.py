"""The ops' formulas in float64 NumPy, written to be checked by eye, and how an op's results are compared with them.

A backward takes the gradient of the forward's result and returns the gradients of its inputs, in the inputs' order.
"""

import functools
import math

import numpy as np

# (B, T, C): the least there can be, odd ones, primes, one above a power of two; no multiple of a vector's length
SHAPES = [(1, 1, 1), (1, 1, 3), (2, 3, 5), (3, 2, 17), (1, 5, 257), (5, 1, 97), (1, 97, 2), (2, 17, 97), (1, 257, 3)]

UNIT = 2.0**-24  # the largest relative error of one float32 operation
TINY = 1e-35  # below this float32 ops may give zero: exp is cut off at e**-87, 1.6e-38


def in_float64(function):
    """The function, with its float32 arrays turned into float64."""

    @functools.wraps(function)
    def wrapped(*args):
        return function(*[x.astype(np.float64) if getattr(x, "dtype", None) == np.float32 else x for x in args])

    return wrapped


def one_hot(indices, n):
    return (indices[..., None] == np.arange(n)).astype(np.float64)


@in_float64
def encoder_forward(tokens, wte, wpe):
    return wte[tokens] + wpe[: tokens.shape[1]]


@in_float64
def encoder_backward(dout, tokens, wte, wpe):
    dwpe = np.zeros_like(wpe)
    dwpe[: tokens.shape[1]] = dout.sum(axis=0)
    return np.einsum("btv,btc->vc", one_hot(tokens, len(wte)), dout), dwpe


@in_float64
def layernorm_forward(inp, weight, bias):
    """Returns out, mean, rstd."""
    mean, variance = inp.mean(axis=-1), inp.var(axis=-1)
    rstd = (variance + 1e-5) ** -0.5
    return (inp - mean[..., None]) * rstd[..., None] * weight + bias, mean, rstd


@in_float64
def layernorm_backward(dout, inp, weight, bias):
    """Through the Jacobian d norm[i] / d inp[j] = rstd * ((i == j) - (1 + norm[i] * norm[j]) / C)."""
    _, mean, rstd = layernorm_forward(inp, weight, bias)
    norm = (inp - mean[..., None]) * rstd[..., None]
    C = inp.shape[-1]
    jacobian = rstd[..., None, None] * (np.eye(C) - (1 + norm[..., :, None] * norm[..., None, :]) / C)
    dinp = np.einsum("bti,btij->btj", dout * weight, jacobian)
    return dinp, (dout * norm).sum(axis=(0, 1)), dout.sum(axis=(0, 1))


@in_float64
def matmul_forward(inp, weight, bias):
    out = np.einsum("btc,oc->bto", inp, weight)
    return out if bias is None else out + bias


@in_float64
def matmul_backward(dout, inp, weight):
    dinp, dweight = np.einsum("bto,oc->btc", dout, weight), np.einsum("bto,btc->oc", dout, inp)
    return dinp, dweight, dout.sum(axis=(0, 1))


def split_heads(x, num_heads):
    """(B, T, C) -> (B, NH, T, HS)"""
    B, T, C = x.shape
    return x.reshape(B, T, num_heads, C // num_heads).transpose(0, 2, 1, 3)


def join_heads(x):
    """(B, NH, T, HS) -> (B, T, C)"""
    B, NH, T, HS = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, NH * HS)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@in_float64
def attention_forward(qkv, num_heads):
    """Returns out, att."""
    q, k, v = (split_heads(x, num_heads) for x in np.split(qkv, 3, axis=-1))
    T, HS = q.shape[-2:]
    future = np.triu(np.ones((T, T), bool), 1)
    att = softmax(np.where(future, -np.inf, q @ k.swapaxes(-1, -2) / math.sqrt(HS)))
    return join_heads(att @ v), att


@in_float64
def attention_backward(dout, qkv, num_heads):
    q, k, v = (split_heads(x, num_heads) for x in np.split(qkv, 3, axis=-1))
    _, att = attention_forward(qkv, num_heads)
    dy = split_heads(dout, num_heads)
    datt = dy @ v.swapaxes(-1, -2)
    dscores = att * (datt - (att * datt).sum(axis=-1, keepdims=True)) / math.sqrt(q.shape[-1])
    dq, dk, dv = dscores @ k, dscores.swapaxes(-1, -2) @ q, att.swapaxes(-1, -2) @ dy
    return np.concatenate([join_heads(dq), join_heads(dk), join_heads(dv)], axis=-1)


@in_float64
def gelu_forward(inp):
    return 0.5 * inp * (1 + np.tanh(math.sqrt(2 / math.pi) * (inp + 0.044715 * inp**3)))


@in_float64
def gelu_backward(dout, inp):
    tanh = np.tanh(math.sqrt(2 / math.pi) * (inp + 0.044715 * inp**3))
    du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * inp**2)
    return dout * (0.5 * (1 + tanh) + 0.5 * inp * (1 - tanh**2) * du)


@in_float64
def classifier_forward(logits, targets, vocab_size):
    """The losses."""
    probabilities = softmax(logits[..., :vocab_size])
    with np.errstate(divide="ignore"):
        return -np.log(np.take_along_axis(probabilities, targets[..., None], axis=-1)[..., 0])


@in_float64
def classifier_backward(dloss, logits, targets, vocab_size):
    """The gradient of dloss * sum(losses); zero in the padding columns."""
    dlogits = np.zeros_like(logits)
    dlogits[..., :vocab_size] = (softmax(logits[..., :vocab_size]) - one_hot(targets, vocab_size)) * dloss
    return dlogits


@in_float64
def adamw_update(params, grads, m, v, decays, learning_rate, beta1, beta2, eps, weight_decay, step, grad_scale):
    """Returns params, m, v. Algorithm 2 of Loshchilov and Hutter 2017, the learning rate as its schedule multiplier."""
    grads = grads * grad_scale
    m = beta1 * m + (1 - beta1) * grads
    v = beta2 * v + (1 - beta2) * grads**2
    mhat, vhat = m / (1 - beta1**step), v / (1 - beta2**step)
    decay = weight_decay * np.repeat(decays, 64)
    return params - learning_rate * (mhat / (np.sqrt(vhat) + eps) + decay * params), m, v


def finite_difference(f, x, dout, step=1e-5):
    """The gradient of sum(f(x) * dout) with respect to x, by central differences in float64.

    Truncation loses about step**2 = 1e-10 of the third derivative, rounding 1e-16 / step = 1e-11 of the sum: compare
    with 1e-8 of the magnitudes involved.
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


def sum_error(magnitude, n):
    """What float32 may lose in a sum of n products whose absolute values sum to `magnitude`.

    Each of the n additions rounds a partial sum, by at most UNIT of magnitude; the errors' signs are as good as random,
    so that together they grow with the root of n. Four such deviations, and one more term for the product's own error.
    """
    return 4 * math.sqrt(n + 1) * UNIT * magnitude


def assert_close(name, got, expected, tolerance):
    """Every element of `got` is within `tolerance` (a number or an array, absolute) of `expected`; NaN never is."""
    assert got.shape == np.shape(expected), f"{name} has shape {got.shape}, not {np.shape(expected)}"
    excess = np.abs(got - np.asarray(expected, np.float64)) - tolerance
    excess = np.where(np.isnan(excess), np.inf, excess)
    worst = np.unravel_index(np.argmax(excess), got.shape)
    allowed = np.broadcast_to(tolerance, got.shape)[worst]
    index = ", ".join(str(i) for i in worst)
    assert excess[worst] <= 0, (
        f"{name}[{index}] is {got[worst]!r}, not {np.asarray(expected)[worst]!r} within {allowed:.3g}"
        f" ({np.count_nonzero(excess > 0)} of {got.size} elements are off)"
    )
