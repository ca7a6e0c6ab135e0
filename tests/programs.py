"""Run the commands: in this process where that gives the same result, else in a subprocess."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numba
import pytest

from llm_numba import train
from llm_numba.cpu import jit  # noqa: F401  chooses Numba's cache folder
from llm_numba.training import checkpoint
from llm_numba.util.cli import exit_with

ROOT = Path(__file__).parents[1]
DEVICE = os.environ["DEVICE_OF_PROGRAMS"]  # chosen by conftest.py
PACKAGE = "cpu" if DEVICE == "cpu" else "cuda"  # of llm_numba
TIMES = ("ms", "tokens_per_second", "share_of_peak")  # differ between two equal runs
QUICK = ("--preset", "nano", "--batch-size", 8, "--sequence-length", 32, "--val-batches", 1, "--sample-tokens", 4)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A folder for tokenised text. Compiled functions stay in Numba's folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_NUMBA_CACHE", str(folder))
        yield folder
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def write_text(path, sentences=1500):
    """Write a text of short words in an unpredictable order; return the path as a str."""
    words = "the cat sat on a mat and saw one dog run far off to big old red sea ".split()
    text = " ".join(words[i * i * 7919 % 104729 % len(words)] for i in range(10 * sentences))
    Path(path).write_text(text)
    return str(path)


def with_device(name, arguments):
    """The arguments, with the tested device if the program has that flag and they do not set it."""
    arguments = [str(argument) for argument in arguments]
    decided = {"--device", "--no-jit", "--interpret", "--help"} & set(arguments)
    return arguments if decided or name not in ("train", "sample", "inspect") else [*arguments, "--device", DEVICE]


def run_here(*arguments, program=train):
    """Run the command in this process; return what its `main` returns."""
    return program.main(with_device(program.__name__.rpartition(".")[2], arguments))


def environment(**changes):
    """The environment of a user, with the caches of these tests; None removes a variable."""
    unset = dict.fromkeys(("NUMBA_NUM_THREADS", "PYTHONUNBUFFERED"))  # set by the tests, or by the user who runs them
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ours = {**os.environ, **unset, "PYTHONPATH": path, "NUMBA_CACHE_DIR": numba.config.CACHE_DIR, **changes}
    return {name: value for name, value in ours.items() if value is not None}


def command(name, *arguments):
    return [sys.executable, "-m", "llm_numba", name, *with_device(name, arguments)]


def run(name, *arguments, cwd, **options):
    """Run `llm-numba NAME ARGUMENTS` to its end."""
    options = {
        "env": environment(),
        "capture_output": True,
        "text": True,
        "encoding": "utf-8",
        "timeout": 300,
    } | options
    return subprocess.run(command(name, *arguments), cwd=cwd, **options)


@contextlib.contextmanager
def started(command, cwd, **options):
    """A running process, which is killed at the end of the block."""
    options = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    if os.name != "nt":  # a background job of a script ignores SIGINT, and so would its children
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=cwd, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(true, process, seconds=120):
    """Poll until `true()`; False if the process ends before."""
    deadline = time.monotonic() + seconds
    while not true():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "nothing happened"
    return True


def error_line(status, stderr):
    """The error of a command that failed: one line after any notes, and exit status 2."""
    assert status == 2, stderr
    stderr = "".join(line for line in stderr.splitlines(True) if not line.startswith("note: "))
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    return stderr


def refused(capfd, *arguments, program=train):
    """Run a command in this process that must fail with a UserError; return the line it prints."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        exit_with(lambda: run_here(*arguments, program=program))
    return error_line(stopped.value.code, capfd.readouterr().err)


def rows_of(folder, key="loss"):
    """The rows of log.jsonl that have `key`, without times."""
    rows = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows if key in row]


def losses_of(folder):
    return [row["loss"] for row in rows_of(folder)]


def rows_written(folder):
    """How many steps a run has logged so far."""
    path = Path(folder) / "log.jsonl"
    return path.read_bytes().count(b'"norm_z"') if path.exists() else 0


def content_of(path):
    """(tensors' bytes, state, tokenizer) of a checkpoint or of a run's newest, without settings that a resumed run may
    change."""
    path = checkpoint.newest(path) if Path(path).is_dir() else path
    tensors, state, tokenizer = checkpoint.load(path)
    for name in ("out", "resume", "threads", "checkpoint_every", "keep", "keep_every", "steps", "check_finite"):
        del state["settings"][name]
    return {name: (t.shape, t.tobytes()) for name, t in tensors.items()}, state, tokenizer


def files_in(folder):
    """{path: content} of everything in a folder."""
    paths = sorted(Path(folder).rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def steps_of(folder):
    """The steps of a run's checkpoints."""
    return sorted(int(p.stem[5:]) for p in (Path(folder) / "checkpoints").glob("step_*.safetensors"))
