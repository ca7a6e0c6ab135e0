"""Weights to start from: GPT-2 as published, a folder of Hugging Face's, llm.c's .bin, or one of our own runs."""

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
from llm_numba.util.cli import UserError, not_installed

PUBLISHED = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
LLMC_MODEL, LLMC_TOKENIZER = "model.bin", "gpt2_tokenizer.bin"  # of an export; llm.c's programs ask for the second


class Weights(NamedTuple):
    """A model that exists, before there is memory for it."""

    config: GPT2Config
    tokenizer: Callable[[], tiktoken.Encoding | None]  # None where the source has none
    parameters: Iterator[tuple[str, np.ndarray]]  # (name, float32, all layers together), each read when asked for


def open_weights(source: str) -> Weights:
    """The weights that `source` names: gpt2, gpt2-medium, gpt2-large or gpt2-xl; a folder with a config.json; a .bin of
    llm.c's, or the folder of one that was exported; a run folder or a checkpoint.

    Errors: nothing of the kind is there; it is not GPT-2, or damaged.
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
    """OpenAI's GPT-2; its sizes and tokenizer are fetched at once, its weights when they are asked for."""
    folder = fetch(name, [huggingface.CONFIG, huggingface.TOKENIZER])
    config = huggingface.read_config(folder)

    def parameters():
        fetch(name, [huggingface.WEIGHTS], revision=folder.name)
        yield from huggingface.read_parameters(folder, config)

    return Weights(config, lambda: huggingface.read_tokenizer(folder), parameters())


def fetch(name: str, files: list[str], revision: str | None = None) -> Path:
    """The folder in Hugging Face's cache that has these files of a published model, downloaded where they are missing.

    A download that was cut goes on where it stopped. HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE hold as usual.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(f"{name}: cannot be downloaded: {not_installed('huggingface_hub')}") from error
    try:
        paths = [Path(hf_hub_download(PUBLISHED[name], file, revision=revision)) for file in files]
    except Exception as error:  # of the network, of the hub, of the disk: they share no class
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(
            f"{name}: cannot be downloaded ({type(error).__name__}: {reason}); try again, and it goes on where it "
            "stopped; or give a folder that has the files"
        ) from error
    return paths[0].parent


def set_parameters(ops, arena: Arena, parameters: Iterator[tuple[str, np.ndarray]]) -> None:
    """The arena's parameters = these; wte may be padded by any number of rows."""
    for name, values in tqdm(parameters, desc="weights", leave=False, disable=None):
        model.set_parameter(ops, arena, name, pad(values, arena.config) if name == "wte" else values)


def pad(wte: np.ndarray, config: GPT2Config) -> np.ndarray:
    """wte (Vp, C), whose last rows are 0, of a wte (V or more, C)."""
    padded = np.zeros((config.padded_vocab_size, config.channels), np.float32)
    padded[: config.vocab_size] = wte[: config.vocab_size]
    return padded
