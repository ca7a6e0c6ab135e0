"""One block of memory for everything, and every tensor a view of it.

A tensor is described by one TensorSpec. `layout` turns groups of specs into offsets without allocating anything.
`Arena` makes the one allocation and the views. After that a training step allocates nothing.

A plan decides what shares memory. Tensors that name the same slot in `shares` are never needed at the same time. The
plan "reuse" lays them over one another, so one buffer serves all layers. The plan "keep" gives each tensor its own
memory, so that a debugger can look at a whole step afterwards. The code that runs the step is the same.
"""

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np

from llm_numba.util.files import format_bytes

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
RUN = 64  # elements: tensors are padded to a multiple, so groups of different dtypes have the same element offsets
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # --dtype -> dtype of the arena


class TensorSpec(NamedTuple):
    """The description of a tensor; `shape` is that of one layer if the tensor exists once per layer.

    The dtype "model" stands for the precision of the run, which `in_precision` fills in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "model"
    per_layer: bool = False
    shares: str = ""  # the slot it occupies under the plan "reuse"
    rows: int = 0  # under the plan "reuse", memory holds this many of its (b, t) rows at a time; 0: all of them
    std: float = 0.0  # parameters: initialised from a normal distribution with this standard deviation ...
    fill: float = 0.0  # ... or, if std is 0, to this value
    decays: bool = False  # parameters: weight decay applies


class Place(NamedTuple):
    """Where a tensor lies in the arena; `shape` starts with the layers if each layer has its own memory."""

    group: str
    spec: TensorSpec
    shape: tuple[int, ...]
    stacked: bool
    offset: int  # bytes
    nbytes: int


class Block(NamedTuple):
    """Neighbours in the arena that are copied to or from the host together."""

    device: Any  # their memory, as bytes
    host: np.ndarray  # as many bytes on the host
    tensors: dict[str, np.ndarray]  # views of `host`


Groups = dict[str, list[TensorSpec]]


def in_precision(groups: Groups, dtype: str) -> Groups:
    """The groups, with `dtype` for every tensor in the precision of the run."""
    return {
        group: [spec._replace(dtype=dtype) if spec.dtype == "model" else spec for spec in specs]
        for group, specs in groups.items()
        if specs
    }


def count(specs: list[TensorSpec], L: int) -> int:
    """The elements that these tensors occupy in the arena, each padded to a multiple of RUN."""
    return sum(padded(math.prod(spec.shape) * (L if spec.per_layer else 1)) for spec in specs)


def padded(elements: int) -> int:
    return -(-elements // RUN) * RUN


def layout(groups: Groups, L: int, plan: str) -> tuple[list[Place], int]:
    """(the place of each tensor, total bytes), for L layers under a plan ("keep" or "reuse")."""
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
            offset, own = (slots[shares], 0) if shares in slots else (end, nbytes)
            if shares:
                slots[shares] = offset
            places.append(Place(group, spec, shape, stacked, offset, own))
            end += own
    return places, end


class Arena:
    """The allocation of a layout, zeroed, with a view of each tensor.

    model: gives the number of layers, and wires the namespaces of its tensors (`models.Model`).
    """

    def __init__(self, groups: Groups, model, plan: str, backend):
        self.model, self.plan, self.backend = model, plan, backend
        self.places, self.nbytes = layout(groups, model.num_layers, plan)
        self.memory = backend.allocate(self.nbytes)
        self._views = {}
        self.tensors = {(p.group, p.spec.name): self._view(p.offset, p.shape, p.spec.dtype) for p in self.places}

    def _view(self, offset, shape, dtype):
        """Tensors with the same place and shape are one object, so an op can see that it would copy onto itself."""
        key = (offset, shape, dtype)
        if key not in self._views:
            self._views[key] = self.backend.view(self.memory, offset, shape, dtype)
        return self._views[key]

    def named(self, group: str) -> dict:
        """The tensors of a group by name."""
        return {name: tensor for (owner, name), tensor in self.tensors.items() if owner == group}

    def flat(self, group: str):
        """A whole group of parameters, gradients or moments as one flat array, in which the padding between tensors
        stays 0, or None if the arena has no such group."""
        places = [p for p in self.places if p.group == group]
        size = (count([p.spec for p in places], self.model.num_layers),)
        return self._view(places[0].offset, size, places[0].spec.dtype) if places else None

    def block(self, group: str, first: str, last: str) -> Block:
        """The tensors of a group from `first` to `last`."""
        places = [p for p in self.places if p.group == group]
        names = [p.spec.name for p in places]
        places = places[names.index(first) : names.index(last) + 1]
        start, nbytes = places[0].offset, sum(p.nbytes for p in places)
        host = np.zeros(nbytes, np.uint8)

        def view(p):
            begin = p.offset - start
            return host[begin : begin + math.prod(p.shape) * np.dtype(p.spec.dtype).itemsize]

        tensors = {p.spec.name: view(p).view(p.spec.dtype).reshape(p.shape) for p in places}
        return Block(self._view(start, (nbytes,), "uint8"), host, tensors)

    def namespace(self, *groups: str) -> SimpleNamespace:
        """The tensors of these groups by name, wired by the model; beside them `layers`, a namespace per layer with the
        views of its tensors, `blocks`, a namespace per block of rows (see `_blocks`), and `recompute`, "none"."""
        places = [p for p in self.places if p.group in groups]
        m = SimpleNamespace(**{p.spec.name: self.tensors[p.group, p.spec.name] for p in places}, recompute="none")
        layer = {p.spec.name: (getattr(m, p.spec.name), p.stacked) for p in places if p.spec.per_layer}
        m.layers = [
            SimpleNamespace(**{name: x[l] if stacked else x for name, (x, stacked) in layer.items()})
            for l in range(self.model.num_layers)
        ]
        m.blocks = self._blocks(m, places)
        self.model.wire(m)
        return m

    def training(self, recompute: str = "none") -> SimpleNamespace:
        """The namespace of a training step (see `training_groups`), and beside its tensors:

        flat: the parameters, master weights, gradients and moments as flat arrays; micro_batches: the (tokens, targets)
        of each; recompute: what the backward pass computes again.
        """
        m = self.namespace("parameters", "gradients", "activations", "activation gradients", "inputs", "scratch")
        m.flat = SimpleNamespace(**{name: self.flat(name) for name in ("parameters", "master", "gradients", "m", "v")})
        m.micro_batches = [(m.batches[i, 0], m.batches[i, 1]) for i in range(m.batches.shape[0])]
        m.recompute = recompute
        places = [p for p in self.places if p.group == "parameters"]
        decays = np.repeat([p.spec.decays for p in places], [padded(math.prod(p.shape)) // RUN for p in places])
        self.backend.to_device(m.decays, decays)
        return m

    def _blocks(self, m: SimpleNamespace, places: list[Place]) -> list[SimpleNamespace]:
        """The blocks of rows (b, t) that a tensor with `rows` is computed in, each with its rows of every (B, T, ...)
        tensor that exists once. m itself is the only block if all rows fit into one."""
        limited = next((p.spec for p in places if p.spec.rows), None)
        if limited is None or limited.rows == math.prod(limited.shape[:2]):
            return [m]
        total = math.prod(limited.shape[:2])
        whole = {p.spec.name: p for p in places if not p.spec.per_layer and p.spec.shape[:2] == limited.shape[:2]}

        def view(p, first, last):
            skipped = 0 if p.spec.rows and self.plan == "reuse" else first
            offset = p.offset + skipped * math.prod(p.spec.shape[2:]) * np.dtype(p.spec.dtype).itemsize
            return self._view(offset, (1, last - first, *p.spec.shape[2:]), p.spec.dtype)

        runs = [(first, min(first + limited.rows, total)) for first in range(0, total, limited.rows)]
        return [SimpleNamespace(**{name: view(p, *run) for name, p in whole.items()}) for run in runs]


def format_map(places: list[Place], nbytes: int) -> str:
    """The arena as a table: tensor, shape, dtype, offset, bytes and share of the total, with a sum for each group."""
    lines = []
    for group in dict.fromkeys(p.group for p in places):
        members = [p for p in places if p.group == group]
        total = sum(p.nbytes for p in members)
        lines.append(f"{group}: {format_bytes(total)}, {total / nbytes:.1%}")
        for p in members:
            shape = " x ".join(map(str, p.shape))
            size = f"{p.nbytes:>15,} {p.nbytes / nbytes:7.2%}" if p.nbytes else f"  shares {p.spec.shares}"
            lines.append(f"  {p.spec.name:<18} {shape:<26} {p.spec.dtype:<8} at {p.offset:>15,} {size}")
    lines.append(f"whole arena: {nbytes:,} bytes = {format_bytes(nbytes)}")
    return "\n".join(lines)
