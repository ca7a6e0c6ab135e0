"""A model that the package does not know: planned, trained, saved, resumed, sampled, inspected and compared."""

import pytest
from programs import DEVICE, cache, content_of, losses_of, refused, run_here, write_text  # noqa: F401
from toy_model import Toy

from llm_numba import eval as evaluation
from llm_numba import sample
from llm_numba.debug import diff, inspect
from llm_numba.models import MODELS

pytestmark = pytest.mark.compiled
FLAGS = ("--preset", "toy", "--tokenizer", "bytes", "--batch-size", 2, "--sequence-length", 8, "--val-batches", 1,
         "--sample-tokens", 4, "--learning-rate", 0.01)  # fmt: skip


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(MODELS, "toy", Toy)


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt", 200)


def test_plan_memory(capsys):
    run_here(*FLAGS, "--plan-memory")
    printed = capsys.readouterr().out
    assert "hidden             2 x 2 x 8 x 24" in printed and "shares dactive" in printed and "it fits" in printed


SIMULATED = [pytest.param("cudasim", marks=pytest.mark.slow)]


@pytest.mark.parametrize("where", [DEVICE, *(SIMULATED if DEVICE == "cpu" else ())])
def test_a_resumed_run_is_the_same_bit_for_bit(text, tmp_path, capsys, where):
    steps, half = (40, 20) if where != "cudasim" else (2, 1)
    flags = (*FLAGS, "--data", text, "--device", where)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_here(*flags, "--steps", steps, "--schedule", "constant", "--out", whole)
    run_here(*flags, "--steps", half, "--schedule", "constant", "--out", resumed)
    run_here("--resume", resumed, "--steps", steps, "--device", where)
    assert content_of(whole)[0] == content_of(resumed)[0]
    assert losses_of(whole) == losses_of(resumed)
    if where != "cudasim":
        assert losses_of(whole)[-1] < 0.8 * losses_of(whole)[0]  # it learns

        capsys.readouterr()
        run_here(whole, "--length", 5, program=sample)
        assert capsys.readouterr().out
        run_here(whole, program=evaluation)
        assert "perplexity" in capsys.readouterr().out
        run_here(whole, "--save", f"1.hidden={tmp_path / 'hidden.npy'}", program=inspect)
        printed = capsys.readouterr().out
        assert "1.dhidden" in printed and "dhead" in printed and (tmp_path / "hidden.npy").exists()


def test_diff(text, capsys):
    devices = ("cpu", "cudasim") if DEVICE == "cpu" else ("cpu", DEVICE)
    assert run_here("--preset", "toy", "--sequence-length", 4, "--devices", *devices, program=diff) == 0
    assert "agree: both are within rounding" in capsys.readouterr().out


def test_a_size_that_the_model_does_not_have(capfd):
    assert "--preset toy: a toy model has no num_heads\n" in refused(capfd, *FLAGS, "--heads", 2)
