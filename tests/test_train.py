"""A training run: what it leaves to read, what its settings do, and how it goes on after it was stopped."""

import json
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from programs import (
    QUICK,
    TIMES,
    cache,  # noqa: F401
    content_of,
    files_in,
    losses_of,
    refused,
    rows_of,
    run,
    run_here,
    steps_of,
    write_text,
)

from llm_numba.data import corpus as data
from llm_numba.training import checkpoint
from llm_numba.training.outliers import WINDOW
from llm_numba.training.trainer import Trainer

pytestmark = pytest.mark.compiled
ROW = {"step", "loss", "loss_z", "norm", "norm_z", "learning_rate", *TIMES, "skipped"}
STEPS = 24
COPIES = "to_device", "to_host"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def base(tmp_path_factory, text):
    """A whole run in a process of its own: 24 steps, a checkpoint every 6."""
    here = tmp_path_factory.mktemp("base")
    arguments = ("--steps", STEPS, "--checkpoint-every", 6, "--keep", 9, "--val-every", 10, "--sample-every", 12)
    process = run("train", *QUICK, "--data", text, *arguments, cwd=here)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    return SimpleNamespace(folder=here / "runs" / "nano-000", stdout=process.stdout)


@pytest.fixture
def copy(base, tmp_path):
    """A copy of the run, to go on from."""
    return shutil.copytree(base.folder, tmp_path / "copy")


