"""Figures, source code and text for the lessons. A notebook displays them; a script prints the text.

pictures.show(pictures.draw_counts(ladder.counts(LADDER)))
"""

import inspect
import io
import sys
import textwrap
from collections.abc import Callable

from llm_numba.lessons.counting import SECTOR, WARP, instructions
from llm_numba.lessons.tracing import Trace
from llm_numba.training.loss_plot import COLOURS

DPI = 80
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}


def in_notebook() -> bool:
    return "ipykernel" in sys.modules and "IPython" in sys.modules


def new(rows: int = 1, columns: int = 1, width: float = 8.0, height: float = 3.0, **options):
    """plt.subplots in the lessons' style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def show(figure) -> None:
    """Display a figure as a small PNG. In a script it is only rendered."""
    import matplotlib.pyplot as plt

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    plt.close(figure)
    if in_notebook():
        from IPython.display import Image, display

        display(Image(content.getvalue()))


def text(markdown: str) -> None:
    if in_notebook():
        from IPython.display import Markdown, display

        display(Markdown(markdown))
    else:
        print(markdown)


def source(*functions: Callable) -> None:
    """Show the source of functions, read from their files: the code that runs, not a copy."""
    for function in functions:
        lines = textwrap.dedent(inspect.getsource(getattr(function, "py_func", function)))
        text(f"```python\n{lines.rstrip()}\n```")


def draw_counts(counts: dict[str, dict[str, int]]):
    """Bars for each rung: elements requested from global memory and sectors moved; requests to shared memory and
    passes over its banks. counts: from `ladder.counts`."""
    has_shared = any(c["shared accesses"] for c in counts.values())
    figure, axes = new(1, 2 if has_shared else 1, width=9, height=0.9 + 0.55 * len(counts), sharey=True, squeeze=False)
    panels = [
        ("global memory", [("elements requested", "global accesses"), ("32-byte sectors moved", "global sectors")]),
        (
            "shared memory",
            [("warp requests", "shared instructions"), ("passes: n for an n-way bank conflict", "shared passes")],
        ),
    ]
    names = list(counts)
    for axis, (title, bars) in zip(axes[0], panels, strict=False):
        for i, (label, key) in enumerate(bars):
            ys = [y + (i - 0.5) * 0.38 for y in range(len(names))]
            drawn = axis.barh(ys, [counts[n][key] for n in names], 0.36, label=label, color=COLOURS[i])
            axis.bar_label(drawn, fmt="{:,.0f}", padding=2, fontsize=8)
        axis.set(title=title, yticks=range(len(names)), yticklabels=map(short, names))
        axis.margins(x=0.18)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes[0, 0].invert_yaxis()
    return figure


def draw_warp(trace: Trace, array: str, steps: int = 12, launch: int = 0, warp: int = 0, title: str = ""):
    """The elements of an array that the threads of a warp access. Each row is one access, in program order; each square
    is an element, coloured by thread. Grey: the 32-byte sectors that have to be moved."""
    from matplotlib.patches import Rectangle

    groups = [g for g in instructions(trace) if g[0].array == array and g[0].launch == launch]
    groups = [g for g in groups if g[0].block == groups[0][0].block and g[0].lane // WARP == warp][:steps]
    each = groups[0][0].nbytes
    elements = [a.offset // each for g in groups for a in g]
    first = min(elements) // (SECTOR // each) * (SECTOR // each)
    last = max(elements) + 1
    is_global = groups[0][0].space == "global"
    figure, axis = new(width=9, height=1.3 + 0.26 * len(groups))
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    marker = max(1.0, (last - first) / 300)  # stays visible when there are many elements
    lanes = max(a.lane % WARP for g in groups for a in g) or 1
    for row, group in enumerate(groups):
        if is_global:
            for sector in {a.offset // SECTOR for a in group}:
                box = (sector * SECTOR // each, row - 0.45), SECTOR / each, 0.9
                axis.add_patch(Rectangle(*box, color="0.85", linewidth=0))
        for a in group:
            colour = colours(a.lane % WARP / lanes)
            axis.add_patch(Rectangle((a.offset // each, row - 0.32), marker, 0.64, facecolor=colour, linewidth=0))
    kinds = [f"{g[0].kind} {i + 1}" for i, g in enumerate(groups)]
    axis.set(xlim=(first, last + 0.02 * (last - first)), ylim=(len(groups) - 0.4, -0.6))
    axis.set(yticks=range(len(groups)), yticklabels=kinds, xlabel=f"element of {array}, in memory order")
    axis.set_title(title or f"{array}: accesses of one warp, in program order")
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, lanes), colours)
    figure.colorbar(scale, ax=axis, label="thread", pad=0.01, aspect=12)
    return figure


def draw_times(found: dict):
    """Bars of the rates that `timing.times` found, and the machine's limit as a dashed line."""
    names = list(found["rows"])
    rates = [found["work"] / found["rows"][name] for name in names]
    limit = found["limit"] or 0.0
    in_tera = found["unit"] == "flops" and max(*rates, limit) >= 1e12
    unit = ("TFLOP/s" if in_tera else "GFLOP/s") if found["unit"] == "flops" else "GB/s"
    scale = 1e-12 if in_tera else 1e-9
    figure, axis = new(width=8, height=1.1 + 0.36 * len(names))
    drawn = axis.barh(
        range(len(names)), [scale * rate for rate in rates], 0.7, color=[colour_of(name) for name in names]
    )
    axis.bar_label(drawn, fmt="{:,.4g}", padding=3, fontsize=8)
    axis.set(yticks=range(len(names)), yticklabels=map(short, names), xlabel=unit, ylim=(len(names) - 0.4, -1.2))
    if limit:
        axis.axvline(scale * limit, color="0.4", linestyle="--", linewidth=1)
        label = f"the machine's limit: {scale * limit:,.4g} {unit} "
        axis.text(scale * limit, -0.6, label, fontsize=8, color="0.3", ha="right")
    axis.margins(x=0.1)
    return figure


def colour_of(name: str) -> str:
    """One colour for the lesson's rungs, one for the model's own op, one for other libraries."""
    return COLOURS[0] if name.rpartition("_v")[2].isdigit() else COLOURS[2] if "(llm_numba" in name else COLOURS[1]


def short(name: str) -> str:
    """A rung's title, with its module on a second line."""
    return name.replace(" (", "\n(")
