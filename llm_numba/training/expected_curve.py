"""The loss curve of the default run, recorded once. A run with the same settings is compared with it.

llm-numba record-curve RUN replaces the curve and its figure with those of RUN.
"""

import json
from pathlib import Path

from llm_numba.training.log import RunLog
from llm_numba.training.loss_plot import SMOOTH
from llm_numba.training.settings import FIELDS, Settings, to_record
from llm_numba.util.cli import Parser, UserError, exit_with
from llm_numba.util.files import write_whole

CURVE = Path(__file__).with_suffix(".json")
TOLERANCE = 0.1  # the largest relative difference that is not reported


class Reference:
    """Compares the losses of a run with the expected curve, if the curve was recorded with the settings of the run."""

    def __init__(self, settings: Settings, log: RunLog):
        self.log, self.curve, self.losses, self.reported = log, [], [], False
        if CURVE.exists():
            known, own = json.loads(CURVE.read_text(encoding="utf-8")), to_record(settings)
            if known["settings"].items() <= own.items():
                self.curve = known["curve"]

    def compare(self, step: int, loss: float) -> None:
        """Report once if the mean of the last SMOOTH losses differs from the curve by more than TOLERANCE."""
        self.losses = [*self.losses[1 - SMOOTH :], loss]
        expected = dict(self.curve).get(step)
        if expected is None or self.reported or len(self.losses) < SMOOTH:
            return
        mean = sum(self.losses) / SMOOTH
        if abs(mean / expected - 1) > TOLERANCE:
            self.reported = True
            self.log.say(
                f"note: at step {step} the loss is {mean:.3f}; expected {expected:.3f}. A difference of this size "
                "means that something changed: the code, the data, or the machine"
            )


def record(run: Path) -> None:
    """The curve = the settings of a run, and the mean of every SMOOTH losses; its figure is that of the run."""
    try:
        settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        figure = (run / "loss.png").read_bytes()
        losses = [row["loss"] for row in rows if "loss" in row]
        deciding = [name for name, f in FIELDS.items() if not f.metadata["free"] and name != "out"]
        ends = range(SMOOTH, len(losses) + 1, SMOOTH)
        curve = [[end, round(sum(losses[end - SMOOTH : end]) / SMOOTH, 4)] for end in ends]
        known = {"settings": {name: settings[name] for name in (*deciding, "steps", "epochs")}, "curve": curve}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run}: not the folder of a finished run ({error})") from error
    write_whole(CURVE, json.dumps(known, indent=1).encode() + b"\n")
    write_whole(CURVE.with_suffix(".png"), figure)


def main(argv: list[str] | None = None) -> None:
    about = "Make the losses of a run the expected curve, with which later runs of the same settings are compared."
    parser = Parser(prog="llm-numba record-curve", description=about)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    record(parser.parse_args(argv).run)


if __name__ == "__main__":
    exit_with(main)
