"""Text or token shards on disk -> spans of tokens for training and validation.

`prepare` finds the files (find.py), tokenises text once into shards in the cache folder (text.py, shards.py), and holds
out the validation part. loader.py makes batches of the spans.
"""

import hashlib
import json
import os
import platform
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from tiktoken import Encoding

from llm_numba.data.find import check_one_kind, find_files, is_shard, standard_library_files
from llm_numba.data.shards import Span, token_dtype, whole_shards, write_shard
from llm_numba.data.text import documents
from llm_numba.data.tokenizer import load_tokenizer, tokenizer_from_state, tokenizer_state
from llm_numba.util.cache import cache_folder
from llm_numba.util.cli import UserError, note
from llm_numba.util.files import write_whole

CACHE_FORMAT = 4  # increase it when the same text must be tokenised again
SHARD_TOKENS = 100_000_000
LEARN_CHARACTERS = 64_000_000
INDEX, RANKS = "corpus.json", "tokenizer.tiktoken"  # beside the shards


class Corpus(NamedTuple):
    """What a run trains and validates on; `encoding` is None if the shards' tokenizer is unknown."""

    train: list[Span]
    val: list[Span]
    encoding: Encoding | None
    vocab_size: int


def prepare(
    data: Sequence[str], val_data: Sequence[str], tokenizer: str | Encoding, vocab_size: int, val_fraction: float
) -> Corpus:
    """Find the data, tokenise new text, and hold out the validation part.

    data          files, folders and globs (see `find_files`); empty: Python's standard library
    val_data      the same for validation; empty: the last `val_fraction` of all tokens of `data`
    tokenizer     gpt2, bytes, bpe (learned from `data`), none (token shards without samples), or an encoding
    vocab_size    for bpe and none; the others have a fixed size

    A text file is one document; each line of a .jsonl file, an object with the key "text", is one too. Files are
    shuffled in a fixed order, so the held-out end resembles the rest. Each document begins with an end-of-text token;
    names of special tokens in a text are plain text. bpe learns from the first 64 million characters in that order.
    Shards and tokenizer are kept in `cache_folder()`, under a name that depends on the paths, sizes and modification
    times of the files, the tokenizer and its size.
    Errors: a file that is missing, empty, not UTF-8 or a damaged shard; a tokenizer that does not fit the data.
    """
    files = find_files(data) if data else standard_library_files()
    val_files = find_files(val_data, "--val-data") if val_data else []
    if tokenizer == "bpe" and any(map(is_shard, files + val_files)):
        raise UserError("--tokenizer bpe: is learned from text, not from .bin shards: use gpt2, bytes or none")
    if tokenizer == "none" and not all(map(is_shard, files + val_files)):
        raise UserError("--tokenizer none: is for .bin shards only; text needs gpt2, bpe or bytes")

    given = tokenizer if isinstance(tokenizer, Encoding) else None
    identity = [_identity(given) if given else tokenizer, platform.python_version() if not data else None]
    if tokenizer == "bpe":  # validation text is tokenised with what these files taught
        identity += [vocab_size, _stamps(files)]

    def load(texts: Iterable[str] = ()) -> Encoding:
        return given or load_tokenizer(str(tokenizer), texts, vocab_size)

    if is_shard(files[0]):
        encoding = None if tokenizer == "none" else load()
        V = encoding.n_vocab if encoding else vocab_size
        train = whole_shards(files, V)
    else:
        encoding, train = _tokenised(files, identity, lambda files: load(_text_to_learn_from(files)))
        V = encoding.n_vocab

    if not val_files:
        return Corpus(*_split(train, val_fraction), encoding, V)
    if is_shard(files[0]) and is_shard(val_files[0]):
        check_one_kind([files[0], val_files[0]], "--data and --val-data")
    if is_shard(val_files[0]):
        return Corpus(train, whole_shards(val_files, V), encoding, V)
    return Corpus(train, _tokenised(val_files, identity, lambda _: encoding or load())[1], encoding, V)


def spans_of(patterns: Sequence[str], encoding: Encoding | None, vocab_size: int) -> list[Span]:
    """All tokens of the files that `patterns` name, in a given tokenizer. Errors: those of `prepare`; text although
    `encoding` is None."""
    files = find_files(patterns)
    if is_shard(files[0]):
        return whole_shards(files, vocab_size)
    if encoding is None:
        raise UserError(f"--data {files[0]}: a model trained with --tokenizer none needs .bin shards")
    return _tokenised(files, [_identity(encoding)], lambda _: encoding)[1]


def describe_windows(windows: list[Span]) -> list[dict]:
    """Where the windows of a batch come from, as JSON types: shard, tokens, and their files, if `prepare` tokenised
    them."""
    indices = {folder: _read_index(folder) for folder in {window.path.parent for window in windows}}

    def files_of(window):
        if not (index := indices[window.path.parent]):
            return []
        before = int(window.path.stem) * index["shard_tokens"]
        first, last = (bisect_right(index["starts"], before + at) for at in (window.start, window.stop - 1))
        return index["files"][first - 1 : last]

    return [{"shard": str(w.path), "start": w.start, "stop": w.stop, "files": files_of(w)} for w in windows]


def _split(spans: list[Span], val_fraction: float) -> tuple[list[Span], list[Span]]:
    """The spans without the last `val_fraction` of their tokens, and that last part."""
    left = sum(span.stop - span.start for span in spans)
    left -= int(left * val_fraction)
    train, val = [], []
    for span in spans:
        cut = min(span.start + left, span.stop)
        left -= cut - span.start
        train.append(span._replace(stop=cut))
        val.append(span._replace(start=cut))
    return [span for span in train if span.start < span.stop], [span for span in val if span.start < span.stop]


