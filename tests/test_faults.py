"""Kills, signals, bad input, full disks: nothing is lost, and one line says what to do."""

import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from programs import (
    PACKAGE,
    QUICK,
    cache,  # noqa: F401
    command,
    content_of,
    environment,
    error_line,
    files_in,
    refused,
    rows_of,
    rows_written,
    run,
    run_here,
    started,
    steps_of,
    wait_until,
    write_text,
)

from llm_numba import sample, train
from llm_numba.data.shards import write_shard
from llm_numba.training import checkpoint

pytestmark = [pytest.mark.compiled, pytest.mark.faults]
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
STEPS = 160  # more than a window of z-scores, less than two epochs
RUN = ("--steps", STEPS, "--checkpoint-every", 4, "--keep", 3, "--val-every", 25, "--batch-size", 16)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 1000)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """A run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_here(*QUICK, "--data", text, *RUN, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory, text):
    """A run of 4 steps with checkpoints at 2 and 4; do not change it."""
    folder = tmp_path_factory.mktemp("short") / "run"
    run_here(*QUICK, "--data", text, "--steps", 4, "--checkpoint-every", 2, "--out", folder)
    return folder


@pytest.fixture
def copy(short, tmp_path):
    return shutil.copytree(short, tmp_path / "copy")


SLOW_DISK = """
import os, sys, time
from llm_numba import train
from llm_numba.util.cli import exit_with
fsync = os.fsync
os.fsync = lambda handle: (time.sleep(0.03), fsync(handle), time.sleep(0.03))
exit_with(lambda: train.main(sys.argv[1:]))
"""


def slow_training(*arguments):
    """The command that trains on a disk so slow that a signal can be sent at a certain moment of the run."""
    return [sys.executable, "-c", SLOW_DISK, *map(str, arguments)]


def assert_same(folder, whole):
    assert rows_of(folder, "step") == rows_of(whole, "step")  # losses, norms, z-scores, validation, sample
    assert content_of(folder) == content_of(whole)  # parameters, moments, the position in the data, z-score windows
    assert [path.name for path in (folder / "checkpoints").iterdir() if "tmp" in path.name] == []


# ---------------------------------------------------------------------------------------------------------------------
# Kills and signals


@posix
def test_a_run_that_is_killed_repeatedly_gives_the_same_result(whole, text, tmp_path, capsys):
    """SIGKILL at eight moments: four anywhere, four while a checkpoint is written: before its data is on the disk,
    before it is renamed, before the new name is on the disk, before older checkpoints are removed."""
    folder, numbers, unfinished = tmp_path / "run", random.Random(0), 0
    arguments = ("--data", text, *QUICK, *RUN, "--out", folder)

    def writing():
        return next((folder / "checkpoints").glob("*tmp*"), None)

    for delay in 0, None, 0.045, None, 0.075, None, 0.105, None:
        with started(slow_training(*arguments), tmp_path) as process:
            first = steps_of(folder)[-1] if (folder / "checkpoints").exists() else 0
            until = first + numbers.randint(6, 16)
            assert wait_until(lambda until=until: rows_written(folder) >= until, process), process.stderr.read()
            if delay is not None:
                assert wait_until(writing, process)
            time.sleep(numbers.uniform(0, 0.1) if delay is None else delay)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        unfinished += writing() is not None
        for path in (folder / "checkpoints").glob("step_*.safetensors"):
            checkpoint.load(path)  # whole
        arguments = ("--resume", folder)
    assert unfinished, "no kill came while a checkpoint was being written: half of this test has tested nothing"
    assert steps_of(folder)[-1] < STEPS
    run_here(*arguments)
    assert_same(folder, whole)


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(whole, text, tmp_path, capsys, number):
    folder = tmp_path / "a run"
    with started(slow_training("--data", text, *QUICK, *RUN, "--out", folder), tmp_path) as process:
        assert wait_until(lambda: rows_written(folder) >= 21, process)
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == 128 + number
    assert err.decode().split() == f"{number.name}: stopping after this step; again to stop at once".split()
    steps = len(rows_of(folder))
    assert 21 <= steps < STEPS and steps_of(folder)[-1] == steps
    *_, stopped, go_on = out.decode().splitlines()  # the path has a space
    assert f"stopped by {number.name} after step {steps}" in stopped
    assert (folder / "loss.png").exists()
    assert shlex.split(go_on.partition(":")[2]) == ["llm-numba", "train", "--resume", str(folder)]
    arguments = "--resume", folder
    run_here(*arguments)
    assert_same(folder, whole)


@posix
def test_a_signal_before_the_first_step(whole, text, tmp_path, capsys, monkeypatch):
    """Even then the run can be resumed."""
    folder = tmp_path / "run"

    def checked(ops, *_):  # called just before the first step
        os.kill(os.getpid(), signal.SIGTERM)
        return ops

    monkeypatch.setattr("llm_numba.training.trainer.checked", checked)
    arguments = ("--data", text, *QUICK, *RUN, "--out", folder)
    assert run_here(*arguments, "--check-finite") == 128 + signal.SIGTERM
    assert steps_of(folder) == [0] and rows_of(folder) == []
    run_here("--resume", folder)
    assert_same(folder, whole)


@posix
def test_a_second_signal_ends_the_run_at_once(text, tmp_path):
    folder = tmp_path / "run"
    slow = ("--batch-size", 1, "--tokens-per-step", 32 * 20_000)  # many seconds a step
    with started(command("train", "--data", text, *QUICK, *slow, "--out", folder), tmp_path) as process:
        assert wait_until(lambda: "first step" in text_of(folder / "train.log"), process), process.stderr.read()
        process.send_signal(signal.SIGINT)
        line = process.stderr.readline() + process.stderr.readline()
        assert b"again to stop at once" in line
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err.decode()) == (130, "stopped by Ctrl-C\n")


def text_of(path):
    return path.read_text() if path.exists() else ""


@posix
def test_ctrl_c_while_text_is_tokenised(text, tmp_path):
    (tmp_path / "large.txt").write_text(open(text).read() * 800)
    folder = tmp_path / "cache"
    arguments = (*QUICK, "--data", "large.txt", "--out", "run")
    with started(command("train", *arguments), tmp_path, env=environment(LLM_NUMBA_CACHE=str(folder))) as process:
        assert wait_until(lambda: list(folder.glob("unfinished")), process), process.stderr.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out.decode(), err.decode()) == (130, "", "stopped by Ctrl-C\n")
    assert sorted(files_in(tmp_path)) == ["cache", "cache/tokenising.lock", "large.txt"]


@posix
def test_ctrl_c_while_the_ops_are_compiled(text, tmp_path):
    empty = environment(NUMBA_CACHE_DIR=str(tmp_path / "compiled"))
    with started(command("train", *QUICK, "--data", text, "--out", "run"), tmp_path, env=empty) as process:
        assert wait_until(lambda: list(tmp_path.glob("compiled/*/*.nbc")), process), process.stderr.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out.decode(), err.decode()) == (130, "", "stopped by Ctrl-C\n")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--presett", "nano"], ["--presett", "--preset"]),
        (["--preset", "huge"], ["--preset", "huge", "nano"]),
        (["--batch-size", "many"], ["--batch-size", "many"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--batch-size"], ["--batch-size"]),
        (["--learning-rate", "nan"], ["--learning-rate nan"]),
        (["--steps", "-1"], ["--steps -1"]),
        (["--steps", "1.5"], ["--steps", "1.5"]),
        (["--schedule", "sine"], ["--schedule", "sine", "cosine"]),
        (["--threads", "100000"], ["--threads 100000"]),
        (["--sequence-length", "33"], ["--sequence-length 33", "32"]),
        (["--tokens-per-step", "300"], ["--tokens-per-step 300", "288 or 304"]),
        (["--steps", "4", "--warmup", "5"], ["--warmup 5", "4"]),
        (["--epochs", "0.1", "--warmup", "5000"], ["--warmup 5000", "--steps"]),
        (["--interpret", "layernrom"], ["--interpret layernrom", "layernorm"]),
        (["--tokenizer", "gpt2", "--vocab-size", "300"], ["--vocab-size 300"]),
        (["--tokenizer", "bpe", "--vocab-size", "60000"], ["--vocab-size 60000"]),
        (["--tokenizer", "none", "--vocab-size", "97"], ["--tokenizer none"]),
        (["--val-fraction", "0.0001"], ["--val-fraction"]),
        (["--val-data", "absent.txt"], ["--val-data", "absent.txt: no text and no .bin shard"]),
        (["--resume", "absent"], ["absent"]),
        (["--resume", "."], ["."]),
        (["--batch-size", "1000000000"], ["--batch-size 1000000000", "would fit"]),
    ],
)
def test_a_bad_flag(text, tmp_path, monkeypatch, capfd, arguments, names):
    monkeypatch.chdir(tmp_path)
    line = refused(capfd, "--preset", "nano", "--data", text, "--out", "run", *arguments)
    assert all(name in line for name in names), line
    assert files_in(tmp_path) == {}


def test_a_bad_flag_in_a_subprocess(tmp_path):
    """The command does what the tests in this process do."""
    process = run("train", "--batch-size", 0, cwd=tmp_path)
    assert "--batch-size 0" in error_line(process.returncode, process.stderr)
    assert process.stdout == "" and files_in(tmp_path) == {}


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "no text and no .bin shard found"),
        (b"", "empty"),
        (b"too short", "--sequence-length"),
        (b"the cat\xff sat " * 500, "not UTF-8 at byte 7"),
    ],
)
def test_bad_text(tmp_path, monkeypatch, capfd, content, expected):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    before = files_in(tmp_path)
    line = refused(capfd, *QUICK, "--data", "text.txt", "--out", "run")
    assert expected in line and ("text.txt" in line or "--data" in line)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("what", ["magic", "version", "short", "long", "count", "id", "header"])
def test_a_bad_shard(tmp_path, monkeypatch, capfd, what):
    monkeypatch.chdir(tmp_path)
    tokens = (np.arange(2000) % 97).astype(np.uint16)
    tokens[1234] = 97 if what == "id" else 0
    write_shard(tmp_path / "a.bin", tokens)
    content = bytearray((tmp_path / "a.bin").read_bytes())
    header = np.frombuffer(content, "<i4", 256)
    if what in ("magic", "version", "count"):
        header[["magic", "version", "count"].index(what)] += 1
    del header  # which holds the content
    content = {"short": content[:-1], "long": content + b"\0", "header": content[:1000]}.get(what, content)
    (tmp_path / "a.bin").write_bytes(content)
    before = files_in(tmp_path)
    arguments = ("--tokenizer", "none", "--vocab-size", 97, "--out", "run")
    line = refused(capfd, *QUICK, "--data", "a.bin", *arguments)
    assert "a.bin" in line and (what != "id" or "token 1234 is 97" in line)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint(copy, capfd, damage):
    """If it is requested by name, the error names the previous good one; a run's folder uses that one."""
    path = checkpoint.newest(copy)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes({"cut": content[:-100], "flipped": content, "empty": b""}[damage])
    before = files_in(copy)
    for arguments, program in [(("--resume", path), train), ((path,), sample)]:
        line = refused(capfd, *arguments, program=program)
        assert str(path) in line and "step_000002" in line
    run_here(copy, "--length", 1, program=sample)
    assert f"using {checkpoint.checkpoint_path(copy, 2)}" in capfd.readouterr().err
    assert files_in(copy) == before
    run_here("--resume", copy)
    err = capfd.readouterr().err
    assert err.startswith(f"note: {path}") and err.endswith(f"; using {checkpoint.checkpoint_path(copy, 2)}\n")
    assert path.with_name(path.name + ".aside").read_bytes() == before[f"checkpoints/{path.name}"]


