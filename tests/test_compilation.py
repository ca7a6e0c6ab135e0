"""Compiled functions: the same bits when read back from disk, and no stale code when a source file changes."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_numba.models import preset
from llm_numba.ops import CONTRACT, get_ops
from llm_numba.training import precompile
from llm_numba.training.settings import Settings
from llm_numba.util import cache

pytestmark = pytest.mark.compiled
HERE = Path(__file__).parent
SCRIPT = """
import hashlib, sys
sys.path[:0] = {paths!r}
import numpy as np
from training import new_run, random_batch, random_parameters, set_parameters, train_step
from llm_numba.models.gpt2 import GPT2
from llm_numba.ops import get_ops

model, rng = GPT2(130, 97, 1, 2, 130), np.random.default_rng(7)
run = new_run(get_ops("cpu"), model, 2, 130, "keep")
set_parameters(run.arena, random_parameters(model, rng))
train_step(run, random_batch(model, 2, 130, rng))
run.m.scratch.fill(0)
print(hashlib.sha256(run.arena.memory).hexdigest())
"""


def output(script, **environment):
    command = [sys.executable, "-P", "-c", script]
    return subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_compiled_and_read_back_give_the_same_bits(tmp_path):
    """LLVM sees a parallel loop in two forms, and once optimised them differently where it could reorder sums."""
    script = SCRIPT.format(paths=[str(HERE), str(HERE.parent)])
    digests = [output(script, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert digests[0] == digests[1]


def test_starting_the_threads_does_not_count_as_a_compiled_op(tmp_path):
    script = """if True:
        import numpy as np
        from llm_numba.ops import get_ops
        ops = get_ops("cpu")
        ops.set_threads(0)
        found = [bool(ops.shares())]
        ops.residual_backward(np.zeros((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32))
        print(*found, bool(ops.shares()))
    """
    assert output(script, NUMBA_CACHE_DIR=str(tmp_path), PYTHONPATH=str(HERE.parent)).split() == ["True", "False"]


def test_other_processes_compile_what_this_one_leaves(monkeypatch):
    started, done = [], []

    class Other:
        def __init__(self, command, **_):
            started.append(command[3:])

        def wait(self):
            done.append("waited")

        def kill(self):
            pass

    monkeypatch.setattr(precompile.subprocess, "Popen", Other)
    ops = get_ops("cpu").replace(shares=lambda: [{"attention"}, {"matmul_forward"}])
    ops = ops.wrap(lambda name, op: lambda *arguments: done.append(name) or op(*arguments))
    precompile.precompile(ops, preset("nano"), Settings(preset="nano", device="cpu"))
    assert [names for _, *names in started] == [list(CONTRACT["attention"]), ["matmul_forward"]]
    before, after = set(done[: done.index("waited")]), set(done[done.index("waited") :])
    left = {"attention_forward", "attention_backward", "attention_cached_forward", "matmul_forward"}
    assert not left & before and "matmul_backward" in before and left <= after
    precompile.compile_share(started[1][0], "matmul_forward")  # with what the other process is given


OP = """
from numba import njit
from llm_numba.cpu import jit
from llm_numba.models.new.helper import factor

@njit(cache=True)
def op():
    return factor()
"""
HELPER = """
from numba import njit

@njit(inline="always")
def factor():
    return {}
"""


def test_a_changed_file_in_a_subfolder_runs_no_stale_code(tmp_path):
    """Numba alone would not notice: the op's own file stays as it is."""
    package = tmp_path / "llm_numba"
    shutil.copytree(HERE.parent / "llm_numba", package, ignore=shutil.ignore_patterns("__pycache__"))
    helper = package / "models" / "new" / "helper.py"
    helper.parent.mkdir()
    (package / "cpu" / "added.py").write_text(OP)
    script = "from llm_numba.cpu.added import op; print(op(), sum(op.stats.cache_hits.values()))"
    environment = dict(PYTHONPATH=str(tmp_path), LLM_NUMBA_CACHE=str(tmp_path / "cache"), NUMBA_CACHE_DIR="")
    for value, from_disk in ((2, 0), (2, 1), (3, 0)):
        helper.write_text(HELPER.format(value))
        assert output(script, **environment).split() == [str(value), str(from_disk)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_NUMBA_CACHE", str(tmp_path))
    return tmp_path


def test_compiled_code_that_was_not_used_for_a_month_is_deleted(folder):
    ages = {"numba-of-last-year": 365, "numba-of-last-month": 31, "numba-of-last-week": 7, "tokens-of-last-year": 365}
    for name, days in ages.items():
        (folder / name / "cpu").mkdir(parents=True)
        os.utime(folder / name, (time.time() - days * 24 * 3600,) * 2)
    mine = cache.compiled_code_folder()
    left = {path.name for path in folder.iterdir()}
    assert left == {mine.name, "numba-of-last-week", "tokens-of-last-year"}


def test_each_use_counts(folder):
    mine = cache.compiled_code_folder()
    os.utime(mine, (0, 0))
    assert cache.compiled_code_folder() == mine
    assert time.time() - mine.stat().st_mtime < 3600
