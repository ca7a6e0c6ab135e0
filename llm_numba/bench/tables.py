"""Turn benchmark results into tables and targets, and write tables into documentation pages.

A row is a dict: name; shape; flops, or bytes and their access pattern; times (column -> seconds of every run); absent
(column -> why it has no times); memory (column -> peak bytes). Columns: "ours", on a GPU "no graph", and
"<build> eager" and "<build> compiled" for each PyTorch build in BUILDS. A build "x+y" is a variant of the build "x".
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from llm_numba.bench.breakdown import PATTERNS
from llm_numba.util.cli import UserError
from llm_numba.util.files import format_bytes, write_whole

BUILDS = {
    "torch": "PyTorch as installed",
    "avx512": "PyTorch with MKL's AVX-512 path",
    "tf32": "PyTorch in float32 with TF32 matmuls",
    "autocast": "PyTorch with float32 parameters and bf16 autocast",
    "autocast+cudnn": "the same, with cuDNN's attention, where PyTorch would choose another",
    "bf16": "PyTorch entirely in bf16, AdamW included",
    "bf16+cudnn": "the same, with cuDNN's attention",
}
MEMORY = {
    "cpu": "Memory is the peak increase of the process's resident memory during a step.",
    "cuda": "Memory is the peak GPU memory of a step, for PyTorch without its allocator's cached blocks. An op's time "
    "is GPU time with a cold L2 cache; a step's time includes copying the loss to the host.",
    "cudasim": "Timings in the simulator are meaningless.",
}
MODES = ("eager", "compiled")

# GPT-2 124M: upper bounds of our time over that of PyTorch, as installed and with MKL's AVX-512 path
STEP_RATIOS = {"4 x 64": (0.33, 0.52), "4 x 256": (0.35, 0.77), "4 x 1024": (0.32, 0.57)}
SAMPLING_RATIOS = (0.7, 0.7)
MEMORY_RATIO = 1.0
# lower bounds of the share of the measured peak or bandwidth
STEP_SHARES = {"4 x 64": 0.75}
MATMUL_SHARE, VOCABULARY_SHARE, BANDWIDTH_SHARE = 0.85, 0.80, 0.80
MEMORY_BOUND = ("layernorm", "gelu_forward", "gelu_backward", "residual", "adamw")


class Verdict(NamedTuple):
    """A target, its bound, the measured value (None: not measured), and whether the value meets the bound."""

    target: str
    bound: float
    measured: float | None
    met: bool


def ours(row: dict) -> float:
    return median(row["times"]["ours"])


def columns_of(build: str, row: dict, measured: str) -> list[str]:
    """The columns of a build and of its variants that have times, or memory."""
    return [c for c, x in row[measured].items() if x and c.partition(" ")[0].partition("+")[0] == build]


def torch_seconds(row: dict, build: str) -> float | None:
    """The fastest of a build's columns; None if none ran."""
    return min((median(row["times"][c]) for c in columns_of(build, row, "times")), default=None)


def fastest_torch(row: dict) -> str:
    """The column of PyTorch's fastest time; "" if there is none."""
    columns = [c for c in row["times"] if c.partition(" ")[0] in BUILDS]
    return min(columns, key=lambda c: median(row["times"][c]), default="")


def ratio(row: dict, build: str) -> float | None:
    """Our time over PyTorch's; below 1 means that llm_numba is faster."""
    return ours(row) / other if (other := torch_seconds(row, build)) else None


def memory_ratio(row: dict, build: str) -> float | None:
    """Our peak memory over the smallest of PyTorch's."""
    other = min((row["memory"][c] for c in columns_of(build, row, "memory")), default=None)
    return row["memory"]["ours"] / other if other and row["memory"].get("ours") else None


def share(row: dict, results: dict) -> float | None:
    """Share of the measured peak, or of the measured bandwidth for the row's pattern; None in the simulator."""
    work, limit = row["flops"] or row["bytes"], results["peak_flops"]
    if not row["flops"]:
        limit = results["bandwidth"].get(row["pattern"])
    return work / ours(row) / limit if limit else None


def datasheet_share(row: dict, results: dict) -> str:
    """Share of the data sheet's peak (the "model FLOPs utilisation", MFU, of a step)."""
    return f"{row['flops'] / ours(row) / results['datasheet']:.1%}" if row["flops"] and results["datasheet"] else ""


