"""HellaSwag: which of four endings is the most likely for the model? Zellers et al. 2019, arXiv:1905.07830

Scored by completion, as in llm.c: the model sees the context with one ending at a time. `acc` chooses the ending with
the smallest sum of token losses, `acc_norm` the one with the smallest mean.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from llm_numba.data import datasets
from llm_numba.data.text import json_lines
from llm_numba.util.cli import UserError

ENDINGS = 4
EXPECTED = 'a text "ctx", a list of four texts "endings", and the correct one\'s number "label", 0 to 3'


class Examples(NamedTuple):
    """All examples, in ENDINGS consecutive rows each. A row is (the context and an ending, at most T + 1 tokens; how
    many of the last ones are scored)."""

    rows: list[tuple[list[int], int]]
    labels: np.ndarray  # the correct ending of each


class Score(NamedTuple):
    """The fraction of examples whose correct ending was chosen."""

    acc_norm: float
    acc: float
    examples: int

    def __str__(self):
        return f"acc_norm {self.acc_norm:.4f}, acc {self.acc:.4f} over {self.examples:,} examples"


def read_examples(
    file: str, encoding: tiktoken.Encoding | None, T: int, limit: int, flag: str
) -> tuple[Examples, str | None]:
    """The first `limit` examples (0: all) of JSON lines with "ctx", "endings" and "label", and a note if some are cut.

    file: "" means the download of `llm-numba data hellaswag`. A row longer than T + 1 tokens loses its start.
    Errors: UserError with the flag, the file and the line; a model without a tokenizer.
    """
    if encoding is None:
        raise UserError("HellaSwag is text: a model trained with --tokenizer none cannot read it")
    path = Path(file).expanduser() if file else datasets.folder_of("hellaswag") / datasets.HELLASWAG
    where = f"{flag} {path}" if file else str(path)
    rows, labels, cut = [], [], 0
    try:
        for number, value in json_lines(path):
            match value:
                case {"ctx": str(text), "endings": [str(), str(), str(), str()] as endings, "label": int(label)} if (
                    text and 0 <= label < ENDINGS
                ):
                    before = encoding.encode_ordinary(text)
                case _:
                    raise UserError(f"{where}: line {number}: expected a JSON object with {EXPECTED}")
            for ending in endings:
                after = encoding.encode_ordinary(" " + ending)
                tokens = (before + after)[-T - 1 :]
                cut += len(tokens) < len(before) + len(after)
                rows.append((tokens, min(len(after), len(tokens) - 1)))
            labels.append(label)
            if len(labels) == limit:
                break
    except OSError as error:
        hint = "" if file else f": download it with llm-numba data hellaswag, or give {flag} FILE"
        raise UserError(f"{where}: cannot be read ({error.strerror}){hint}") from error
    if not labels:
        raise UserError(f"{where}: has no examples")
    note = f"{cut:,} of {len(rows):,} contexts with endings are longer than {T} tokens: cut at the start"
    return Examples(rows, np.array(labels)), note if cut else None


def losses_of(examples: Examples, losses: Callable, B: int, T: int, stop=()) -> tuple[np.ndarray, np.ndarray]:
    """The sum and the mean of each ending's losses, both (examples, ENDINGS) float64.

    losses: a function of (tokens, targets), both (B, T) int32, that returns the losses, (B, T). Rows are padded on the
    right with token 0, which does not change them, because attention is causal. When `stop` becomes non-empty, the
    remaining rows are skipped and the result is incomplete.
    """
    from tqdm import tqdm

    rows, (sums, means) = examples.rows, np.zeros((2, len(examples.rows)))
    for start in tqdm(range(0, len(rows), B), desc="hellaswag", unit="batch", leave=False, disable=None):
        batch = rows[start : start + B]
        tokens, targets = np.zeros((2, B, T), np.int32)
        for b, (row, _) in enumerate(batch):
            tokens[b, : len(row) - 1], targets[b, : len(row) - 1] = row[:-1], row[1:]
        found = losses(tokens, targets)
        for b, (row, n) in enumerate(batch):
            ending = found[b, len(row) - 1 - n : len(row) - 1].astype(np.float64)
            sums[start + b], means[start + b] = ending.sum(), ending.mean()
        if stop:
            break
    if not np.isfinite(sums).all():
        raise UserError("the model's losses are not finite: use an earlier checkpoint")
    return sums.reshape(-1, ENDINGS), means.reshape(-1, ENDINGS)


def score(sums: np.ndarray, means: np.ndarray, labels: np.ndarray) -> Score:
    """The ending with the smallest loss is chosen, the first of equal ones; sums, means (examples, ENDINGS)."""
    found, found_norm = sums.argmin(1), means.argmin(1)
    return Score(float(np.mean(found_norm == labels)), float(np.mean(found == labels)), len(labels))
