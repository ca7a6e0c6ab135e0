"""Logs of training runs: our log.jsonl, llm.c's main.log, and JSON with a step or iter and a loss, as nanoGPT writes.

JSON may be a list of objects, or one object per line.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm_numba.util.cli import UserError

# column -> its names in logs, in lower case and with _ for every other character
NAMES = {
    "step": ("step", "iter", "iteration", "iter_num", "_step"),
    "loss": ("loss", "train_loss", "loss_train"),
    "val_loss": ("val_loss", "loss_val", "valid_loss", "validation_loss"),
    "norm": ("norm", "grad_norm", "gradient_norm"),
    "learning_rate": ("learning_rate", "lr"),
    "tokens_per_second": ("tokens_per_second", "tok_per_sec", "tokens_per_sec"),
    "ms": ("ms", "dt_ms", "step_ms"),
    "tokens": ("tokens", "tokens_seen", "total_tokens"),
}
COLUMN_OF = {name: column for column, names in NAMES.items() for name in names}
LLMC = {"trl": "loss", "tel": "val_loss", "lr": "learning_rate", "norm": "norm"}  # its eval is an accuracy
LLMC_LINE = re.compile(r"s:(\d+)((?: \w+:\S+)+)")


class Run(NamedTuple):
    """What a log contains: column -> (steps, values), both (n,), steps ascending."""

    name: str
    columns: dict[str, tuple[np.ndarray, np.ndarray]]


def read_run(path: Path) -> tuple[Run, int]:
    """(run, number of damaged lines, which are skipped) of a run folder or a log file.

    Errors: UserError if the file cannot be read, is empty, or contains no losses in a known format.
    """
    file = path
    if path.is_dir():
        file = next((path / name for name in ("log.jsonl", "main.log") if (path / name).exists()), None)
        if file is None:
            raise UserError(f"{path}: this folder contains neither log.jsonl nor main.log")
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if not text.strip():
        raise UserError(f"{file}: is empty: the run has not logged anything yet")
    columns, damaged = columns_in(text)
    if not columns.keys() & {"loss", "val_loss"}:
        raise UserError(
            f"{file}: no losses found; expected a log.jsonl, llm.c's main.log, or JSON objects with step or iter and "
            "loss"
        )
    name = path.stem if path == file and file.name not in ("log.jsonl", "main.log") else file.absolute().parent.name
    return Run(name, columns), damaged


def columns_in(text: str) -> tuple[dict, int]:
    """(columns of a Run, number of damaged lines). If a step occurs twice, the last row counts."""
    found, damaged = {}, 0
    for row in rows_in(text):
        if row is None:
            damaged += 1
            continue
        step = row.pop("step")
        for column, value in row.items():
            found.setdefault(column, {})[step] = value
    columns = {}
    for column, values in found.items():
        steps = sorted(values)
        columns[column] = np.array(steps, float), np.array([values[step] for step in steps], float)
    return with_time_and_tokens(columns), damaged


def rows_in(text: str) -> Iterator[dict | None]:
    """The values of each record by column, with its step; None for a damaged record."""
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except (ValueError, RecursionError):
            records = text.splitlines()
        yield from map(row_of, records)
        return
    for line in filter(str.strip, text.splitlines()):
        llmc = LLMC_LINE.fullmatch(line.strip())
        if llmc:
            pairs = dict(pair.split(":", 1) for pair in llmc[2].split())
            yield row_of({"step": float(llmc[1])} | {LLMC[key]: value for key, value in pairs.items() if key in LLMC})
            continue
        try:
            yield row_of(json.loads(line))
        except (ValueError, RecursionError):
            yield None


def row_of(record) -> dict | None:
    """The finite values of a record by column; None if it has no step."""
    if not isinstance(record, dict):
        return None
    row = {}
    for key, value in record.items():
        column = COLUMN_OF.get(re.sub(r"\W", "_", key.lower()))
        try:
            number = float(value)
        except (OverflowError, TypeError, ValueError):
            continue
        if column and math.isfinite(number):
            row.setdefault(column, number)
    return row if "step" in row else None


def with_time_and_tokens(columns: dict) -> dict:
    """The columns, plus seconds of training and tokens up to each step if they can be computed."""
    columns = dict(columns)
    if "ms" in columns:
        steps, ms = columns.pop("ms")
        columns["seconds"] = steps, np.cumsum(ms) / 1e3
        rate = columns.get("tokens_per_second")
        if rate and "tokens" not in columns and len(rate[0]) == len(steps):
            columns["tokens"] = steps, np.cumsum(np.rint(rate[1] * ms / 1e3))
    return columns
