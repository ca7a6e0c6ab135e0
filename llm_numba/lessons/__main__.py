"""The lessons: llm-numba lessons"""

import argparse

from llm_numba.util.cli import Parser, UserError, command, exit_with


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="llm-numba lessons",
        description="Lessons from the naive kernel to the one that the model uses. Without a command: list the lessons "
        "and their exercises.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    build = commands.add_parser("build", help="run lessons and write their notebooks", description="Run lessons and "
                                "write each one's notebook beside its script.")  # fmt: skip
    build.add_argument("lessons", nargs="*", metavar="NN", help="lesson numbers; default: all")
    check = commands.add_parser("check", help="check an exercise", description="Check an exercise and print the first "
                                "error. Exit status 0 if it is correct, 1 if not.")  # fmt: skip
    check.add_argument("exercise", metavar="FILE", help="your file, or the name of one in lessons/exercises")
    results = commands.add_parser("results", help="time all ladders", description="Time the rungs of all lessons on "
                                  "this machine, write lessons/results/MACHINE.json, and update the tables in "
                                  "lessons/results/README.md. Run it on an idle machine.")  # fmt: skip
    results.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "build":
        from llm_numba.lessons import notebooks

        for script in [notebooks.script_of(n) for n in args.lessons] or notebooks.scripts():
            print(notebooks.build(script))
        return 0
    if args.command == "check":
        from llm_numba.lessons import exercise

        return 0 if exercise.check(args.exercise) else 1
    if args.command == "results":
        return write_results(args.device)
    return list_lessons()


def write_results(device: str) -> int:
    from llm_numba.lessons import results

    path = results.write(device)
    if path is None:
        raise UserError(f"--device {device}: this machine has no such device, or no ladder uses it")
    print(path)
    return 0


def list_lessons() -> int:
    from llm_numba.lessons import FOLDER, notebooks

    for script in notebooks.scripts():
        print(f"{script.stem[:2]}  {notebooks.title_of(script)}")
        print(f"    python lessons/{script.name}, or open lessons/{script.with_suffix('.ipynb').name}")
    names = sorted(file.stem for file in (FOLDER / "exercises").glob("*.py"))
    print(f"exercises: {', '.join(names) or 'none yet'}")
    print(f"check your solution: {command('lessons', 'check', 'lessons/exercises/NAME.py')}")
    return 0


if __name__ == "__main__":
    exit_with(main)
