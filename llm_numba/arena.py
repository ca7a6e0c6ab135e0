"""One block of memory for everything, and every tensor a view of it.

A tensor is one TensorSpec line. `layout` turns groups of them into offsets, without allocating anything; `Arena` makes
the one allocation and the views. After it a training step allocates nothing.

A plan decides what shares memory. Tensors that name the same slot in `shares` are never needed at the same time:
the plan "reuse" lays them over one another, and one buffer serves all layers; the plan "keep" gives each its own, so
that a whole step can be looked at afterwards. The code that runs the step is the same.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16
import numpy as np

from llm_numba.models.config import GPT2Config
from llm_numba.util.files import format_bytes

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
RUN = 64  # elements: a tensor is padded to whole runs, so that groups of different dtypes stay in step, run by run
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # --dtype -> how the arena calls it


class TensorSpec(NamedTuple):
    """A tensor's line in a list; shape is that of one layer where there is one for each layer.

    The dtype "model" stands for the precision of the run, which `in_precision` puts in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "model"
    per_layer: bool = False
    shares: str = ""  # the slot it lives in under the plan "reuse"
    rows: int = 0  # under the plan "reuse" there is memory for so many of its rows (b, t) at a time; 0: for all
    std: float = 0.0  # parameters: drawn from a normal distribution of this deviation ...
    fill: float = 0.0  # ... or, where that is 0, set to this value
    decays: bool = False  # parameters: weight decay applies


class Place(NamedTuple):
    """Where a tensor stands in the arena; shape has the layers in front where each has its own."""

    group: str
    spec: TensorSpec
    shape: tuple[int, ...]
    stacked: bool
    offset: int  # bytes
    nbytes: int


Groups = dict[str, list[TensorSpec]]


def parameter_specs(config: GPT2Config) -> list[TensorSpec]:
    """The parameters of GPT-2, in llm.c's order. The projections into the residual stream start smaller, because
    2*L of them add up in it (Radford et al. 2019, section 2.3)."""
    maxT, Vp, C = config.max_seq_len, config.padded_vocab_size, config.channels
    residual_std = 0.02 / math.sqrt(2 * config.num_layers)
    each = dict(per_layer=True)
    return [
        TensorSpec("wte", (Vp, C), std=0.02, decays=True),
        TensorSpec("wpe", (maxT, C), std=0.02, decays=True),
        TensorSpec("ln1w", (C,), fill=1, **each),
        TensorSpec("ln1b", (C,), **each),
        TensorSpec("qkvw", (3 * C, C), std=0.02, decays=True, **each),
        TensorSpec("qkvb", (3 * C,), **each),
        TensorSpec("attprojw", (C, C), std=residual_std, decays=True, **each),
        TensorSpec("attprojb", (C,), **each),
        TensorSpec("ln2w", (C,), fill=1, **each),
        TensorSpec("ln2b", (C,), **each),
        TensorSpec("fcw", (4 * C, C), std=0.02, decays=True, **each),
        TensorSpec("fcb", (4 * C,), **each),
        TensorSpec("fcprojw", (C, 4 * C), std=residual_std, decays=True, **each),
        TensorSpec("fcprojb", (C,), **each),
        TensorSpec("lnfw", (C,), fill=1),
        TensorSpec("lnfb", (C,)),
    ]


