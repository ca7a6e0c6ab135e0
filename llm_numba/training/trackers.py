"""--track: the rows of a run's log go to TensorBoard, Weights & Biases or Trackio too."""

import importlib
import importlib.util
import secrets
from collections.abc import Callable
from pathlib import Path

from llm_numba.util.cli import UserError
from llm_numba.util.files import write_whole

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}  # of a tracker


def check(name: str) -> None:
    """Raise a UserError where the package of the tracker `name` is missing; "none" needs none."""
    if name in PACKAGES and not importlib.util.find_spec(PACKAGES[name]):
        raise UserError(f"--track {name}: the package is missing: pip install {PACKAGES[name]}")


class Tracker:
    """Passes rows on until that fails, which it tells once: a tracker never stops a run.

    name: a key of PACKAGES, or "none"; record: the settings, as JSON types; step: that of the checkpoint that the run
    goes on from, None for a new run; say: a function that tells the user a line.
    """

    def __init__(self, name: str, folder: Path, record: dict, step: int | None, say: Callable[[str], None]):
        self.name, self.say = name, say
        self.pass_on, self.end = (lambda row, step: None), (lambda: None)
        if name in PACKAGES:
            start = tensorboard if name == "tensorboard" else like_wandb
            self.pass_on, self.end = self._attempt(start, name, folder, record, step) or (self.pass_on, self.end)

    def log(self, row: dict) -> None:
        """Pass on the numbers of a row, which has the "step" that they belong to."""
        numbers = {
            name: float(value) for name, value in row.items() if name != "step" and isinstance(value, int | float)
        }
        if numbers:
            self._attempt(self.pass_on, numbers, row["step"])

    def close(self) -> None:
        self._attempt(self.end)

    def _attempt(self, function: Callable, *arguments):
        try:
            return function(*arguments)
        except Exception as error:  # whatever it is: somebody else's code, a network
            self.pass_on, self.end = (lambda row, step: None), (lambda: None)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.say(f"note: --track {self.name} has failed and is off from here, the run goes on: {reason}")


def tensorboard(name: str, folder: Path, record: dict, step: int | None) -> tuple[Callable, Callable]:
    """(pass_on, end) that write event files into the run folder; what came after `step` is hidden by TensorBoard."""
    from tensorboardX import SummaryWriter

    options = dict(flush_secs=10, filename_suffix=f".from-step-{step or 0}")  # else a name for each second
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=None if step is None else step + 1, **options)

    def pass_on(row, step):
        for name, value in row.items():
            writer.add_scalar(name, value, step)

    return pass_on, writer.close


def like_wandb(name: str, folder: Path, record: dict, step: int | None) -> tuple[Callable, Callable]:
    """(pass_on, end) of a module with wandb's functions. A resumed run goes on under the identity it got at first."""
    module = importlib.import_module(PACKAGES[name])
    identity = folder / f"{name}-run"
    if step is None or not identity.exists():
        write_whole(identity, f"{folder.name}-{secrets.token_hex(4)}".encode())
    run = identity.read_text()
    where = {"id": run, "dir": str(folder)} if name == "wandb" else {}  # trackio knows a run by its name
    module.init(project="llm_numba", name=run, config=record, resume="allow", **where)
    return lambda row, step: module.log(row, step=step), module.finish
