"""Compare training runs in a figure: llm-numba plot RUN..."""

from pathlib import Path

from llm_numba.training.loss_plot import FORMATS, write_figure
from llm_numba.training.read_log import read_run
from llm_numba.util.cli import Parser, UserError, exit_with, note


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="llm-numba plot",
        description="Draw the losses, gradient norms, learning rates and speeds of runs in one figure.",
    )
    runs_help = "a run folder, a log.jsonl or llm.c's main.log"
    out_help = ".png, .svg or .pdf (default: runs.png)"
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help=runs_help)
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("runs.png"), help=out_help)
    args = parser.parse_args(argv)
    if args.out.suffix not in FORMATS:
        raise UserError(f"--out {args.out}: expected a file name ending in {', '.join(FORMATS)}")
    runs = []
    for path in args.runs:
        run, damaged = read_run(path)
        runs.append(run)
        if damaged:
            note(f"note: {path}: skipped {damaged} damaged lines")
    names = [run.name for run in runs]
    pairs = zip(runs, args.runs, strict=True)
    runs = [run if names.count(run.name) == 1 else run._replace(name=str(path)) for run, path in pairs]
    write_figure(args.out, runs)
    print(args.out)


if __name__ == "__main__":
    exit_with(main)