def activation_specs(config: GPT2Config, B: int, T: int, recompute: str = "none") -> list[TensorSpec]:
    """What a forward pass writes, in its order.

    recompute: what the backward pass computes again from what it is made of, so that all layers can share it.
    """
    C, Vp = config.channels, config.padded_vocab_size
    each = dict(per_layer=True)
    exact = dict(dtype="float32")
    normed = dict(shares="normed" if "layernorm" in recompute else "")
    gelu = dict(shares="gelu" if "gelu" in recompute else "")
    return [
        TensorSpec("encoded", (B, T, C)),
        TensorSpec("ln1", (B, T, C), **each, **normed),
        TensorSpec("ln1_mean", (B, T), **each, **exact),
        TensorSpec("ln1_rstd", (B, T), **each, **exact),
        TensorSpec("qkv", (B, T, 3 * C), **each),
        TensorSpec("lse", (B, config.num_heads, T), **each, **exact),
        TensorSpec("atty", (B, T, C), **each),
        TensorSpec("attproj", (B, T, C), shares="branch", **each),
        TensorSpec("residual2", (B, T, C), **each),
        TensorSpec("ln2", (B, T, C), **each, **normed),
        TensorSpec("ln2_mean", (B, T), **each, **exact),
        TensorSpec("ln2_rstd", (B, T), **each, **exact),
        TensorSpec("fch", (B, T, 4 * C), **each),
        TensorSpec("fch_gelu", (B, T, 4 * C), **each, **gelu),
        TensorSpec("fcproj", (B, T, C), shares="branch", **each),
        TensorSpec("residual3", (B, T, C), **each),
        TensorSpec("lnf", (B, T, C)),
        TensorSpec("lnf_mean", (B, T), **exact),
        TensorSpec("lnf_rstd", (B, T), **exact),
        TensorSpec("logits", (B, T, Vp), rows=logits_rows(B * T)),
        TensorSpec("losses", (B, T), **exact),
    ]


