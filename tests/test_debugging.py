"""Stepping through a training step: plain Python in place of compiled code, in a debugger, and nothing else changed."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from programs import (
    QUICK,
    ROOT,
    cache,  # noqa: F401
    environment,
    losses_of,
    refused,
    rows_of,
    run,
    run_here,
    write_text,
)

from llm_numba.ops import BACKEND, CONTRACT, WRITES
from llm_numba.training import checkpoint

pytestmark = pytest.mark.compiled
SMALL = (*QUICK, "--sequence-length", 8, "--batch-size", 1, "--steps", 3, "--sample-tokens", 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 100)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, text):
    """Three compiled steps."""
    folder = tmp_path_factory.mktemp("compiled") / "run"
    run_here(*SMALL, "--data", text, "--out", folder)
    return folder


@pytest.fixture
def as_compiled():
    """Puts back what --interpret replaces in the modules of the ops."""
    modules = [importlib.import_module(f"llm_numba.cpu.{file}") for file in CONTRACT | BACKEND]
    before = [dict(vars(module)) for module in modules]
    yield
    for module, names in zip(modules, before, strict=True):
        vars(module).update(names)


def assert_same_losses(folder, other):
    """Three steps, in which sums of at most some hundred float32 may differ in their order."""
    for kind in ("loss", "norm"):
        values = [[row[kind] for row in rows_of(f)] for f in (folder, other)]
        assert len(values[0]) == 3
        np.testing.assert_allclose(*values, rtol=2e-6 if kind == "loss" else 1e-5)


def pdb_session(tmp_path, text, *commands):
    flags = [part for command in commands for part in ("-c", command)]
    program = ["-m", "llm_numba.train", *map(str, SMALL), "--data", text, "--interpret", "layernorm"]
    return subprocess.run(
        [sys.executable, "-m", "pdb", *flags, *program],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def test_a_breakpoint_inside_an_op(tmp_path, text):
    """Where a row's averages are known, in the first backward: of the last LayerNorm, which has (1, 8) rows."""
    source = (ROOT / "llm_numba" / "cpu" / "layernorm.py").read_text().splitlines()
    line = 1 + next(i for i, code in enumerate(source) if "dnorm_average =" in code)
    session = pdb_session(
        tmp_path,
        text,
        f"b llm_numba/cpu/layernorm.py:{line}",
        "c",
        "p 'here', mean.shape, rstd.dtype, weight.tolist() == [1.0] * 16",
        "p 'rows', float(abs(((inp - mean[..., None]) * rstd[..., None]).mean(-1)).max()) < 1e-6",
        "n",
        "p 'average', abs(float(dnorm_average) - float((weight * dy).mean())) < 1e-6",
        "w",
        "q",
    )
    out = session.stdout
    assert f"Breakpoint 1 at {ROOT / 'llm_numba' / 'cpu' / 'layernorm.py'}:{line}" in out, out + session.stderr
    assert "('here', (1, 8), dtype('float32'), True)" in out
    assert "('rows', True)" in out and "('average', True)" in out
    for frame in (
        "step()",
        "gradients(ops, model, m)",
        "backward(ops, m, accumulate=i > 0)",
        "layernorm_backward()",
    ):
        assert frame in out  # all of it can be read from there
    assert "step 1/3" not in out and "Traceback" not in out + session.stderr


def test_all_else_stays_compiled():
    code = "from llm_numba.ops import get_ops; ops = vars(get_ops('cpu', interpret={})); "
    code += "print(*[name for name, op in ops.items() if hasattr(op, 'py_func')])"
    before, after = (
        subprocess.check_output([sys.executable, "-c", code.format(names)], env=environment(), text=True).split()
        for names in ((), ("layernorm", "gelu_backward"))
    )
    assert set(before) - set(after) == {"layernorm_forward", "layernorm_backward", "gelu_backward"}
    assert "gelu_forward" in after


@pytest.mark.parametrize("name", [*CONTRACT, *WRITES])
def test_each_layer_and_each_op_interpreted(compiled, as_compiled, text, tmp_path, capsys, name):
    run_here(*SMALL, "--data", text, "--interpret", name, "--out", tmp_path / "run")
    assert_same_losses(tmp_path / "run", compiled)


def test_two_layers_at_once(compiled, as_compiled, text, tmp_path, capsys):
    run_here(*SMALL, "--data", text, "--interpret", "gelu", "adamw_update", "--out", tmp_path / "run")
    assert_same_losses(tmp_path / "run", compiled)


