"""Compare training runs in a figure: llm-numba plot RUN..."""

from pathlib import Path

from llm_numba.training.loss_plot import FORMATS, write_figure
from llm_numba.training.read_log import Run, read_run
from llm_numba.util.cli import Parser, UserError, exit_with, note


def with_distinct_names(runs: list[Run], paths: list[Path]) -> list[Run]:
    """The runs; those with the same name are named by their paths."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else run._replace(name=str(path))
        for run, path in zip(runs, paths, strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="llm-numba plot",
        description="Draw the losses, gradient norms, learning rates and speeds of runs in one figure.",
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
    if args.out.suffix not in FORMATS:
        raise UserError(f"--out {args.out}: expected a file name ending in {', '.join(FORMATS)}")
    runs = []
    for path in args.runs:
        run, damaged = read_run(path)
        runs.append(run)
        if damaged:
            note(f"note: {path}: skipped {damaged} damaged lines")
    write_figure(args.out, with_distinct_names(runs, args.runs))
    print(args.out)


if __name__ == "__main__":
    exit_with(main)
