"""HellaSwag: which of four endings is the most likely for the model? Zellers et al. 2019, arXiv:1905.07830

Scored by completion, as in llm.c: the model sees the context with one ending at a time. `acc` chooses the ending with
the smallest sum of token losses, `acc_norm` the one with the smallest mean.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from llm_numba.data import datasets
from llm_numba.util.cli import UserError

ENDINGS = 4


class Row(NamedTuple):
    """A context with one of its endings: at most T + 1 tokens, the last `ending` of which are scored."""

    tokens: list[int]
    ending: int


class Examples(NamedTuple):
    """The rows of all examples, ENDINGS consecutive ones for each, and which of them is right."""

    rows: list[Row]
    labels: np.ndarray

    def longest(self) -> int:
        """The smallest T that fits every row."""
        return max(len(row.tokens) for row in self.rows) - 1


class Score(NamedTuple):
    """The fraction of examples whose right ending was chosen."""

    acc_norm: float
    acc: float
    examples: int

    def __str__(self):
        return f"acc_norm {self.acc_norm:.4f}, acc {self.acc:.4f} over {self.examples:,} examples"


def read_examples(
    file: str, encoding: tiktoken.Encoding | None, T: int, limit: int, flag: str
) -> tuple[Examples, str | None]:
    """The first `limit` examples (0: all) of JSON lines with "ctx", "endings" and "label", and a note if some are cut.

    file: "" means the download of `python -m llm_numba.data hellaswag`. A row longer than T + 1 tokens loses its start.
    Errors: UserError with the flag, the file and the line; a model without a tokenizer.
    """
    if encoding is None:
        raise UserError("HellaSwag is text: a model trained with --tokenizer none cannot read it")
    path = Path(file).expanduser() if file else datasets.folder_of("hellaswag") / datasets.HELLASWAG
    where = f"{flag} {path}" if file else str(path)
    rows, labels, cut = [], [], 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                context, endings, label = _example(line, f"{where}: line {number}")
                before = encoding.encode_ordinary(context)
                for ending in endings:
                    after = encoding.encode_ordinary(" " + ending)
                    tokens = (before + after)[-T - 1 :]
                    cut += len(tokens) < len(before) + len(after)
                    rows.append(Row(tokens, min(len(after), len(tokens) - 1)))
                labels.append(label)
                if len(labels) == limit:
                    break
    except OSError as error:
        hint = "" if file else f": download it with python -m llm_numba.data hellaswag, or give {flag} FILE"
        raise UserError(f"{where}: cannot be read ({error.strerror}){hint}") from error
    if not labels:
        raise UserError(f"{where}: has no examples")
    note = f"{cut:,} of {len(rows):,} contexts with endings are longer than {T} tokens: cut at the start"
    return Examples(rows, np.array(labels)), note if cut else None


def _example(line: bytes, where: str) -> tuple[str, list[str], int]:
    try:
        example = json.loads(line)
        context, endings, label = example["ctx"], example["endings"], example["label"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{where}: expected a JSON object with "ctx", "endings" and "label"') from error
    texts = [context, *endings] if isinstance(endings, list) else []
    if len(texts) != 1 + ENDINGS or not all(isinstance(text, str) for text in texts) or not context:
        raise UserError(f"{where}: expected a string as ctx and {ENDINGS} strings as endings")
    if type(label) is not int or not 0 <= label < ENDINGS:
        raise UserError(f"{where}: label is {label!r:.20}, expected 0 to {ENDINGS - 1}")
    return context, endings, label


def losses_of(examples: Examples, losses: Callable, B: int, T: int, stop=()) -> tuple[np.ndarray, np.ndarray]:
    """The sum and the mean of each ending's losses, both (examples, ENDINGS) float64.

    losses: a function of (tokens, targets), both (B, T) int32, that returns the losses, (B, T). Rows are padded on the
    right with token 0, which does not change them, because attention is causal. When `stop` becomes non-empty, the
    remaining rows are skipped and the result is incomplete.
    """
    from tqdm import tqdm

    sums, means = np.empty((2, len(examples.rows)))
    with tqdm(total=len(examples.labels), desc="hellaswag", unit="example", leave=False, disable=None) as progress:
        for start in range(0, len(examples.rows), B):
            batch = examples.rows[start : start + B]
            tokens, targets = np.zeros((2, B, T), np.int32)
            for b, row in enumerate(batch):
                n = len(row.tokens) - 1
                tokens[b, :n], targets[b, :n] = row.tokens[:-1], row.tokens[1:]
            found = losses(tokens, targets)
            for b, row in enumerate(batch):
                n = len(row.tokens) - 1
                ending = found[b, n - row.ending : n].astype(np.float64)
                sums[start + b], means[start + b] = ending.sum(), ending.mean()
            progress.update((start + len(batch)) // ENDINGS - progress.n)
            if stop:
                break
    if not stop and not np.isfinite(sums).all():
        raise UserError("the model's losses are not finite: use an earlier checkpoint")
    return sums.reshape(-1, ENDINGS), means.reshape(-1, ENDINGS)


def score(sums: np.ndarray, means: np.ndarray, labels: np.ndarray) -> Score:
    """The ending with the smallest loss is chosen, the first of equal ones; sums, means (examples, ENDINGS)."""
    found, found_norm = sums.argmin(1), means.argmin(1)
    return Score(float(np.mean(found_norm == labels)), float(np.mean(found == labels)), len(labels))
