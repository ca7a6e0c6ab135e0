"""Token shards, llm.c's `.bin`: a header of 256 int32 (magic 20240520, version 1, number of tokens, zeros), then the
tokens as uint16, little endian."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm_numba.util.cli import UserError
from llm_numba.util.files import write_whole

MAGIC, VERSION, HEADER = 20240520, 1, 256
BLOCK_TOKENS = 1 << 20


class Span(NamedTuple):
    """The tokens [start, stop) of a shard."""

    path: Path
    start: int
    stop: int


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write `tokens` (n,), each of 0..65535, as a token shard; an existing file is replaced once all is on the disk."""
    header = np.zeros(HEADER, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    write_whole(path, header, np.ascontiguousarray(tokens, "<u2"))


def open_shard(path: Path, vocab_size: int | None = None) -> np.memmap:
    """The tokens of a shard, (n,) uint16, mapped from the disk: reading a few reads only these.

    Errors: no such file; another magic or version; no tokens; a length that is not the header's; and, where
    `vocab_size` is given, a token that is not below it. That check reads the file once, a block at a time.
    """
    try:
        header, size = np.fromfile(path, "<i4", HEADER), path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): a token shard was expected") from error
    if len(header) < HEADER or header[0] != MAGIC:
        raise UserError(f"{path}: not a token shard: expected llm.c's .bin, {HEADER} int32 beginning with {MAGIC}")
    if header[1] != VERSION:
        raise UserError(f"{path}: a token shard of version {header[1]}: expected version {VERSION} (uint16 tokens)")
    count = int(header[2])
    if count < 1:
        raise UserError(f"{path}: the token shard is empty: expected at least one token")
    expected = HEADER * 4 + count * 2
    if size != expected:
        raise UserError(
            f"{path}: {size} bytes long, but its header says {count} tokens, {expected} bytes: copy it anew"
        )
    tokens = np.memmap(path, "<u2", "r", offset=HEADER * 4)
    if vocab_size is not None:
        _check_ids(path, tokens, vocab_size)
    return tokens


def _check_ids(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    for start in range(0, len(tokens), BLOCK_TOKENS):
        block = tokens[start : start + BLOCK_TOKENS]
        if block.max() >= vocab_size:
            at = int(np.argmax(block >= vocab_size))
            raise UserError(
                f"{path}: token {start + at} is {block[at]}, but the vocabulary has {vocab_size}: "
                "give the --tokenizer and --vocab-size that the shard was made with"
            )
