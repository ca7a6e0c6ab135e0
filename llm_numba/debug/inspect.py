"""Look inside one step: python -m llm_numba.debug.inspect RUN_OR_PRESET

Runs one batch forward and backward with every tensor in memory of its own, and prints what each holds. A tensor is
called by its name, behind its layer where there is one for each: encoded, 3.qkv, 3.dqkv.
"""

from collections.abc import Callable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm_numba.arena import DTYPES, Arena, Groups, training_groups
from llm_numba.data.loader import Loader
from llm_numba.formats.pretrained import of_checkpoint
from llm_numba.models import gpt2 as model
from llm_numba.models.config import PRESETS, GPT2Config
from llm_numba.ops import DEVICES, choose_device, get_ops
from llm_numba.train import MOMENTS, read_data
from llm_numba.training import checkpoint, settings
from llm_numba.training.memory_plan import check_memory
from llm_numba.util.cli import Parser, UserError, exit_with

HEADER = (
    f"{'tensor':<16} {'shape':<20} {'mean':>11} {'std':>10} {'min':>11} {'max':>11} {'zeros':>7} {'not finite':>11}"
)


def one_batch(ops, arena: Arena, m) -> Iterator[tuple[str, str, np.ndarray]]:
    """Run a step on m.tokens and m.targets, and give (heading, name, tensor) of all that it makes, in its order.

    A tensor is given when it holds what its name says: the logits before their gradient replaces them, as dlogits.
    """
    model.forward(ops, m)
    model.loss(ops, m, arena.config.vocab_size, write_dlogits=False)
    yield from tensors_of(ops, arena, "activations", without=("losses",))
    yield "loss", "losses", ops.to_host(m.losses)
    model.loss(ops, m, arena.config.vocab_size)
    model.backward(ops, m)
    yield "activation gradients", "dlogits", ops.to_host(m.logits)
    yield from tensors_of(ops, arena, "activation gradients")
    yield from tensors_of(ops, arena, "gradients")


def tensors_of(ops, arena: Arena, group: str, without=()) -> Iterator[tuple[str, str, np.ndarray]]:
    """(heading, name, tensor) of a group, the layers' own in the middle; gradients from the last layer to the first."""
    specs = [p.spec for p in arena.places if p.group == group and p.spec.name not in without]
    if group == "gradients":  # listed like the parameters
        specs.reverse()
    layers = range(arena.config.num_layers)
    for per_layer, block in groupby(specs, key=lambda spec: spec.per_layer):
        tensors = {spec.name: ops.to_host(arena.tensors[group, spec.name]) for spec in block}
        if not per_layer:
            yield from ((group, name, tensor) for name, tensor in tensors.items())
        else:
            for l in reversed(layers) if group.endswith("gradients") else layers:
                yield from ((f"{group} of layer {l}", f"{l}.{name}", x[l]) for name, x in tensors.items())


def describe(name: str, tensor: np.ndarray) -> str:
    """One line: shape, mean, standard deviation, extremes of the finite values; share of zeros; how many not finite."""
    finite = tensor[np.isfinite(tensor)].astype(np.float64)
    mean, std, low, high = (f(finite) if finite.size else np.nan for f in (np.mean, np.std, np.min, np.max))
    zeros, broken = np.mean(tensor == 0), tensor.size - finite.size
    shape = " x ".join(map(str, tensor.shape))
    numbers = f"{mean:>11.3e} {std:>10.3e} {low:>11.3e} {high:>11.3e} {zeros:>7.1%} {broken:>11,}"
    return f"{name:<16} {shape:<20} {numbers}" + ("   <---" if broken else "")


def save(tensor: np.ndarray, name: str, path: Path) -> None:
    """Write a tensor as .npy, or as a picture, .png: rows by columns, of the first sequence, heads side by side."""
    try:
        if path.suffix == ".npy":
            np.save(path, tensor)
        else:
            picture(tensor, name, path)
    except OSError as error:
        raise UserError(f"--save {name}={path}: cannot be written ({error.strerror})") from error


