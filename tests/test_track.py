"""Trackers get what the log gets, and cannot stop a run."""

import json
import struct
import sys
from types import ModuleType

import pytest
from programs import (
    QUICK,
    cache,  # noqa: F401
    content_of,
    refused,
    rows_of,
    run_here,
    steps_of,
    write_text,
)

pytestmark = pytest.mark.compiled
RUN = ("--steps", 4, "--val-every", 2, "--checkpoint-every", 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def numbers_in(folder):
    """{(name, step): number} of everything in log.jsonl."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {
        (name, row["step"]): float(value)
        for row in rows
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }


def test_tensorboard(text, tmp_path, capsys):
    """TensorBoard's reader finds every number; those of repeated steps once."""
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    run_here(*QUICK, "--data", text, *RUN, "--track", "tensorboard", "--out", folder)
    run_here("--resume", folder / "checkpoints" / "step_000002.safetensors")
    events = reader.EventAccumulator(str(folder / "tensorboard")).Reload()
    found = [(name, event.step, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)]
    expected = numbers_in(folder)
    assert len(found) == len(expected) and {"loss", "norm", "learning_rate", "ms", "val_loss"} < {x[0] for x in found}
    for name, step, value in found:
        assert value == pytest.approx(expected[name, step], rel=1e-6)  # of a float32


def stand_in(monkeypatch, name, fails_at=None):
    """Install a fake module with the documented functions of wandb and trackio; return the list of its calls."""
    calls = []

    def init(project=None, name=None, config=None, resume=None, **more):
        calls.append(("init", name, resume, config["preset"], more))

    def log(data, step=None):
        if step == fails_at:
            raise ConnectionError("no network\nand no second line")
        calls.append(("log", step, data))

    module = ModuleType(name)
    module.__spec__ = sys.__spec__
    module.init, module.log, module.finish = init, log, lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_every_number(text, tmp_path, monkeypatch, capsys, name):
    calls, folder = stand_in(monkeypatch, name), tmp_path / "run"
    run_here(*QUICK, "--data", text, *RUN, "--track", name, "--out", folder)
    init, *logs, finish = calls
    identity = (folder / f"{name}-run").read_text()
    where = {"id": identity, "dir": str(folder)} if name == "wandb" else {}
    assert init == ("init", identity, "allow", "nano", where) and finish == ("finish",)
    assert identity.startswith("run-")
    sent = {(key, step): value for _, step, data in logs for key, value in data.items()}
    assert sent == numbers_in(folder)

    del calls[:]
    run_here("--resume", folder, "--steps", 6)  # the flag is kept, and the run has the same id
    assert calls[0][1] == identity and [call[1] for call in calls[1:-1] if "loss" in call[2]] == [5, 6]


def records_in(file):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # the rest of a block is padding
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


def test_wandb_itself(text, tmp_path, monkeypatch, capsys):
    """Offline: its file contains every number."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    run_here(*QUICK, "--data", text, *RUN, "--track", "wandb", "--out", folder)
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = {}
    for record in map(wandb_internal_pb2.Record.FromString, records_in(file)):
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        found |= {(key, row["_step"]): value for key, value in row.items() if not key.startswith("_")}
    assert found == pytest.approx(numbers_in(folder))


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_tracker_that_fails(text, tmp_path, monkeypatch, capsys, fails_at):
    """The failure is reported once, in one line, and the run is the same."""
    calls, folder = stand_in(monkeypatch, "trackio", fails_at), tmp_path / "run"
    run_here(*QUICK, "--data", text, *RUN, "--out", tmp_path / "without")
    run_here(*QUICK, "--data", text, *RUN, "--track", "trackio", "--out", folder)
    notes = [line for line in (folder / "train.log").read_text().splitlines() if "--track" in line]
    assert len(notes) == 1 and notes[0].endswith("the run continues: no network")
    assert [call[0] for call in calls].count("log") == (0 if fails_at == 1 else 3)  # two steps and a validation
    assert steps_of(folder) == [2, 4] and rows_of(folder, "step") == rows_of(tmp_path / "without", "step")
    contents = [content_of(path) for path in (folder, tmp_path / "without")]
    for _, state, _ in contents:
        del state["settings"]["track"]
    assert contents[0] == contents[1]


def test_a_tracker_that_does_not_start(text, tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, "wandb")
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: 1 / 0)
    run_here(*QUICK, "--data", text, "--steps", 2, "--track", "wandb", "--out", tmp_path / "run")
    assert "division by zero" in (tmp_path / "run" / "train.log").read_text()
    assert steps_of(tmp_path / "run") == [2]


def test_a_package_that_is_missing(text, tmp_path, monkeypatch, capfd):
    """It is reported before anything is written."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refused(capfd, *QUICK, "--data", text, "--track", "tensorboard", "--out", tmp_path / "run")
    assert "--track tensorboard" in line and 'pip install -e ".[tensorboard]"' in line
    assert not (tmp_path / "run").exists()