def logits_rows(rows: int) -> int:
    """Of this many rows (b, t), how many have their logits in memory at a time: a quarter, but at least 1024."""
    return min(rows, max(1024, padded(-(-rows // 4))))


def activation_gradient_specs(config: GPT2Config, B: int, T: int) -> list[TensorSpec]:
    """What a backward pass writes, in its order. The gradient of logits is not here: it replaces the logits."""
    C = config.channels
    each = dict(per_layer=True)
    return [
        TensorSpec("dlnf", (B, T, C), shares="dbranch"),
        TensorSpec("dresidual3", (B, T, C), shares="dstream", **each),
        TensorSpec("dfch_gelu", (B, T, 4 * C), shares="dwide", **each),
        TensorSpec("dfch", (B, T, 4 * C), shares="dfch", **each),
        TensorSpec("dln2", (B, T, C), shares="dbranch", **each),
        TensorSpec("dresidual2", (B, T, C), shares="dstream", **each),
        TensorSpec("datty", (B, T, C), shares="dbranch", **each),
        TensorSpec("dqkv", (B, T, 3 * C), shares="dwide", **each),
        TensorSpec("dln1", (B, T, C), shares="dbranch", **each),
        TensorSpec("dencoded", (B, T, C), shares="dstream"),
    ]


def input_specs(B: int, T: int, micro_batches: int, runs: int) -> list[TensorSpec]:
    """What a step is given, the numbers that change from step to step among it, and the two that it reports.

    runs: the parameters of the model, in runs of RUN.
    """
    return [
        TensorSpec("batches", (micro_batches, 2, B, T), "int32"),  # tokens and targets
        TensorSpec("tokens", (B, T), "int32"),
        TensorSpec("targets", (B, T), "int32"),
        TensorSpec("decays", (runs,), "uint8"),
        TensorSpec("learning_rate", (1,), "float32"),
        TensorSpec("step", (1,), "int32"),
        TensorSpec("seed", (1,), "int32"),
        TensorSpec("limits", (2,), "float64"),  # the loss and the gradients' norm above which no update is made
        TensorSpec("grad_scale", (1,), "float32"),
        TensorSpec("loss", (1,), "float64"),
        TensorSpec("grad_norm_squared", (1,), "float64"),
    ]


def training_groups(
    config: GPT2Config,
    B: int,
    T: int,
    backend: SimpleNamespace,
    dtype: str = "float32",
    master: bool = False,
    micro_batches: int = 1,
    recompute: str = "none",
) -> Groups:
    """Everything that training needs, group by group.

    dtype: of the parameters and activations; master: keep the parameters in float32 too; recompute: "none", "gelu" or
    "gelu+layernorm".
    """
    parameters = parameter_specs(config)
    exact = [spec._replace(dtype="float32") for spec in parameters]
    groups = {
        "parameters": parameters,
        "master": exact if master else [],
        "gradients": [spec._replace(name="d" + spec.name) for spec in exact],
        "m": exact,
        "v": exact,
        "activations": activation_specs(config, B, T, recompute),
        "activation gradients": activation_gradient_specs(config, B, T),
        "inputs": input_specs(B, T, micro_batches, count(parameters, config.num_layers) // RUN),
        "scratch": [TensorSpec("scratch", (backend.scratch_size(config, B, T),), "float32")],
    }
    return in_precision(groups, dtype)


def in_precision(groups: Groups, dtype: str) -> Groups:
    """The groups with `dtype` for every tensor that is in the precision of the run."""
    return {
        group: [spec._replace(dtype=dtype) if spec.dtype == "model" else spec for spec in specs]
        for group, specs in groups.items()
        if specs
    }


def count(specs: list[TensorSpec], L: int) -> int:
    """The elements that these tensors take in the arena, each padded to whole runs."""
    return sum(padded(math.prod(spec.shape) * (L if spec.per_layer else 1)) for spec in specs)


def padded(elements: int) -> int:
    return -(-elements // RUN) * RUN


def layout(groups: Groups, L: int, plan: str) -> tuple[list[Place], int]:
    """Where each tensor stands, and the bytes of the whole, for L layers under a plan ("keep" or "reuse")."""
    places, slots, end = [], {}, 0

    def nbytes_of(shape, dtype):
        return padded(math.prod(shape)) * np.dtype(dtype).itemsize

    shared = [s for specs in groups.values() for s in specs if s.shares and plan == "reuse"]
    slot_sizes = {s.shares: max(nbytes_of(o.shape, o.dtype) for o in shared if o.shares == s.shares) for s in shared}
    for group, specs in groups.items():
        for spec in specs:
            shares = spec.shares if plan == "reuse" else ""
            stacked = spec.per_layer and not shares
            shape = (L, *spec.shape) if stacked else spec.shape
            if plan == "reuse" and 0 < spec.rows < math.prod(spec.shape[:2]):
                shape = (1, spec.rows, *spec.shape[2:])
            nbytes = slot_sizes[shares] if shares else nbytes_of(shape, spec.dtype)
            if shares in slots:
                places.append(Place(group, spec, shape, stacked, slots[shares], 0))
                continue
            if shares:
                slots[shares] = end
            places.append(Place(group, spec, shape, stacked, end, nbytes))
            end += nbytes
    return places, end


class Arena:
    """The allocation of a layout, zeroed, with a view of each tensor."""

    def __init__(self, groups: Groups, config: GPT2Config, plan: str, backend: SimpleNamespace):
        self.config, self.plan, self.backend = config, plan, backend
        self.places, self.nbytes = layout(groups, config.num_layers, plan)
        self.memory = backend.allocate(self.nbytes)
        self._views = {}
        self.tensors = {(p.group, p.spec.name): self._view(p.offset, p.shape, p.spec.dtype) for p in self.places}

    def _view(self, offset, shape, dtype):
        """Tensors of one place and shape are one object, so that an op can see that it would copy onto itself."""
        key = (offset, shape, dtype)
        if key not in self._views:
            self._views[key] = self.backend.view(self.memory, offset, shape, dtype)
        return self._views[key]

    def named(self, group: str) -> dict:
        """The tensors of a group by name."""
        return {name: tensor for (owner, name), tensor in self.tensors.items() if owner == group}

    def flat(self, name: str):
        """A whole group of parameters or what belongs to them as one flat array, or None where there is none; the few
        elements between two tensors stay 0."""
        places = [p for p in self.places if p.group == name]
        if not places:
            return None
        specs = [p.spec for p in places]
        return self._view(places[0].offset, (count(specs, self.config.num_layers),), specs[0].dtype)

    def namespace(self, *groups: str) -> SimpleNamespace:
        """The tensors of these groups by name, and `layers`: for each layer its own views by the same names.

        A layer also has `inp` and `dinp`, the residual stream as it comes in and its gradient, and `next`, the
        LayerNorm behind it: out, mean, rstd, weight and bias of the next layer's ln1, or of lnf. `blocks` are the rows
        whose logits are in memory together.
        """
        places = [p for p in self.places if p.group in groups]
        whole = {p.spec.name: self.tensors[p.group, p.spec.name] for p in places}
        layers = []
        for l in range(self.config.num_layers):
            views = {}
            for p in places:
                if p.spec.per_layer:
                    tensor = whole[p.spec.name]
                    views[p.spec.name] = tensor[l] if p.stacked else tensor
            views["inp"] = layers[-1].residual3 if l else whole["encoded"]
            views["dinp"] = layers[-1].dresidual3 if l and "dresidual3" in whole else whole.get("dencoded")
            layers.append(SimpleNamespace(**views))
        for l, layer in enumerate(layers):
            name, owner = ("ln1", vars(layers[l + 1])) if l + 1 < len(layers) else ("lnf", whole)
            parts = {"out": "", "mean": "_mean", "rstd": "_rstd", "weight": "w", "bias": "b"}
            layer.next = SimpleNamespace(**{part: owner.get(name + end) for part, end in parts.items()})
        m = SimpleNamespace(**whole, layers=layers, num_heads=self.config.num_heads)
        m.blocks = self._blocks(m, {p.spec.name: p for p in places})
        return m

    def training(self, recompute: str = "none") -> SimpleNamespace:
        """The namespace of a training step: with the groups of `training_groups`, `flat` views of those that belong to
        the parameters, `micro_batches` (the (tokens, targets) of each), and what the backward pass is to recompute."""
        m = self.namespace("parameters", "gradients", "activations", "activation gradients", "inputs", "scratch")
        m.flat = SimpleNamespace(**{name: self.flat(name) for name in ("parameters", "master", "gradients", "m", "v")})
        m.micro_batches = [(m.batches[i, 0], m.batches[i, 1]) for i in range(m.batches.shape[0])]
        m.recompute = recompute
        places = [p for p in self.places if p.group == "parameters"]
        decays = np.repeat([p.spec.decays for p in places], [padded(math.prod(p.shape)) // RUN for p in places])
        self.backend.to_device(m.decays, decays)
        return m

    def _blocks(self, m: SimpleNamespace, places: dict[str, Place]) -> list[SimpleNamespace]:
        """For each run of rows whose logits are computed together, their views of logits, losses, targets, lnf, dlnf,
        those that m has: m itself where all rows are one run."""
        if not {"logits", "tokens"} <= places.keys():
            return []
        rows, step = m.tokens.size, places["logits"].spec.rows
        if rows == step:
            return [m]

        def view(name, first, last):
            p = places[name]
            skipped = 0 if p.spec.rows and self.plan == "reuse" else first
            offset = p.offset + skipped * math.prod(p.spec.shape[2:]) * np.dtype(p.spec.dtype).itemsize
            return self._view(offset, (1, last - first, *p.spec.shape[2:]), p.spec.dtype)

        names = places.keys() & {"logits", "losses", "targets", "lnf", "dlnf"}
        runs = [(first, min(first + step, rows)) for first in range(0, rows, step)]
        return [SimpleNamespace(**{name: view(name, *run) for name in names}) for run in runs]


def format_map(places: list[Place], nbytes: int) -> str:
    """The arena as a table: tensor, shape, dtype, offset, bytes and share of the whole, with a sum for each group."""
    lines = []
    for group in dict.fromkeys(p.group for p in places):
        mine = [p for p in places if p.group == group]
        total = sum(p.nbytes for p in mine)
        lines.append(f"{group}: {format_bytes(total)}, {total / nbytes:.1%}")
        for p in mine:
            shape = " x ".join(map(str, p.shape))
            size = f"{p.nbytes:>15,} {p.nbytes / nbytes:7.2%}" if p.nbytes else f"  shares {p.spec.shares}"
            lines.append(f"  {p.spec.name:<18} {shape:<26} {p.spec.dtype:<8} at {p.offset:>15,} {size}")
    lines.append(f"whole arena: {nbytes:,} bytes = {format_bytes(nbytes)}")
    return "\n".join(lines)
