"""Weights to start from: published GPT-2, a Hugging Face folder, llm.c's .bin, or one of our runs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from llm_numba.arena import Arena, parameter_specs
from llm_numba.data.tokenizer import tokenizer_from_state
from llm_numba.formats import huggingface, llmc
from llm_numba.models import gpt2 as model
from llm_numba.models.config import GPT2Config
from llm_numba.training import checkpoint
from llm_numba.util.cli import UserError
from llm_numba.util.download import from_hub

PUBLISHED = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
LLMC_MODEL, LLMC_TOKENIZER = "model.bin", "gpt2_tokenizer.bin"  # of an export; llm.c's programs expect the second


class Weights(NamedTuple):
    """A model's sizes and tokenizer, and its parameters, which are read when they are used."""

    config: GPT2Config
    tokenizer: Callable[[], tiktoken.Encoding | None]  # None if the source has none
    parameters: Iterator[tuple[str, np.ndarray]]  # (name, float32, all layers together)


def open_weights(source: str) -> Weights:
    """The weights of a source: gpt2, gpt2-medium, gpt2-large or gpt2-xl; a folder with a config.json; a model .bin of
    llm.c, or an exported folder with one; a run folder or a checkpoint.

    Errors: no such source; a model that is not GPT-2, or damaged.
    """
    if source in PUBLISHED:
        return of_published(source)
    path = Path(source).expanduser()
    path = path / LLMC_MODEL if (path / LLMC_MODEL).exists() else path
    if (path / huggingface.CONFIG).exists():
        config = huggingface.read_config(path)
        return Weights(config, lambda: huggingface.read_tokenizer(path), huggingface.read_parameters(path, config))
    if path.is_file() and path.suffix == ".bin":
        config, _, parameters = llmc.read_model(path)
        beside = path.with_name(LLMC_TOKENIZER)
        return Weights(
            config, lambda: llmc.read_tokenizer(beside) if beside.exists() else None, iter(parameters.items())
        )
    if path.is_file() or (path / "checkpoints").is_dir():
        path = checkpoint.newest(path) if path.is_dir() else path
        stored = checkpoint.load(path)
        checkpoint.sizes_of(path, *stored[:2])
        return of_checkpoint(*stored)
    raise UserError(
        f"{source}: expected one of {', '.join(PUBLISHED)}, a folder with a {huggingface.CONFIG}, "
        "a model .bin of llm.c, a run folder or a checkpoint"
    )


def of_checkpoint(tensors: dict[str, np.ndarray], record: dict, tokenizer: checkpoint.Tokenizer | None) -> Weights:
    """The weights in what `checkpoint.load` returned."""
    config = GPT2Config(**record["config"])
    parameters = ((spec.name, tensors[spec.name].astype(np.float32, copy=False)) for spec in parameter_specs(config))
    return Weights(config, lambda: tokenizer and tokenizer_from_state(*tokenizer), parameters)


def of_published(name: str) -> Weights:
    """OpenAI's GPT-2: config and tokenizer are downloaded at once, the weights when they are used."""
    repository = PUBLISHED[name]
    from_hub(repository, huggingface.TOKENIZER)
    folder = from_hub(repository, huggingface.CONFIG).parent
    config = huggingface.read_config(folder)

    def parameters():
        from_hub(repository, huggingface.WEIGHTS, revision=folder.name)
        yield from huggingface.read_parameters(folder, config)

    return Weights(config, lambda: huggingface.read_tokenizer(folder), parameters())


def set_parameters(ops, arena: Arena, parameters: Iterator[tuple[str, np.ndarray]]) -> None:
    """The arena's parameters = these, with any padding of the vocabulary."""
    for name, values in tqdm(parameters, desc="weights", leave=False, disable=None):
        model.set_parameter(ops, arena, name, padded(name, values, arena.config))


def padded(name: str, values: np.ndarray, config: GPT2Config) -> np.ndarray:
    """The parameter, with Vp rows instead of any number >= V if its rows are tokens; the rows from V on are 0."""
    if name not in llmc.LLMC.padded:
        return values
    found = np.zeros((config.padded_vocab_size, *values.shape[1:]), np.float32)
    found[: config.vocab_size] = values[: config.vocab_size]
    return found
