"""Logs in two formats give the same columns, damaged lines are skipped, and the figure shows the values."""

import json
import math
import sys

import numpy as np
import pytest
from programs import refused

from llm_numba import plot
from llm_numba.training import loss_plot
from llm_numba.training.loss_plot import COLOURS, LOSSES, SMOOTH, STYLES, figure_of, smooth
from llm_numba.training.read_log import Run, read_run, row_of
from llm_numba.util.cli import UserError


def row(step, **values):
    return {"step": step, **values}


OURS = [
    row(1, loss=5.5, loss_z=None, norm=2.0, learning_rate=1e-3, ms=500.0, tokens_per_second=512.0),
    row(2, loss=5.25, loss_z=None, norm=1.5, learning_rate=2e-3, ms=250.0, tokens_per_second=1024.0),
    row(2, val_loss=5.125),
    row(2, sample="s:7 trl:1.0"),
    row(3, loss=None, norm=1.25, learning_rate=3e-3, ms=250.0, tokens_per_second=1024.0),
    row(4, loss=5.0, norm=1.0, learning_rate=4e-3, ms=250.0, tokens_per_second=1024.0),
]
LLMC = "s:0 tel:5.5000\ns:0 eval:0.2500\ns:0 trl:5.5000 lr:1.00e-03 norm:2.00\ns:1 trl:5.2500 lr:2.00e-03 norm:1.50\n"


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def columns_of(path):
    run, damaged = read_run(path)
    assert damaged == 0
    return {name: ([*steps], [*values]) for name, (steps, values) in run.columns.items()}


def test_log_jsonl(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text(lines_of(OURS))
    found = columns_of(tmp_path / "run")
    assert found == columns_of(tmp_path / "run" / "log.jsonl")
    assert found["loss"] == ([1, 2, 4], [5.5, 5.25, 5.0])  # the loss of step 3 was not finite
    assert found["val_loss"] == ([2], [5.125])
    assert found["norm"] == ([1, 2, 3, 4], [2.0, 1.5, 1.25, 1.0])
    assert found["seconds"] == ([1, 2, 3, 4], [0.5, 0.75, 1.0, 1.25])
    assert found["tokens"] == ([1, 2, 3, 4], [256, 512, 768, 1024])
    assert read_run(tmp_path / "run")[0].name == read_run(tmp_path / "run" / "log.jsonl")[0].name == "run"


def test_main_log_of_llm_c(tmp_path):
    (tmp_path / "main.log").write_text(LLMC)
    assert columns_of(tmp_path) == columns_of(tmp_path / "main.log") == {
        "loss": ([0, 1], [5.5, 5.25]),
        "val_loss": ([0], [5.5]),
        "learning_rate": ([0, 1], [1e-3, 2e-3]),
        "norm": ([0, 1], [2.0, 1.5]),
    }  # fmt: skip


def test_the_last_row_of_a_repeated_step_counts(tmp_path):
    (tmp_path / "main.log").write_text(LLMC + "s:1 trl:5.1250 lr:2.00e-03 norm:1.50\n")
    assert columns_of(tmp_path)["loss"] == ([0, 1], [5.5, 5.125])


@pytest.mark.parametrize(
    "line", ['{"step": 9, "loss"', "[1, 2]", "s:9 trl", '{"loss": 1.0}', "\0\0\0", "[" * 100_000, "9" * 5000]
)
def test_a_damaged_line_is_skipped_and_reported(tmp_path, capsys, monkeypatch, line):
    (tmp_path / "log.jsonl").write_text(lines_of(OURS[:2]) + line + "\n" + lines_of(OURS[2:]))
    run, damaged = read_run(tmp_path)
    assert damaged == 1 and [*run.columns["loss"][0]] == [1, 2, 4]
    monkeypatch.setattr(plot, "write_figure", lambda *_: None)
    plot.main([str(tmp_path), "--out", str(tmp_path / "a.png")])
    assert capsys.readouterr().err == f"note: {tmp_path}: skipped 1 damaged lines\n"


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"a text\nof two lines\n", "no losses found"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "no losses found"),
        (b'{"step": 1, "val_los": 2}\n', "no losses found"),
        (b'{"step": 1, "loss": NaN}\n', "no losses found"),
        (b"[]", "no losses found"),
    ],
)
def test_a_file_that_is_no_log(tmp_path, capfd, content, says):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    line = refused(capfd, tmp_path / "x", "--out", tmp_path / "a.png", program=plot)
    assert str(tmp_path / "x") in line and says in line
    assert not (tmp_path / "a.png").exists()


def test_other_mistakes(tmp_path, capfd):
    (tmp_path / "log.jsonl").write_text(lines_of(OURS))
    assert "contains neither log.jsonl nor" in refused(capfd, tmp_path.parent, program=plot)
    assert ".png, .svg, .pdf" in refused(capfd, tmp_path, "--out", "a.txt", program=plot)
    assert "cannot be written" in refused(capfd, tmp_path, "--out", tmp_path / "absent" / "a.png", program=plot)
    assert "RUN" in refused(capfd, program=plot)


