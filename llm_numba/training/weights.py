"""Weights to start from: published models, files of other programs, or a run of this one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from llm_numba.arena import Arena
from llm_numba.formats import huggingface, llmc
from llm_numba.models import Model
from llm_numba.ops import Ops
from llm_numba.training import settings
from llm_numba.training.checkpoint import Checkpoint, open_checkpoint
from llm_numba.training.settings import Settings
from llm_numba.training.step import set_parameter
from llm_numba.util.cli import UserError

LLMC_MODEL, LLMC_TOKENIZER = "model.bin", "gpt2_tokenizer.bin"  # in an export; llm.c's programs expect the second name


class Weights(NamedTuple):
    """A trained model, before there is memory for it."""

    model: Model
    tokenizer: Callable[[], tiktoken.Encoding | None]  # None if the source has none
    parameters: Iterator[tuple[str, np.ndarray]]  # (name, all layers together), each read when it is needed


def open_weights(source: str) -> Weights:
    """The weights that `source` names: gpt2, gpt2-medium, gpt2-large or gpt2-xl; a Hugging Face folder; an llm.c .bin,
    or the folder of an exported one; a run folder or a checkpoint. Errors: UserError for anything else, or damage."""
    if source in huggingface.PUBLISHED:
        return Weights(*huggingface.open_published(source))
    path = Path(source).expanduser()
    path = path / LLMC_MODEL if (path / LLMC_MODEL).exists() else path
    if (path / huggingface.CONFIG).exists():
        model = huggingface.read_config(path)
        return Weights(model, lambda: huggingface.read_tokenizer(path), huggingface.read_parameters(path, model))
    if path.is_file() and path.suffix == ".bin":
        model, _, parameters = llmc.read_model(path)
        file = path.with_name(LLMC_TOKENIZER)
        tokenizer = (lambda: llmc.read_tokenizer(file)) if file.exists() else lambda: None
        return Weights(model, tokenizer, iter(parameters.items()))
    if path.is_file() or (path / "checkpoints").is_dir():
        return weights_of(open_checkpoint(path))
    known = f"{', '.join(huggingface.PUBLISHED)}, a folder with a {huggingface.CONFIG}"
    raise UserError(f"{source}: expected one of {known}, an llm.c .bin, a run folder or a checkpoint")


def random_weights(s: Settings) -> Weights:
    """The random start of a model of a preset's sizes."""
    model = settings.preset_model(s)
    return Weights(model, lambda: None, model.initial_parameters(s.seed))


def weights_of(stored: Checkpoint) -> Weights:
    return Weights(stored.model, lambda: stored.encoding, stored.parameters())


def set_parameters(ops: Ops, arena: Arena, parameters: Iterator[tuple[str, np.ndarray]]) -> None:
    """The arena's parameters = these, with any padding of the vocabulary."""
    for name, values in tqdm(parameters, desc="weights", leave=False, disable=None):
        set_parameter(ops, arena, name, padded(name, values, arena.model))


def padded(name: str, values: np.ndarray, model: Model) -> np.ndarray:
    """The parameter; if its rows are tokens, with Vp rows instead of any number >= V. Rows from V on are 0."""
    if name not in model.vocab_parameters:
        return values
    rows = next(spec.shape[0] for spec in model.parameters() if spec.name == name)
    found = np.zeros((rows, *values.shape[1:]), np.float32)
    found[: model.vocab_size] = values[: model.vocab_size]
    return found
