"""Check and time every variant of the ops that have several, on a GPU: python -m llm_numba.bench.variants [--help]

Every product of a GPT-2's training step, in the step's order, each layer with tensors of its own, is captured in a CUDA
graph. The graphs of the variants take turns; the medians are compared with cuBLAS (through PyTorch, if it is
installed), whose graph has the products alone: no bias, GELU or bias gradients. Attention: see attention_variants.py.
"""

import argparse
import functools
import importlib
import statistics
import time
from importlib.util import find_spec
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from llm_numba.models.gpt2 import GPT2, logits_rows

# R, C, OC of the checks: around the tiles of 128 x 256 and 128 x 192 and the steps of 32 and 64, and split K
AWKWARD = [(1, 8, 8), (200, 72, 200), (328, 136, 264), (1000, 520, 392), (4096, 768, 768), (8192, 200, 768)]
POOL = 1 << 22  # random values; larger tensors repeat them
RNG = np.random.default_rng(0)


class Product(SimpleNamespace):
    """One product of a step: way (forward, dinp, dweight), sizes, its tensors, and how often a step runs it."""


def random_tensor(shape):
    """bf16 on the GPU: the pool, from a random place on."""
    from llm_numba.cuda import memory

    size, offset = int(np.prod(shape)), int(RNG.integers(POOL // 8)) * 8
    tensor = memory.allocate(2 * size).view(np.uint16)
    for start in range(0, size, POOL):
        n = min(POOL, size - start)
        memory.copy(tensor[start : start + n], pool()[offset : offset + n])
    return tensor.reshape(*shape)


@functools.cache
def pool():
    """Twice POOL random values."""
    from numba import cuda

    return cuda.to_device(RNG.standard_normal(2 * POOL, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16))


def float32_tensor(*shape):
    from llm_numba.cuda import memory

    return memory.allocate(4 * int(np.prod(shape))).view(np.float32).reshape(*shape)


def layer_products(C, R):
    """The products of a layer, forward then backward: label, way, R, C, OC, with GELU."""
    shapes = {"qkv": (C, 3 * C), "attproj": (C, C), "fc": (C, 4 * C), "fcproj": (4 * C, C)}
    forward = [(f"{name} forward", "forward", R, *shape, name == "fc") for name, shape in shapes.items()]
    backward = []
    for name, shape in reversed(shapes.items()):
        backward += [
            (f"{name} dinp", "dinp", R, *shape, name == "fcproj"),
            (f"{name} dweight", "dweight", R, *shape, False),
        ]
    return forward, backward


def step_products(model: GPT2, R: int) -> list[Product]:
    """All products of a step in order, with their tensors."""
    C, Vp, L = model.channels, model.padded_vocab_size, model.num_layers
    forward, backward = layer_products(C, R)
    rows = logits_rows(R)
    head = [(f"head {way}", way, rows, C, Vp, False) for way in ("forward", "dinp", "dweight")] * (R // rows)
    todo = forward * L + head + backward * L
    weights = {}
    products = []
    for label, way, rows_, in_, out, gelu in todo:
        with_bias = not label.startswith("head")
        again = not with_bias and label in weights  # the head's gradient is summed over pieces of the rows
        tensors = SimpleNamespace(inp=None, weight=None, bias=None, out=None, pre=None, dweight=None, dbias=None)
        if not again:
            tensors.inp, tensors.out = random_tensor((rows_, in_)), random_tensor((rows_, out))
            if way == "dweight":
                tensors.dweight = float32_tensor(out, in_)
                tensors.dbias = float32_tensor(out) if with_bias else None
            else:
                tensors.weight = random_tensor((out, in_))
                tensors.bias = random_tensor((out,)) if with_bias else None
                if gelu:
                    tensors.pre = random_tensor((rows_, out if way == "forward" else in_))
            weights[label] = tensors
        products.append(Product(label=label, way=way, R=rows_, C=in_, OC=out, t=weights[label], accumulate=again))
    return products


def run_product(variant, p, scratch):
    """The product by a variant, with everything fused that belongs to it."""
    t = p.t
    if p.way == "forward":
        variant.forward(t.out, t.inp, t.weight, t.bias, scratch, t.pre)
    elif p.way == "dinp":
        variant.input_gradient(t.inp, t.out, t.weight, scratch, t.pre)
    else:
        variant.weight_gradient(t.dweight, t.dbias, t.out, t.inp, scratch, p.accumulate)


def scratch_for(variant, products):
    sizes = [variant.forward_scratch(p.R, p.C, p.OC) for p in products if p.way == "forward"]
    sizes += [variant.backward_scratch(p.R, p.C, p.OC, p.t.dbias is not None) for p in products if p.way != "forward"]
    return float32_tensor(max(1, *sizes))


def graph_of(run):
    """A function that launches run's kernels as one CUDA graph and returns its milliseconds."""
    from numba import cuda

    from llm_numba.cuda import jit, memory

    launch = memory.capture(run)
    launch(), launch(), memory.synchronise()
    start, end = cuda.event(), cuda.event()

    def timed():
        start.record(jit.stream())
        launch()
        end.record(jit.stream())
        end.synchronize()
        return start.elapsed_time(end)

    return timed


def torch_graph_of(products):
    """The same for the products alone by cuBLAS."""
    import torch

    def wrap(x):
        return None if x is None else torch.as_tensor(x.view(np.int16), device="cuda").view(torch.bfloat16)

    calls = []
    for p in products:
        inp, out, weight = wrap(p.t.inp), wrap(p.t.out), wrap(p.t.weight)
        if p.way == "forward":
            calls.append((inp, weight.T, out))
        elif p.way == "dinp":
            calls.append((out, weight, inp))
        else:
            calls.append((out.T, inp, torch.empty(p.OC, p.C, dtype=torch.bfloat16, device="cuda")))
    for a, b, c in calls[:1]:
        torch.mm(a, b, out=c)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for a, b, c in calls:
            torch.mm(a, b, out=c)
        stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for a, b, c in calls:
            torch.mm(a, b, out=c)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed():
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return timed


def medians(contestants: dict, rounds: int) -> dict:
    """The median milliseconds of each, which take turns."""
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, timed in contestants.items():
            times[name].append(timed())
    return {name: statistics.median(found) for name, found in times.items()}


def check(name, variant):
    """Compare every product of a variant with float64; print the largest error relative to the largest result."""
    from llm_numba import oracle
    from llm_numba.cuda import memory

    for R, C, OC in AWKWARD:
        if reason := variant.supports(np.uint16, R, C, OC):
            print(f"  {name} {R} x {C} x {OC}: {reason}")
            continue
        inp, dout, weight, bias = (random_tensor(shape) for shape in ((R, C), (R, OC), (OC, C), (OC,)))
        pre, dweight, dbias = random_tensor((R, C)), float32_tensor(OC, C), float32_tensor(OC)
        x, dy, w, b, u = (memory.to_host(t).astype(np.float64) for t in (inp, dout, weight, bias, pre))
        size = max(variant.forward_scratch(R, C, OC), variant.backward_scratch(R, C, OC, True), 1)
        scratch = float32_tensor(size)

        def poisoned(*shape):
            tensor = memory.allocate(2 * int(np.prod(shape))).view(np.uint16).reshape(*shape)
            memory.to_device(tensor, np.nan)
            return tensor

        found = {}
        for _ in range(2):
            memory.to_device(scratch, np.nan)
            out, plain, act, dinp, dpre = (
                poisoned(R, OC),
                poisoned(R, OC),
                poisoned(R, OC),
                poisoned(R, C),
                poisoned(R, C),
            )
            variant.forward(out, inp, weight, bias, scratch)
            got = {"forward": (out, x @ w.T + b)}
            variant.forward(act, inp, weight, bias, scratch, plain)
            got["gelu"] = (act, None)
            variant.input_gradient(dinp, dout, weight, scratch)
            got["dinp"] = (dinp, dy @ w)
            variant.input_gradient(dpre, dout, weight, scratch, pre)
            expected = np.empty((R, C))
            oracle.gelu_backward(expected, u, dy @ w)
            got["dgelu"] = (dpre, expected)
            for accumulate in False, True:
                if not accumulate:
                    memory.to_device(dweight, np.nan), memory.to_device(dbias, np.nan)
                variant.weight_gradient(dweight, dbias, dout, inp, scratch, accumulate)
            variant.weight_gradient(dweight, None, dout, inp, scratch, True)
            got["dweight"], got["dbias"] = (dweight, 3 * dy.T @ x), (dbias, 2 * dy.sum(0))
            errors = {}
            for what, (tensor, expected) in got.items():
                values = memory.to_host(tensor).astype(np.float64)
                if what == "gelu":
                    expected = np.empty((R, OC))
                    oracle.gelu_forward(expected, memory.to_host(plain).astype(np.float64))
                errors[what] = float(np.abs(values - expected).max() / np.abs(expected).max())
                same = found.setdefault(what, values.tobytes()) == values.tobytes()
                limit = 1e-5 if what in ("dweight", "dbias") else 2**-8
                if not errors[what] < limit or not same:
                    print(f"  WRONG: {name} {what} {R} x {C} x {OC}: error {errors[what]:.1e}, same bits: {same}")
        print(f"  {name} {R} x {C} x {OC}: " + ", ".join(f"{what} {error:.0e}" for what, error in errors.items()))


def flops(p):
    return 2 * p.R * p.C * p.OC


def time_matmul(model: GPT2, B: int, T: int, names: list[str], rounds: int, per_product: bool):
    products = step_products(model, B * T)
    variants = {name: importlib.import_module(f"llm_numba.cuda.matmul_{name}") for name in names}
    scratch = {name: scratch_for(variant, products) for name, variant in variants.items()}

    def race(chosen, rounds):
        contestants = {
            name: graph_of(lambda v=variant, s=scratch[name]: [run_product(v, p, s) for p in chosen])
            for name, variant in variants.items()
        }
        if find_spec("torch"):
            contestants["cuBLAS"] = torch_graph_of(chosen)
        return medians(contestants, rounds)

    found = {"all": (race(products, rounds), sum(map(flops, products)))}
    if per_product:
        for label in dict.fromkeys(p.label for p in products):
            same = [p for p in products if p.label == label]
            times = {name: ms / len(same) for name, ms in race(same, rounds).items()}
            found[label] = times, flops(same[0])
    columns = list(found["all"][0])
    print(f"\nproducts of a step, {B} x {T}: milliseconds (TFLOP/s)")
    for label, (times, operations) in found.items():
        cells = "".join(f"{name} {times[name]:8.3f} ({operations / times[name] / 1e9:4.0f})  " for name in columns)
        print(f"  {label:16s} {cells}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d12", help="a preset of GPT-2 (default: d12)")
    parser.add_argument("--shapes", default="4x1024,32x1024", help="B x T of a step (default: 4x1024,32x1024)")
    parser.add_argument("--families", default="matmul,attention", help="separated by commas (default: all)")
    parser.add_argument("--variants", default="", help="of each family, separated by commas (default: all)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--total-only", action="store_true", help="do not time each product by itself")
    args = parser.parse_args(argv)
    from llm_numba.bench import attention_variants
    from llm_numba.cuda.variants import FAMILIES

    model, shapes = GPT2.PRESETS[args.model], [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    for family in args.families.split(","):
        names = args.variants.split(",") if args.variants else list(FAMILIES[family])
        if not args.no_check:
            print(f"\n{family}: errors against float64", flush=True)
            for name in names:
                start = time.perf_counter()
                variant = importlib.import_module(f"llm_numba.cuda.{family}_{name}")
                (check if family == "matmul" else attention_variants.check)(name, variant)
                print(f"  {name}: {time.perf_counter() - start:.1f} s with compilation", flush=True)
        for B, T in shapes:
            if family == "matmul":
                time_matmul(model, B, T, names, args.rounds, not args.total_only)
            else:
                attention_variants.time_attention(model, B, T, names, args.rounds)
    return 0


if __name__ == "__main__":
    main()
