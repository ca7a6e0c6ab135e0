"""Text files -> documents, in pieces that can be tokenised one by one."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llm_numba.util.cli import UserError

PIECE_BYTES = 1 << 18  # tiktoken and rustbpe panic at 10^6 white spaces in a row: a few pieces must stay below that

# Up to the last white space that follows another character: no word of GPT-2's pattern contains both
LAST_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def documents(path: Path) -> Iterator[Iterator[str]]:
    """The documents of a file, each in pieces: the "text" of every line of a .jsonl file, or the whole file. The tokens
    of the pieces, joined, are those of the document.

    Errors: a file that cannot be read or is not UTF-8; a line of a .jsonl file without a "text".
    """
    if path.suffix != ".jsonl":
        yield _cut(blocks(path))
        return
    for number, value in json_lines(path):
        match value:
            case {"text": str(text)}:
                yield _cut(text[start : start + PIECE_BYTES] for start in range(0, len(text), PIECE_BYTES))
            case _:
                expected = 'a JSON object with a string under the key "text"'
                raise UserError(f"{path}: line {number}: expected {expected}: fix or remove the line")


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, JSON value) of each line that is not blank; the value is None if the line is not JSON."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                try:
                    yield number, json.loads(line)
                except (RecursionError, ValueError):
                    yield number, None


def blocks(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, PIECE_BYTES at a time. Errors: a file that cannot be read or is not UTF-8."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(PIECE_BYTES):
                yield decoder.decode(block)
                start = file.tell() - len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {start + error.start}: convert or leave out the file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _cut(blocks: Iterable[str]) -> Iterator[str]:
    """The same text, cut between words. A block without such a place is cut at its end, perhaps inside a word."""
    rest = ""
    for block in blocks:
        text = rest + block
        cut = LAST_CUT.match(text)
        end = cut.end() if cut else len(text)
        yield text[:end]
        rest = text[end:]
    if rest:
        yield rest
