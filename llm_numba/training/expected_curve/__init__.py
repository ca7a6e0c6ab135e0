"""The loss curve that the default run had when it was recorded, for a run to be held against.

python -m llm_numba.training.expected_curve RUN records another one: the curve of RUN, as
tiny.json, and its plot, as tiny.png.
"""

import json
import shutil
from pathlib import Path

from llm_numba.training.log import SMOOTH, RunLog, smoothed
from llm_numba.training.settings import FIELDS, Settings, to_record
from llm_numba.util.cli import UserError

CURVE = Path(__file__).with_name("tiny.json")
TOLERANCE = 0.1  # a run further than this from the reference, relative, is told so


class Reference:
    """Holds the losses of a run against the curve, where the run has the settings that it was recorded with."""

    def __init__(self, settings: Settings, log: RunLog):
        self.log, self.curve, self.losses, self.told = log, [], [], False
        if CURVE.exists():
            known = json.loads(CURVE.read_text())
            record = to_record(settings)
            if all(record.get(name) == value for name, value in known["settings"].items()):
                self.curve = known["curve"]
        self.expected = dict(self.curve)

    def compare(self, step: int, loss: float) -> None:
        """Tell once when the mean of the last SMOOTH losses is further than TOLERANCE from the curve."""
        self.losses = [*self.losses[1 - SMOOTH :], loss]
        expected = self.expected.get(step)
        if expected is None or self.told or len(self.losses) < SMOOTH:
            return
        mean = sum(self.losses) / SMOOTH
        if abs(mean / expected - 1) > TOLERANCE:
            self.told = True
            self.log.say(
                f"note: at step {step} the loss is {mean:.3f}; the reference run had {expected:.3f}. "
                "A difference of this size means that something changed: the code, the text, or the machine"
            )


def record(run: Path) -> None:
    """CURVE = the smoothed losses of a run, every SMOOTH steps, with the settings that decide them; tiny.png too."""
    try:
        settings = json.loads((run / "settings.json").read_text())
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        picture = run / "loss.png"
        losses = [row["loss"] for row in rows if "loss" in row]
        deciding = [name for name, f in FIELDS.items() if not f.metadata["free"] and name != "out"]
        known = {
            "settings": {name: settings[name] for name in (*deciding, "steps", "epochs")},
            "curve": [[step, round(smoothed(losses[:step])[-1], 4)] for step in range(SMOOTH, len(losses) + 1, SMOOTH)],
        }
        CURVE.write_text(json.dumps(known, indent=1) + "\n")
        shutil.copyfile(picture, CURVE.with_suffix(".png"))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{run}: not the folder of a run that has ended ({error})") from error
