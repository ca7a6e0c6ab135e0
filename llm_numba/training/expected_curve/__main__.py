from pathlib import Path

from llm_numba.training.expected_curve import record
from llm_numba.util.cli import Parser, exit_with


def main() -> None:
    parser = Parser(
        prog="python -m llm_numba.training.expected_curve",
        description="Make a run the reference that later runs with its settings are compared with.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run that has ended")
    record(parser.parse_args().run)


if __name__ == "__main__":
    exit_with(main)
