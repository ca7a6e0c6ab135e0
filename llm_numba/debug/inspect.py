"""Look inside one step: llm-numba inspect RUN_OR_PRESET

Runs one batch forward and backward with every tensor in its own memory, and prints statistics of each. A tensor's name
starts with its layer if there is one per layer: encoded, 3.qkv, 3.dqkv.
"""

import difflib
from collections.abc import Callable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm_numba.arena import DTYPES, Arena, Groups, layout
from llm_numba.data.loader import Loader
from llm_numba.models import Model, preset, presets
from llm_numba.ops import Ops, choose_device, device_flags, get_ops
from llm_numba.training.checkpoint import open_checkpoint
from llm_numba.training.memory_plan import complete, training_groups
from llm_numba.training.run_data import data_of
from llm_numba.training.step import set_parameter
from llm_numba.util.cli import Parser, UserError, exit_with
from llm_numba.util.files import format_bytes

HEADER = "{:<16} {:<20} {:>11} {:>10} {:>11} {:>11} {:>7} {:>11}".format(
    "tensor", "shape", "mean", "std", "min", "max", "zeros", "not finite")  # fmt: skip
Named = Iterator[tuple[str, str, np.ndarray]]  # (heading, name, tensor)


def one_batch(ops: Ops, arena: Arena, m) -> Named:
    """Run a step on m.tokens and m.targets, and yield everything it computes, in order.

    A tensor is yielded while it holds what its name says: the logits before their gradient, dlogits, replaces them.
    """
    model = arena.model
    model.forward(ops, m)
    model.loss(ops, m, write_dlogits=False)
    yield from tensors_of(ops, arena, "activations")
    model.loss(ops, m)
    model.backward(ops, m)
    if hasattr(m, "logits"):
        yield "activation gradients", "dlogits", ops.to_host(m.logits)
    yield from tensors_of(ops, arena, "activation gradients")
    yield from tensors_of(ops, arena, "gradients")


def tensors_of(ops: Ops, arena: Arena, group: str) -> Named:
    """The tensors of a group, those of the layers in the middle; gradients from the last layer to the first."""
    specs = [p.spec for p in arena.places if p.group == group]
    if group == "gradients":  # in the order of the parameters
        specs.reverse()
    layers = range(arena.model.num_layers)
    for per_layer, block in groupby(specs, key=lambda spec: spec.per_layer):
        tensors = {spec.name: ops.to_host(arena.tensors[group, spec.name]) for spec in block}
        if not per_layer:
            yield from ((group, name, tensor) for name, tensor in tensors.items())
        else:
            for l in reversed(layers) if group.endswith("gradients") else layers:
                yield from ((f"{group} of layer {l}", f"{l}.{name}", x[l]) for name, x in tensors.items())


def attention_weights(ops: Ops, arena: Arena, m) -> Named:
    """The weights of every attention call of a forward pass, (B, NH, T, T), of which training saves only `lse`."""
    weights = arena.tensors["attention weights", "weights"]
    found = []

    def attention(out, lse, *inputs):
        ops.attention_forward(out, lse, *inputs)
        ops.attention_weights(weights, lse, *inputs[:-1])  # without scratch
        found.append(("attention weights", f"{len(found)}.att", np.array(ops.to_host(weights))))

    arena.model.forward(ops.replace(attention_forward=attention), m)
    yield from found


def describe(name: str, tensor: np.ndarray) -> str:
    """One line: shape, mean, standard deviation, minimum and maximum of the finite elements; share of zeros; elements
    that are not finite."""
    finite = tensor[np.isfinite(tensor)].astype(np.float64)
    mean, std, low, high = (f(finite) if finite.size else np.nan for f in (np.mean, np.std, np.min, np.max))
    zeros, broken = np.mean(tensor == 0), tensor.size - finite.size
    shape = " x ".join(map(str, tensor.shape))
    numbers = f"{mean:>11.3e} {std:>10.3e} {low:>11.3e} {high:>11.3e} {zeros:>7.1%} {broken:>11,}"
    return f"{name:<16} {shape:<20} {numbers}" + ("   <---" if broken else "")


def save(tensor: np.ndarray, name: str, path: Path) -> None:
    """Write a tensor as .npy, or as a picture (.png) of the first sequence: rows by columns, heads side by side."""
    try:
        if path.suffix == ".npy":
            np.save(path, tensor)
        else:
            picture(tensor, name).savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"--save {name}={path}: cannot be written ({error.strerror})") from error


