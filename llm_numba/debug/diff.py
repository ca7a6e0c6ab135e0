"""Where two devices differ: llm-numba diff --devices cpu cuda

Runs one step on both with the same weights and batch, and compares every tensor in the order of computation. NumPy in
float64 decides which device is wrong. NumPy in the precision of the device (oracle.py) shows how large rounding errors
are: a device is wrong when its error is more than MULTIPLE times NumPy's.
"""

from itertools import groupby
from typing import NamedTuple

import ml_dtypes
import numpy as np

from llm_numba.arena import DTYPES, Arena, layout
from llm_numba.debug.inspect import Source, check_memory, one_batch, read_source, source_flags, step_groups
from llm_numba.models import presets
from llm_numba.ops import DEVICES, Ops, get_ops
from llm_numba.training.step import set_parameter
from llm_numba.util.cli import Parser, UserError, exit_with

# How much larger than NumPy's a rounding error may be: sums in another order are up to 4 times less accurate.
# In bfloat16 nearly all of it comes from storing tensors, at the same places in NumPy and on a GPU.
MULTIPLE = {"float32": 8, "bfloat16": 3}
LEAST = 2.0**-23  # two roundings of float32: used if NumPy's error happens to be smaller


class Row(NamedTuple):
    """The line of a tensor. The first of each pair belongs to device A. Errors are relative to float64."""

    heading: str
    name: str
    largest: float  # absolute difference
    index: tuple[int, ...]  # of the largest difference
    relative: float  # |A - B| / |B|, norms of the whole tensors
    ulps: float  # the largest difference in units in the last place of float32
    errors: tuple[float, ...]  # |X - exact| / |exact|
    excess: tuple[float, ...]  # error (of the tensor, or its worst element) / what rounding explains: wrong above 1

    @property
    def differs(self) -> bool:
        return not max(self.excess) <= 1


def compare(heading: str, name: str, pair, exact, rounded, dtypes) -> Row:
    """The line of a tensor. pair: A's and B's; exact: float64; rounded: NumPy's in the dtypes of A and B."""
    pair, exact = [x.astype(np.float64) for x in pair], exact.astype(np.float64)
    difference = distance(*pair)
    index = tuple(map(int, np.unravel_index(difference.argmax(), difference.shape)))
    largest = difference[index]
    ulps = largest / np.spacing(max(np.float32(abs(x[index])) for x in pair)) if largest else 0.0
    errors, excess = [errors_of(x, exact) for x in pair], []
    for error, x, dtype in zip(errors, rounded, dtypes, strict=True):
        explained = MULTIPLE[dtype] * np.maximum(errors_of(x.astype(np.float64), exact), LEAST)
        excess.append((error / explained).max())
    return Row(heading, name, largest, index, errors_of(*pair)[0], ulps, tuple(e[0] for e in errors), tuple(excess))


def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x - y| of each element: 0 if both are the same infinity or NaN, infinite if only one is NaN."""
    with np.errstate(invalid="ignore"):
        off = np.nan_to_num(np.abs(x - y), nan=np.inf, posinf=np.inf)
    return np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, off)


def errors_of(x: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The error of x as a whole and of its worst element: RMS(x - exact) and the largest |x - exact|, both relative to
    RMS(exact)."""
    off = distance(x, exact)
    if not off.any():
        return np.zeros(2)
    scale = root_mean_square(exact[np.isfinite(exact)])
    with np.errstate(divide="ignore"):
        return np.array([root_mean_square(off), off.max()]) / scale


def root_mean_square(x: np.ndarray) -> np.float64:
    return np.sqrt(np.mean(np.square(x))) if x.size else np.float64(0)


def through_float32(op):
    """The op for bfloat16 tensors: it computes in float32 and rounds its results."""

    def run(*arguments):
        wide = [x.astype(np.float32) if getattr(x, "dtype", None) == ml_dtypes.bfloat16 else x for x in arguments]
        op(*wide)
        for argument, x in zip(arguments, wide, strict=True):
            if x is not argument:
                argument[...] = x

    return run


