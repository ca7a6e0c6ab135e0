"""What a run survives: fifty kills, a damaged checkpoint, a second run, a reader that leaves, a clock that jumps."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numba
import pytest
from programs import (
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

from llm_numba.data.shards import write_shard
from llm_numba.training import checkpoint
from llm_numba.training.trainer import Trainer

pytestmark = [pytest.mark.compiled, pytest.mark.skipif(os.name == "nt", reason="needs POSIX")]
KILLS = 50
RUN = ("--device", "cpu", "--steps", 400, "--checkpoint-every", 3, "--val-every", 50, "--batch-size", 8)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 1000)


@pytest.fixture(scope="module")
def short(tmp_path_factory, text):
    """A run of 6 steps with a checkpoint at 2, 4 and 6, not to be changed."""
    folder = tmp_path_factory.mktemp("short") / "run"
    run_here(*QUICK, "--data", text, "--steps", 6, "--checkpoint-every", 2, "--out", folder)
    return folder


@pytest.fixture
def copy(short, tmp_path):
    return shutil.copytree(short, tmp_path / "copy")


# ---------------------------------------------------------------------------------------------------------------------
# Kills

KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from llm_numba import oracle, train
from llm_numba.ops import Ops
from llm_numba.util.cli import exit_with

own = dict(is_compiled=lambda: False, set_threads=lambda n: None, capture=lambda f: f, describe_device=lambda: "NumPy",
           peak_flops=lambda dtype: 1e9, reader=lambda x: lambda: x.copy)
train.get_ops = lambda *_: Ops(**vars(oracle) | own)

def start(*what):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        exit_with(lambda: train.main([str(x) for x in what]))
    return child

here, kills, arguments = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
assert os.waitpid(start(*arguments, "--out", here / "whole"), 0)[1] == 0
numbers, reached, finished, writing, folder = random.Random(0), [], [], 0, here / "run-0"
while len(reached) < kills:
    resumable = any(folder.glob("checkpoints/step_*.safetensors"))
    if not resumable and folder.exists():  # killed before its first checkpoint
        folder = folder.with_name(folder.name + "-again")
    child = start("--resume", folder) if resumable else start(*arguments, "--out", folder)
    time.sleep(numbers.uniform(0, 0.2))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        reached.append(max((int(p.stem[5:]) for p in folder.glob("checkpoints/step_*.safetensors")), default=0))
        writing += any(folder.glob("checkpoints/*tmp*"))
    else:
        assert status == 0, status
    if (folder / "checkpoints" / "step_000400.safetensors").exists():
        finished.append(str(folder))
        folder = here / f"run-{len(finished)}"
if any(folder.glob("checkpoints/step_*.safetensors")):
    assert os.waitpid(start("--resume", folder), 0)[1] == 0
    finished.append(str(folder))
print(json.dumps({"finished": finished, "writing": writing, "reached": reached}))
"""


