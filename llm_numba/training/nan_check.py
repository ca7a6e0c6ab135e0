"""--check-finite: stop at the first value that is nan or infinite, and say where it is."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from llm_numba.arena import Arena
from llm_numba.ops import CONTRACT, WRITES, Ops
from llm_numba.training import checkpoint
from llm_numba.training.override import parameters_of
from llm_numba.util.cli import UserError


class NotFinite(UserError):
    """The first value that is nan or infinite, and where it is."""


def bad_step_path(folder: Path) -> Path:
    """Where a run folder keeps the step that --check-finite stopped."""
    return folder / "bad_step.safetensors"


def save_bad_step(folder: Path, inputs: dict, tensors: dict[str, np.ndarray], record: dict) -> None:
    """Write everything that the step started from: the content of a checkpoint from before it, and its inputs."""
    scalars = {name: value for name, value in inputs.items() if name != "batches"}
    checkpoint.save(bad_step_path(folder), tensors | {"batches": inputs["batches"]}, record | {"inputs": scalars})


def tensor_names(m: SimpleNamespace) -> dict[int, str]:
    """id of a view in the namespace m -> "layer 3 qkv". A view has one name only under the plan "keep"."""
    names = {id(tensor): name for block in m.blocks for name, tensor in vars(block).items()}
    for l, layer in enumerate(m.layers):
        names |= {id(x): f"layer {l} {name}" for name, x in vars(layer).items() if name not in ("inp", "dinp")}
    return names | {id(tensor): name for name, tensor in vars(m).items()}


def checked(ops: Ops, production: Ops, m: SimpleNamespace, arena: Arena, state) -> Ops:
    """The same ops, each followed by a check of what it wrote. state.step counts the updates so far.

    production: the ops whose parameters have the names of the contract; those of --use may have others.
    """
    names = tensor_names(m)
    parts = {}  # a flat view of a group stands for the tensors of the group
    for group, flat in vars(m.flat).items():
        prefix = "" if group == "parameters" else f"{group} of "
        parts[id(flat)] = [(prefix + name, tensor) for name, tensor in arena.named(group).items()]

    def follow(op_name, op):
        parameters = parameters_of(getattr(production, op_name))
        written = [parameters.index(name) for name in WRITES[op_name]]

        def call(*arguments):
            op(*arguments)
            for argument in (arguments[i] for i in written if arguments[i] is not None):
                for name, tensor in parts.get(id(argument), [(names.get(id(argument), op_name), argument)]):
                    check(ops.to_host(tensor), op_name, name)

        return call

    def check(tensor, op_name, name):
        bad = ~np.isfinite(tensor) if np.issubdtype(tensor.dtype, np.floating) else np.zeros(0, bool)
        if bad.any():
            index = tuple(int(i) for i in np.unravel_index(bad.argmax(), tensor.shape))
            where = f"{name}[{', '.join(map(str, index))}]"
            raise NotFinite(
                f"step {state.step + 1}: {where} is {tensor[index]} after {op_name}, the first value that is not "
                f"finite; {bad.sum():,} of the tensor's {tensor.size:,} elements are not"
            )

    return without_graphs(ops.wrap(follow, WRITES.keys() - CONTRACT["memory"].keys()))


def without_graphs(ops: Ops) -> Ops:
    """The same ops, launched one by one."""
    return ops.replace(capture=lambda function: function)