@pytest.mark.parametrize("count", [1, 3, 57, 5000])
def test_smooth(count):
    values = np.random.default_rng(0).standard_normal(count)
    longest = max(20, count // 100)
    expected = [values[max(0, i + 1 - min(longest, max(1, (i + 1) // 4))) : i + 1].mean() for i in range(count)]
    assert smooth(values) == pytest.approx(expected, abs=1e-12)  # 5000 sums of about 70 each lose 70 ulps at most


def test_values_that_are_means_already_are_not_smoothed():
    values = np.random.default_rng(0).standard_normal(60)
    assert [*smooth(values, SMOOTH)] == pytest.approx([*values])
    sparse = run_of("expected curve", 60, loss=values)._replace(columns={"loss": (SMOOTH * np.arange(1.0, 61), values)})
    line = figure_of([sparse], LOSSES).axes[0].lines[1]
    assert [*line.get_ydata()] == pytest.approx([*values])


def run_of(name, steps, **columns):
    return Run(name, {key: (np.arange(1.0, steps + 1), np.asarray(values, float)) for key, values in columns.items()})


@pytest.mark.parametrize("steps", [1, 30, 3000])
def test_the_figure_shows_the_columns_of_the_runs(steps):
    n = np.arange(1, steps + 1)
    full = run_of("ours", steps, loss=3 + 5 / n, val_loss=3 + 6 / n, norm=1 / n, learning_rate=n, tokens_per_second=n,
                  tokens=100 * n, seconds=n / 2)  # fmt: skip
    less = run_of("llm.c", steps, loss=2 + 5 / n)
    axes = {axis.get_title(): axis for axis in figure_of([full, less]).axes}
    lines = {title: [line for line in axis.lines if line.get_alpha() is None] for title, axis in axes.items()}
    for title, x, runs in (
        ("training loss by steps", n, [full, less]),
        ("training loss by tokens", 100 * n, [full]),
        ("training loss by time", n / 2, [full]),
    ):
        for line, run, colour in zip(lines[title], runs, COLOURS, strict=False):
            assert [*line.get_xdata()] == [*x] and line.get_color() == colour
            assert [*line.get_ydata()] == [*smooth(run.columns["loss"][1])]
        assert len(lines[title]) == len(runs)
        faint = [line for line in axes[title].lines if line.get_alpha() is not None]
        assert [*faint[0].get_ydata()] == [*full.columns["loss"][1]]
        assert axes[title].get_yscale() == "log"
        assert axes[title].get_xscale() == ("log" if steps > 2000 and "time" not in title else "linear")
    for title, column in ("validation loss", "val_loss"), ("learning rate", "learning_rate"):
        (line,) = lines[title]
        assert [*line.get_ydata()] == [*full.columns[column][1]]
    names = [text.get_text() for axis in axes.values() if axis.get_legend() for text in axis.get_legend().get_texts()]
    assert [name.partition("\n")[0] for name in names] == ["ours", "llm.c"]


def luminance(colour):
    """WCAG's relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return np.dot(linear, (0.2126, 0.7152, 0.0722))


def test_lines_are_distinguishable():
    """With more runs than colours, line styles differ; each colour has a contrast to white of at least 2:1 (WCAG)."""
    runs = [run_of(f"{i}", 3, loss=[3, 2, 1]) for i in range(2 * len(COLOURS))]
    axis = figure_of(runs).axes[0]
    looks = {(line.get_color(), line.get_linestyle()) for line in axis.lines if line.get_alpha() is None}
    assert len(looks) == len(runs) and {style for _, style in looks} == set(STYLES[:2])
    assert all(1.05 / (luminance(colour) + 0.05) > 2 for colour in COLOURS)


def test_runs_with_the_same_name_are_named_by_their_paths(tmp_path, monkeypatch, capsys):
    paths = []
    for folder in "a", "b":
        (tmp_path / folder / "run").mkdir(parents=True)
        (tmp_path / folder / "run" / "log.jsonl").write_text(lines_of(OURS))
        paths.append(tmp_path / folder / "run")
    shown = []
    monkeypatch.setattr(loss_plot, "figure_of", lambda runs, panels: shown.append(runs) or figure_of(runs, panels))
    for suffix, start in ("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"):
        out = tmp_path / f"a.{suffix}"
        plot.main([*map(str, paths), "--out", str(out)])
        assert out.read_bytes().startswith(start) and capsys.readouterr().out == f"{out}\n"
    assert [run.name for run in shown[0]] == [str(path) for path in paths]


def test_the_losses_of_a_log_are_finite():
    """Python's JSON may contain Infinity, and numbers too large for a float."""
    for value in math.nan, math.inf, 10**400, "x", None, [1.0]:
        line = json.dumps({"step": 1, "loss": value, "norm": 1.0})
        assert row_of(line) == {"step": 1.0, "norm": 1.0}
    assert row_of(f'{{"step": {sys.maxsize}, "loss": 1}}') is not None


def test_a_huge_step_needs_no_memory(tmp_path):
    """Arrays are as long as the file has rows, also with a step of 10**15."""
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 1e15, "loss": 1}\n')
    assert [*read_run(tmp_path)[0].columns["loss"][0]] == [1, 1e15]
    with pytest.raises(UserError):
        read_run(tmp_path / "absent")
