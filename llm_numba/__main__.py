"""llm-numba NAME ...: every command, by its name."""

from llm_numba.util import ctrl_c

ctrl_c.exit_at_once()  # the console script gets here first

import importlib  # noqa: E402
import sys  # noqa: E402
from difflib import get_close_matches  # noqa: E402

from llm_numba.util import cli  # noqa: E402

GROUPS = {  # heading -> {name: (module, what it does)}
    "Train and use a model": {
        "train": ("train", "train a model, or resume a run"),
        "sample": ("sample", "print text that a trained model writes"),
        "eval": ("eval", "compute the validation loss or the HellaSwag score of a model"),
        "export": ("export", "write a model for Hugging Face or llm.c"),
        "plot": ("plot", "draw the losses and speeds of runs"),
        "data": ("data.datasets", "download a data set"),
    },
    "Look inside": {
        "inspect": ("debug.inspect", "print every activation and gradient of one batch"),
        "diff": ("debug.diff", "compare every tensor of one batch on two devices"),
        "replay": ("debug.replay", "repeat the step that train --check-finite stopped"),
        "check-llmc": ("debug.llmc_parity", "compare gradients and losses with those of llm.c"),
    },
    "This machine": {
        "doctor": ("doctor", "print what is installed and which devices work"),
        "bench": ("bench", "time ops, training steps and sampling"),
    },
    "Learn and develop": {
        "lessons": ("lessons.__main__", "list the lessons, check an exercise"),
        "record-curve": ("training.expected_curve", "make a run the expected curve of later runs"),
    },
}
COMMANDS = {name: module for group in GROUPS.values() for name, (module, _) in group.items()}


def usage() -> str:
    lines = ["usage: llm-numba COMMAND ...   (or: python -m llm_numba COMMAND ...)"]
    for heading, group in GROUPS.items():
        lines += ["", heading, *(f"  {name:<12}  {what}" for name, (_, what) in group.items())]
    return "\n".join([*lines, "", "llm-numba COMMAND --help lists the options of a command."])


def dispatch() -> int | None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        nearest = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(COMMANDS)}"
        raise cli.UserError(f"{name}: no such command; {hint}")
    ctrl_c.exit_at_once()
    module = importlib.import_module(f"llm_numba.{COMMANDS[name]}")
    ctrl_c.raise_interrupt()
    return module.main(arguments)


def main() -> None:
    cli.exit_with(dispatch)


if __name__ == "__main__":
    main()