def test_the_log_has_a_row_for_each_step(base):
    rows = [json.loads(line) for line in (base.folder / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    for row in steps:
        assert row.keys() == ROW
        assert row["loss_z"] is None and row["norm_z"] is None and row["skipped"] is False
        assert min(row[name] for name in ("loss", "norm", "learning_rate", "ms", "tokens_per_second")) > 0
        assert 0 < row["share_of_peak"] < 1.5  # of a peak measured in 0.1 s, while others may have the cores
        assert row["ms"] * row["tokens_per_second"] == pytest.approx(8 * 32 * 1000)
    assert [row["step"] for row in rows if "val_loss" in row] == [10, 20, STEPS]
    assert all(0 < row["val_loss"] < 6 for row in rows if "val_loss" in row)
    assert [row["step"] for row in rows if "sample" in row] == [12, STEPS]


def test_the_loss_falls(base):
    losses = losses_of(base.folder)
    assert losses[0] == pytest.approx(np.log(257), abs=0.05)  # at first every token is as likely
    assert losses[-1] < 4.9
    assert rows_of(base.folder, "val_loss")[-1]["val_loss"] == pytest.approx(losses[-1], abs=0.3)


def test_a_line_says_what_its_row_does(base):
    lines = [line for line in base.stdout.splitlines() if line.startswith("step ")]
    for line, row in zip(lines, rows_of(base.folder), strict=True):
        step, loss, norm, rate, ms, tokens, share, left = line.split(" | ")
        assert step == f"step {row['step']:2}/{STEPS}"
        assert loss == f"loss {row['loss']:7.4f} (z     -)"
        assert norm == f"norm {row['norm']:7.4f} (z     -)"
        assert rate == f"lr {row['learning_rate']:.2e}"
        assert ms.endswith(" ms") and tokens.endswith(" tok/s") and share.endswith("% of peak")
        assert left.endswith(" left") and ":" in left
    assert (base.folder / "train.log").read_text() == base.stdout


def test_the_files_of_a_run(base):
    names = {path.name for path in base.folder.iterdir()}
    assert names == {"settings.json", "train.log", "log.jsonl", "loss.png", "checkpoints", ".lock"}
    settings = json.loads((base.folder / "settings.json").read_text())
    assert (settings["preset"], settings["steps"], settings["learning_rate"]) == ("nano", STEPS, 3e-3)
    assert steps_of(base.folder) == [6, 12, 18, 24]
    import matplotlib.pyplot as plt

    picture = plt.imread(base.folder / "loss.png")
    assert picture.ndim == 3 and picture[..., :3].std() > 0.01  # neither another format nor one colour


def test_what_to_do_next_is_said_with_commands_that_work(base, tmp_path):
    """Those that the run ends with, each as it stands."""
    lines = [line for line in base.stdout.splitlines() if "llm-numba " in line and "FILE" not in line]
    assert len(lines) == 3
    for line in lines:
        name, *arguments = shlex.split(line.partition("llm-numba ")[2])
        if name == "train":
            continue  # test_more_steps_go_on does, in a copy
        assert run(name, *arguments, cwd=base.folder.parents[1]).returncode == 0


def test_a_second_run_gets_a_folder_of_its_own(base, text, monkeypatch, capsys):
    before = files_in(base.folder)
    monkeypatch.chdir(base.folder.parents[1])
    run_here(*QUICK, "--data", text, "--steps", 1)
    assert files_in(base.folder) == before
    assert losses_of("runs/nano-001") == losses_of(base.folder)[:1]


def test_the_same_bits_on_one_thread_and_on_two(base, text, tmp_path, capsys):
    for threads in (1, 2):
        run_here(*QUICK, "--data", text, "--steps", STEPS, "--threads", threads, "--out", tmp_path / str(threads))
        assert losses_of(tmp_path / str(threads)) == losses_of(base.folder)
        assert content_of(tmp_path / str(threads))[0] == content_of(base.folder)[0]


def test_a_step_copies_once_to_the_device_and_waits_once(text, tmp_path, monkeypatch, capsys):
    counts, step = [], Trainer.step

    def counted(self):
        before, calls = self.ops, []
        watch = {name: lambda *a, name=name: calls.append(name) or getattr(before, name)(*a) for name in COPIES}
        self.ops = before.replace(**watch)
        step(self)
        self.ops = before
        counts.append(calls)

    monkeypatch.setattr(Trainer, "step", counted)
    run_here(*QUICK, "--data", text, "--steps", 3, "--out", tmp_path / "run")
    assert counts == [["to_device", "to_host"]] * 3


def test_overfitting_one_batch(text, tmp_path, capsys):
    arguments = ("--batch-size", 1, "--sequence-length", 16, "--schedule", "constant", "--weight-decay", 0)
    run_here(*QUICK, "--data", text, "--overfit", "--steps", 200, *arguments, "--out", tmp_path / "run")
    assert losses_of(tmp_path / "run")[-1] < 0.05


def test_accumulation_gives_the_larger_batch(text, tmp_path, capsys):
    """The same windows, in one micro-batch or in four: the same losses but for the order of the sums."""
    for batch in (8, 2):
        arguments = ("--batch-size", batch, "--tokens-per-step", 256, "--steps", 12, "--out", tmp_path / str(batch))
        run_here(*QUICK, "--data", text, *arguments)
    whole, parts = rows_of(tmp_path / "8"), rows_of(tmp_path / "2")
    for name in ("loss", "norm"):
        np.testing.assert_allclose([row[name] for row in parts], [row[name] for row in whole], rtol=2e-5)
    assert checkpoint.load(checkpoint.newest(tmp_path / "2"))[1]["loader"] == {"epoch": 0, "window": 12 * 8}


def test_the_number_of_steps_follows_from_the_epochs(text, tmp_path, capsys):
    run_here(*QUICK, "--data", text, "--epochs", 0.5, "--out", tmp_path / "run")
    tokens = len(open(text, "rb").read()) + 1  # a byte each, behind the end of a text
    windows = (tokens - int(0.05 * tokens) - 1) // 32
    assert len(losses_of(tmp_path / "run")) == round(0.5 * windows / 8)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [1.0] * 10),
        ("linear", [1 - i / 10 for i in range(10)]),
        ("cosine", [(1 + np.cos(np.pi * i / 10)) / 2 for i in range(10)]),
        ("wsd", [1.0] * 8 + [1 - np.sqrt(0.4 / 2.4), 1 - np.sqrt(1.4 / 2.4)]),  # over 2.4 of 12 steps, from 9.6 on
    ],
)
def test_the_schedule_is_followed(text, tmp_path, capsys, schedule, expected):
    arguments = ("--schedule", schedule, "--warmup", 2, "--final-fraction", 0, "--learning-rate", 1e-2)
    run_here(*QUICK, "--data", text, "--steps", 12, *arguments, "--out", tmp_path / "run")
    rates = [row["learning_rate"] / 1e-2 for row in rows_of(tmp_path / "run")]
    assert rates == pytest.approx([0.5, 1.0, *expected])