@pytest.mark.parametrize("where", ["settings", "state"])
def test_a_checkpoint_of_another_version(copy, capfd, where):
    """Complete, but with an unknown setting, or without a required one."""
    path = checkpoint.newest(copy)
    tensors, state, tokenizer = checkpoint.load(path)
    if where == "settings":
        state["settings"]["dropout"] = 0.1
    else:
        del state["loader"]
    checkpoint.save(path, tensors, state, tokenizer)
    assert str(path) in refused(capfd, "--resume", copy, "--steps", 8)


@pytest.mark.parametrize("line", ["no JSON", "[1]", '{"loss": 1.0}'])
def test_a_damaged_log(copy, capfd, line):
    with open(copy / "log.jsonl", "a") as file:
        file.write(line + "\n")
    before = files_in(copy)
    assert f"{copy / 'log.jsonl'}: a line is damaged" in refused(capfd, "--resume", copy, "--steps", 8)
    assert files_in(copy) == before


def test_a_run_is_not_overwritten(copy, text, capfd):
    before = files_in(copy)
    assert f"--resume {copy}" in refused(capfd, *QUICK, "--data", text, "--out", copy)
    assert files_in(copy) == before


@pytest.mark.parametrize("out", ["a file", "in a file", "/proc/run"])
def test_a_folder_that_cannot_be_written(text, tmp_path, capfd, out):
    (tmp_path / "file").write_text("in the way")
    folder = {"a file": tmp_path / "file", "in a file": tmp_path / "file" / "run"}.get(out, out)
    if out == "/proc/run" and not os.path.isdir("/proc/self"):
        pytest.skip("this system has no folder that root cannot write")
    assert f"--out {folder}" in refused(capfd, *QUICK, "--data", text, "--steps", 2, "--out", folder)
    assert files_in(tmp_path) == {"file": b"in the way"}


