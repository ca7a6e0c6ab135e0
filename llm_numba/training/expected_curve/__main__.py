from pathlib import Path

from llm_numba.training.expected_curve import record
from llm_numba.util.cli import Parser, exit_with


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="llm-numba record-curve",
        description="Make the losses of a run the expected curve, which later runs with the same settings are compared "
        "with.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    record(parser.parse_args(argv).run)


if __name__ == "__main__":
    exit_with(main)
