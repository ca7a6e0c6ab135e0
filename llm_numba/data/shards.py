"""Token shards, llm.c's `.bin`: a header of 256 int32 (magic, version, number of tokens, zeros), then the tokens.
Little-endian.

Version 1 (magic 20240520) holds uint16 tokens, for vocabularies of up to 65,536. Version 7 (magic 20240801) holds
uint32 tokens, for larger ones such as Llama 3's.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm_numba.util.cache import cache_folder
from llm_numba.util.cli import UserError
from llm_numba.util.files import write_whole

HEADER = 256  # int32
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic -> version, dtype
MAX_UINT16_VOCAB, MAX_VOCAB_SIZE = 2**16, 2**31 - 128  # batches are int32, and V is padded to a multiple of 128
BLOCK_TOKENS = 1 << 20
CHECKED = "checked-shards.json"  # in the cache folder


class Span(NamedTuple):
    """The tokens [start, stop) of a shard."""

    path: Path
    start: int
    stop: int


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= MAX_UINT16_VOCAB else "<u4")


def write_shard(path: Path, tokens: np.ndarray, vocab_size: int = MAX_UINT16_VOCAB) -> None:
    """Write `tokens` (n,), all below `vocab_size`, as uint16 where that is enough and as uint32 otherwise.

    An existing file is replaced once the new one is complete.
    """
    dtype = token_dtype(vocab_size)
    header = np.zeros(HEADER, "<i4")
    header[:3] = next((magic, version, len(tokens)) for magic, (version, t) in FORMATS.items() if t == dtype)
    write_whole(path, header, np.ascontiguousarray(tokens, dtype))


def open_shard(path: Path) -> np.memmap:
    """The tokens of a shard, (n,) uint16 or uint32, memory-mapped: only what is used is read from the disk.

    Errors: no such file; unknown magic or version; no tokens; a length that differs from the header's.
    """
    try:
        header, size = np.fromfile(path, "<i4", HEADER), path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): expected a token shard") from error
    if len(header) < HEADER or int(header[0]) not in FORMATS:
        expected = " or ".join(f"{magic} ({dtype.name} tokens)" for magic, (_, dtype) in FORMATS.items())
        raise UserError(f"{path}: not a token shard: expected llm.c's .bin, {HEADER} int32 that start with {expected}")
    version, dtype = FORMATS[int(header[0])]
    if header[1] != version:
        raise UserError(f"{path}: token shard of version {header[1]}: expected version {version} ({dtype.name} tokens)")
    count = int(header[2])
    if count < 1:
        raise UserError(f"{path}: the token shard is empty: expected at least one token")
    expected = HEADER * 4 + count * dtype.itemsize
    if size != expected:
        raise UserError(f"{path}: {size} bytes, but its header says {count} tokens, {expected} bytes: copy it again")
    return np.memmap(path, dtype, "r", offset=HEADER * 4)


def whole_shards(paths: Sequence[Path], vocab_size: int) -> list[Span]:
    """All tokens of these shards. Errors: those of `open_shard` and `check_ids`."""
    spans = [Span(path, 0, len(open_shard(path))) for path in paths]
    check_ids(paths, vocab_size)
    return spans


def check_ids(paths: Sequence[Path], vocab_size: int) -> None:
    """Raise a UserError unless all tokens of these shards are below `vocab_size`.

    Each shard is read once. CHECKED remembers {path: [inode, size, modification time, largest token]}.
    """
    known, new = _remembered(), {}
    try:
        for path in paths:
            key, state = str(path.absolute()), stamp(path)
            found = known.get(key)
            if not isinstance(found, list) or found[:-1] != state or type(found[-1]) is not int:
                found = new[key] = [*state, max(int(block.max()) for _, block in _blocks(path))]
            if found[-1] >= vocab_size:
                start, block = next(found for found in _blocks(path) if found[1].max() >= vocab_size)
                at = int(np.argmax(block >= vocab_size))
                wrong = f"token {start + at} is {block[at]}, but the vocabulary has {vocab_size}"
                raise UserError(f"{path}: {wrong}: give the --tokenizer and --vocab-size that the shard was made with")
    finally:
        if new:
            kept = {key: state for key, state in known.items() if Path(key).exists()}
            with suppress(UserError):  # without a cache folder, the next start checks again
                write_whole(cache_folder() / CHECKED, json.dumps(kept | new).encode())


def _remembered() -> dict:
    try:
        found = json.loads((cache_folder() / CHECKED).read_text())
    except (OSError, RecursionError, UserError, ValueError):
        found = {}
    return found if isinstance(found, dict) else {}


def _blocks(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    tokens = open_shard(path)
    for start in range(0, len(tokens), BLOCK_TOKENS):
        yield start, tokens[start : start + BLOCK_TOKENS]


def stamp(path: Path) -> list[int]:
    """Changes when the file is replaced, written, truncated or removed."""
    try:
        status = path.stat()
        return [status.st_ino, status.st_size, status.st_mtime_ns]
    except OSError:
        return []


def fingerprint(spans: Sequence[Span]) -> list[list[int]]:
    """Identifies tokens by content, wherever the files are: the length of each span, and a CRC-32 of its beginning and
    its end (1 Mi tokens each)."""
    parts = (open_shard(span.path)[span.start : span.stop] for span in spans)
    return [[len(x), zlib.crc32(x[-BLOCK_TOKENS:].data, zlib.crc32(x[:BLOCK_TOKENS].data))] for x in parts]