def picture(tensor: np.ndarray, name: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    flat = tensor[0] if tensor.ndim >= 3 else np.atleast_2d(tensor)
    panels = flat if flat.ndim == 3 else flat[None]
    finite = np.abs(panels[np.isfinite(panels)])
    bound = float(np.quantile(finite, 0.995)) if finite.any() else 1.0  # a few outliers would pale the rest
    bound = bound or float(finite.max())
    figure, axes = plt.subplots(
        1, len(panels), figsize=(max(6, 3 * len(panels)), 5), squeeze=False, sharey=True, layout="constrained"
    )
    for i, (axis, values) in enumerate(zip(axes[0], panels, strict=True)):
        image = axis.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto", interpolation="nearest")
        axis.set(xlabel="key" if len(panels) > 1 else "column", title=f"head {i}" if len(panels) > 1 else "")
    axes[0, 0].set_ylabel("query" if len(panels) > 1 else "row")
    figure.suptitle(f"{name}  {' x '.join(map(str, tensor.shape))}")
    figure.colorbar(image, ax=axes[0].tolist())
    figure.savefig(path, dpi=120)
    plt.close(figure)


class Source(NamedTuple):
    """A model and a batch, before there is memory for them."""

    config: GPT2Config
    B: int
    T: int
    fill: Callable  # (ops, arena, m): writes the parameters and m.tokens and m.targets


def read_source(source: str, B: int, T: int, seed: int) -> Source:
    """A run folder or a checkpoint, with a batch of its data; or a preset, with random weights and tokens.

    T is 0 for that of the run, or the preset's context.
    """
    if source in PRESETS:
        config = PRESETS[source]
        T = length(T, config.max_seq_len)

        def fill(ops, arena, m):
            model.initialise(ops, arena, seed)
            batch = np.random.default_rng(seed).integers(0, config.vocab_size, (B, T + 1))
            ops.to_device(m.tokens, batch[:, :-1])
            ops.to_device(m.targets, batch[:, 1:])

        return Source(config, B, T, fill)

    path = Path(source)
    if not path.exists():
        raise UserError(f"{source}: neither a run folder, a checkpoint nor a preset ({', '.join(PRESETS)})")
    path = checkpoint.newest(path) if path.is_dir() else path
    stored = checkpoint.load(path)
    config = checkpoint.sizes_of(path, *stored[:2])
    s = settings.from_record(stored[1]["settings"], path)
    weights, tensors = of_checkpoint(*stored), stored[0]
    T = length(T, s.sequence_length or config.max_seq_len)

    def fill(ops, arena, m):
        for name in arena.named("parameters"):
            model.set_parameter(ops, arena, name, tensors[name])
        batch = np.empty((2, B, T), np.int32)
        Loader(read_data(s, config, weights).train, B, T, seed, True).next_batch(*batch)
        ops.to_device(m.tokens, batch[0])
        ops.to_device(m.targets, batch[1])

    return Source(config, B, T, fill)


def length(T: int, context: int) -> int:
    if not 0 <= T <= context:
        raise UserError(f"--sequence-length {T}: the context is {context}; give 1 to {context}")
    return T or context


def step_groups(source: Source, ops, attention: str, dtype: str) -> Groups:
    """What a step needs up to its gradients; arguments as for training_groups."""
    groups = training_groups(source.config, source.B, source.T, ops, attention, dtype)
    return {group: specs for group, specs in groups.items() if group not in MOMENTS}


def add_source_flags(parser: Parser) -> None:
    """The flags that choose the batch."""
    parser.add_argument("--batch-size", type=int, default=1, metavar="B", help="sequences in the batch (default: 1)")
    parser.add_argument(
        "--sequence-length", type=int, default=0, metavar="T", help="tokens in each (default: as the run)"
    )
    parser.add_argument("--seed", type=int, default=42, help="which batch, and which random weights (default: 42)")


def check_source_flags(args) -> None:
    for flag, value, lowest in ("--batch-size", args.batch_size, 1), ("--seed", args.seed, 0):
        if value < lowest:
            raise UserError(f"{flag} {value}: must be at least {lowest}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="llm-numba inspect",
        description="Run one batch forward and backward, and print what every activation and gradient holds.",
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_PRESET",
        help="a run folder or a checkpoint, with a batch of its data; or a preset, with random weights and tokens",
    )
    add_source_flags(parser)
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="auto: a CUDA card, or else the CPU (default)",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 needs a CUDA card")
    parser.add_argument(
        "--save",
        action="append",
        default=[],
        metavar="TENSOR=FILE",
        help="write a tensor to FILE.npy or, as a picture, to FILE.png, such as 0.att=att.png; may be given repeatedly",
    )
    args = parser.parse_args(argv)
    check_source_flags(args)
    wanted = {}
    for value in args.save:
        name, equals, file = value.partition("=")
        if not equals or Path(file).suffix not in (".npy", ".png"):
            raise UserError(f"--save {value}: expected TENSOR=FILE with FILE ending in .npy or .png")
        wanted[name] = Path(file)

    ops = get_ops(choose_device(args.device), args.dtype)
    source = read_source(args.source, args.batch_size, args.sequence_length, args.seed)
    groups = step_groups(source, ops, "keep", DTYPES[args.dtype])
    s = settings.Settings(batch_size=source.B, sequence_length=source.T, dtype=args.dtype, no_jit=True)
    check_memory(groups, s, source.config, ops)
    arena = Arena(groups, source.config, "keep", ops)
    m = arena.training()
    source.fill(ops, arena, m)
    shown, names = None, set()
    for heading, name, tensor in chain(tensors_of(ops, arena, "parameters"), one_batch(ops, arena, m)):
        if heading != shown:
            print(f"\n{heading}\n{HEADER}")
            shown = heading
        print(describe(name, tensor))
        names.add(name)
        if name in wanted:
            save(tensor, name, wanted[name])
    missing = wanted.keys() - names
    if missing:
        raise UserError(f"--save {missing.pop()}=...: no such tensor; the table above has their names")
    print(f"\nloss {float(np.mean(ops.to_host(m.losses), dtype=np.float64)):.4f}")


if __name__ == "__main__":
    exit_with(main)