def verdicts(results: dict) -> list[Verdict]:
    """A verdict for every target that has a row in the results."""
    found = []

    def at_most(what, value, bound):
        found.append(Verdict(f"{what}: at most", bound, value, value is not None and value <= bound))

    def at_least(what, value, bound):
        found.append(Verdict(f"{what}: at least", bound, value, value >= bound))

    for row in results["rows"]:
        name = f"{row['name']} {row['shape']}"
        bounds = {"step": STEP_RATIOS.get(row["shape"]), "sampling": SAMPLING_RATIOS}.get(row["name"])
        for build, bound in zip(BUILDS, bounds or (), strict=False):
            if build in results["builds"]:
                at_most(f"{name}, time relative to {BUILDS[build]}", ratio(row, build), bound)
        if row["name"] == "step":
            for build in results["builds"]:
                at_most(f"{name}, memory relative to {BUILDS[build]}", memory_ratio(row, build), MEMORY_RATIO)
            if row["shape"] in STEP_SHARES:
                at_least(f"{name}, share of peak", share(row, results), STEP_SHARES[row["shape"]])
        if row["name"] in ("matmul_forward", "matmul_backward"):
            bound = VOCABULARY_SHARE if row["vocabulary"] else MATMUL_SHARE
            at_least(f"{name}, share of peak", share(row, results), bound)
        if row["name"].startswith(MEMORY_BOUND):
            at_least(f"{name}, share of bandwidth", share(row, results), BANDWIDTH_SHARE)
    return found


def report(results: dict) -> str:
    """All results as Markdown, aligned to be readable on a terminal too."""
    bandwidth = ", ".join(f"{name} {1e-9 * rate:.1f}" for name, rate in results["bandwidth"].items())
    datasheet = f" (data sheet {flops_rate(results['datasheet'])})" if results["datasheet"] else ""
    lines = [
        f"{results['date']}, {results['preset']}, {results['dtype']}: {results['machine']}; "
        f"measured peak {flops_rate(results['peak_flops'], 0)}{datasheet}, memory GB/s {bandwidth}; "
        f"{results['versions']}.",
        "",
        "Times are medians in milliseconds, with the minimum and maximum in parentheses; the columns were timed in "
        "turn, round after round. Rates use the FLOPs or bytes in the ops' docstrings. A ratio is our time over "
        f"PyTorch's fastest column of the same precision. {MEMORY[results['device']]}",
    ]
    lines += [f"{build}: {BUILDS[build]}." for build in results["builds"]]
    lines += [f"{build}, {BUILDS[build]}: absent, {why}." for build, why in results["no_build"].items()]
    steps = [row for row in results["rows"] if row["name"] in ("step", "sampling")]
    ops = [row for row in results["rows"] if row not in steps]
    for rows in (steps, ops):
        lines += ["", *speed_table(rows, results)] if rows else []
    lines += ["", *memory_table(steps)] if steps else []
    for shape, found in results["breakdown"].items():
        lines += ["", *breakdown_table(shape, found, results)]
    if results["scaling"]:
        lines += ["", *scaling_table(results["scaling"])]
    lines += [line for what in results["wrong"] for line in ("", f"wrong result, not timed: {what}")]
    reasons = dict.fromkeys(why for row in results["rows"] for why in row["absent"].values())
    lines += [line for why in reasons for line in ("", f"failed: {why}")]
    return "\n".join(lines)


def speed_table(rows: list[dict], results: dict) -> list[str]:
    """One line per row; columns without any value are left out."""
    columns: dict[str, Callable] = {
        "": lambda row: f"{row['name']} {row['shape']}",
        "ours, ms": lambda row: milliseconds(row, "ours"),
        "rate": rate,
        "share of": lambda row: share_text(row, results),
        "of data sheet": lambda row: datasheet_share(row, results),
        "no graph, ms": lambda row: milliseconds(row, "no graph"),
    }
    for build in results["builds"]:
        for mode in MODES:
            columns[f"{build} {mode}, ms"] = lambda row, c=f"{build} {mode}": milliseconds(row, c)
        if "+" not in build:
            columns[f"ours / {build}"] = lambda row, b=build: number(ratio(row, b))
    if len(results["builds"]) > 1:
        columns["fastest PyTorch"] = fastest_torch
    cells = {header: [cell(row) for row in rows] for header, cell in columns.items()}
    kept = {header: column for header, column in cells.items() if any(column)}
    return table(list(kept), zip(*kept.values(), strict=True))


