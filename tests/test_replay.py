"""A step that went wrong can be run again and looked at, and the log says which text a strange step saw."""

import json

import numpy as np
import pytest
from programs import (
    QUICK,
    cache,  # noqa: F401
    command,
    environment,
    error_line,
    files_in,
    refused,
    rows_of,
    run_here,
    write_text,
)

from llm_numba.data import corpus as data
from llm_numba.data.shards import write_shard
from llm_numba.debug import replay
from llm_numba.training import checkpoint, outliers

pytestmark = pytest.mark.compiled
EXPLODES = ("--learning-rate", 1e30, "--schedule", "constant", "--grad-clip", 0, "--steps", 20, "--check-finite")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 1000)


# ---------------------------------------------------------------------------------------------------------------------
# --check-finite, and the step again


@pytest.fixture
def broken(tmp_path, text, capfd):
    """(folder, line) of a run of two micro-batches a step that --check-finite has stopped after its checkpoints."""
    folder = tmp_path / "run"
    run_here(*QUICK, "--data", text, "--tokens-per-step", 512, "--steps", 4, "--checkpoint-every", 2, "--out", folder)
    path = checkpoint.newest(folder)
    tensors, state, tokenizer = checkpoint.load(path)
    tensors["fcw"][1, 5, 3] = np.nan
    checkpoint.save(path, tensors, state, tokenizer)
    return folder, refused(capfd, "--resume", folder, "--steps", 8, "--check-finite")


def test_the_step_again(broken, tmp_path, capfd):
    """The same tensor is named, compiled or not, without the data, and as often as one likes."""
    folder, line = broken
    first, semicolon, rest = line.partition("; to run the saved step again")
    assert "step 5: layer 1 fch[0, 0, 5] is nan after matmul_gelu_forward" in first
    assert rest.endswith(f"llm-numba replay {folder}\n")
    before = files_in(folder)
    for arguments in (folder,), (folder / "bad_step.safetensors",), (folder, "--device", "cpu"):
        assert refused(capfd, *arguments, program=replay) == first + "\n"
    assert files_in(folder) == before


def test_an_update_that_is_not_finite(broken, capfd):
    """The update too starts from what it started from: moments, learning rate, number of the step."""
    folder, _ = broken
    path = checkpoint.newest(folder)
    tensors, state, tokenizer = checkpoint.load(path)
    tensors["fcw"][1, 5, 3] = 0.01
    tensors["m.fcw"][1, 5, 3] = 3e38
    checkpoint.save(path, tensors, state, tokenizer)
    first = refused(capfd, "--resume", folder, "--steps", 8, "--check-finite").partition(
        "; to run the saved step again"
    )[0]
    assert "step 5: fcw[1, 5, 3] is -inf after adamw_update" in first  # with no learning rate it would be nan
    assert refused(capfd, folder, program=replay) == first + "\n"


def test_the_step_again_as_plain_python(broken, tmp_path):
    import subprocess

    folder, line = broken
    process = subprocess.run(
        command("replay", folder, "--no-jit"), capture_output=True, text=True, env=environment(), cwd=tmp_path
    )
    last = process.stderr.splitlines(keepends=True)[-1]  # before it NumPy warns of each nan
    assert error_line(process.returncode, last) == line.partition("; to run the saved step again")[0] + "\n"


def test_a_step_that_is_whole_again(broken, tmp_path, capfd):
    """With the parameter mended, the step has the very loss and norm that the run would have had."""
    folder, _ = broken
    tensors, state, tokenizer = checkpoint.load(folder / "bad_step.safetensors")
    tensors["fcw"][1, 5, 3] = 0.01
    checkpoint.save(folder / "bad_step.safetensors", tensors, state, tokenizer)
    path = checkpoint.newest(folder)
    tensors, state, tokenizer = checkpoint.load(path)
    tensors["fcw"][1, 5, 3] = 0.01
    checkpoint.save(path, tensors, state, tokenizer)
    assert replay.main([str(folder), "--device", "cpu"]) == 0
    told = capfd.readouterr().out.strip()
    run_here("--resume", folder, "--steps", 5, "--device", "cpu")
    (row,) = [row for row in rows_of(folder) if row["step"] == 5]
    assert told.endswith(f"finite here: loss {row['loss']:.4f}, norm of the gradients {row['norm']:.4f}")


def test_before_the_first_checkpoint(text, tmp_path, capfd):
    """A run that explodes at once has its step kept too."""
    line = refused(capfd, *QUICK, "--data", text, *EXPLODES, "--out", tmp_path / "run")
    first = line.partition("; to run the saved step again")[0]
    assert refused(capfd, tmp_path / "run", program=replay) == first + "\n"


