"""PyTorch's side of the benchmark: a process that builds what it is told to and measures it when asked.

It reads one JSON line [function, arguments] after the other and answers each with {"value": ...} or {"failed": why}.
Only this process imports torch. Between two requests it waits for input, and its threads sleep.
"""

import json
import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from llm_numba.bench import measuring

runs: dict[str, Callable] = {}  # what `first` and `measure` run, by its mode: "eager", "compiled"
BEFORE = measuring.resident()


class Block(nn.Module):
    def __init__(self, C: int, NH: int):
        super().__init__()
        self.NH = NH
        self.ln1, self.qkv, self.attproj = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.ln2, self.fc, self.fcproj = nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x, cache=None, position: int = 0):
        """x (B, T, C); with a cache (2, B, NH, maxT, HS), x is the one token at `position`."""
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.NH, -1).transpose(1, 2) for y in self.qkv(self.ln1(x)).split(C, dim=-1))
        if cache is not None:
            cache[0, :, :, position : position + 1], cache[1, :, :, position : position + 1] = k, v
            k, v = cache[:, :, :, : position + 1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """config: the fields of llm_numba's GPT2Config and padded_vocab_size."""

    def __init__(self, config: dict):
        super().__init__()
        C, NH = config["channels"], config["num_heads"]
        self.wte, self.wpe = nn.Embedding(config["padded_vocab_size"], C), nn.Embedding(config["max_seq_len"], C)
        self.layers = nn.ModuleList(Block(C, NH) for _ in range(config["num_layers"]))
        self.lnf = nn.LayerNorm(C)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, caches=None, position: int = 0):
        """Logits (B, T, Vp) of tokens (B, T)."""
        x = self.wte(tokens) + self.wpe.weight[position : position + tokens.shape[1]]
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = layer(x, cache, position)
        return F.linear(self.lnf(x), self.wte.weight)


def start(threads: int) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return {"version": torch.__version__, "mkl": torch.backends.mkl.is_available()}


def prepare_step(config: dict, B: int, T: int) -> None:
    """One training step: gradients cleared, forward, loss, backward, gradient clipped to a norm of 1, AdamW."""
    model = GPT2(config).train()
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() == 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-4,
        betas=(0.9, 0.95),
        fused=True,
    )
    stream = torch.randint(config["vocab_size"], (B, T + 1))
    tokens, targets = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()

    def forward_loss(tokens, targets):
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    def step_with(forward_loss):
        def step():
            optimiser.zero_grad(set_to_none=True)
            loss = forward_loss(tokens, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            return loss.item()

        return step

    runs.update(eager=step_with(forward_loss), compiled=step_with(torch.compile(forward_loss)))


def prepare_sampling(config: dict, tokens: int) -> None:
    """The likeliest continuation of one token, `tokens` long, with the layers' keys and values in a cache."""
    model = GPT2(config).eval()
    HS = config["channels"] // config["num_heads"]
    caches = [torch.zeros(2, 1, config["num_heads"], config["max_seq_len"], HS) for _ in model.layers]

    def next_token(token, position: int):
        return model(token, caches, position)[:, -1, : config["vocab_size"]].argmax(dim=-1, keepdim=True)

    def sampling_with(next_token):
        @torch.inference_mode()
        def sample():
            token, said = torch.zeros(1, 1, dtype=torch.long), []
            for position in range(tokens):
                token = next_token(token, position)
                said.append(token.item())
            return said

        return sample

    runs.update(eager=sampling_with(next_token), compiled=sampling_with(torch.compile(next_token, dynamic=True)))


def prepare_op(op: str, sizes: dict) -> None:
    """One op by itself, at the sizes of op_cases.op_list."""
    runs.clear()  # what the op before held
    runs.update(eager=OPS[op](**sizes))


def no_grad(function: Callable, *inputs) -> Callable:
    return torch.no_grad()(lambda: function(*inputs))


def gradients(out, *inputs) -> Callable:
    """The gradients of the inputs, through what `out` already saved."""
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def leaf(*shape: int):
    return torch.randn(shape, requires_grad=True)


def linear(R, C, OC, bias):
    return leaf(R, C), leaf(OC, C), *([leaf(OC)] if bias else [])


def attend(qkv, NH):
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (x.view(B, T, NH, -1).transpose(1, 2) for x in qkv.split(C, dim=-1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)


def normalise(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def gelu(x):
    return F.gelu(x, approximate="tanh")


def embed(wte, wpe, tokens):
    return F.embedding(tokens, wte) + wpe[: tokens.shape[1]]


def matmul_backward(**sizes):
    inputs = linear(**sizes)
    return gradients(F.linear(*inputs), *inputs)


def attention_backward(B, T, C, NH):
    qkv = leaf(B, T, 3 * C)
    return gradients(attend(qkv, NH), qkv)


def layernorm_backward(B, T, C):
    inputs = leaf(B, T, C), leaf(C), leaf(C)
    return gradients(normalise(*inputs), *inputs)


def gelu_backward(B, T, C):
    x = leaf(B, T, C)
    return gradients(gelu(x), x)


def encoder_backward(B, T, C, Vp):
    wte, wpe = leaf(Vp, C), leaf(T, C)
    return gradients(embed(wte, wpe, torch.randint(Vp, (B, T))), wte, wpe)


def fused_classifier(B, T, V, Vp):
    logits, targets = leaf(B * T, Vp), torch.randint(V, (B * T,))
    return lambda: torch.autograd.grad(F.cross_entropy(logits, targets), logits)


def adamw_update(n):
    parameter = leaf(n)
    parameter.grad = torch.randn(n)
    return torch.optim.AdamW([parameter], lr=1e-4, fused=True).step


OPS = {
    "matmul_forward": lambda **sizes: no_grad(F.linear, *linear(**sizes)),
    "matmul_backward": matmul_backward,
    "attention_forward": lambda B, T, C, NH: no_grad(attend, leaf(B, T, 3 * C), NH),
    "attention_backward": attention_backward,
    "layernorm_forward": lambda B, T, C: no_grad(normalise, leaf(B, T, C), leaf(C), leaf(C)),
    "layernorm_backward": layernorm_backward,
    "gelu_forward": lambda B, T, C: no_grad(gelu, leaf(B, T, C)),
    "gelu_backward": gelu_backward,
    "residual_forward": lambda B, T, C: no_grad(torch.add, leaf(B, T, C), leaf(B, T, C)),
    "encoder_forward": lambda B, T, C, Vp: no_grad(embed, leaf(Vp, C), leaf(T, C), torch.randint(Vp, (B, T))),
    "encoder_backward": encoder_backward,
    "fused_classifier": fused_classifier,
    "global_norm_squared": lambda n: no_grad(torch.linalg.vector_norm, leaf(n)),
    "adamw_update": adamw_update,
}


def first(mode: str) -> int | None:
    """Run twice: the first compiles, and makes the optimiser's state; returns the bytes that the process took on."""
    runs[mode]()
    return measuring.peak_memory(runs[mode], BEFORE)


def measure(mode: str, seconds: float) -> list[float]:
    return measuring.measure(runs[mode], seconds)


FUNCTIONS = {f.__name__: f for f in (start, prepare_step, prepare_sampling, prepare_op, first, measure)}


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a compiler prints is no answer
    for line in sys.stdin:
        function, arguments = json.loads(line)
        try:
            answer = {"value": FUNCTIONS[function](**arguments)}
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            answer = {"failed": f"{type(error).__name__}: {reason}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