def memory_table(rows: list[dict]) -> list[str]:
    columns = dict.fromkeys(column for row in rows for column in row["memory"])
    lines = [[f"{row['name']} {row['shape']}", *(size(row["memory"].get(c)) for c in columns)] for row in rows]
    return table(["memory", *columns], lines)


def breakdown_table(shape: str, rows: list[dict], results: dict) -> list[str]:
    """rows: the ops of a step, see breakdown.break_down."""
    total, lines = sum(row["seconds"] for row in rows), []
    for row in rows:
        timed = row | {"times": {"ours": [row["seconds"]]}, "pattern": PATTERNS.get(row["name"], "copy")}
        cells = rate(timed), share_text(timed, results), datasheet_share(timed, results)
        ms = f"{1e3 * row['seconds']:.3f}"
        lines.append([f"{row['name']} {row['shape']}", str(row["calls"]), ms, f"{row['seconds'] / total:.1%}", *cells])
    lines.append(["all", str(sum(row["calls"] for row in rows)), f"{1e3 * total:.3f}", "", "", "", ""])
    return table([f"step {shape}, by op", "calls", "ms", "of the step", "rate", "share of", "of data sheet"], lines)


def scaling_table(rows: list[dict]) -> list[str]:
    """rows: number of threads, and the times of a step with that many."""
    one = median(rows[0]["times"])
    lines = []
    for row in rows:
        speed_up = one / median(row["times"])
        lines.append([str(row["threads"]), spread(row["times"]), f"{speed_up:.2f}", f"{speed_up / row['threads']:.0%}"])
    return table([f"threads, step {rows[0]['shape']}", "ms", "speed-up", "efficiency"], lines)


def verdict_table(found: list[Verdict]) -> list[str]:
    lines = [
        [v.target, f"{v.bound:.2f}", number(v.measured) or "not measured", "met" if v.met else "MISSED"] for v in found
    ]
    return table(["target", "bound", "measured", ""], lines)


def table(headers: list[str], lines: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [headers, *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *others = widths
    text = ["| " + " | ".join([head.ljust(first), *map(str.rjust, cells, others)]) + " |" for head, *cells in lines]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return [text[0], rule, *text[1:]]


def spread(times: list[float]) -> str:
    """The median in milliseconds, and (minimum-maximum)."""
    return "{:.4g} ({:.4g}-{:.4g})".format(*(1e3 * t for t in (median(times), min(times), max(times))))


def milliseconds(row: dict, column: str) -> str:
    return spread(row["times"][column]) if column in row["times"] else "failed" if column in row["absent"] else ""


def rate(row: dict) -> str:
    return flops_rate(row["flops"] / ours(row)) if row["flops"] else f"{1e-9 * row['bytes'] / ours(row):.1f} GB/s"


def flops_rate(flops: float, digits: int = 1) -> str:
    """FLOP/s as text."""
    return f"{1e-12 * flops:.1f} TFLOP/s" if flops >= 1e13 else f"{1e-9 * flops:.{digits}f} GFLOP/s"


def share_text(row: dict, results: dict) -> str:
    value = share(row, results)
    return "" if value is None else f"{value:.0%} {'peak' if row['flops'] else row['pattern']}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def size(nbytes: int | None) -> str:
    return "" if nbytes is None else format_bytes(nbytes)


def split_at_marker(path: Path, marker: str) -> tuple[str, str]:
    """The text up to `<!-- marker -->` and the text from `<!-- end of marker -->` on, markers included.

    Errors: UserError if the file cannot be read or does not contain both markers once, in this order.
    """
    begin, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run this in a checkout of llm_numba") from error
    if not (text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end)):
        raise UserError(f"{path}: expected {begin} and, below it, {end}, once each; add them around the tables")
    return text[: text.index(begin) + len(begin)], text[text.index(end) :]


def write_tables(path: Path, marker: str, text: str) -> None:
    """Replace the text between the markers with `text`. Errors: see split_at_marker."""
    before, after = split_at_marker(path, marker)
    write_whole(path, f"{before}\n{text}\n{after}".encode())