def test_what_is_no_kept_step(broken, tmp_path, capfd):
    folder, _ = broken
    assert "train --check-finite saves" in refused(capfd, tmp_path, program=replay)
    assert "not a step that --check-finite saved" in refused(capfd, checkpoint.newest(folder), program=replay)
    path = folder / "bad_step.safetensors"
    tensors, state, tokenizer = checkpoint.load(path)
    checkpoint.save(path, tensors | {"batches": tensors["batches"] + 257}, state, tokenizer)
    assert "beyond the vocabulary" in refused(capfd, folder, program=replay)
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in refused(capfd, folder, program=replay)


# ---------------------------------------------------------------------------------------------------------------------
# What a strange step saw


def documents(folder, sizes):
    folder.mkdir()
    letters = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        (folder / f"{i:02}.txt").write_text("".join(map(chr, letters.integers(97, 123, size))))
    return folder


@pytest.mark.parametrize("shard_tokens", [64, 10**6])
def test_the_documents_of_a_window(tmp_path, monkeypatch, cache, shard_tokens):  # noqa: F811
    """Every token of every window lies in the files that are named, and each of these has one; over shards' ends."""
    monkeypatch.setattr(data, "SHARD_TOKENS", shard_tokens)
    folder = documents(tmp_path / "text", [5, 100, 1, 1, 33, 260, 7])
    corpus = data.prepare([str(folder)], [], "bytes", None, 0.0)
    stream, files = [], json.loads((corpus.train[0].path.parent / data.INDEX).read_text())["files"]
    for file in files:  # in the order of the shards
        stream += [file] * (1 + len((tmp_path / file).read_bytes()))
    before = 0
    for span in corpus.train:
        tokens = span.stop - span.start
        for start in range(0, tokens, 7):
            window = span._replace(start=start, stop=min(start + 9, tokens))
            (told,) = data.describe_windows([window])
            assert told["files"] == list(dict.fromkeys(stream[before + window.start : before + window.stop]))
            assert (told["shard"], told["start"], told["stop"]) == (str(span.path), window.start, window.stop)
        before += tokens
    assert before == len(stream)


def outliers_of(folder):
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {row["step"]: row["windows"] for row in rows if "windows" in row}


def test_an_outlier_s_text_is_named(tmp_path, monkeypatch, capsys):
    """A file of noise among files of one sentence: the steps that are told are those that saw it, and say so."""
    monkeypatch.setattr(outliers, "WINDOW", 64)
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text("the cat sat on the mat. " * 40)
    (folder / "noise.txt").write_bytes(np.random.default_rng(0).integers(33, 127, 960).astype(np.uint8).tobytes())
    arguments = ("--batch-size", 4, "--steps", 400, "--no-shuffle", "--learning-rate", 1e-2)
    run_here(*QUICK, *arguments, "--data", folder, "--tokenizer", "bytes", "--out", tmp_path / "run")
    found = outliers_of(tmp_path / "run")
    noisy = {step: sorted({file for window in windows for file in window["files"]}) for step, windows in found.items()}
    assert any(str(folder / "noise.txt") in files for files in noisy.values())
    assert all(len(windows) == 4 and all(w["stop"] - w["start"] == 33 for w in windows) for windows in found.values())


def test_a_skipped_step_s_shards_are_named(tmp_path, capsys):
    """Of shards that are not ours, where no files are known; a step is skipped from a full window on."""
    tokens = np.random.default_rng(0).integers(0, 97, 20_000)
    write_shard(tmp_path / "a.bin", tokens)
    arguments = ("--tokenizer", "none", "--vocab-size", 97, "--data", tmp_path / "a.bin", "--skip-loss-z", 1.5)
    run_here(*QUICK, *arguments, "--batch-size", 1, "--steps", 200, "--out", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    skipped = {row["step"] for row in rows if row.get("skipped")}
    found = outliers_of(tmp_path / "run")
    assert skipped and skipped <= found.keys()
    for windows in found.values():
        assert [window["files"] for window in windows] == [[]]
        assert windows[0]["shard"] == str(tmp_path / "a.bin") and windows[0]["stop"] - windows[0]["start"] == 33


def test_a_nan_of_an_op_of_use(tmp_path, text, capfd):
    """The step is saved, and its replay uses the op too; the warm-up and the comparison of the ops go through."""
    own = tmp_path / "own.py"
    own.write_text(
        "from llm_numba.cpu.matmul import matmul_gelu_forward\n\n"
        "def bad(y, x, a, w, b, memory):\n"
        "    matmul_gelu_forward(y, x, a, w, b, memory)\n    y[0, 0, 3] = float('nan')\n"
    )
    use, folder = ("--use", f"matmul_gelu_forward={own}:bad", "--device", "cpu"), tmp_path / "run"
    line = refused(capfd, *QUICK, "--data", text, "--steps", 2, *use, "--check-finite", "--out", folder)
    assert "step 1: layer 0 fch_gelu[0, 0, 3] is nan after matmul_gelu_forward" in line
    assert refused(capfd, folder, "--device", "cpu", program=replay) == line.partition("; to run")[0] + "\n"
