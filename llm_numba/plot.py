"""Compare runs in a picture: python -m llm_numba.plot RUN...

Reads our run folders and their log.jsonl, llm.c's main.log, and JSON as nanoGPT and its kin write it: a list, or a line
each, of objects with a step or iter and a loss.
"""

import io
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm_numba.training.log import SMOOTH
from llm_numba.util.cli import Parser, UserError, exit_with
from llm_numba.util.files import write_whole

# a column -> the names it goes by, in lower case and with _ for every other sign
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
LLMC = {"trl": "loss", "tel": "val_loss", "lr": "learning_rate", "norm": "norm"}  # llm.c's; its eval is an accuracy
LLMC_LINE = re.compile(r"s:(\d+)((?: \w+:\S+)+)")

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; its yellow is too pale for a line
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LONG = 2000  # steps from which on the beginning of a run would hide the rest, were the axis not logarithmic
STYLES = ["-", "--", ":", "-."]  # for more runs than colours


class Run(NamedTuple):
    """What a log says: column -> (steps, values), both (n,), steps rising."""

    name: str
    columns: dict[str, tuple[np.ndarray, np.ndarray]]


def read_run(path: Path) -> tuple[Run, int]:
    """A run by its folder or its log, and how many of the log's lines are damaged and left out.

    Errors: UserError for a file that cannot be read, is empty, or has not one loss in a form that is known.
    """
    file = path
    if path.is_dir():
        file = next((path / name for name in ("log.jsonl", "main.log") if (path / name).exists()), None)
        if file is None:
            raise UserError(f"{path}: neither a log.jsonl nor a main.log is in this folder")
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if not text.strip():
        raise UserError(f"{file}: is empty: the run has logged nothing yet")

    found, damaged = {}, 0
    for row in rows_of(text):
        if row is None:
            damaged += 1
            continue
        for column, value in row.items():
            if column != "step":
                found.setdefault(column, {})[row["step"]] = value  # of a step that came twice the last counts
    if not found.keys() & {"loss", "val_loss"}:
        raise UserError(
            f"{file}: no losses found: expected our log.jsonl, llm.c's main.log, or JSON objects with step or iter and "
            "loss"
        )
    columns = {}
    for column, values in found.items():
        steps = sorted(values)
        columns[column] = np.array(steps, float), np.array([values[step] for step in steps], float)
    name = path.stem if path == file and file.name not in ("log.jsonl", "main.log") else file.absolute().parent.name
    return Run(name, with_time_and_tokens(columns)), damaged


def rows_of(text: str) -> Iterator[dict | None]:
    """The numbers of each record, by column, with its step; None for a damaged one."""
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
    """A record's finite numbers by column; None without a step."""
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
    """The columns, and where they can be known: seconds of training, and tokens, until each step."""
    columns = dict(columns)
    if "ms" in columns:
        steps, ms = columns.pop("ms")
        columns["seconds"] = steps, np.cumsum(ms) / 1e3
        rate = columns.get("tokens_per_second")
        if rate and "tokens" not in columns and len(rate[0]) == len(steps):
            columns["tokens"] = steps, np.cumsum(np.rint(rate[1] * ms / 1e3))
    return columns


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each value and those before it: SMOOTH of them, of very many values a hundredth; but at the start,
    where a loss falls fast, a quarter of what there is."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    starts = ends - np.clip(ends // 4, 1, max(SMOOTH, len(values) // 100))
    return (sums[ends] - sums[starts]) / (ends - starts)