def test_fifty_kills(text, tmp_path):
    """SIGKILL at fifty moments between loading and the last step; what is resumed ends with the bits of a run that was
    never killed. A process forks each try when it has loaded everything, and the ops are NumPy's, which start no
    threads: what could be lost is written by the same code. test_faults.py kills runs of compiled ops."""
    arguments = [*map(str, (*QUICK, "--data", text, *RUN))]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(KILLS), json.dumps(arguments)],
        capture_output=True,
        text=True,
        env=environment(OPENBLAS_NUM_THREADS="1"),
    )
    assert (process.returncode, process.stderr) == (0, "")  # no checkpoint was damaged, or it would be told
    told = json.loads(process.stdout)
    assert len(told["reached"]) == KILLS and len(set(told["reached"])) > KILLS // 3  # they did not all die early
    assert told["writing"] > 0, "no kill came while a checkpoint was being written"
    assert told["finished"]
    for folder in told["finished"]:
        assert rows_of(folder, "step") == rows_of(tmp_path / "whole", "step")
        assert content_of(folder) == content_of(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# What is no longer what it was


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over(copy, tmp_path, capfd, damage):
    """As many as there are; the run ends as if they had not been."""
    expected = shutil.copytree(copy, tmp_path / "expected")
    run_here("--resume", checkpoint.checkpoint_path(expected, 2), "--steps", 8)
    capfd.readouterr()
    for step in 4, 6:
        path = checkpoint.checkpoint_path(copy, step)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes({"cut": content[:-100], "flipped": content, "empty": b""}[damage])
    run_here("--resume", copy, "--steps", 8)
    notes = capfd.readouterr().err.splitlines()
    assert len(notes) == 2 and all(
        line.endswith(f"; using {copy}/checkpoints/step_000002.safetensors") for line in notes
    )
    assert "step_000006" in notes[0] and "step_000004" in notes[1]
    assert rows_of(copy, "step") == rows_of(expected, "step") and content_of(copy) == content_of(expected)


def test_no_checkpoint_is_whole(copy, capfd):
    for step in 2, 4, 6:
        checkpoint.checkpoint_path(copy, step).write_bytes(b"")
    before = files_in(copy)
    line = refused(capfd, "--resume", copy)
    assert "step_000006" in line and "has no whole checkpoint" in line
    assert files_in(copy) == before


def shards_in(folder, count=2, tokens=1500):
    for i in range(count):
        numbers = random.Random(i)
        write_shard(folder / f"{i}.bin", [numbers.randrange(97) for _ in range(tokens)])
    return ("--data", str(folder / "*.bin"), "--tokenizer", "none", "--vocab-size", 97)


def test_a_shard_that_was_replaced(tmp_path, capfd):
    """Between two starts: the line names it."""
    arguments = shards_in(tmp_path)
    run_here(*QUICK, *arguments, "--steps", 2, "--out", tmp_path / "run")
    write_shard(tmp_path / "1.bin", [5] * 1500)
    line = refused(capfd, "--resume", tmp_path / "run", "--steps", 4)
    assert f"{tmp_path / '1.bin'} differs" in line
    shards_in(tmp_path)  # given back
    run_here("--resume", tmp_path / "run", "--steps", 4)


@pytest.mark.parametrize("how", ["replaced", "cut off", "removed"])
def test_a_shard_that_is_replaced_under_the_run(tmp_path, capfd, monkeypatch, how):
    """While it reads; cut off, a memory map would end the process without a word."""
    arguments = shards_in(tmp_path, 1)
    step = Trainer.step

    def then(run):
        step(run)
        if run.state.step == 3:
            if how == "replaced":
                write_shard(tmp_path / "0.bin", [5] * 1500)
            elif how == "cut off":
                os.truncate(tmp_path / "0.bin", 100)
            else:
                os.remove(tmp_path / "0.bin")

    monkeypatch.setattr(Trainer, "step", then)
    line = refused(capfd, *QUICK, *arguments, "--checkpoint-every", 1, "--steps", 9, "--out", tmp_path / "run")
    assert "0.bin: changed while the run was reading it" in line
    assert steps_of(tmp_path / "run")[-1] == 3 and len(rows_of(tmp_path / "run")) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Two runs, a reader that leaves, a terminal that goes, a clock that jumps


def test_two_runs_in_one_folder(text, tmp_path, capfd):
    """The second is refused and changes nothing; once the first is killed, its lock is gone."""
    folder = tmp_path / "run"
    long = ("--data", text, *QUICK, "--steps", 3000, "--checkpoint-every", 5, "--out", folder)
    with started(command("train", *long), tmp_path) as process:
        assert wait_until(lambda: rows_written(folder) >= 6, process), process.stderr.read()
        process.send_signal(signal.SIGSTOP)
        before = files_in(folder)
        for arguments in ("--resume", folder), long:
            assert f"{folder}: another process is writing this run" in refused(capfd, *arguments)
        assert files_in(folder) == before
        process.kill()
        process.wait()
    run_here("--resume", folder, "--steps", steps_of(folder)[-1] + 1)


def test_a_reader_that_leaves(text, short, tmp_path):
    """`train | head -1`: the run stops with a checkpoint, without a traceback, and goes on to the same bits."""
    arguments = (*QUICK, "--data", text, "--steps", 6, "--checkpoint-every", 2, "--out", tmp_path / "run")
    with started(command("train", *arguments), tmp_path) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 128 + 13
        assert process.stderr.read() == b""
    *_, stopped, go_on = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert "Broken pipe" in stopped and str(tmp_path / "run") in go_on
    assert steps_of(tmp_path / "run")[-1] < 6
    run_here("--resume", tmp_path / "run")
    assert rows_of(tmp_path / "run", "step") == rows_of(short, "step")


def test_no_output_at_all(text, tmp_path):
    """`train >&-`"""
    arguments = command("train", *QUICK, "--data", text, "--steps", 2, "--out", tmp_path / "run")
    process = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *arguments], stderr=subprocess.PIPE, env=environment(), cwd=tmp_path
    )
    assert (process.returncode, process.stderr) == (0, b"")
    assert steps_of(tmp_path / "run") == [2]


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_goes(text, tmp_path, monkeypatch, capsys, nohup):
    """SIGHUP stops the run with a checkpoint, unless it is ignored, as under nohup."""
    step = Trainer.step

    def then(run):
        step(run)
        if run.state.step == 3:
            os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(Trainer, "step", then)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        status = run_here(*QUICK, "--data", text, "--steps", 6, "--out", tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (status, steps_of(tmp_path / "run")) == ((0, [6]) if nohup else (128 + signal.SIGHUP, [3]))


def test_a_clock_that_jumps(text, tmp_path, monkeypatch, capsys):
    """Back or ahead by up to a year at every look: times stay positive, and nothing else notices."""
    numbers, now = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: now() + numbers.uniform(-3e7, 3e7))
    monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
    run_here(*QUICK, "--data", text, "--steps", 6, "--checkpoint-every", 2, "--out", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(0 < row["ms"] < 60_000 for row in rows if "ms" in row)
    assert all(
        "-" not in line.rpartition("|")[2] for line in capsys.readouterr().out.splitlines() if line[:5] == "step "
    )


# ---------------------------------------------------------------------------------------------------------------------
# Caches, and Ctrl-C at the start


@pytest.mark.parametrize("suffix, damage", [("nbc", "cut"), ("nbc", "empty"), ("nbi", "garbage")])
def test_damaged_compiled_functions(text, tmp_path, suffix, damage):
    """One line says which folder to delete; that then helps."""
    compiled = shutil.copytree(numba.config.CACHE_DIR, tmp_path / "compiled")
    for path in compiled.rglob(f"gelu*.{suffix}"):
        content = path.read_bytes()
        path.write_bytes(
            {"cut": content[: len(content) // 2], "empty": b"", "garbage": random.Random(0).randbytes(999)}[damage]
        )
    arguments = (*QUICK, "--data", text, "--steps", 1, "--device", "cpu", "--out", "run")
    process = run("train", *arguments, cwd=tmp_path, env=environment(NUMBA_CACHE_DIR=str(compiled)))
    assert f"error: {compiled}: the compiled functions there cannot be used" in error_line(
        process.returncode, process.stderr
    )
    assert not (tmp_path / "run").exists()


def test_a_cache_on_a_disk_that_is_read_only(text, tmp_path):
    unshare = ["unshare", "--mount", "--map-root-user"]  # the file system goes when the process does
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("cannot make a file system here")
    (tmp_path / "cache").mkdir()
    mount = 'mount -t tmpfs none cache && mount -o remount,ro cache || exit 32; exec "$@"'
    arguments = command("train", *QUICK, "--data", text, "--out", "run")
    process = subprocess.run(
        [*unshare, "sh", "-c", mount, "sh", *arguments],
        capture_output=True,
        encoding="utf-8",
        env=environment(LLM_NUMBA_CACHE=str(tmp_path / "cache")),
        cwd=tmp_path,
    )
    if process.returncode == 32:
        pytest.skip("cannot mount a file system here")
    assert "set LLM_NUMBA_CACHE to a writable folder" in error_line(process.returncode, process.stderr)
