"""--use: a function in place of an op, and how the run compares the two."""

import re
import subprocess
import sys

import numpy as np
import pytest
from programs import PACKAGE, QUICK, ROOT, cache, environment, losses_of, refused, run_here, write_text  # noqa: F401

from llm_numba.ops import get_ops
from llm_numba.training.override import override, split
from llm_numba.util.cli import UserError

pytestmark = pytest.mark.compiled
SMALL = (*QUICK, "--sequence-length", 8, "--batch-size", 2, "--tokens-per-step", 32, "--steps", 3, "--sample-tokens", 2)
NAIVE = "llm_numba.cpu.naive"
RUNGS = ROOT / "lessons" / "rungs"
NAIVE_OPS = {  # op -> MODULE:NAME, for the tested device: CPU functions do not take arrays of a GPU
    "cpu": {
        op: f"{NAIVE}:{op}" for op in ("matmul_forward", "matmul_backward", "attention_forward", "attention_backward")
    },
    "cuda": {
        "matmul_forward": f"{RUNGS / 'matmul_cuda.py'}:matmul_forward_v1",
        "attention_forward": f"{RUNGS / 'attention_cuda.py'}:attention_forward_v1",
    },
}[PACKAGE]
OWN = {
    "cpu": """
from llm_numba.cpu.matmul import matmul_gelu_forward as right

def own(out, pre, inp, weight, bias, scratch):
    right(out, pre, inp, weight, bias, scratch)
    out *= {factor}
""",
    "cuda": """
from numba import cuda, float32
from llm_numba.cuda.matmul import matmul_gelu_forward as right
from llm_numba.cuda.jit import blocks_for, stream

@cuda.jit
def scale(x):
    i = cuda.grid(1)
    if i < x.shape[0]:
        x[i] *= float32({factor})

def own(out, pre, inp, weight, bias, scratch):
    right(out, pre, inp, weight, bias, scratch)
    scale[blocks_for(out.size, 256), 256, stream()](out.reshape(-1))
""",
}[PACKAGE]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 100)


@pytest.fixture(scope="module")
def usual(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("usual") / "run"
    run_here(*SMALL, "--data", text, "--out", folder)
    return folder


def comparisons(folder):
    """(value of --use, its milliseconds, the op's, the difference) of each line in the log."""
    pattern = (
        r"--use (\S+): (\S+) ms a step \(\S+ to \S+\), production \w+ (\S+) ms \(\S+ to \S+\), medians of 5; largest "
        r"difference (\S+) of"
    )
    return [(v, *map(float, rest)) for v, *rest in re.findall(pattern, (folder / "train.log").read_text())]


def test_naive_ops_train_like_the_fast_ones(tmp_path, text, usual):
    values = [f"{op}={place}" for op, place in NAIVE_OPS.items()]
    run_here(*SMALL, "--data", text, "--out", tmp_path / "run", "--use", *values)
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(usual), rtol=2e-6)
    lines = comparisons(tmp_path / "run")
    assert [line[0] for line in lines] == values
    assert all(mine > 0 and theirs > 0 for _, mine, theirs, _ in lines)
    assert all(off < 2e-6 for *_, off in lines)  # sums of at most some hundred float32, in another order


@pytest.mark.parametrize("factor, off", [(1.02, 0.02), (1.0, 0.0)])
def test_a_file_of_one_s_own_and_how_wrong_it_is(tmp_path, text, usual, factor, off):
    own = tmp_path / "own.py"
    own.write_text(OWN.format(factor=factor))
    run_here(*SMALL, "--data", text, "--out", tmp_path / "run", "--use", f"matmul_gelu_forward={own}:own")
    ((_, _, _, difference),) = comparisons(tmp_path / "run")
    assert difference == pytest.approx(off, rel=1e-3)
    pairs = zip(losses_of(tmp_path / "run"), losses_of(usual), strict=True)
    assert all((mine == theirs) == (off == 0) for mine, theirs in pairs)


def test_stepping_through_an_overridden_op():
    ops = get_ops("cpu")
    value = f"matmul_forward={NAIVE}:matmul_forward"
    assert hasattr(override(ops, [value]).matmul_forward, "py_func")
    for name in "matmul", "matmul_forward":
        assert not hasattr(override(ops, [value], [name]).matmul_forward, "py_func")
    assert override(ops, [value]).matmul_backward is ops.matmul_backward


@pytest.mark.parametrize(
    "value, words",
    [
        ("matmul_forward", ["expected OP=MODULE:NAME"]),
        ("matmul_forward=v3", ["expected OP=MODULE:NAME"]),
        ("gelu_forward=README.md:f", ["README.md is not a .py file"]),
        ("matmul_foward=a:b", ["no op matmul_foward", "did you mean matmul_forward?"]),
        ("matmul_forward=nowhere.at_all:v1", ["nowhere.at_all cannot be loaded", "No module named"]),
        ("matmul_forward=missing.py:v1", ["missing.py cannot be loaded", "No such file"]),
        (f"matmul_forward={NAIVE}:v9", [f"{NAIVE} has no function v9"]),
        (f"gelu_forward={NAIVE}:matmul_forward", ["parameters of gelu_forward (out, inp)", "it has out, inp, weight"]),
    ],
)
def test_errors(capfd, tmp_path, text, value, words):
    line = refused(capfd, *SMALL, "--data", text, "--out", tmp_path / "run", "--use", value)
    assert f"--use {value}: " in line and all(word in line for word in words)
    assert not (tmp_path / "run").exists()


def test_a_file_that_raises(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("1 / 0")
    with pytest.raises(UserError, match=r"own\.py cannot be loaded \(ZeroDivisionError: division by zero\)"):
        override(get_ops("cpu"), [f"gelu_forward={own}:own"])


def test_windows_paths_keep_their_colon():
    assert split(r"gelu_forward=C:\own.py:f") == ("gelu_forward", r"C:\own.py", "f")


def test_a_cached_function_of_ones_own_is_found_again(tmp_path):
    """Numba reads it from disk in the second process, and with it the module's name."""
    file = tmp_path / "own.py"
    file.write_text("from numba import njit\n@njit(cache=True, parallel=True)\ndef own(x):\n    return x + 1\n")
    code = "from llm_numba.training.override import load; "
    code += f"f = load({str(file)!r}, '').own; print(f(1), len(f._cache_hits))"
    for hits in (0, 1):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(NUMBA_CACHE_DIR=str(tmp_path / "cache")),
            capture_output=True,
            text=True,
        )
        assert run.stdout.split() == ["2", str(hits)], run.stderr


def test_an_op_outside_of_forward_and_backward_is_not_compared(tmp_path, text):
    use = f"adamw_update=llm_numba.{PACKAGE}.adamw:adamw_update"
    run_here(*SMALL, "--data", text, "--out", tmp_path / "run", "--use", use)
    line = f"--use {use}: used, but not compared: forward and backward do not call adamw_update"
    assert line in (tmp_path / "run" / "train.log").read_text()
