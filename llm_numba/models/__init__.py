"""The models by name. A model is one file: copy gpt2.py to add one, and list its class in MODELS."""
# pyright: reportReturnType=false
# (the methods of the protocol have no bodies)

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar, Protocol

import numpy as np

from llm_numba.arena import TensorSpec
from llm_numba.models.gpt2 import GPT2
from llm_numba.util.cli import UserError


class Model(Protocol):
    """What the arena, the trainer and the commands ask of a model: a frozen dataclass of its sizes, without tensors.

    `ops` are the ops of one device, `m` a namespace of the arena's tensors (`Arena.namespace`).
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]  # in checkpoints, and the key in MODELS
    PRESETS: ClassVar[dict[str, "Model"]]
    huggingface: ClassVar[SimpleNamespace]  # optional: its names in Hugging Face's files
    llmc: ClassVar[SimpleNamespace]  # optional: its names in llm.c's files
    vocab_parameters: ClassVar[set[str]]  # parameters with a row for each token, which files pad differently
    max_seq_len: int  # the context: the longest T
    vocab_size: int  # V
    num_layers: int  # L

    def parameters(self) -> list[TensorSpec]:
        """The parameters. The arena derives gradients, moments and master weights from them."""

    def activations(self, B: int, T: int, recompute: str = "none") -> list[TensorSpec]:
        """What `forward` and `loss` write, in their order; `losses` (B, T) float32 among it."""

    def activation_gradients(self, B: int, T: int) -> list[TensorSpec]:
        """What `loss` and `backward` write beside the parameters' gradients, in their order."""

    def wire(self, m: SimpleNamespace) -> None:
        """Add to m and m.layers the names that connect layers, such as a layer's input."""

    def initial_parameters(self, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        """(name, values) of every parameter at the start of training; a single value fills the parameter."""

    def forward(self, ops, m) -> None:
        """m.tokens (B, T) -> the activations up to the logits' input."""

    def loss(self, ops, m, share: float = 1.0, write_dlogits: bool = True, accumulate: bool = False) -> None:
        """m.losses (B, T) = the loss of each target, m.loss += share * their mean; the first part of the backward."""

    def backward(self, ops, m, accumulate: bool = False) -> None:
        """The gradients of all parameters, written (=), or added (+=) if `accumulate`."""

    def update(self, ops, m, s) -> None:
        """parameters = those after one step of the optimiser with the settings s."""

    def generation_cache(self) -> list[TensorSpec]:
        """What generating text keeps of earlier tokens, such as keys and values."""

    def generation_activations(self, T: int) -> list[TensorSpec]:
        """What `next_logits` needs for T new tokens, beside parameters and cache: `tokens`, `logits`, ..."""

    def next_logits(self, ops, m) -> None:
        """m.logits (1, T, Vp) = the logits after each new token in m.tokens, of which the first stands at m.position
        (1,); the cache is extended."""

    def flops_per_token(self, T: int) -> float:
        """Floating-point operations of forward and backward, for each token of sequences of length T."""

    def miniature(self, T: int) -> "Model":
        """The smallest model with a context of T tokens whose step compiles the same code as this model's."""


MODELS: dict[str, type] = {GPT2.name: GPT2}


def presets() -> dict[str, Model]:
    """The named sizes of all models."""
    return {name: sizes for model in MODELS.values() for name, sizes in model.PRESETS.items()}


def preset(name: str, **changes: int) -> Model:
    """The preset called `name`, with `changes` to its sizes. Errors: no such preset; the model has no such size."""
    known = presets()
    if name not in known:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(known)}")
    missing = [size for size in changes if not hasattr(known[name], size)]
    if missing:
        raise UserError(f"--preset {name}: a {known[name].name} model has no {', '.join(missing)}")
    return replace(known[name], **changes)


def model_of(record: dict) -> Model:
    """The model that a checkpoint's record describes: its "model" (gpt2 if it has none) and its sizes, "config".

    Errors: KeyError, TypeError, ValueError or UserError for a record that describes none.
    """
    name = record.get("model", GPT2.name)
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r:.40}")
    model = MODELS[name](**record["config"])
    if any(type(size) is not int for size in vars(model).values()):
        raise TypeError("a size is not an integer")
    return model