OUTLIER = WINDOW + 6  # the step that meets the strange passage, once the window of the z-scores is full


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A text that changes its alphabet for one step of 256 tokens, which are the bytes behind the end-of-text token."""
    path = tmp_path_factory.mktemp("strange") / "text.txt"
    content = bytearray(b"the cat sat on the mat. " * 1700)
    start = 256 * (OUTLIER - 1)
    content[start : start + 255] = bytes(np.random.default_rng(0).integers(65, 91, 255, dtype=np.uint8))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("flag", ["", "--skip-loss-z", "--skip-norm-z"])
def test_an_outlier_s_update_is_skipped_where_asked_for(strange, tmp_path, capsys, flag):
    stop = ("--steps", OUTLIER, "--no-shuffle", *((flag, 3) if flag else ()), "--checkpoint-every", OUTLIER - 1)
    run_here(*QUICK, "--data", strange, *stop, "--out", tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if row["skipped"]] == ([OUTLIER] if flag else [])
    assert ("SKIPPED" in capsys.readouterr().out) == bool(flag)
    before, after = (content_of(checkpoint.checkpoint_path(tmp_path / "run", OUTLIER - i)) for i in (1, 0))
    changed = {name for name in before[0] if before[0][name] != after[0][name]}
    assert changed == (set() if flag else set(before[0]))
    assert after[1]["step"] == OUTLIER and after[1]["loader"]["window"] == 8 * OUTLIER
    for kind in ("loss", "norm"):
        assert [row[f"{kind}_z"] for row in rows[:WINDOW]] == [None] * WINDOW
        values = np.array([row[kind] for row in rows])
        for i in range(WINDOW, OUTLIER):  # the mean and the deviation of the last WINDOW values, this one included
            window = values[i + 1 - WINDOW : i + 1]
            assert rows[i][f"{kind}_z"] == pytest.approx((values[i] - window.mean()) / window.std(), abs=1e-9)
        assert rows[-1][f"{kind}_z"] > 3
        assert after[1][f"{kind}_history"] == list(values[-WINDOW:])


def go_on(folder, *arguments, **options):
    return run_here("--resume", folder, *arguments, **options)


@pytest.mark.parametrize("step", [6, 12, 18])
def test_from_an_older_checkpoint(base, copy, capsys, step):
    """What is newer is set aside whole, and the run ends as the one that was never stopped."""
    newer = [checkpoint.checkpoint_path(copy, s) for s in (6, 12, 18, 24) if s > step]
    before = {path.name: path.read_bytes() for path in newer}
    go_on(checkpoint.checkpoint_path(copy, step))
    assert {path.name: path.with_name(path.name + ".aside").read_bytes() for path in newer} == before
    assert rows_of(copy, "step") == rows_of(base.folder, "step")
    assert content_of(copy) == content_of(base.folder)
    assert steps_of(copy) == [6, 12, 18, 24]
    assert len((copy / "train.log").read_text()) > len(base.stdout)  # it keeps what the JSON log lets go


def test_more_steps_go_on(base, copy, text, tmp_path, capsys):
    """A run of 24 steps that goes on to 30: with a constant learning rate the same as one of 30."""
    arguments = (*QUICK, "--data", text, "--schedule", "constant", "--checkpoint-every", 5)
    run_here(*arguments, "--steps", 13, "--out", tmp_path / "short")
    go_on(tmp_path / "short", "--steps", 20)
    run_here(*arguments, "--steps", 20, "--out", tmp_path / "long")
    assert rows_of(tmp_path / "short") == rows_of(tmp_path / "long")
    assert content_of(tmp_path / "short") == content_of(tmp_path / "long")


def test_over_the_end_of_an_epoch(text, tmp_path, capsys):
    """The second epoch's order is the same after a stop in the first, or in the middle of the second."""
    arguments = (*QUICK, "--data", text, "--sequence-length", 32, "--batch-size", 97, "--epochs", 2.4)
    run_here(*arguments, "--out", tmp_path / "whole")
    steps = len(losses_of(tmp_path / "whole"))
    run_here(*arguments, "--checkpoint-every", 1, "--keep", 99, "--out", tmp_path / "run")
    epochs = set()
    for step in range(steps // 3, steps):
        path = checkpoint.checkpoint_path(tmp_path / "run", step)
        epochs.add(checkpoint.load(path)[1]["loader"]["epoch"])
        if step in (steps // 3, steps * 2 // 3, steps - 1):
            resumed = tmp_path / str(step) / "checkpoints"
            resumed.mkdir(parents=True)
            shutil.copy(path, resumed)
            go_on(resumed.parent)
            assert losses_of(resumed.parent) == losses_of(tmp_path / "whole")[step:]
            assert content_of(resumed.parent) == content_of(tmp_path / "whole")
    assert epochs == {0, 1, 2}


def test_a_log_that_was_cut_off_in_a_line(base, copy, capsys):
    """Killed while it wrote: the line is not whole, and lies behind the checkpoint."""
    for step in (18, 24):
        checkpoint.checkpoint_path(copy, step).unlink()
    lines = (copy / "log.jsonl").read_text().splitlines(keepends=True)
    (copy / "log.jsonl").write_text("".join(lines[:17]) + lines[17][:40])
    go_on(copy)
    assert rows_of(copy, "step") == rows_of(base.folder, "step")


def test_keep(text, tmp_path, capsys):
    arguments = ("--steps", 13, "--checkpoint-every", 2, "--keep", 2, "--keep-every", 4)
    run_here(*QUICK, "--data", text, *arguments, "--out", tmp_path / "run")
    assert steps_of(tmp_path / "run") == [4, 8, 12, 13]


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--batch-size", 4),
        ("--learning-rate", 1e-4),
        ("--seed", 1),
        ("--preset", "tiny"),
        ("--vocab-size", "300"),
        ("--out", "elsewhere"),
        ("--no-shuffle", None),
        ("--overfit", None),
        ("--skip-loss-z", 3),
    ],
)
def test_what_cannot_change_on_resume(copy, capfd, flag, value):
    before = files_in(copy)
    line = refused(capfd, "--resume", copy, flag, *(() if value is None else (value,)))
    assert line.startswith(f"error: {flag}") and "cannot change on resume" in line
    assert files_in(copy) == before


