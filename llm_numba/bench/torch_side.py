"""PyTorch's side of the benchmark: a process that builds what it is told to and measures it when asked.

It reads one JSON line [function, arguments] after the other and answers each with {"value": ...} or {"failed": why}.
Only this process imports torch. Between two requests it waits for input, and its threads sleep.
"""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llm_numba.bench import measuring

runs: dict[str, Callable] = {}  # what `first` and `measure` run, by its mode: "eager", "compiled"
BEFORE = measuring.resident()
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16}
device, precision = "cpu", "fp32"  # as `start` is told


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


def start(threads: int, device: str = "cpu", precision: str = "fp32") -> dict:
    """device: cpu or cuda; precision: of DTYPES, where tf32 lets matmuls round their inputs and autocast rounds to bf16
    what its ops take in."""
    globals().update(device=device, precision=precision)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if device == "cuda":
        torch.zeros(1, device=device)  # raises where this PyTorch has no card
    return {"version": torch.__version__, "mkl": torch.backends.mkl.is_available()}


def on_device(prepare: Callable) -> Callable:
    """What `prepare` makes lies on the device, in its precision."""

    @functools.wraps(prepare)
    def run(*args, **arguments):
        runs.clear()  # what was prepared before
        torch.set_default_dtype(DTYPES[precision])
        with torch.device(device):
            prepare(*args, **arguments)

    return run


def in_precision():
    """What a model's forward pass runs under."""
    if precision == "autocast":
        return torch.autocast(device, torch.bfloat16)
    return contextlib.nullcontext()


def cold(run: Callable) -> float:
    """The seconds that the card works on what `run` launches, none of whose data is in the L2 cache: as ours, see
    llm_numba.cuda.peak.timed."""
    for _ in range(4):
        other_memory().zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


@functools.cache
def other_memory():
    return torch.empty(1 << 28, dtype=torch.uint8, device=device)


@on_device
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
        with in_precision():
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


@on_device
def prepare_sampling(config: dict, tokens: int) -> None:
    """The likeliest continuation of one token, `tokens` long, with the layers' keys and values in a cache."""
    model = GPT2(config).eval()
    HS = config["channels"] // config["num_heads"]
    dtype = torch.bfloat16 if precision == "autocast" else None
    caches = [torch.zeros(2, 1, config["num_heads"], config["max_seq_len"], HS, dtype=dtype) for _ in model.layers]

    def next_token(token, position: int):
        with in_precision():
            logits = model(token, caches, position)
        return logits[:, -1, : config["vocab_size"]].argmax(dim=-1, keepdim=True)

    def sampling_with(next_token):
        @torch.inference_mode()
        def sample():
            token, said = torch.zeros(1, 1, dtype=torch.long, device=device), []
            for position in range(tokens):
                token = next_token(token, position)
                said.append(token.item())
            return said

        return sample

    runs.update(eager=sampling_with(next_token), compiled=sampling_with(torch.compile(next_token, dynamic=True)))


@on_device
def prepare_training(config: dict, weights: str, beta1, beta2, eps, weight_decay, grad_clip):
    """A model with these weights (a file of llm_numba's tensors by name), which `train` then trains step by step."""
    model, ours = GPT2(config), {name: torch.from_numpy(x) for name, x in np.load(weights).items()}
    with torch.no_grad():
        model.lnf.weight.copy_(ours["lnfw"])
        model.lnf.bias.copy_(ours["lnfb"])
        model.wte.weight.copy_(ours["wte"])
        model.wpe.weight.copy_(ours["wpe"])
        for l, layer in enumerate(model.layers):
            for name, module in layer.named_children():
                module.weight.copy_(ours[name + "w"][l])
                module.bias.copy_(ours[name + "b"][l])
    parameters = list(model.parameters())
    matrices, vectors = ([p for p in parameters if p.dim() == dim] for dim in (2, 1))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(beta1, beta2), eps=eps, fused=True)
    V = config["vocab_size"]

    def step(tokens, targets, learning_rate):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate
        optimiser.zero_grad(set_to_none=True)
        with in_precision():
            logits = model(tokens)
        loss = F.cross_entropy(logits[..., :V].flatten(0, 1).float(), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, grad_clip)
        optimiser.step()
        return loss.item()

    runs.update(train=step)


def train(batch: str, learning_rate: float) -> float:
    """The loss of a batch, a file of (2, B, T) tokens and targets, before the step that is taken on it."""
    return runs["train"](*torch.from_numpy(np.load(batch)).long().to(device), learning_rate)


@on_device
def prepare_op(op: str, sizes: dict) -> None:
    """One op by itself, at the sizes of op_cases.op_list."""
    runs.update(eager=OPS[op](**sizes))


def no_grad(function: Callable, *inputs) -> Callable:
    return torch.no_grad()(lambda: function(*inputs))


def gradients(out, *inputs) -> Callable:
    """The gradients of the inputs, through what `out` already saved."""
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def leaf(*shape: int, dtype=None):
    return torch.randn(shape, requires_grad=True, dtype=dtype)


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


def residual_layernorm_forward(B, T, C):
    return no_grad(lambda x, y, *rest: normalise(x + y, *rest), leaf(B, T, C), leaf(B, T, C), leaf(C), leaf(C))


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
    """In float32, as ours keeps it too."""
    parameter = leaf(n, dtype=torch.float32)
    parameter.grad = torch.randn(n, dtype=torch.float32)
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
    "residual_layernorm_forward": residual_layernorm_forward,
    "encoder_forward": lambda B, T, C, Vp: no_grad(embed, leaf(Vp, C), leaf(T, C), torch.randint(Vp, (B, T))),
    "encoder_backward": encoder_backward,
    "fused_classifier": fused_classifier,
    "global_norm_squared": lambda n: no_grad(torch.linalg.vector_norm, leaf(n, dtype=torch.float32)),
    "adamw_update": adamw_update,
}


def first(mode: str) -> int | None:
    """Run twice: the first compiles, and makes the optimiser's state; returns the bytes that the process took on, or
    those that its tensors take on the card."""
    runs[mode]()
    if device != "cuda":
        return measuring.peak_memory(runs[mode], BEFORE)
    torch.cuda.reset_peak_memory_stats()
    runs[mode]()
    torch.cuda.empty_cache()  # for the other processes
    return torch.cuda.max_memory_allocated()


def measure(mode: str, seconds: float, launches_only: bool) -> list[float]:
    """launches_only: what runs does not wait for a card, so that the card is asked for the time."""
    timed = cold if launches_only and device == "cuda" else measuring.by_the_clock
    times = measuring.measure(runs[mode], seconds, timed)
    if device == "cuda":
        torch.cuda.empty_cache()
    return times


FUNCTIONS = {
    f.__name__: f for f in (start, prepare_step, prepare_sampling, prepare_op, prepare_training, train, first, measure)
}


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
