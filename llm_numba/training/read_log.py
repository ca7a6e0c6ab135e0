"""Logs of training runs: our log.jsonl and llm.c's main.log."""

import json
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm_numba.util.cli import UserError

COLUMNS = ("step", "loss", "val_loss", "norm", "learning_rate", "tokens_per_second", "ms")
LLMC = {"trl": "loss", "tel": "val_loss", "lr": "learning_rate", "norm": "norm"}  # its eval is an accuracy
LLMC_LINE = re.compile(r"s:(\d+)((?: \w+:\S+)+)")
LOGS = ("log.jsonl", "main.log")


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
        file = next((path / name for name in LOGS if (path / name).exists()), None)
        if file is None:
            raise UserError(f"{path}: this folder contains neither {' nor '.join(LOGS)}")
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if not text.strip():
        raise UserError(f"{file}: is empty: the run has not logged anything yet")
    columns, damaged = columns_in(text)
    if not columns.keys() & {"loss", "val_loss"}:
        raise UserError(f"{file}: no losses found; expected our log.jsonl or llm.c's main.log")
    return Run(file.absolute().parent.name if file.name in LOGS else file.stem, columns), damaged


def columns_in(text: str) -> tuple[dict, int]:
    """(columns of a Run, number of damaged lines). If a step occurs twice, the last row counts.

    With "ms" there are also "seconds" of training up to each step, and with "tokens_per_second" the "tokens".
    """
    rows = [row_of(line) for line in text.splitlines() if line.strip()]
    found: dict[str, dict[float, float]] = {}
    for row in filter(None, rows):
        step = row.pop("step")
        for column, value in row.items():
            found.setdefault(column, {})[step] = value
    columns = {}
    for column, values in found.items():
        steps = sorted(values)
        columns[column] = np.array(steps, float), np.array([values[step] for step in steps], float)
    if "ms" in columns:
        steps, ms = columns.pop("ms")
        columns["seconds"] = steps, np.cumsum(ms) / 1e3
        rate = columns.get("tokens_per_second")
        if rate and len(rate[0]) == len(steps):
            columns["tokens"] = steps, np.cumsum(np.rint(rate[1] * ms / 1e3))
    return columns, rows.count(None)


def row_of(line: str) -> dict[str, float] | None:
    """The finite values of a line by column; None if the line is damaged or has no step."""
    if llmc := LLMC_LINE.fullmatch(line.strip()):
        pairs = [pair.split(":", 1) for pair in llmc[2].split()]
        record = {"step": llmc[1]} | {LLMC[key]: value for key, value in pairs if key in LLMC}
    else:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return None
    row = {}
    for column in COLUMNS if isinstance(record, dict) else ():
        with suppress(KeyError, OverflowError, TypeError, ValueError):
            if math.isfinite(value := float(record[column])):
                row[column] = value
    return row if "step" in row else None