def test_nothing_left_to_do(copy, capfd):
    before = files_in(copy)
    for arguments in [(), ("--steps", STEPS - 1)]:
        line = refused(capfd, "--resume", copy, *arguments)
        assert f"--resume {copy}" in line and "--steps" in line
    assert files_in(copy) == before


@pytest.mark.parametrize("change", ["a letter", "length", "gone"])
def test_other_data_on_resume(tmp_path, capfd, change):
    path = write_text(tmp_path / "text.txt")
    run_here(*QUICK, "--data", path, "--steps", 2, "--out", tmp_path / "run")
    before = files_in(tmp_path / "run")
    content = open(path).read()
    with open(path, "w") as file:
        file.write({"a letter": content.replace("cat", "cow", 1), "length": content + "!", "gone": ""}[change])
    line = refused(capfd, "--resume", tmp_path / "run", "--steps", 4)
    assert path in line if change == "gone" else "the data is no longer what the run was started on" in line
    assert files_in(tmp_path / "run") == before


def test_shards_without_a_tokenizer(tmp_path, capsys):
    tokens = np.random.default_rng(0).integers(0, 97, 5000).astype(np.uint16)
    from llm_numba.data.shards import write_shard

    write_shard(tmp_path / "a.bin", tokens)
    arguments = ("--tokenizer", "none", "--vocab-size", 97, "--steps", 3, "--out", tmp_path / "run")
    run_here(*QUICK, "--data", tmp_path / "a.bin", *arguments)
    assert losses_of(tmp_path / "run")[0] == pytest.approx(np.log(97), abs=0.05)
    assert not rows_of(tmp_path / "run", "sample")


