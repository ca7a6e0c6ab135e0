"""--track: also send the rows of a run's log to TensorBoard, Weights & Biases or Trackio."""

import importlib
import importlib.util
import secrets
from collections.abc import Callable
from pathlib import Path

from llm_numba.util.cli import UserError, not_installed
from llm_numba.util.files import write_whole

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}  # tracker -> module


def check(name: str) -> None:
    """Raise a UserError if the package of the tracker `name` is missing; "none" needs none."""
    if name in PACKAGES and not importlib.util.find_spec(PACKAGES[name]):
        raise UserError(f"--track {name}: {not_installed(PACKAGES[name])}")


class Tracker:
    """Sends rows until that fails. A failure is reported once and never stops a run.

    name: a key of PACKAGES, or "none"; record: the settings, as JSON types; step: that of the checkpoint from which the
    run resumes, None for a new run; say: a function that prints a line.
    """

    def __init__(self, name: str, folder: Path, record: dict, step: int | None, say: Callable[[str], None]):
        self.name, self.say = name, say
        start = tensorboard if name == "tensorboard" else like_wandb if name in PACKAGES else off
        self.send, self.finish = self.attempt(start, name, folder, record, step) or off()

    def log(self, row: dict) -> None:
        """Send the numbers of a row, under its "step"."""
        numbers = {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        if numbers:
            self.attempt(self.send, numbers, row["step"])

    def attempt(self, function: Callable, *arguments):
        try:
            return function(*arguments)
        except Exception as error:  # other people's code, a network: anything
            self.send, self.finish = off()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.say(f"note: --track {self.name} failed and is now off; the run continues: {reason}")


def off(*_) -> tuple[Callable, Callable]:
    """(send, finish) that do nothing."""
    return lambda row, step: None, lambda: None


def tensorboard(_, folder: Path, record: dict, step: int | None) -> tuple[Callable, Callable]:
    """(send, finish) that write event files into the run folder; TensorBoard hides older events after `step`."""
    from tensorboardX import SummaryWriter

    purge_step = None if step is None else step + 1
    suffix = f".from-step-{step or 0}"  # default names differ only by the second
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step, flush_secs=10, filename_suffix=suffix)

    def send(row, step):
        for name, value in row.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


def like_wandb(name: str, folder: Path, record: dict, step: int | None) -> tuple[Callable, Callable]:
    """(send, finish) for a module with wandb's functions. A resumed run keeps the id of its first start."""
    module = importlib.import_module(PACKAGES[name])
    identity = folder / f"{name}-run"
    if step is None or not identity.exists():
        write_whole(identity, f"{folder.name}-{secrets.token_hex(4)}".encode())
    run = identity.read_text(encoding="utf-8")
    where = {"id": run, "dir": str(folder)} if name == "wandb" else {}  # trackio identifies a run by its name
    module.init(project="llm_numba", name=run, config=record, resume="allow", **where)
    return lambda row, step: module.log(row, step=step), module.finish
