"""The loss of every token of a batch: forward only."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from llm_numba.models import Model
from llm_numba.ops import Ops


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