def picture(runs: list[Run]):
    """A matplotlib figure that compares the runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    long = max(steps[-1] for run in runs for steps, _ in run.columns.values()) > LONG
    panels = [  # title, column, what it is drawn against, unit of y, smoothed, which axes are logarithmic
        ("training loss by steps", "loss", "step", "nats per token", True, "xy" if long else "y"),
        ("training loss by tokens", "loss", "tokens", "nats per token", True, "xy" if long else "y"),
        ("training loss by time", "loss", "seconds", "nats per token", True, "y"),
        ("validation loss", "val_loss", "step", "nats per token", False, "xy" if long else "y"),
        ("norm of the gradient", "norm", "step", "", True, "xy" if long else "y"),
        ("learning rate", "learning_rate", "step", "", False, ""),
        ("speed", "tokens_per_second", "step", "tokens/s", True, ""),
    ]
    with plt.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(2, 4, figsize=(16, 7.5), layout="constrained")
        for axis, (title, column, against, unit, smoothed, logarithmic) in zip(axes.flat, panels, strict=False):
            draw(axis, runs, column, against, smoothed, "x" in logarithmic)
            axis.set(title=title, xlabel=against, ylabel=unit)
            finish(axis, logarithmic)
        legend(axes[1, 3], runs)
    return figure


def draw(axis, runs: list[Run], column: str, against: str, smoothed: bool, positive: bool) -> None:
    for i, run in enumerate(runs):
        if column not in run.columns or against not in ("step", *run.columns):
            continue
        steps, y = run.columns[column]
        x = steps
        if against != "step":
            known, values = run.columns[against]
            inside = (steps >= known[0]) & (steps <= known[-1])
            x, y = np.interp(steps[inside], known, values), y[inside]
        x, y = (x[x > 0], y[x > 0]) if positive else (x, y)
        line = dict(color=COLOURS[i % len(COLOURS)], linestyle=STYLES[i // len(COLOURS) % len(STYLES)], linewidth=1.6)
        if smoothed:
            axis.plot(x, y, color=line["color"], alpha=0.18, linewidth=0.7)
            axis.plot(x, smooth(y), **line)
        else:
            axis.plot(x, y, marker="o" if len(x) < 40 else "", markersize=3.5, **line)


def finish(axis, logarithmic: str) -> None:
    """Scales, ticks that are read at a glance, and a word where there is nothing to see."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MultipleLocator, NullFormatter

    if not axis.lines:
        axis.text(0.5, 0.5, "in none of these logs", transform=axis.transAxes, ha="center", color="0.5")
        axis.set(xticks=[], yticks=[])
        return
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.margins(x=0.01)
    engineer = EngFormatter(sep="")
    thousands = FuncFormatter(lambda x, position: engineer(x, position).replace("G", "B"))
    longest = axis.get_xlim()[1]
    if "x" in logarithmic:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(thousands)
    elif axis.get_xlabel() == "seconds":
        if longest > 300:
            unit, size = ("hours", 3600) if longest > 3 * 3600 else ("minutes", 60)
            axis.set_xlabel(unit)
            tick = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**6) if n * size * 8 >= longest)
            axis.xaxis.set_major_locator(MultipleLocator(tick * size))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / size:g}"))
    elif longest >= 1000:
        axis.xaxis.set_major_formatter(thousands)
    low, high = axis.get_ylim()
    if "y" in logarithmic and min(y.min() for y in (line.get_ydata() for line in axis.lines)) > 0:
        axis.set_yscale("log")
        wide = high > 20 * max(low, 1e-12)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else range(1, 10)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif high >= 1000:
        axis.yaxis.set_major_formatter(thousands)


def legend(axis, runs: list[Run]) -> None:
    """The runs' names in their colours, and where each has come to."""
    from matplotlib.lines import Line2D

    axis.axis("off")
    lines, labels = [], []
    for i, run in enumerate(runs):
        style = STYLES[i // len(COLOURS) % len(STYLES)]
        lines.append(Line2D([], [], color=COLOURS[i % len(COLOURS)], linestyle=style, linewidth=2.5))
        labels.append(f"{run.name}\n{summary(run)}")
    axis.legend(lines, labels, loc="upper left", frameon=False, labelspacing=1, handlelength=2.5, borderaxespad=0)


def summary(run: Run) -> str:
    parts = []
    if "loss" in run.columns:
        steps, losses = run.columns["loss"]
        parts += [f"step {steps[-1]:.0f}", f"loss {smooth(losses)[-1]:.4g}"]
    if "val_loss" in run.columns:
        parts.append(f"best validation {run.columns['val_loss'][1].min():.4g}")
    return ", ".join(parts)


def named_apart(runs: list[Run], paths: list[Path]) -> list[Run]:
    """The runs, those of one name under their paths."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else run._replace(name=str(path))
        for run, path in zip(runs, paths, strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="llm-numba plot",
        description="Draw the losses, gradient norms, learning rates and speeds of runs into one picture.",
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="a run folder, a log.jsonl, llm.c's main.log, or JSON with step or iter, and loss or train/loss",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("runs.png"), help=".png, .svg or .pdf (default: runs.png)"
    )
    args = parser.parse_args(argv)
    if args.out.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {args.out}: expected a name that ends in .png, .svg or .pdf")
    runs = []
    for path in args.runs:
        run, damaged = read_run(path)
        runs.append(run)
        if damaged:
            print(f"note: {path}: left out {damaged} damaged lines", file=sys.stderr)
    figure = picture(named_apart(runs, args.runs))
    content = io.BytesIO()
    figure.savefig(content, format=args.out.suffix[1:], dpi=130)
    write_whole(args.out, content.getvalue())
    print(args.out)


if __name__ == "__main__":
    exit_with(main)