def picture(tensor: np.ndarray, name: str):
    """A matplotlib figure. Its colours leave out the largest 0.5% of the elements, which would hide the rest."""
    from matplotlib.figure import Figure

    flat = tensor[0] if tensor.ndim >= 3 else np.atleast_2d(tensor)
    panels = flat if flat.ndim == 3 else flat[None]
    finite = np.abs(panels[np.isfinite(panels)])
    bound = float(np.quantile(finite, 0.995) or finite.max()) if finite.any() else 1.0
    figure = Figure(figsize=(max(6, 3 * len(panels)), 5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for i, (axis, values) in enumerate(zip(axes, panels, strict=True)):
        image = axis.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto", interpolation="nearest")
        axis.set(xlabel="key" if len(panels) > 1 else "column", title=f"head {i}" if len(panels) > 1 else "")
    axes[0].set_ylabel("query" if len(panels) > 1 else "row")
    figure.suptitle(f"{name}  {' x '.join(map(str, tensor.shape))}")
    figure.colorbar(image, ax=axes.tolist())
    return figure


class Source(NamedTuple):
    """A model and a batch, before there is memory for them."""

    model: Model
    B: int
    T: int
    parameters: Iterator[tuple[str, np.ndarray]]
    read_batch: Callable[[], np.ndarray]  # (2, B, T): tokens and targets

    def fill(self, ops: Ops, arena: Arena, m) -> None:
        """Write the parameters, m.tokens and m.targets; once."""
        for name, values in self.parameters:
            set_parameter(ops, arena, name, values)
        for tensor, values in zip((m.tokens, m.targets), self.read_batch(), strict=True):
            ops.to_device(tensor, values)


def read_source(source: str, B: int, T: int, seed: int) -> Source:
    """A run folder or a checkpoint, with a batch of its data; or a preset, with random weights and tokens.

    T is 0 for that of the run, or the preset's context.
    """
    if source in presets():
        model = preset(source)
        parameters, context = model.initial_parameters(seed), model.max_seq_len
    elif Path(source).exists():
        stored = open_checkpoint(source)
        model, parameters = stored.model, stored.parameters()
        context = stored.settings.sequence_length or model.max_seq_len
    else:
        raise UserError(f"{source}: neither a run folder, a checkpoint nor a preset ({', '.join(presets())})")
    if not 0 <= T <= context:
        raise UserError(f"--sequence-length {T}: the context is {context}; give 1 to {context}")
    T = T or context

    def read_batch():
        if source in presets():
            windows = np.random.default_rng(seed).integers(0, model.vocab_size, (B, T + 1))
            return np.stack([windows[:, :-1], windows[:, 1:]])
        batch = np.empty((2, B, T), np.int32)
        Loader(data_of(stored).train, B, T, seed, True).next_batch(*batch)
        return batch

    return Source(model, B, T, parameters, read_batch)


def step_groups(source: Source, ops: Ops, dtype: str) -> Groups:
    """What a step needs up to its gradients."""
    groups = training_groups(source.model, source.B, source.T)
    del groups["m"], groups["v"]

    def program(ops, arena):
        m = arena.training()
        source.model.forward(ops, m)
        source.model.loss(ops, m)
        source.model.backward(ops, m)

    return complete(groups, source.model, ops, dtype, program)


def check_memory(source: Source, needed: int, ops: Ops) -> None:
    """Raise a UserError if `needed` bytes are not available."""
    available = ops.available_memory()
    if needed > available:
        raise UserError(
            f"--batch-size {source.B}: the tensors need {format_bytes(needed)}, but {format_bytes(available)} of "
            "memory are available; give a smaller --batch-size or --sequence-length, or a smaller model"
        )


def source_flags(parser: Parser) -> None:
    """Add the flags that choose the batch."""
    parser.number("--batch-size", 1, "sequences in the batch", least=1, metavar="B")
    parser.number("--sequence-length", 0, "tokens in each; 0: as the run", metavar="T")
    parser.number("--seed", 42, "which batch, and which random weights", metavar="N")


def parse_save(text: str) -> tuple[str, Path]:
    """TENSOR=FILE as (tensor, file)."""
    name, equals, file = text.partition("=")
    if not equals or Path(file).suffix not in (".npy", ".png"):
        raise UserError(f"--save {text}: expected TENSOR=FILE with FILE ending in .npy or .png")
    return name, Path(file)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="llm-numba inspect", description="Run one batch forward and backward, and print statistics of "
                    "every activation and gradient.")  # fmt: skip
    parser.add_argument("source", metavar="RUN_OR_PRESET", help="a run folder or a checkpoint, with a batch of its "
                        "data; or a preset, with random weights and tokens")  # fmt: skip
    source_flags(parser)
    device_flags(parser, "dtype")
    parser.add_argument("--save", action="append", type=parse_save, default=[], metavar="TENSOR=FILE",
                        help="write a tensor to FILE.npy or, as a picture, to FILE.png, such as 0.att=att.png (the "
                        "attention weights of layer 0) or tokens=tokens.npy; repeatable")  # fmt: skip
    args = parser.parse_args(argv)
    ops = get_ops(choose_device(args.device), args.dtype)
    source = read_source(args.source, args.batch_size, args.sequence_length, args.seed)
    groups = step_groups(source, ops, DTYPES[args.dtype])
    lse = next((spec for spec in groups["activations"] if spec.name == "lse"), None)
    if lse:
        groups["attention weights"] = [lse._replace(name="weights", shape=(*lse.shape, source.T), per_layer=False)]
    check_memory(source, layout(groups, source.model.num_layers, "keep")[1], ops)
    wanted = dict(args.save)
    known = tensor_names(groups, source.model.num_layers)
    for name in wanted.keys() - known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--save {name}={wanted[name]}: no such tensor{hint}")

    arena = Arena(groups, source.model, "keep", ops)
    m = arena.training()
    source.fill(ops, arena, m)
    batch = (("batch", name, ops.to_host(getattr(m, name))) for name in ("tokens", "targets"))
    weights = attention_weights(ops, arena, m) if lse else ()
    heading = None
    for part, name, tensor in chain(batch, tensors_of(ops, arena, "parameters"), one_batch(ops, arena, m), weights):
        if part != heading:
            print(f"\n{part}\n{HEADER}")
            heading = part
        print(describe(name, tensor))
        if name in wanted:
            save(tensor, name, wanted[name])
    print(f"\nloss {float(np.mean(ops.to_host(m.losses), dtype=np.float64)):.4f}")


def tensor_names(groups: Groups, L: int) -> set[str]:
    """The names of the tensors that the command prints."""
    names = {"tokens", "targets", "dlogits"}
    for group in "parameters", "activations", "activation gradients", "gradients":
        for spec in groups[group]:
            names |= {f"{l}.{spec.name}" for l in range(L)} if spec.per_layer else {spec.name}
    return names | {f"{l}.att" for l in range(L) if "attention weights" in groups}


if __name__ == "__main__":
    exit_with(main)
