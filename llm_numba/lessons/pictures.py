"""What a lesson shows: figures, source, text; in a notebook as such, in a script as little as makes sense.

pictures.show(pictures.draw_counts(ladder.counts(LADDER)))
"""

import inspect
import io
import sys
import textwrap
from collections.abc import Callable

from llm_numba.lessons.counting import SECTOR, WARP, instructions
from llm_numba.lessons.tracing import Trace
from llm_numba.plot import COLOURS

DPI = 80
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}


def in_notebook() -> bool:
    return "ipykernel" in sys.modules and "IPython" in sys.modules


def new(rows: int = 1, columns: int = 1, width: float = 8.0, height: float = 3.0, **options):
    """(figure, axes) in the lessons' style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def show(figure) -> None:
    """Put a figure into the notebook as a small PNG; a script only renders it."""
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
    """The functions as they stand in their files: the code that runs, not a copy of it."""
    for function in functions:
        lines = textwrap.dedent(inspect.getsource(getattr(function, "py_func", function)))
        text(f"```python\n{lines.rstrip()}\n```")


def draw_counts(counts: dict[str, dict[str, int]]):
    """Bars for each rung: what its threads ask of global memory and what the card has to move for that, and how often
    shared memory is asked and has to give. counts: of `ladder.counts`."""
    has_shared = any(c["shared accesses"] for c in counts.values())
    figure, axes = new(1, 2 if has_shared else 1, width=9, height=0.9 + 0.55 * len(counts), sharey=True, squeeze=False)
    panels = [
        ("global memory", [("numbers asked for", "global accesses"), ("32-byte sectors moved", "global sectors")]),
        ("shared memory", [("requests of a warp", "shared instructions"), ("turns of its banks", "shared turns")]),
    ]
    names = list(counts)
    for axis, (title, bars) in zip(axes[0], panels, strict=False):
        for i, (label, key) in enumerate(bars):
            places = [y + (i - 0.5) * 0.38 for y in range(len(names))]
            drawn = axis.barh(places, [counts[n][key] for n in names], 0.36, label=label, color=COLOURS[i])
            axis.bar_label(drawn, fmt="{:,.0f}", padding=2, fontsize=8)
        axis.set(title=title, yticks=range(len(names)), yticklabels=map(short, names))
        axis.margins(x=0.18)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes[0, 0].invert_yaxis()
    return figure


def draw_warp(trace: Trace, array: str, steps: int = 12, launch: int = 0, warp: int = 0, title: str = ""):
    """Which elements of an array the threads of a warp touch, access after access: a row an access, in program order;
    a square an element, coloured by the thread. Grey are the 32-byte sectors that have to be moved for it."""
    from matplotlib.patches import Rectangle

    groups = [g for g in instructions(trace) if g[0].array == array and g[0].launch == launch]
    groups = [g for g in groups if g[0].block == groups[0][0].block and g[0].lane // WARP == warp][:steps]
    each = groups[0][0].nbytes
    places = [a.offset // each for g in groups for a in g]
    first = min(places) // (SECTOR // each) * (SECTOR // each)
    last = max(places) + 1
    is_global = groups[0][0].space == "global"
    figure, axis = new(width=9, height=1.3 + 0.26 * len(groups))
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    marker = max(1.0, (last - first) / 300)  # a square that is still seen where the elements are many
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
    axis.set(yticks=range(len(groups)), yticklabels=kinds, xlabel=f"element of {array}, in the order of memory")
    axis.set_title(title or f"{array}: what a warp touches, access after access")
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, lanes), colours)
    figure.colorbar(scale, ax=axis, label="thread", pad=0.01, aspect=12)
    return figure


def draw_times(found: dict):
    """Bars of a ladder's times, as `timing.times` gives them: the rate of each rung, and the machine's limit."""
    names = list(found["rows"])
    rates = [1e-9 * found["work"] / found["rows"][name] for name in names]
    unit = "GFLOP/s" if found["unit"] == "flops" else "GB/s"
    figure, axis = new(width=8, height=1.1 + 0.36 * len(names))
    drawn = axis.barh(range(len(names)), rates, 0.7, color=[colour_of(name) for name in names])
    axis.bar_label(drawn, fmt="{:,.4g}", padding=3, fontsize=8)
    axis.set(yticks=range(len(names)), yticklabels=map(short, names), xlabel=unit, ylim=(len(names) - 0.4, -1.2))
    if found["limit"]:
        limit = 1e-9 * found["limit"]
        axis.axvline(limit, color="0.4", linestyle="--", linewidth=1)
        axis.text(limit, -0.6, f"the machine's limit: {limit:,.0f} {unit} ", fontsize=8, color="0.3", ha="right")
    axis.margins(x=0.1)
    return figure


def colour_of(name: str) -> str:
    """Rungs of the lesson in one colour, the one that the model uses in another, others' kernels in a third."""
    return COLOURS[0] if name.rpartition("_v")[2].isdigit() else COLOURS[2] if "(llm_numba" in name else COLOURS[1]


def short(name: str) -> str:
    """A rung's title on two lines where it has a module."""
    return name.replace(" (", "\n(")
