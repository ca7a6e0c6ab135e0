"""The figure of one or more runs: losses, gradient norm, learning rate and speed."""

import io
import os
from pathlib import Path

import numpy as np

from llm_numba.training.read_log import Run
from llm_numba.util.files import write_whole

SMOOTH = 20  # steps over which a loss is averaged
LONG = 2000  # steps above which the axis is logarithmic, or the start of a run would hide the rest
FORMATS = (".png", ".svg", ".pdf")

# Okabe and Ito's colours, distinguishable with any colour vision, without yellow, which is too pale for a line
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", ":", "-."]  # for more runs than colours

PANELS = [  # title, column, x axis, unit of y, smoothed, logarithmic axes ("x" only in long runs)
    ("training loss by steps", "loss", "step", "nats per token", True, "xy"),
    ("training loss by tokens", "loss", "tokens", "nats per token", True, "xy"),
    ("training loss by time", "loss", "seconds", "nats per token", True, "y"),
    ("validation loss", "val_loss", "step", "nats per token", False, "xy"),
    ("gradient norm", "norm", "step", "", True, "xy"),
    ("learning rate", "learning_rate", "step", "", False, ""),
    ("speed", "tokens_per_second", "step", "tokens/s", True, ""),
]
LOSSES = [PANELS[0], PANELS[3]]


def write_figure(path: Path, runs: list[Run], panels: list[tuple] = PANELS) -> None:
    """Write the figure to a .png, .svg or .pdf. Errors: UserError if the file cannot be written."""
    content = io.BytesIO()
    figure_of(runs, panels).savefig(content, format=path.suffix[1:], dpi=130)
    write_whole(path, content.getvalue())


def figure_of(runs: list[Run], panels: list[tuple] = PANELS):
    """A matplotlib figure with one panel per row of `panels`, and a legend."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    long = max(steps[-1] for run in runs for steps, _ in run.columns.values()) > LONG
    rows = -(-(len(panels) + 1) // 4)
    columns = (len(panels) + rows) // rows
    with rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4 * columns, 3.75 * rows), layout="constrained")
        axes = figure.subplots(rows, columns).flat
        for axis, (title, column, against, unit, smoothed, logarithmic) in zip(axes, panels, strict=False):
            scales = logarithmic if long else logarithmic.replace("x", "")
            for i, run in enumerate(runs):
                draw(axis, i, run, column, against, smoothed, "x" in scales)
            axis.set(title=title, xlabel=against, ylabel=unit)
            finish(axis, scales)
        legend(axes[-1], runs)
    return figure


def draw(axis, i: int, run: Run, column: str, against: str, smoothed: bool, positive: bool) -> None:
    """Draw a column of run number `i`, if it has it; positive: only where x is."""
    if column not in run.columns or against not in ("step", *run.columns):
        return
    x = steps = run.columns[column][0]
    y = run.columns[column][1]
    if against != "step":
        known, values = run.columns[against]
        inside = (steps >= known[0]) & (steps <= known[-1])
        x, y, steps = np.interp(steps[inside], known, values), y[inside], steps[inside]
    if positive:
        x, y, steps = x[x > 0], y[x > 0], steps[x > 0]
    if smoothed:
        axis.plot(x, y, color=look(i)["color"], alpha=0.18, linewidth=0.7)
        axis.plot(x, smooth(y, spacing(steps)), **look(i), linewidth=1.6)
    else:
        axis.plot(x, y, **look(i), linewidth=1.6, marker="o" if len(x) < 40 else "", markersize=3.5)


def look(i: int) -> dict[str, str]:
    """Colour and line style of run number `i`."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}


def spacing(steps: np.ndarray) -> float:
    return float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0


def smooth(values: np.ndarray, spacing: float = 1.0) -> np.ndarray:
    """The mean of each value and those before it: over SMOOTH steps (`spacing` steps from one value to the next), or in
    a long run over a hundredth of it; at the start, where the loss falls fast, over a quarter of the values so far."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    starts = ends - np.clip(ends // 4, 1, max(1, int(SMOOTH / spacing), len(values) // 100))
    return (sums[ends] - sums[starts]) / (ends - starts)


def finish(axis, logarithmic: str) -> None:
    """Scales and readable ticks; a remark if there is nothing to draw."""
    from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if not axis.lines:
        axis.text(0.5, 0.5, "not in these logs", transform=axis.transAxes, ha="center", color="0.5")
        axis.set(xticks=[], yticks=[])
        return
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.margins(x=0.01)
    engineer = EngFormatter(sep="")
    thousands = FuncFormatter(lambda x, position: engineer(x, position).replace("G", "B"))
    longest, (low, high) = axis.get_xlim()[1], axis.get_ylim()
    if "x" in logarithmic:
        axis.set_xscale("log")
    if axis.get_xlabel() == "seconds" and longest > 300:
        unit, size = ("hours", 3600) if longest > 3 * 3600 else ("minutes", 60)
        axis.set_xlabel(unit)
        ticks = MaxNLocator(8, integer=True).tick_values(0, longest / size)
        axis.xaxis.set_major_locator(FixedLocator([n * size for n in ticks]))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / size:g}"))
    elif longest >= 1000:
        axis.xaxis.set_major_formatter(thousands)
    if "y" in logarithmic and min(y.min() for y in (line.get_ydata() for line in axis.lines)) > 0:
        axis.set_yscale("log")
        wide = high > 20 * max(low, 1e-12)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else range(1, 10)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif high >= 1000:
        axis.yaxis.set_major_formatter(thousands)


def legend(axis, runs: list[Run]) -> None:
    """Each run's name, with its last step and loss and its best validation."""
    axis.axis("off")
    labels = []
    for i, run in enumerate(runs):
        parts = []
        if "loss" in run.columns:
            steps, losses = run.columns["loss"]
            parts += [f"step {steps[-1]:.0f}", f"loss {smooth(losses, spacing(steps))[-1]:.4g}"]
        if "val_loss" in run.columns:
            parts.append(f"best validation {run.columns['val_loss'][1].min():.4g}")
        axis.plot([], [], **look(i), linewidth=2.5)
        labels.append(f"{os.fsencode(run.name).decode(errors='replace')}\n{', '.join(parts)}")
    axis.legend(axis.lines, labels, loc="upper left", frameon=False, labelspacing=1, handlelength=2.5, borderaxespad=0)
