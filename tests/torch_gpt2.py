"""GPT-2 in PyTorch, float64, from the paper's formulas: what the model is compared with. It knows nothing of llm_numba.

Parameters come as a dict of NumPy arrays by llm.c's names, those of the layers stacked: qkvw is (L, 3*C, C).
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

DECAYS = {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}  # the matrices


def forward(p, tokens, num_heads, see):
    """Logits (B, T, V) of tokens (B, T); every activation passes through see(name, layer or None, tensor)."""
    (B, T), C = tokens.shape, p["wte"].shape[1]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)

    def heads(x):
        return x.view(B, T, num_heads, C // num_heads).transpose(1, 2)

    x = see("encoded", None, F.embedding(tokens, p["wte"]) + p["wpe"][:T])
    for l in range(len(p["ln1w"])):
        y = see("ln1", l, F.layer_norm(x, (C,), p["ln1w"][l], p["ln1b"][l], 1e-5))
        qkv = see("qkv", l, F.linear(y, p["qkvw"][l], p["qkvb"][l]))
        q, k, v = map(heads, qkv.split(C, dim=-1))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(C // num_heads)).masked_fill(future, -math.inf)
        y = see("atty", l, (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, T, C))
        x = see("residual2", l, x + F.linear(y, p["attprojw"][l], p["attprojb"][l]))
        y = see("ln2", l, F.layer_norm(x, (C,), p["ln2w"][l], p["ln2b"][l], 1e-5))
        y = see("fch", l, F.linear(y, p["fcw"][l], p["fcb"][l]))
        y = see("fch_gelu", l, F.gelu(y, approximate="tanh"))
        x = see("residual3", l, x + F.linear(y, p["fcprojw"][l], p["fcprojb"][l]))
    x = see("lnf", None, F.layer_norm(x, (C,), p["lnfw"], p["lnfb"], 1e-5))
    return see("logits", None, x @ p["wte"].T)


def leaves(parameters, dtype=torch.float64):
    return {name: torch.tensor(x, dtype=dtype, requires_grad=True) for name, x in parameters.items()}


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def forward_backward(parameters, tokens, targets, num_heads, dtype=torch.float64):
    """One pass each way, all in this dtype: the mean loss; by name the parameters' gradients; by (name, layer or None)
    the activations and their gradients, in which all that reaches one is added up. There is none for the output of
    GELU: the model fuses GELU's backward into a matmul."""
    p, seen = leaves(parameters, dtype), {}

    def see(name, layer, x):
        x.retain_grad()
        seen[name, layer] = x
        return x

    tokens, targets = torch.tensor(tokens, dtype=torch.long), torch.tensor(targets, dtype=torch.long)
    loss = cross_entropy(forward(p, tokens, num_heads, see), targets)
    loss.backward()
    return SimpleNamespace(
        loss=loss.item(),
        gradients={name: x.grad.double().numpy() for name, x in p.items()},
        activations={key: x.detach().double().numpy() for key, x in seen.items()},
        activation_gradients={key: x.grad.double().numpy() for key, x in seen.items() if key[0] != "fch_gelu"},
    )


def train(parameters, tokens, targets, num_heads, steps):
    """`steps` times AdamW on one batch, the gradient clipped to a norm of 1: losses, norms before clipping, and the
    parameters afterwards."""
    p = leaves(parameters)
    tokens, targets = torch.tensor(tokens, dtype=torch.long), torch.tensor(targets, dtype=torch.long)
    optimiser = torch.optim.AdamW(
        [
            {"params": [x for name, x in p.items() if name in DECAYS], "weight_decay": 0.1},
            {"params": [x for name, x in p.items() if name not in DECAYS], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses, norms = [], []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = cross_entropy(forward(p, tokens, num_heads, lambda name, layer, x: x), targets)
        loss.backward()
        norm = math.sqrt(sum(x.grad.square().sum().item() for x in p.values()))
        for x in p.values():
            x.grad *= min(1, 1 / norm)
        optimiser.step()
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms, {name: x.detach().numpy() for name, x in p.items()}
