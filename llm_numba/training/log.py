"""The files of a run folder that are for reading: settings.json, train.log, log.jsonl and loss.png."""

import contextlib
import errno
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from llm_numba.training.loss_plot import LOSSES, write_figure
from llm_numba.training.read_log import Run, columns_in
from llm_numba.training.trackers import Tracker
from llm_numba.util.cli import UserError, command, discard
from llm_numba.util.files import write_whole

COLUMNS = (
    "Columns of the log: loss and gradient norm, each with its z-score over the last 128 steps; learning rate; step\n"
    "time; throughput; share of the measured peak; time left. A terminal shows a live line and a tenth of the steps;\n"
    "train.log in the run folder has all of them."
)
CLEAR = "\r\x1b[K"  # a terminal's current line


class RunLog:
    """Writes the files of a run folder, and lines on the screen.

    train.log and log.jsonl get every step. A terminal gets one live line, and the full line of every tenth of the run,
    of outliers, and of each step after which something else is printed. Other outputs get every line.
    step: that of the checkpoint from which a run resumes (later rows are removed from log.jsonl); None for a new run.
    Errors: UserError if a new run's folder contains a run, another process writes it, or a file cannot be written.
    """

    def __init__(self, folder: Path, record: dict, step: int | None, track: str = "none"):
        self.folder, self.path = folder, folder / "log.jsonl"
        self.unwritable: OSError | None = None  # why the screen can no longer be written
        self.is_terminal, self.is_live, self.hidden = sys.stdout.isatty(), False, ""
        self.lock = FileLock(folder / ".lock")  # released by the system however the process ends
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            self._open(record, step)
        except Timeout as error:
            problem = "another process is writing this run; wait until it ends, or choose another --out"
            raise UserError(f"{folder}: {problem}") from error
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: a line is damaged ({error}); fix it, or move the file away") from error
        finally:
            if not hasattr(self, "json"):
                self.lock.release()
        self.tracker = Tracker(track, folder, record, step, self.say)

    def _open(self, record: dict, step: int | None) -> None:
        if step is None and (self.folder / "settings.json").exists():
            resume = command("train", "--resume", self.folder)
            raise UserError(f"--out {self.folder}: already contains a run; resume it with {resume}, or choose another")
        rows = self.path.read_text(encoding="utf-8") if step is not None and self.path.exists() else ""
        lines = rows[: rows.rfind("\n") + 1].splitlines(keepends=True)  # the last line may be cut off
        write_whole(self.path, "".join(line for line in lines if json.loads(line)["step"] <= step).encode())
        write_whole(self.folder / "settings.json", json.dumps(record, indent=1).encode() + b"\n")
        self.text = open(self.folder / "train.log", "a", encoding="utf-8", errors="surrogateescape")
        self.json = open(self.path, "a", encoding="utf-8")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.tracker.attempt(self.tracker.finish)
        self._show("")
        for file in self.text, self.json:
            with contextlib.suppress(OSError):  # a line that could not be written, which was reported then
                file.close()
        self.lock.release()

    def say(self, line: str) -> None:
        """A line on the screen and in train.log."""
        self._show(f"{self.hidden}{line}\n")
        self.hidden = ""
        self._write(self.text, line)

    def _show(self, text: str, live: bool = False) -> None:
        """Write to the screen, over the live line if there is one."""
        clear = CLEAR if self.is_live else ""
        if self.unwritable or not clear + text:
            return
        try:
            print(end=clear + text, flush=True)
            self.is_live = live
        except OSError as error:
            if error.errno == errno.EBADF:  # closed on purpose, as by >&-
                discard(sys.stdout)
            else:
                self.unwritable = error

    def record(self, **values) -> None:
        """A row of log.jsonl."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._write(self.json, json.dumps(finite))
        self.tracker.log(finite)

    def _write(self, file, line: str) -> None:
        try:
            print(line, file=file, flush=True)
        except OSError as error:
            raise UserError(f"{file.name}: cannot be written ({error.strerror}); the checkpoints are kept") from error

    def step(self, step: int, steps: int, seconds_left: float, **values) -> None:
        """A training step, in the format that COLUMNS describes."""
        v = values
        loss_z, norm_z = ("    -" if math.isnan(z) else f"{z:5.2f}" for z in (v["loss_z"], v["norm_z"]))
        number = f"step {step:>{len(str(steps))}}/{steps} | loss {v['loss']:7.4f}"
        speed = f"{v['tokens_per_second']:7,.0f} tok/s"
        share = f" | {v['share_of_peak']:4.0%} of peak" if v["share_of_peak"] is not None else ""
        left = f"{int(seconds_left) // 60}:{int(seconds_left) % 60:02} left"
        line = (
            f"{number} (z {loss_z}) | norm {v['norm']:7.4f} (z {norm_z}) | lr {v['learning_rate']:.2e} | "
            f"{v['ms']:7.1f} ms | {speed}{share} | {left}{' | SKIPPED: an outlier' if v['skipped'] else ''}"
        )
        if not self.is_terminal or v["skipped"] or step == 1 or step % max(1, steps // 10) == 0:
            self.hidden = ""
            self.say(line)
        else:
            self.hidden = line + "\n"
            self._show(f"{number} | {speed} | {left}", live=True)
            self._write(self.text, line)
        self.record(step=step, **values)

    def event(self, line: str, **row) -> None:
        """A line and a row about something else than a training step."""
        self.say(line)
        self.record(**row)

    def picture(self, expected: list[list[float]]) -> None:
        """loss.png: the losses so far, and the expected curve [(step, loss)] if there is one."""
        columns, _ = columns_in(self.path.read_text(encoding="utf-8"))
        if "loss" not in columns:
            return
        runs = [Run(str(self.folder), columns)]
        if expected:
            runs.append(Run("expected curve", {"loss": tuple(np.array(expected, float).T)}))
        write_figure(self.folder / "loss.png", runs, LOSSES)


def share_of_peak(flops: float, peak: float | None, measure: Callable[[], float | None]):
    """(share, peak): the part of `peak` that the `flops` per second of a step are, or None if no peak is known.

    A step above the peak means that the machine was busy during the measurement, so it is repeated. If the step is
    above that too, the peak stays unknown.
    """
    if peak and flops > peak:
        peak = measure()
    if not peak or flops > peak:
        return None, None
    return flops / peak, peak