def test_nothing_compiled(compiled, text, tmp_path):
    """A step of one sequence of 8 tokens takes well under a second (here: the quickest of three in a busy machine)."""
    nothing = environment(NUMBA_CACHE_DIR=str(tmp_path / "compiled"))
    process = run("train", *SMALL, "--data", text, "--no-jit", "--out", "run", cwd=tmp_path, env=nothing)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert_same_losses(tmp_path / "run", compiled)
    assert not (tmp_path / "compiled").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert min(row["ms"] for row in rows if "ms" in row) < 1000
    assert all(row["share_of_peak"] is None for row in rows if "ms" in row)


@pytest.mark.parametrize("flags", [("--interpret", "layernorm"), ("--check-finite",)])
def test_for_one_start_only(compiled, as_compiled, text, tmp_path, capsys, flags):
    """A run that goes on does not inherit the flag, and may be given it."""
    run_here(*SMALL, "--data", text, "--steps", 1, *flags, "--out", tmp_path / "run")
    state = checkpoint.load(checkpoint.newest(tmp_path / "run"))[1]
    assert state["settings"][flags[0][2:].replace("-", "_")]
    run_here("--resume", tmp_path / "run", "--steps", 2)
    state = checkpoint.load(checkpoint.newest(tmp_path / "run"))[1]
    assert not state["settings"][flags[0][2:].replace("-", "_")]
    run_here("--resume", tmp_path / "run", "--steps", 3, *flags, "--device", "cpu")
    assert len(losses_of(tmp_path / "run")) == 3


# ---------------------------------------------------------------------------------------------------------------------
# --check-finite


def test_looking_for_what_is_not_finite_changes_nothing(compiled, text, tmp_path, capsys):
    run_here(*SMALL, "--data", text, "--check-finite", "--out", tmp_path / "run")
    assert rows_of(tmp_path / "run") == rows_of(compiled)
    for key in checkpoint.load(checkpoint.newest(compiled))[0]:
        tensors = [checkpoint.load(checkpoint.newest(folder))[0][key] for folder in (compiled, tmp_path / "run")]
        assert tensors[0].tobytes() == tensors[1].tobytes()


@pytest.mark.parametrize(
    "name, index, value, found",
    [
        ("fcw", (1, 5, 3), np.nan, "layer 1 fch[0, 0, 5] is nan after matmul_gelu_forward"),
        ("qkvb", (0, 47), np.inf, "layer 0 qkv[0, 0, 47] is inf after matmul_forward"),
        ("ln2b", (1, 2), -np.inf, "layer 1 ln2[0, 0, 2] is -inf after residual_layernorm_forward"),
        ("wpe", (3, 7), np.nan, "encoded[0, 3, 7] is nan after encoder_forward"),
        ("lnfw", (4,), np.inf, "lnf[0, 0, 4] is"),
        ("attprojw", (0, 9, 0), np.nan, "layer 0 attproj[0, 0, 9] is nan after matmul_forward"),
        ("fcprojb", (1, 0), np.nan, "layer 1 fcproj[0, 0, 0] is nan after matmul_forward"),
        ("wte", (200, 1), np.nan, "logits[0, 0, 200] is nan after matmul_forward"),
        ("m.qkvw", (1, 4, 2), np.nan, "qkvw[1, 4, 2] is nan after adamw_update"),
    ],
)
def test_the_first_value_that_is_not_finite(text, tmp_path, capfd, name, index, value, found):
    """A fault planted in a checkpoint: its step, layer, tensor, index, and the op that made it."""
    run_here(*SMALL, "--data", text, "--steps", 2, "--out", tmp_path / "run")
    path = checkpoint.newest(tmp_path / "run")
    tensors, state, tokenizer = checkpoint.load(path)
    tensors[name][index] = value
    checkpoint.save(path, tensors, state, tokenizer)
    line = refused(capfd, "--resume", tmp_path / "run", "--steps", 4, "--check-finite")
    assert line.startswith(f"error: step 3: {found}"), line
    if not name.startswith("m."):  # which only the step after it would notice
        line = refused(capfd, "--resume", tmp_path / "run", "--steps", 4)
        assert line.startswith("error: step 3: the loss is ") and "--check-finite" in line


def test_a_gradient_that_is_not_finite(text, tmp_path, capfd, monkeypatch):
    """The forward pass is whole; an op of the backward goes wrong."""
    from llm_numba.cpu import gelu

    backward = gelu.gelu_backward

    def gelu_backward(dinp, inp, dout):
        backward(dinp, inp, dout)
        if dinp.shape == (1, 8, 64):  # not while warming up
            dinp[0, 6, 33] = np.inf

    monkeypatch.setattr(gelu, "gelu_backward", gelu_backward)
    line = refused(capfd, *SMALL, "--data", text, "--check-finite", "--device", "cpu", "--out", tmp_path / "run")
    assert "step 1: layer 1 dfch[0, 6, 33] is inf after gelu_matmul_backward" in line
    assert "; 1 of the tensor's 512 elements" in line
