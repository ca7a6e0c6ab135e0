"""The data of a run: found, tokenised, and recognised by its content when a run is resumed."""

import glob
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tiktoken

from llm_numba.data import corpus as data
from llm_numba.models import Model
from llm_numba.training import settings
from llm_numba.training.checkpoint import Checkpoint
from llm_numba.training.settings import Settings
from llm_numba.util.cli import UserError

Tokenizer = Callable[[], tiktoken.Encoding | None]


def read_data(s: Settings, model: Model, own_tokenizer: Tokenizer) -> data.Corpus:
    """The data, as tokens of the model. own_tokenizer: that of the weights that the run starts or continues from.
    Errors: UserError for a tokenizer, or token shards, of another vocabulary than the model's."""
    tokenizer = settings.tokenizer_kind(s)
    if tokenizer == "init":
        known = "gpt2" if model.vocab_size == settings.FIXED_VOCABULARIES["gpt2"] else "none"
        tokenizer = own_tokenizer() or known
    if isinstance(tokenizer, tiktoken.Encoding):
        V, owner = tokenizer.n_vocab, "its tokenizer's"
    else:
        V = settings.FIXED_VOCABULARIES.get(tokenizer) or s.vocab_size or model.vocab_size
        owner = f"that of --tokenizer {tokenizer}"
    if V != model.vocab_size:
        raise UserError(
            f"--init {s.init}: the model's vocabulary has {model.vocab_size} tokens, {owner} {V}; they must be the "
            "same: choose another --tokenizer, or none for token shards of the model's vocabulary"
        )
    return data.prepare(s.data, s.val_data, tokenizer, V, s.val_fraction)


def data_of(stored: Checkpoint) -> data.Corpus:
    """The data of the run that wrote a checkpoint. Errors: UserError as of `read_data`."""
    s = locate(stored.settings, stored.settings.out, stored.path.absolute().parent.parent)
    return read_data(s, stored.model, lambda: stored.encoding)


def absolute(s: Settings) -> Settings:
    """The settings with absolute paths, so that the run can be resumed from another folder."""

    def path(value):
        return os.path.abspath(os.path.expanduser(value)) if value else value

    paths = dict(data=tuple(map(path, s.data)), val_data=tuple(map(path, s.val_data)), eval_data=path(s.eval_data))
    return replace(s, **paths)


def locate(s: Settings, recorded_folder: str, folder: Path) -> Settings:
    """The settings of a resumed run. Missing data is looked for where it would be if it had moved together with the
    run folder, from `recorded_folder` to `folder`."""

    def paths(values):
        found = []
        for value in values:
            moved = os.path.normpath(folder.absolute() / os.path.relpath(value, recorded_folder or "."))
            found.append(moved if not glob.glob(value) and glob.glob(moved) else value)
        return tuple(found)

    return replace(s, data=paths(s.data), val_data=paths(s.val_data))


def check_same(corpus: data.Corpus, fingerprint: list, recorded: list, resume: str) -> None:
    """Raise a UserError unless the training tokens are those that the run was started on, wherever they lie now."""
    if fingerprint == recorded:
        return
    pairs = zip(corpus.train, fingerprint, recorded, strict=False)
    changed = next((span.path for span, now, then in pairs if now != then), "the number of files")
    problem = f"the data is no longer what the run was started on ({changed} differs)"
    raise UserError(f"--resume {resume}: {problem}: restore it, or give the same data from another place with --data")
