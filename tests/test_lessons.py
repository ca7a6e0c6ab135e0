"""Every lesson runs, its notebook matches the script, its rungs are correct, and its exercises find wrong answers."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from llm_numba.lessons import FOLDER, exercise, notebooks
from llm_numba.lessons.ladder import ladders, rung_files

ROOT = Path(__file__).parents[1]
SECONDS = 40  # CPU time of a lesson at small sizes: 20 s on two cores
TIMEOUT = 1200  # wall-clock seconds
LESSONS = [pytest.param(script, id=script.stem) for script in notebooks.scripts()]
EXERCISES = sorted(file.stem for file in (FOLDER / "exercises").glob("*.py"))
MOST_BYTES = 1_500_000  # per notebook
pytestmark = pytest.mark.compiled


@pytest.fixture(autouse=True)
def simulator():
    from numba import config

    if not config.ENABLE_CUDASIM:
        pytest.skip("the lessons' kernels run in the simulator: --device cpu,cudasim")


@pytest.mark.parametrize("script", LESSONS)
def test_runs_as_a_script(script, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LESSONS_FAST": "1", "NUMBA_NUM_THREADS": "2"}
    environment.pop("NUMBA_ENABLE_CUDASIM")
    before = psutil.Process().cpu_times()
    run = subprocess.run(
        [sys.executable, script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT
    )
    after = psutil.Process().cpu_times()
    assert run.returncode == 0, run.stderr
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < SECONDS, f"it took {seconds:.0f} s of CPU time"
    assert not list(tmp_path.iterdir()), "a lesson must not leave files behind"


@pytest.mark.parametrize("script", LESSONS)
def test_notebook_matches_the_script(script):
    assert notebooks.complaints(script) == []
    text = script.with_suffix(".ipynb").read_text()
    assert len(text) < MOST_BYTES
    for path in (str(ROOT), str(Path.home()) + "/", sys.prefix, "/tmp/", "site-packages"):
        assert path not in text, f"the notebook contains {path}, a path of this machine"


@pytest.mark.parametrize("file", rung_files(), ids=lambda file: file.stem)
def test_ladders_end_with_the_models_own_op(file):
    found = ladders(file)
    assert found, f"{file.name} has no Ladder"
    for ladder in found:
        assert {1, 3, 97, 257} <= {size for sizes in ladder.problem.sizes for size in sizes.values()}, ladder.name
        last = ladder.rungs[-1]
        assert last.__module__.startswith("llm_numba."), f"{ladder.name}: the last rung is {last.__name__}"
        assert bool(ladder.flops) != bool(ladder.nbytes)
        for rung in ladder.rungs[:-1]:
            cache = getattr(getattr(rung, "_cache", None), "_cache_path", None)
            assert cache is None, f"{rung.__name__} is cached, but the file is imported under more than one name"


def answers(name):
    spec = importlib.util.spec_from_file_location(f"answers_{name}", Path(__file__).parent / "exercises" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise_rejects_the_stub_and_accepts_the_solution(name, capsys):
    assert not exercise.check(name)
    assert "the function is unfinished" in capsys.readouterr().out
    assert exercise.check(name, answers(name).solution), capsys.readouterr().out
    assert "correct at all" in capsys.readouterr().out
    exercise.show(name)
    assert exercise.show(name, answers(name).solution).accesses


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise_explains_wrong_answers(name, capsys):
    wrong = answers(name).WRONG
    assert len(wrong) >= 5
    for function, phrases in wrong:
        assert not exercise.check(name, function), f"{function.__name__} is accepted"
        printed = capsys.readouterr().out
        for phrase in phrases:
            assert phrase in printed, f"{function.__name__}: {printed}"


def test_kernels_compile_for_a_gpu():
    """The simulator ignores types, so a kernel may run there and not compile. Needs no GPU."""
    if importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed")
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_rungs.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_ENABLE_CUDASIM": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "layernorm_cuda.py: layernorm_forward_v1: kernel_v1" in run.stdout
