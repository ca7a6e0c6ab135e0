"""A resumed run finds its data: after a change of folder, in a moved project, under a new path; and --no-shuffle."""

import json
import shutil

import pytest
from programs import QUICK, cache, content_of, files_in, refused, rows_of, run_here, write_text  # noqa: F401

from llm_numba import eval as evaluation

pytestmark = pytest.mark.compiled
FLAGS = (*QUICK, "--val-every", 0, "--val-batches", 1, "--sample-tokens", 0, "--schedule", "constant")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project folder with a text and a run of two steps, started with relative paths; and the run to four steps."""
    folder = tmp_path_factory.mktemp("project")
    write_text(folder / "text.txt", 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_here(*FLAGS, "--data", "text.txt", "--steps", 4, "--out", "runs/whole")
        run_here(*FLAGS, "--data", "text.txt", "--steps", 2, "--out", "runs/half")
    return folder


@pytest.fixture
def moved(project, tmp_path):
    """A copy of the project elsewhere; the original is not touched."""
    return shutil.copytree(project, tmp_path / "moved project")


def assert_continues(project, run, *arguments):
    run_here("--resume", run, "--steps", 4, *arguments)
    assert content_of(run)[0] == content_of(project / "runs" / "whole")[0]


def test_from_another_folder(project, moved, monkeypatch):
    monkeypatch.chdir("/")
    assert_continues(project, moved / "runs" / "half")


def test_data_that_moved_with_the_run(project, moved, tmp_path):
    """The recorded path is gone; the text lies at the same place relative to the run folder."""
    hidden = project.rename(project.with_name("hidden"))
    try:
        run_here("--resume", moved / "runs" / "half", "--steps", 4)
    finally:
        hidden.rename(project)
    assert content_of(moved / "runs" / "half")[0] == content_of(project / "runs" / "whole")[0]


def test_the_same_data_under_a_new_path(project, moved, tmp_path):
    copied = shutil.copyfile(moved / "text.txt", tmp_path / "copied.txt")
    assert_continues(project, moved / "runs" / "half", "--data", copied)


def test_other_data_is_refused(moved, tmp_path, capfd):
    other = write_text(tmp_path / "other.txt", 301)
    before = files_in(moved / "runs" / "half")
    line = refused(capfd, "--resume", moved / "runs" / "half", "--steps", 4, "--data", other)
    assert "the data is no longer what the run was started on" in line
    assert files_in(moved / "runs" / "half") == before


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda text: text.replace('"learning_rate": 0.003', '"learning_rate": 0.5'), "differs in learning_rate"),
        (lambda text: text[:40], "is missing or damaged"),
        (lambda text: "[]", "is missing or damaged"),
    ],
)
def test_a_changed_settings_file_is_reported(project, moved, capfd, damage, words):
    path = moved / "runs" / "half" / "settings.json"
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    assert_continues(project, moved / "runs" / "half")
    notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and words in notes[0] and "step_000002.safetensors are used" in notes[0]
    assert json.loads(path.read_text())["learning_rate"] == 0.003


def test_an_unchanged_settings_file_is_not_reported(project, moved, capfd):
    assert_continues(project, moved / "runs" / "half")
    assert "note: " not in capfd.readouterr().err


def test_no_shuffle_validates_in_the_order_of_the_text(project, capsys):
    """On the first windows of the held-out text, which `eval --limit` reads too; shuffled, on others."""
    losses = []
    for flags in ((), ("--no-shuffle",)):
        run = project / "runs" / f"validation{len(losses)}"
        run_here(*FLAGS, *flags, "--data", project / "text.txt", "--steps", 2, "--out", run)
        (row,) = rows_of(run, "val_loss")
        capsys.readouterr()
        run_here(run, "--limit", 8, "--json", program=evaluation)  # the 8 sequences of a batch
        losses.append((row["val_loss"], json.loads(capsys.readouterr().out)["loss"]))
    (shuffled, first), (ordered, expected) = losses
    assert ordered == pytest.approx(expected, rel=1e-6) and abs(shuffled - first) > 1e-5
