from pathlib import Path

from llm_numba.errors import Parser, exit_with
from llm_numba.reference import record


def main() -> None:
    parser = Parser(
        prog="python -m llm_numba.reference",
        description="Make a run the reference that later runs with its settings are compared with.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run that has ended")
    record(parser.parse_args().run)


if __name__ == "__main__":
    exit_with(main)