def test_python_s_own_library_is_what_there_is_to_train_on(tmp_path, monkeypatch, capsys):
    """Without --data; here only a small file of it."""
    (tmp_path / "stdlib.py").write_text(open(write_text(tmp_path / "x")).read())
    monkeypatch.setattr(data, "standard_library_files", lambda: [tmp_path / "stdlib.py"])
    run_here(*QUICK, "--steps", 2, "--out", tmp_path / "run")
    assert len(losses_of(tmp_path / "run")) == 2
    assert "--prompt 'def '" in capsys.readouterr().out


def test_the_plan_of_the_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert not run_here(*QUICK, "--data", "no such file", "--plan-memory")
    out = capsys.readouterr().out
    assert files_in(tmp_path) == {}
    for line in ("parameters: ", "gradients: ", "m: ", "v: ", "activations: ", "scratch: ", "whole arena: ", "fits"):
        assert line in out
    wte = next(line for line in out.splitlines() if line.split()[:1] == ["wte"])
    assert wte.split()[1:6] == ["384", "x", "16", "float32", "at"] and "24,576" in wte


def test_the_reference_curve(text, tmp_path, monkeypatch, capsys):
    """A run with the reference's settings is told, once, when its losses are far from the recorded ones."""
    reference = tmp_path / "reference.json"
    monkeypatch.setattr("llm_numba.training.expected_curve.CURVE", reference)
    for scale, notes in ((1.0, 0), (0.5, 1)):
        out = tmp_path / str(scale)
        losses = [5.55] * 25  # the first 20 steps of a low learning rate stay there
        curve = [[i + 1, loss * scale] for i, loss in enumerate(losses)]
        reference.write_text(json.dumps({"settings": {"preset": "nano", "learning_rate": 1e-6}, "curve": curve}))
        run_here(*QUICK, "--data", text, "--steps", 25, "--learning-rate", 1e-6, "--out", out)
        assert capsys.readouterr().out.count("note: at step 20 the loss is 5.5") == notes


def test_a_run_becomes_the_reference(text, tmp_path, monkeypatch):
    """`record` takes the curve, the settings that decide it and the picture from a run."""
    from llm_numba.training import expected_curve

    monkeypatch.setattr(expected_curve, "CURVE", tmp_path / "curve.json")
    run_here(*QUICK, "--data", text, "--steps", 45, "--out", tmp_path / "run")
    expected_curve.record(tmp_path / "run")
    known = json.loads((tmp_path / "curve.json").read_text())
    losses = losses_of(tmp_path / "run")
    assert known["curve"] == [[n, pytest.approx(sum(losses[n - 20 : n]) / 20, abs=1e-4)] for n in (20, 40)]
    assert known["settings"]["preset"] == "nano" and known["settings"]["steps"] == 45
    assert not known["settings"].keys() & {"out", "resume", "threads", "val_every"}
    assert (tmp_path / "curve.png").read_bytes() == (tmp_path / "run" / "loss.png").read_bytes()