# ---------------------------------------------------------------------------------------------------------------------
# Text -> shards


def _identity(encoding: Encoding) -> str:
    """Changes when the tokens do."""
    state, ranks = tokenizer_state(encoding)
    return hashlib.sha256(json.dumps([state["pat_str"], state["special_tokens"]]).encode() + ranks).hexdigest()


def _stamps(files: list[Path]) -> list:
    """Changes when a file does."""
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _tokenised(files: list[Path], identity: list, load: Callable) -> tuple[Encoding, list[Span]]:
    """The encoding and the shards of `files`, shuffled, from the cache folder if they were tokenised before.

    `identity` is what else the tokens depend on; `load` gives the encoding, if these files must be tokenised.
    """
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    key = json.dumps([CACHE_FORMAT, identity, _stamps(files)])
    cache = cache_folder()
    folder = cache / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    if not folder.is_dir():
        with _acquired(FileLock(cache / "tokenising.lock")):
            if not folder.is_dir():  # another process may have tokenised the same text meanwhile
                _tokenise(folder, files, load(files))
    try:
        index = _read_index(folder)
        encoding = tokenizer_from_state(index["tokenizer"], (folder / RANKS).read_bytes())
        return encoding, whole_shards([folder / name for name in index["shards"]], encoding.n_vocab)
    except (KeyError, OSError, ValueError, UserError) as error:
        raise UserError(f"{folder}: the tokenised text is damaged: delete the folder and start again") from error


def _acquired(lock: FileLock):
    """One process tokenises at a time; the others wait."""
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        note(f"waiting for another process that is tokenising text ({lock.lock_file})")
        return lock.acquire()


def _tokenise(folder: Path, files: list[Path], encoding: Encoding) -> None:
    """Write the shards of `files`, their tokenizer and an index; `folder` appears when all is complete."""
    for left in folder.parent.glob("unfinished*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    unfinished, V = folder.with_name("unfinished"), encoding.n_vocab
    try:
        unfinished.mkdir()
        shards, starts = [], {}
        for tokens in _in_shards(_encode(files, encoding, starts), token_dtype(V)):
            shards.append(f"{len(shards):06d}.bin")
            write_shard(unfinished / shards[-1], tokens, V)
        state, ranks = tokenizer_state(encoding)
        write_whole(unfinished / RANKS, ranks)
        index = {"tokenizer": state, "shards": shards, "shard_tokens": SHARD_TOKENS}
        index |= {"files": list(map(str, starts)), "starts": list(starts.values())}
        write_whole(unfinished / INDEX, json.dumps(index).encode())
        os.rename(unfinished, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _read_index(folder: Path) -> dict:
    """What a folder of tokenised text holds: "tokenizer" (its state), "shards" (names), "shard_tokens" (of all but the
    last shard), "files" and "starts" (the number of tokens before each file). Empty if it is missing or damaged."""
    kinds = {"shards": str, "files": str, "starts": int}
    try:
        index = json.loads((folder / INDEX).read_text())
        whole = all(type(index[name]) is list and {*map(type, index[name])} <= {kind} for name, kind in kinds.items())
        return index if whole and type(index["shard_tokens"]) is int else {}
    except (KeyError, OSError, RecursionError, TypeError, ValueError):
        return {}


def _in_shards(arrays: Iterable[np.ndarray], dtype: np.dtype) -> Iterator[np.ndarray]:
    """The concatenated `arrays`, SHARD_TOKENS at a time, the last ones fewer; each is overwritten by the next."""
    shard, used = np.empty(SHARD_TOKENS, dtype), 0
    for array in arrays:
        for part in np.split(array, range(SHARD_TOKENS - used, len(array), SHARD_TOKENS)):
            shard[used : used + len(part)] = part
            used += len(part)
            if used == SHARD_TOKENS:
                yield shard
                used = 0
    if used:
        yield shard[:used]


def _encode(files: list[Path], encoding: Encoding, starts: dict[Path, int]) -> Iterator[np.ndarray]:
    """The tokens of all files, an end-of-text token before each document; in bounded memory, one thread per core.

    starts[file] = the number of tokens before it, for each file that has any.
    """
    from tqdm import tqdm

    def encode(piece: tuple[Path, bool, str]) -> np.ndarray:
        _, first, text = piece
        tokens = encoding.encode_to_numpy(text, disallowed_special=())
        return np.concatenate(([encoding.eot_token], tokens)) if first else tokens

    count, pieces, size = 0, _pieces(files), sum(file.stat().st_size for file in files)
    with (
        tqdm(total=size, desc="tokenising", unit="B", unit_scale=True, disable=None) as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        while batch := list(islice(pieces, 32)):
            for (file, _, _), tokens in zip(batch, pool.map(encode, batch), strict=True):
                starts.setdefault(file, count)
                count += len(tokens)
                yield tokens
            progress.update(sum(len(text.encode()) for _, _, text in batch))


def _pieces(files: list[Path]) -> Iterator[tuple[Path, bool, str]]:
    """(file, whether a document begins here, text) of each piece of these files."""
    for file in files:
        for document in documents(file):
            for number, text in enumerate(document):
                yield file, number == 0, text


def _text_to_learn_from(files: list[Path]) -> Iterator[str]:
    size = 0
    for _, _, text in _pieces(files):
        yield text
        size += len(text)
        if size >= LEARN_CHARACTERS:
            return
