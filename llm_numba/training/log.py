"""What a run leaves to read: its settings, a log as text and as JSON lines, and a picture of the losses."""

import contextlib
import json
import math
import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from llm_numba.data.hellaswag import Score
from llm_numba.training.trackers import Tracker
from llm_numba.util.cli import UserError
from llm_numba.util.files import write_whole

SMOOTH = 20  # steps that are averaged before a loss is drawn


class RunLog:
    """The files of a run folder, and the lines on the screen.

    step: that of the checkpoint that the run goes on from, and the log loses what came after it; None for a new run.
    track: a tracker that gets the rows too. unread: why the screen can no longer be written, if so.
    Errors: UserError where the folder of a new run holds one already, another process is writing it, or a file cannot
    be written.
    """

    def __init__(self, folder: Path, record: dict, step: int | None, track: str = "none"):
        self.folder, self.path, self.unread = folder, folder / "log.jsonl", ""
        self.lock = FileLock(folder / ".lock")  # which the system takes back when the process ends, however it does
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            self._open(record, step)
        except Timeout as error:
            raise UserError(
                f"{folder}: another process is writing this run; wait until it ends, or choose another --out"
            ) from error
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: a line is damaged ({error}); mend it, or move the file away") from error
        finally:
            if not hasattr(self, "json"):
                self.lock.release()
        self.tracker = Tracker(track, folder, record, step, self.say)

    def _open(self, record: dict, step: int | None) -> None:
        if step is None and (self.folder / "settings.json").exists():
            raise UserError(
                f"--out {self.folder}: holds a run already; go on with --resume {self.folder}, or choose another"
            )
        lines = [] if step is None else self._lines()
        write_whole(self.path, "".join(line for line in lines if json.loads(line)["step"] <= step).encode())
        write_whole(self.folder / "settings.json", json.dumps(record, indent=1).encode() + b"\n")
        self.text = open(self.folder / "train.log", "a", encoding="utf-8")
        self.json = open(self.path, "a")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.tracker.close()
        for file in self.text, self.json:
            with contextlib.suppress(OSError):  # of a line that could not be written, which was told then
                file.close()
        self.lock.release()

    def _lines(self) -> list[str]:
        """The whole lines of the JSON log; the last one may have been cut off."""
        if not self.path.exists():
            return []
        with open(self.path) as file:
            return [line for line in file if line.endswith("\n")]

    def say(self, line: str) -> None:
        try:
            print(line, flush=True)
        except OSError as error:  # the program at the end of the pipe, or the terminal, has gone
            self.unread = error.strerror
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self._write(self.text, line)

    def record(self, **values) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._write(self.json, json.dumps(finite))
        self.tracker.log(finite)

    def _write(self, file, line: str) -> None:
        try:
            print(line, file=file, flush=True)
        except OSError as error:
            raise UserError(f"{file.name}: cannot be written ({error.strerror}); the checkpoints are kept") from error

    def step(self, step: int, steps: int, seconds_left: float, **values) -> None:
        def z(value):
            return "    -" if math.isnan(value) else f"{value:5.2f}"

        v = values
        share = f" | {v['share_of_peak']:4.0%} of peak" if v["share_of_peak"] is not None else ""
        self.say(
            f"step {step:>{len(str(steps))}}/{steps} | loss {v['loss']:7.4f} (z {z(v['loss_z'])}) | "
            f"norm {v['norm']:7.4f} (z {z(v['norm_z'])}) | lr {v['learning_rate']:.2e} | {v['ms']:7.1f} ms | "
            f"{v['tokens_per_second']:7,.0f} tok/s{share} | {int(seconds_left) // 60}:{int(seconds_left) % 60:02} left"
            + (" | SKIPPED: an outlier" if v["skipped"] else "")
        )
        self.record(step=step, **values)

    def validation(self, step: int, loss: float) -> None:
        self.say(f"validation at step {step}: loss {loss:.4f}")
        self.record(step=step, val_loss=loss)

    def hellaswag(self, step: int, score: Score) -> None:
        self.say(f"hellaswag at step {step}: {score}")
        self.record(step=step, **{f"hellaswag_{name}": value for name, value in score._asdict().items()})

    def sample(self, step: int, text: str) -> None:
        self.say(f"--- sample at step {step} ---\n{text}\n---")
        self.record(step=step, sample=text)

    def picture(self, reference: list[list[float]]) -> None:
        """loss.png: the training loss, smoothed, the validation loss, and the reference curve [(step, loss)] if any."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        rows = [json.loads(line) for line in self._lines()]
        train = [(row["step"], row["loss"]) for row in rows if type(row.get("loss")) is float]
        val = [(row["step"], row["val_loss"]) for row in rows if type(row.get("val_loss")) is float]
        if not train:
            return
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=1)
        axes.plot(steps, smoothed(losses), color="C0", label=f"training, mean of {SMOOTH} steps")
        if val:
            axes.plot(*zip(*val, strict=True), "o-", color="C1", label="validation")
        if reference:
            axes.plot(*zip(*reference, strict=True), "--", color="grey", label="reference run")
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=str(self.folder))
        axes.grid(alpha=0.3)
        axes.legend()
        try:
            figure.savefig(self.folder / "loss.png", dpi=120)
        except OSError as error:
            raise UserError(f"{self.folder / 'loss.png'}: cannot be written ({error.strerror})") from error
        finally:
            plt.close(figure)


def smoothed(values) -> list[float]:
    """The mean of each value and the SMOOTH - 1 before it, of fewer at the start."""
    return [sum(v := values[max(0, i + 1 - SMOOTH) : i + 1]) / len(v) for i in range(len(values))]