def rows_of(source: Source, devices: list[Ops], dtypes: list[str]) -> list[Row]:
    """The line of every tensor of one step, in the order of computation. devices: the ops of A and B."""
    from llm_numba import oracle  # imports Numba, which must know before whether to simulate a GPU

    in_numpy = Ops(**vars(oracle))
    in_bfloat16 = in_numpy.wrap(lambda name, op: through_float32(op))

    precisions = list(dict.fromkeys(dtypes))
    backends = [(ops, step_groups(source, ops, dtype)) for ops, dtype in zip(devices, dtypes, strict=True)]
    for dtype in precisions:
        ops = in_bfloat16 if dtype == "bfloat16" else in_numpy
        backends.append((ops, step_groups(source, in_numpy, dtype)))
    backends.append((in_numpy, oracle.in_float64(step_groups(source, in_numpy, "float32"))))
    needed = [layout(groups, source.model.num_layers, "keep")[1] for _, groups in backends]
    for (ops, _), nbytes in zip(backends, needed, strict=True):
        check_memory(source, nbytes, ops)
    check_memory(source, sum(needed), in_numpy)

    arenas = [(ops, Arena(groups, source.model, "keep", ops)) for ops, groups in backends]
    runs = [(ops, arena, arena.training()) for ops, arena in arenas]
    first = runs[2 + precisions.index("bfloat16" if "bfloat16" in precisions else "float32")]
    source.fill(*first)
    for ops, arena, m in runs:  # get its weights, which are already rounded
        for name, values in first[1].named("parameters").items():
            set_parameter(ops, arena, name, values)
        ops.to_device(m.tokens, first[2].tokens)
        ops.to_device(m.targets, first[2].targets)

    rows = []
    with np.errstate(invalid="ignore", over="ignore"):  # the rows show what is not finite
        for step in zip(*(one_batch(*run) for run in runs), strict=True):
            heading, name, _ = step[0]
            tensors = [tensor for _, _, tensor in step]
            rounded = [tensors[2 + precisions.index(dtype)] for dtype in dtypes]
            rows.append(compare(heading, name, tensors[:2], tensors[-1], rounded, dtypes))
    return rows


def table(rows: list[Row], names: list[str], whole: bool) -> str:
    """All rows if `whole`, else those that differ and the worst one under each heading."""
    lines = [f"{'tensor':<16} {'largest difference':<28} {'relative':>9} {'ulps':>9}"]
    lines[0] += "".join(f" {'error of ' + name:>17}" for name in names)
    for heading, group in groupby(rows, key=lambda row: row.heading):
        group = list(group)
        worst = max(group, key=lambda row: max(row.excess))
        shown = [row for row in group if whole or row.differs or row is worst]
        lines += ["", heading if len(shown) == len(group) else f"{heading}: {len(shown)} of {len(group)}"]
        for row in shown:
            where = f"{row.largest:.2e} at [{', '.join(map(str, row.index))}]" if row.largest else "none"
            errors = "".join(f" {error:>17.1e}" for error in row.errors)
            mark = "   <---" if row.differs else ""
            lines.append(f"{row.name:<16} {where:<28} {row.relative:>9.1e} {row.ulps:>9.3g}{errors}{mark}")
    return "\n".join(lines)


def verdict(rows: list[Row], names: list[str]) -> str:
    """The first tensor that rounding does not explain, and the device that is wrong there."""
    differing = [row for row in rows if row.differs]
    if not differing:
        return f"{names[0]} and {names[1]} agree: both are within rounding in all {len(rows)} tensors"
    row = differing[0]
    (most, wrong), (less, other) = sorted(zip(row.excess, names, strict=True), reverse=True)
    also = "is within rounding" if less <= 1 else f"is wrong too, {less:.3g} times"
    return (
        f"{wrong} is wrong: {row.name} ({row.heading}) is the first of {len(differing)} of {len(rows)} tensors beyond "
        f"rounding, {most:.3g} times as far from float64 as rounding explains; {other} {also}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="llm-numba diff", description="Run one batch forward and backward on two devices; print where "
                    "they differ and which is wrong.")  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument("source", nargs="?", metavar="RUN", help="a run folder or a checkpoint, with a batch of its "
                        "data")  # fmt: skip
    source.add_argument("--preset", choices=presets(), help="instead: random weights and tokens (without either: nano)")
    source_flags(parser)
    parser.add_argument("--devices", nargs=2, choices=DEVICES[1:], default=["cpu", "cuda"], metavar=("A", "B"),
                        help=f"two of {', '.join(DEVICES[1:])} (default: cpu cuda)")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="the GPU's; the CPU computes in float32")
    parser.add_argument("--all", action="store_true", help="print every tensor, not only the worst of each part")
    args = parser.parse_args(argv)
    names = args.devices
    if "cpu" not in names or names[0] == names[1]:
        raise UserError(f"--devices {' '.join(names)}: expected cpu and either cuda or cudasim, in any order")

    dtypes = {name: "fp32" if name == "cpu" else args.dtype for name in names}
    # the simulator first: Numba must know before it is imported
    ops = {name: get_ops(name, dtypes[name]) for name in sorted(names, reverse=True)}
    source = read_source(args.source or args.preset or "nano", args.batch_size, args.sequence_length, args.seed)
    rows = rows_of(source, [ops[name] for name in names], [DTYPES[dtypes[name]] for name in names])
    print(f"{table(rows, names, args.all)}\n\n{verdict(rows, names)}")
    return int(any(row.differs for row in rows))


if __name__ == "__main__":
    exit_with(main)
