"""What the device does in a step of any model: gradients of the micro-batches and the update, or forward and loss."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from llm_numba.arena import Arena
from llm_numba.models import Model
from llm_numba.ops import Ops
from llm_numba.training.settings import Settings


def initialise(ops: Ops, arena: Arena, seed: int) -> None:
    """parameters = the model's random start."""
    for name, values in arena.model.initial_parameters(seed):
        set_parameter(ops, arena, name, values)


def set_parameter(ops: Ops, arena: Arena, name: str, values) -> None:
    """A parameter = values, in every precision in which the arena keeps it."""
    for group in "parameters", "master":
        if (group, name) in arena.tensors:
            ops.to_device(arena.tensors[group, name], values)


def exact_parameters(arena: Arena) -> dict:
    """The parameters by name, in the highest precision that the arena keeps."""
    return arena.named("master") or arena.named("parameters")


def gradients(ops: Ops, model: Model, m) -> None:
    """m.loss = the mean loss over all micro-batches, the gradient of every parameter = its gradient."""
    ops.zero(m.loss)
    for i, (tokens, targets) in enumerate(m.micro_batches):
        ops.copy(m.tokens, tokens)
        ops.copy(m.targets, targets)
        model.forward(ops, m)
        model.loss(ops, m, 1.0 / len(m.micro_batches), accumulate=i > 0)
        model.backward(ops, m, accumulate=i > 0)


def training_step(ops: Ops, model: Model, m, s: Settings) -> None:
    """All that the device does in a step: the same calls with the same arrays, step after step."""
    gradients(ops, model, m)
    model.update(ops, m, s)


def forward_and_loss(ops: Ops, model: Model, m: SimpleNamespace) -> None:
    """m.losses (B, T) = the loss of every token in m.tokens and m.targets."""
    model.forward(ops, m)
    model.loss(ops, m, write_dlogits=False)


def scorer(ops: Ops, model: Model, m: SimpleNamespace) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function of (tokens, targets), both (B, T) int32, that returns the loss of each, (B, T); it adds to m.loss."""
    step = ops.capture(lambda: forward_and_loss(ops, model, m))

    def losses(tokens, targets):
        ops.to_device(m.tokens, tokens)
        ops.to_device(m.targets, targets)
        step()
        return ops.to_host(m.losses)

    return losses
