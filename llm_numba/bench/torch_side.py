"""PyTorch's side of the benchmark: a process that builds models and ops and measures them on request.

It reads requests [function, arguments], one JSON value per line, and answers {"value": ...} or {"failed": reason}.
Only this process imports torch. Its threads sleep while it waits for a request.
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

runs: dict[str, Callable] = {}  # mode ("eager", "compiled") -> what `first` and `measure` run
BEFORE = measuring.resident_memory()
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16}
device, precision = "cpu", "fp32"  # set by `start`


class Block(nn.Module):
    def __init__(self, C: int, NH: int):
        super().__init__()
        self.NH = NH
        self.ln1, self.qkv, self.attproj = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.ln2, self.fc, self.fcproj = nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x, cache=None, position: int = 0):
        """x (B, T, C). With a cache (2, B, NH, max_seq_len, HS), x is the single token at `position`."""
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.NH, -1).transpose(1, 2) for y in self.qkv(self.ln1(x)).split(C, dim=-1))
        if cache is not None:
            cache[0, :, :, position : position + 1], cache[1, :, :, position : position + 1] = k, v
            k, v = cache[:, :, :, : position + 1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """config: the fields of llm_numba's GPT2Config, and padded_vocab_size."""

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


def start(threads: int, device: str = "cpu", precision: str = "fp32", attention: str = "") -> dict:
    """Configure PyTorch. device: cpu or cuda; precision: a key of DTYPES; attention: "cudnn" forces cuDNN's, on which
    PyTorch then fails if it cannot be used."""
    globals().update(device=device, precision=precision)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if attention == "cudnn":
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)
    if device == "cuda":
        torch.zeros(1, device=device)  # raises if PyTorch finds no GPU
    return {"version": torch.__version__, "mkl": torch.backends.mkl.is_available()}


def on_device(prepare: Callable) -> Callable:
    """Decorator: `prepare` creates its tensors on the device, in the precision set by `start`."""

    @functools.wraps(prepare)
    def run(*args, **arguments):
        runs.clear()
        torch.set_default_dtype(DTYPES[precision])
        with torch.device(device):
            prepare(*args, **arguments)

    return run


def in_precision():
    """The context of a model's forward pass."""
    if precision == "autocast":
        return torch.autocast(device, torch.bfloat16)
    return contextlib.nullcontext()


def cold(run: Callable) -> float:
    """GPU seconds of `run` with a cold L2 cache, measured as llm_numba.cuda.peak.timed does."""
    for _ in range(4):
        flush_buffer().zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


@functools.cache
def flush_buffer():
    return torch.empty(1 << 28, dtype=torch.uint8, device=device)


@on_device
def prepare_step(config: dict, B: int, T: int) -> None:
    """One training step: clear the gradients, forward, loss, backward, clip the gradient norm to 1, AdamW."""
    model = GPT2(config).train()
    optimiser = adamw(model, 0.1, lr=1e-4, betas=(0.9, 0.95))
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
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            return loss.item()

        return step

    runs.update(eager=step_with(forward_loss), compiled=step_with(torch.compile(forward_loss)))


def adamw(model: nn.Module, weight_decay: float, **options) -> torch.optim.Optimizer:
    """Fused AdamW; weight decay applies to matrices only."""
    matrices, vectors = ([p for p in model.parameters() if p.dim() == dim] for dim in (2, 1))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=True, **options)


@on_device
def prepare_sampling(config: dict, tokens: int) -> None:
    """Greedy generation of `tokens` tokens after one, with a KV cache."""
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
            token, generated = torch.zeros(1, 1, dtype=torch.long, device=device), []
            for position in range(tokens):
                token = next_token(token, position)
                generated.append(token.item())
            return generated

        return sample

    runs.update(eager=sampling_with(next_token), compiled=sampling_with(torch.compile(next_token, dynamic=True)))


@on_device
def prepare_training(config: dict, weights: str, beta1, beta2, eps, weight_decay, grad_clip):
    """A model for `train`. weights: an .npz file with llm_numba's parameters by name."""
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
    optimiser = adamw(model, weight_decay, betas=(beta1, beta2), eps=eps)
    V = config["vocab_size"]

    def step(tokens, targets, learning_rate):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate
        optimiser.zero_grad(set_to_none=True)
        with in_precision():
            logits = model(tokens)
        loss = F.cross_entropy(logits[..., :V].flatten(0, 1).float(), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimiser.step()
        return loss.item()

    runs.update(train=step)


def train(batch: str, learning_rate: float) -> float:
    """Train one step and return the loss before the update. batch: an .npy file of tokens and targets (2, B, T)."""
    return runs["train"](*torch.from_numpy(np.load(batch)).long().to(device), learning_rate)


@on_device
def prepare_op(op: str, sizes: dict) -> None:
    """A single op; sizes as in op_cases.op_list."""
    runs.update(eager=OPS[op](**sizes))


def no_grad(function: Callable, *inputs) -> Callable:
    return torch.no_grad()(lambda: function(*inputs))


def gradients(out, *inputs) -> Callable:
    """A function that computes the gradients of the inputs from the tensors saved in the forward pass."""
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


def gelu_matmul_backward(R, C, OC):
    pre, weight, bias = linear(R, C, OC, bias=True)
    return gradients(F.linear(gelu(pre), weight, bias), pre, weight, bias)


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
    """In float32, like llm_numba's optimiser state."""
    parameter = leaf(n, dtype=torch.float32)
    parameter.grad = torch.randn(n, dtype=torch.float32)
    return torch.optim.AdamW([parameter], lr=1e-4, fused=True).step


OPS = {
    "matmul_forward": lambda **sizes: no_grad(F.linear, *linear(**sizes)),
    "matmul_gelu_forward": lambda **sizes: no_grad(lambda *x: gelu(F.linear(*x)), *linear(**sizes, bias=True)),
    "matmul_backward": matmul_backward,
    "gelu_matmul_backward": gelu_matmul_backward,
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
    """Run twice, as the first run compiles and creates the optimiser state. Returns the peak memory in bytes: of the
    process, or of its tensors on the GPU."""
    runs[mode]()
    if device != "cuda":
        return measuring.peak_memory(runs[mode], BEFORE)
    torch.cuda.reset_peak_memory_stats()
    runs[mode]()
    torch.cuda.empty_cache()  # leave the memory to the other processes
    return torch.cuda.max_memory_allocated()


def measure(mode: str, seconds: float, launches_only: bool) -> list[float]:
    """Seconds of each run; launches_only: the work is asynchronous, so GPU events time it."""
    timed = cold if launches_only and device == "cuda" else measuring.wall_time
    times = measuring.measure(runs[mode], seconds, timed)
    if device == "cuda":
        torch.cuda.empty_cache()
    return times


FUNCTIONS = {
    f.__name__: f for f in (start, prepare_step, prepare_sampling, prepare_op, prepare_training, train, first, measure)
}


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compiler output must not mix with the answers
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
