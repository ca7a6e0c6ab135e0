"""What a run prints, on a terminal and elsewhere, and what its files contain."""

import json
import math
import sys

import pytest

from llm_numba.training.log import CLEAR, RunLog, share_of_peak

VALUES = dict(
    loss_z=math.nan, norm=1.0, norm_z=math.nan, learning_rate=1e-3, ms=2.0, tokens_per_second=1000.0, share_of_peak=None
)


@pytest.fixture
def log(tmp_path):
    with RunLog(tmp_path / "run", {}, None) as log:
        yield log


@pytest.fixture
def terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


def steps(log, first, last, of, skipped=()):
    for step in range(first, last + 1):
        log.step(step, of, 60.0, loss=5.0 - step / 100, skipped=step in skipped, **VALUES)


def lines_of(log):
    return (log.folder / "train.log").read_text().splitlines()


def test_a_pipe_gets_every_line(log, capsys):
    steps(log, 1, 30, of=30)
    log.event("validation at step 30: loss 4.5000", step=30, val_loss=4.5)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 31 and printed == lines_of(log)


def shown_on_terminal(text):
    """(lines that remain on the screen, live lines that were written over)."""
    *rows, rest = text.split("\n")
    pieces = [row.split(CLEAR) for row in rows]
    return [row[-1] for row in pieces], [live for row in [*pieces, rest.split(CLEAR)] for live in row[:-1] if live]


def step_of(line):
    return int(line.partition("/")[0].split()[1])


def test_a_terminal_gets_a_live_line_and_a_tenth_of_the_lines(terminal, log, capsys):
    steps(log, 1, 30, of=30, skipped=[20])
    lines, live = shown_on_terminal(capsys.readouterr().out)
    whole = [1, 3, 6, 9, 12, 15, 18, 20, 21, 24, 27, 30]
    assert list(map(step_of, lines)) == whole
    assert list(map(step_of, live)) == [step for step in range(1, 31) if step not in whole]
    assert all("tok/s" in line and line.endswith("1:00 left") and len(line) < 80 for line in live)
    assert list(map(step_of, lines_of(log))) == list(range(1, 31))
    assert [json.loads(row)["step"] for row in log.path.read_text().splitlines()] == list(range(1, 31))


def test_a_terminal_gets_the_whole_line_of_a_step_before_its_validation(terminal, log, capsys):
    steps(log, 1, 14, of=100)
    log.event("validation at step 14: loss 4.5000", step=14, val_loss=4.5)
    log.event("--- sample at step 14 ---\ntext\n---", step=14, sample="text")
    lines, _ = shown_on_terminal(capsys.readouterr().out)
    assert list(map(step_of, lines[:3])) == [1, 10, 14] and "(z" in lines[2]
    assert lines[3:] == ["validation at step 14: loss 4.5000", "--- sample at step 14 ---", "text", "---"]


def test_the_live_line_is_removed_at_the_end(terminal, log, capsys):
    with log:
        steps(log, 1, 5, of=100)
    assert capsys.readouterr().out.endswith(f"left{CLEAR}")


def test_a_name_that_is_not_unicode(log):
    """As Python reads a file name in another encoding; the log has its bytes."""
    log.say(b"caf\xc3\xa9".decode("ascii", "surrogateescape"))
    assert (log.folder / "train.log").read_text(encoding="utf-8") == "caf\u00e9\n"


def test_the_plot_of_losses(log):
    log.picture([])
    assert not (log.folder / "loss.png").exists()  # no step yet
    steps(log, 1, 30, of=30)
    log.event("validation at step 30: loss 4.5000", step=30, val_loss=4.5)
    log.picture([[20, 4.8], [40, 4.4]])
    assert (log.folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_share_of_the_peak():
    def never():
        raise AssertionError("measured again")

    assert share_of_peak(50.0, 100.0, never) == (0.5, 100.0)
    assert share_of_peak(50.0, None, never) == (None, None)
    assert share_of_peak(129.0, 100.0, lambda: 258.0) == (0.5, 258.0)  # the first measurement was disturbed
    assert share_of_peak(129.0, 100.0, lambda: 110.0) == (None, None)
    assert share_of_peak(129.0, 100.0, lambda: None) == (None, None)