def test_a_cache_that_cannot_be_written(text, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLM_NUMBA_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.chdir(tmp_path)
    assert "LLM_NUMBA_CACHE" in refused(capfd, *QUICK, "--data", text, "--out", "run")
    process = run(
        "train", "--data", text, cwd=tmp_path, env=environment(NUMBA_CACHE_DIR=None)
    )  # for compiled functions
    assert "LLM_NUMBA_CACHE" in error_line(process.returncode, process.stderr)
    assert files_in(tmp_path) == {"file": b"in the way"}


@pytest.mark.parametrize("more", [(), ("--plan-memory",)])
def test_more_memory_than_there_is(text, tmp_path, monkeypatch, capfd, more):
    monkeypatch.chdir(tmp_path)
    numbers = {}
    for batch in 10_000_000, None:
        arguments = ("--preset", "d48", "--sequence-length", 1, "--tokenizer", "bytes", "--data", text, *more)
        available = 40 << 30  # of a larger machine
        monkeypatch.setattr(f"llm_numba.{PACKAGE}.memory.available_memory", lambda available=available: available)
        monkeypatch.setattr(f"llm_numba.{PACKAGE}.memory.allocate", lambda nbytes: pytest.fail("memory was allocated"))
        batch = batch or numbers["fits"] + 1
        line = refused(capfd, *arguments, "--batch-size", batch)
        numbers["fits"] = int(line.partition("; --batch-size ")[2].split()[0])
        assert line.startswith(f"error: --batch-size {batch}: ") and "40 GiB" in line
    assert numbers["fits"] == batch - 1  # the largest that fits; one more does not
    assert files_in(tmp_path) == {}


def test_a_model_too_large_for_any_batch(text, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(f"llm_numba.{PACKAGE}.memory.available_memory", lambda: 1 << 20)
    line = refused(capfd, "--preset", "d48", "--tokenizer", "bytes", "--data", text, "--plan-memory")
    assert "no batch size fits" in line and "--preset" in line


def test_a_loss_that_is_not_finite_stops_the_run(short, copy, text, tmp_path, capfd):
    """The error names a command that finds the cause and works, also before the first checkpoint."""
    path = checkpoint.newest(copy)
    tensors, state, tokenizer = checkpoint.load(path)
    tensors["fcw"][1, 5, 3] = np.nan
    checkpoint.save(path, tensors, state, tokenizer)
    before = files_in(copy / "checkpoints")
    line = refused(capfd, "--resume", copy, "--steps", 8)
    assert "step 5: the loss is nan" in line and f"--resume {copy} --check-finite" in line
    assert "layer 1 fch[0, 0, 5] is nan" in refused(capfd, "--resume", copy, "--check-finite", "--steps", 8)
    assert files_in(copy / "checkpoints") == before

    explosive = ("--learning-rate", 1e30, "--schedule", "constant", "--grad-clip", 0, "--steps", 20)
    line = refused(capfd, *QUICK, "--data", text, *explosive, "--out", tmp_path / "run")
    assert "--check-finite" in line and "--resume" not in line


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


def limited(nbytes):
    """Limits the size of the files that a process writes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


@posix
def test_a_log_that_may_not_grow(text, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ("--data", text, *QUICK, *RUN, "--out", folder)
    process = run("train", *arguments, "--checkpoint-every", 0, cwd=tmp_path, preexec_fn=limited(6000))
    line = error_line(process.returncode, process.stderr)
    assert str(folder) in line and "File too large" in line
    rows = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    assert len(rows) > 10 and not rows[-1].endswith("\n")  # up to the last byte that fits
    assert [json.loads(row)["step"] for row in rows[:-1]] == list(range(1, len(rows)))


@posix
@pytest.mark.parametrize("nbytes", [100, 50_000])
def test_a_checkpoint_that_may_not_grow(copy, whole, tmp_path, nbytes):
    """On resume, the log, the settings or the next checkpoint: existing files stay unchanged."""
    before = files_in(copy)
    process = run("train", "--resume", copy, "--steps", 8, cwd=tmp_path, preexec_fn=limited(nbytes))
    line = error_line(process.returncode, process.stderr)
    assert str(copy) in line and "File too large" in line
    after = files_in(copy)
    kept = [name for name in before if name.startswith("checkpoints") or nbytes < 50_000 and "train.log" not in name]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after.keys() == before.keys()


@posix
def test_a_disk_that_fills_up(whole, text, tmp_path, capsys):
    """A file system of 1 MB gets full at a checkpoint. With more space the resumed run gives the same result."""
    unshare = ["unshare", "--mount", "--map-root-user"]  # the file system vanishes with the process
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("cannot make a small file system here")
    small, saved = tmp_path / "small", tmp_path / "saved"
    small.mkdir()
    script = 'mount -t tmpfs -o size=1m none "$0" || exit 32; saved=$1; shift; "$@"; status=$?; cp -r "$0" "$saved"'
    arguments = command("train", "--data", text, *QUICK, *RUN, "--keep", 100, "--out", small / "run")
    process = subprocess.run(
        [*unshare, "sh", "-c", script + "; exit $status", str(small), str(saved), *arguments],
        capture_output=True,
        encoding="utf-8",
        env=environment(),
        cwd=tmp_path,
    )
    if process.returncode == 32:  # mount's own status
        pytest.skip("cannot mount a small file system here")
    line = error_line(process.returncode, process.stderr)
    assert "No space left on device" in line and "checkpoint" in line
    steps = steps_of(saved / "run")
    assert steps == list(range(4, steps[-1] + 1, 4)) and len(steps) >= 4
    for step in steps:
        checkpoint.load(checkpoint.checkpoint_path(saved / "run", step))
    run_here("--resume", saved / "run", "--keep", 3)
    assert_same(saved / "run", whole)


def test_a_plot_that_cannot_be_written(text, tmp_path, capfd):
    (tmp_path / "run" / "loss.png").mkdir(parents=True)
    assert "loss.png" in refused(capfd, *QUICK, "--data", text, "--steps", 2, "--out", tmp_path / "run")
    assert steps_of(tmp_path / "run") == [2]


def test_a_log_in_any_locale(text, tmp_path):
    """A sample and a path have characters that the locale's encoding lacks; the log has them all."""
    ascii_only = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    data = shutil.copy(text, tmp_path / "\u00e9t\u00e9.txt")
    arguments = (*QUICK, "--data", data, "--steps", 1, "--sample-tokens", 64, "--out", "caf\u00e9")
    for last in arguments, ("--resume", "caf\u00e9", "--steps", 2):
        process = run("train", *last, cwd=tmp_path, env=ascii_only)
        assert (process.returncode, process.stderr) == (0, "")
    log = (tmp_path / "caf\u00e9" / "train.log").read_text(encoding="utf-8")
    assert "\N{REPLACEMENT CHARACTER}" in log and "run folder caf\u00e9" in log
    run_here("--resume", tmp_path / "caf\u00e9", "--steps", 3)
