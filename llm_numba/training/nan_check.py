"""--check-finite: stop at the first value that is nan or infinite, and say where it is."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from llm_numba.arena import Arena
from llm_numba.ops import CONTRACT, WRITES
from llm_numba.training import checkpoint
from llm_numba.util.cli import UserError


class NotFinite(UserError):
    """The first value that is nan or infinite, and where it is."""


def kept(folder: Path) -> Path:
    """Where the step that --check-finite stopped in a run folder is kept."""
    return folder / "bad_step.safetensors"


def keep(folder: Path, inputs: dict, tensors: dict[str, np.ndarray], record: dict) -> None:
    """Write all that a step starts from: a checkpoint's content from before it, and its inputs."""
    numbers = {name: value for name, value in inputs.items() if name != "batches"}
    checkpoint.save(kept(folder), tensors | {"batches": inputs["batches"]}, record | {"inputs": numbers})


def tensor_names(m: SimpleNamespace) -> dict[int, str]:
    """id of a view in the namespace m -> "layer 3 qkv". One view has one name only under the plan "keep"."""
    names = {}
    for l, layer in enumerate(m.layers):
        names |= {
            id(tensor): f"layer {l} {name}" for name, tensor in vars(layer).items() if name not in ("inp", "dinp")
        }
    return names | {id(tensor): name for name, tensor in vars(m).items()}


def checked(ops, m: SimpleNamespace, arena: Arena, state: SimpleNamespace) -> SimpleNamespace:
    """The same ops, each followed by a look at what it wrote. state.step counts the updates so far."""
    names = tensor_names(m)
    # a flat view of a group stands for the group's tensors
    parts = {
        id(flat): [
            (name if group == "parameters" else f"{group} of {name}", x) for name, x in arena.named(group).items()
        ]
        for group, flat in vars(m.flat).items()
    }

    def follow(op_name, op):
        parameters = list(inspect.signature(getattr(op, "py_func", op)).parameters)
        written = [parameters.index(name) for name in WRITES[op_name]]

        def call(*arguments):
            op(*arguments)
            for argument in (arguments[i] for i in written):
                itself = [(names.get(id(argument), op_name), argument)]
                for name, tensor in parts.get(id(argument), itself):
                    if tensor is not None:
                        check(ops.to_host(tensor), op_name, name)

        return call

    def check(tensor, op_name, name):
        if np.issubdtype(tensor.dtype, np.floating) and not np.isfinite(tensor).all():
            bad = ~np.isfinite(tensor)
            index = tuple(int(i) for i in np.unravel_index(bad.argmax(), tensor.shape))
            where = f"{name}[{', '.join(map(str, index))}]"
            raise NotFinite(
                f"step {state.step + 1}: {where} is {tensor[index]} after {op_name}, the first value that is not "
                f"finite; {bad.sum():,} of the tensor's {tensor.size:,} values are not"
            )

    computing = WRITES.keys() - CONTRACT["memory"].keys()
    return without_graphs(
        SimpleNamespace(**{**vars(ops), **{name: follow(name, getattr(ops, name)) for name in computing}})
    )


def without_graphs(ops) -> SimpleNamespace:
    """The same ops, launched one by one."""
    return SimpleNamespace(**{**vars(ops), "capture": lambda function: function})
