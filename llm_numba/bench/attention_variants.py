"""Check and time the variants of attention, for llm_numba.bench.variants.

A layer's attention runs several times in a CUDA graph, forward or backward. The graphs take turns with those of
PyTorch's FlashAttention and cuDNN, whose backward is their forward and backward together less their forward.
"""

import importlib
import math
from importlib.util import find_spec

import numpy as np

from llm_numba import oracle
from llm_numba.bench.variants import float32_tensor, graph_of, medians, random_tensor
from llm_numba.models.gpt2 import GPT2

# B, T, NH, HS, NKV of the checks
AWKWARD = [(2, 1, 1, 64, 1), (2, 97, 2, 64, 2), (1, 1000, 6, 64, 2), (2, 257, 3, 64, 3), (1, 500, 4, 128, 1)]
REPEATS = 10  # in a graph
LIMIT = 5e-3  # largest error of a tensor relative to its size, both as root mean squares


class Attention:
    """The tensors of one layer's attention, and the two passes of a variant on them."""

    def __init__(self, B, T, NH, HS, NKV):
        self.shape = B, T, NH, HS, NKV
        self.qkv, self.dout = random_tensor((B, T, (NH + 2 * NKV) * HS)), random_tensor((B, T, NH * HS))
        self.dqkv, self.out = random_tensor(self.qkv.shape), random_tensor(self.dout.shape)
        self.lse = float32_tensor(B, NH, T)

    def run(self, variant, forward=True, backward=True):
        """A function that runs the passes with scratch of its own."""
        B, T, NH, HS, NKV = self.shape
        scratch = float32_tensor(variant.backward_scratch(B, T, NH, HS))

        def run():
            if forward:
                variant.forward(self.out, self.lse, self.qkv, NH, NKV, scratch)
            if backward:
                variant.backward(self.dqkv, self.dout, self.out, self.lse, self.qkv, NH, NKV, scratch)

        return run


def check(name, variant):
    """Compare out, lse, dq, dk and dv with float64; print the errors and what is wrong."""
    from llm_numba.cuda import memory

    for shape in AWKWARD:
        B, T, NH, HS, NKV = shape
        if reason := variant.supports(np.uint16, HS):
            print(f"  {name} {shape}: {reason}")
            continue
        a = Attention(*shape)
        run, results = a.run(variant), []
        for _ in range(2):
            for tensor in (a.out, a.lse, a.dqkv):
                memory.to_device(tensor, np.nan)
            run()
            results.append([memory.to_host(tensor).astype(np.float64) for tensor in (a.out, a.lse, a.dqkv)])
        same = all(x.tobytes() == y.tobytes() for x, y in zip(*results, strict=True))
        qkv, dout = (memory.to_host(tensor).astype(np.float64) for tensor in (a.qkv, a.dout))
        out, lse, dqkv = (np.empty(x.shape) for x in results[0])
        oracle.attention_forward(out, lse, qkv, NH, NKV, None)
        oracle.attention_backward(dqkv, dout, out, lse, qkv, NH, NKV, None)
        cuts = NH * HS, (NH + NKV) * HS
        got = [*results[0][:2], *np.split(results[0][2], cuts, -1)]
        expected = [out, lse, *np.split(dqkv, cuts, -1)]
        pairs = dict(zip(("out", "lse", "dq", "dk", "dv"), zip(got, expected, strict=True), strict=True))
        # with one token dq and dk are 0
        sizes = {what: max(math.sqrt(np.square(y).mean()), 1e-2) for what, (_, y) in pairs.items()}
        errors = {what: math.sqrt(np.square(x - y).mean()) / sizes[what] for what, (x, y) in pairs.items()}
        wrong = not same or not all(error < LIMIT for error in errors.values())
        found = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
        print(f"  {'WRONG: ' if wrong else ''}{name} {shape}: {found}, same bits: {same}", flush=True)


def torch_graphs_of(a: Attention) -> dict:
    """PyTorch's forwards, and forwards with backwards, by implementation: functions as of `graph_of`."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def heads(tensor, n):
        B, T, _, HS, _ = a.shape
        return torch.as_tensor(tensor.view(np.int16), device="cuda").view(torch.bfloat16).reshape(B, T, -1, HS)

    _, _, NH, _, NKV = a.shape
    parts = heads(a.qkv, NH + 2 * NKV).split((NH, NKV, NKV), 2)
    q, k, v = (x.transpose(1, 2).contiguous().requires_grad_() for x in parts)
    dout = heads(a.dout, NH).transpose(1, 2).contiguous()
    graphs = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

        def forward(backend=backend):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=NKV < NH)

        def both(forward=forward):
            torch.autograd.grad(forward(), (q, k, v), dout)

        graphs[name] = torch_graph(forward), torch_graph(both)
    return graphs


def torch_graph(run):
    """A function that launches REPEATS runs as one CUDA graph and returns its milliseconds."""
    import torch

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run(), run(), stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(REPEATS):
            run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed():
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return timed


def time_attention(model: GPT2, B: int, T: int, names: list[str], rounds: int):
    """Print the microseconds of a layer's attention, for each variant and for PyTorch's implementations."""
    NH, HS = model.num_heads, model.channels // model.num_heads
    variants = {name: importlib.import_module(f"llm_numba.cuda.attention_{name}") for name in names}
    variants = {name: variant for name, variant in variants.items() if not variant.supports(np.uint16, HS)}
    a = Attention(B, T, NH, HS, NH)
    contestants = {}
    for name, variant in variants.items():
        forward, backward = a.run(variant, backward=False), a.run(variant, forward=False)
        contestants[name, "forward"] = graph_of(lambda run=forward: [run() for _ in range(REPEATS)])
        contestants[name, "backward"] = graph_of(lambda run=backward: [run() for _ in range(REPEATS)])
    if find_spec("torch"):
        for name, (forward, both) in torch_graphs_of(a).items():
            contestants[name, "forward"], contestants[name, "both"] = forward, both
    times = {key: 1e3 * ms / REPEATS for key, ms in medians(contestants, rounds).items()}
    operations = 2 * B * T * T * NH * HS  # of the forward
    print(f"\nattention of a layer, {B} x {T}, {NH} heads of {HS}: microseconds (TFLOP/s)")
    for name in dict.fromkeys(name for name, _ in times):
        forward = times[name, "forward"]
        backward = times.get((name, "backward")) or times[name, "both"] - forward
        cells = [(forward, operations), (backward, 2.5 * operations)]
        forward, backward = (f"{us:8.1f} ({flops / us / 1e6:4.0f})" for us, flops in cells)
        print(f"  {name:8s} forward {forward}  backward {backward}", flush=True)
