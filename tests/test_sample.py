"""Text from a trained model: what the settings mean, and that it comes as it is made."""

import os
import shutil

import numpy as np
import pytest
from programs import (
    QUICK,
    cache,  # noqa: F401
    command,
    environment,
    files_in,
    refused,
    run,
    run_here,
    started,
)

from llm_numba import sample
from llm_numba.data.shards import write_shard
from llm_numba.training import checkpoint

pytestmark = pytest.mark.compiled
PROMPT = "the cat"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that has some idea of the text, but not so firm a one that every draw is the likeliest."""
    here = tmp_path_factory.mktemp("trained")
    (here / "text.txt").write_text("the cat sat on the mat. the dog ran to the sea. " * 500)
    run_here(*QUICK, "--data", here / "text.txt", "--steps", 90, "--learning-rate", 1e-2, "--out", here / "run")
    return here / "run"


@pytest.fixture
def write(trained, capsys):
    """A function that runs the command and returns what it prints behind the prompt."""

    def call(*arguments, prompt=PROMPT):
        capsys.readouterr()
        run_here(trained, "--prompt", prompt, *arguments, program=sample)
        out = capsys.readouterr().out
        assert out.startswith(prompt) and out.endswith("\n")
        return out[len(prompt) : -1]

    return call


def test_the_seed_decides(write):
    one = write("--length", 40, "--seed", 1)
    assert write("--length", 40, "--seed", 1) == one
    assert write("--length", 40, "--seed", 2) != one
    assert write("--length", 40) == write("--length", 40, "--seed", 42)


def test_greedy_in_every_way(write):
    """Temperature 0; the only one left by top-k or top-p, at any seed and temperature."""
    greedy = write("--temperature", 0, "--length", 60)
    assert write("--top-k", 1, "--temperature", 5, "--length", 60, "--seed", 3) == greedy
    for p in 0, 1e-9:
        assert write("--top-p", p, "--temperature", 1, "--length", 60, "--seed", 4) == greedy
    assert write("--top-p", 1, "--temperature", 1e-3, "--length", 60, "--seed", 5) == greedy
    assert write("--top-p", 1, "--temperature", 5, "--length", 60, "--seed", 6) != greedy


def test_greedy_is_the_likeliest(write, trained, ops):
    """The first letter, by the model run as in training, over the whole prompt at once."""
    from training import new_run

    from llm_numba.models import preset
    from llm_numba.ops import get_ops

    tensors, _, _ = checkpoint.load(checkpoint.newest(trained))
    tokens, backend = [256, *PROMPT.encode()], get_ops("cpu")
    run = new_run(backend, preset("nano"), 1, len(tokens), "keep")
    for name, tensor in run.arena.named("parameters").items():
        tensor[...] = tensors[name]
    m = run.m
    m.tokens[...] = tokens
    run.model.forward(backend, m)
    run.model.logits(backend, m, m)
    assert write("--temperature", 0, "--length", 1) == chr(m.logits[0, -1, :257].argmax())


def test_fewer_choices(write):
    """Of five drafts at a high temperature those with a top-k know fewer letters."""
    wide, narrow = (set(write("--temperature", 9, "--length", 300, "--top-p", 1, "--top-k", k)) for k in (0, 3))
    assert len(narrow) < len(wide) / 2


@pytest.mark.parametrize("length", [1, 3, 97])
def test_the_length(write, length):
    """97 is three times the model's context."""
    text = write("--temperature", 0, "--length", length)
    assert len(text) == length and text.isascii()


@pytest.mark.parametrize("repeats", [1, 3, 30])
def test_a_prompt_of_any_length(write, repeats):
    """Shorter than a chunk of a prompt, longer than one, longer than the context."""
    text = write("--temperature", 0, "--length", 12, prompt="the cat sat " * repeats)
    assert set(text) <= set("the cat sat on the mat. the dog ran to the sea. ")


def test_what_was_learned_comes_back(write):
    """Greedy, over far more than a context: nearly all of it words of the text."""
    words = write("--temperature", 0, "--length", 200, prompt="the ").split()[:-1]
    known = {"the", "cat", "sat", "on", "mat.", "dog", "ran", "to", "sea."}
    assert np.mean([word in known for word in words]) > 0.6


def test_several_texts(trained, capsys):
    run_here(trained, "--number", 3, "--length", 50, "--prompt", PROMPT, program=sample)
    first, *parts = capsys.readouterr().out.split("--- ")
    assert first == "" and [part.splitlines()[0] for part in parts] == ["1 of 3", "2 of 3", "3 of 3"]
    texts = [part.partition("\n")[2] for part in parts]
    assert len(set(texts)) == 3
    run_here(trained, "--length", 50, "--prompt", PROMPT, program=sample)
    assert capsys.readouterr().out == texts[0]


def test_a_checkpoint_file(trained, capsys, write):
    text = write("--length", 20)
    run_here(checkpoint.newest(trained), "--length", 20, "--prompt", PROMPT, program=sample)
    assert capsys.readouterr().out == PROMPT + text + "\n"


def test_without_a_prompt(trained, capsys):
    run_here(trained, "--length", 20, "--temperature", 0, program=sample)
    out = capsys.readouterr().out
    assert len(out) == 21 and set(out[:-1]) <= set("the cat sat on the mat. the dog ran to the sea. ")


@pytest.mark.parametrize("prompt", ["naïve 猫 😀", "<|endoftext|>", "two\nlines", "-"])
def test_any_prompt(write, prompt):
    assert write("--length", 5, prompt=prompt)


def test_a_terminal_without_unicode(trained, tmp_path):
    env = environment(PYTHONIOENCODING="ascii")
    process = run("sample", trained, "--prompt", "naïve 猫", "--length", 5, cwd=tmp_path, env=env)
    assert process.returncode == 0 and process.stdout.startswith(r"na\xefve \u732b"), process.stderr


def test_the_text_comes_as_it_is_made(trained, tmp_path):
    """Read from a pipe: the prompt first, then piece by piece, while the command still runs."""
    arguments = ("--prompt", PROMPT, "--length", 4000, "--temperature", 0)
    with started(command("sample", trained, *arguments), tmp_path) as process:
        pieces = []
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            pieces.append(piece)
            if len(pieces) == 20:
                assert process.poll() is None
        assert process.wait() == 0
    text = b"".join(pieces).decode()
    assert text.startswith(PROMPT) and len(text) == len(PROMPT) + 4000 + 1
    assert len(pieces) > 100 and max(map(len, pieces)) < 1000


def test_the_end_of_a_text_ends_it(trained, tmp_path, capsys):
    """A model that gives the end-of-text token right away."""
    folder = shutil.copytree(trained, tmp_path / "run")
    path = checkpoint.newest(folder)
    tensors, state, tokenizer = checkpoint.load(path)
    tensors["lnfw"][...], tensors["wte"][256] = 0, tensors["lnfb"] * 100
    checkpoint.save(path, tensors, state, tokenizer)
    run_here(folder, "--prompt", PROMPT, "--temperature", 0, program=sample)
    assert capsys.readouterr().out == PROMPT + "\n"


def test_a_model_that_is_broken(trained, tmp_path, capfd):
    folder = shutil.copytree(trained, tmp_path / "run")
    path = checkpoint.newest(folder)
    tensors, state, tokenizer = checkpoint.load(path)
    tensors["wte"][3, 5] = np.nan
    checkpoint.save(path, tensors, state, tokenizer)
    for temperature in 0, 1:
        assert "not finite" in refused(capfd, folder, "--temperature", temperature, program=sample)


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--length", 0], ["--length 0"]),
        (["--length", "x"], ["--length", "x"]),
        (["--number", 0], ["--number 0"]),
        (["--temperature", -0.1], ["--temperature -0.1"]),
        (["--temperature", "nan"], ["--temperature nan"]),
        (["--top-k", -1], ["--top-k -1"]),
        (["--top-p", 1.1], ["--top-p 1.1"]),
        (["--seed", -1], ["--seed -1"]),
        (["--threads", 100_000], ["--threads 100000"]),
        (["--threads", -1], ["--threads -1"]),
        (["--what"], ["--what"]),
        (["more"], ["more"]),
    ],
)
def test_bad_flags(trained, capfd, arguments, names):
    before = files_in(trained)
    line = refused(capfd, trained, *arguments, program=sample)
    assert all(name in line for name in names), line
    assert files_in(trained) == before


def test_no_run(tmp_path, capfd):
    (tmp_path / "text").write_text("no checkpoint")
    assert "run" in refused(capfd, program=sample)
    for name in "absent", "", "text":
        assert str(tmp_path / name) in refused(capfd, tmp_path / name, program=sample)


def test_tokens_without_text(tmp_path, capfd):
    write_shard(tmp_path / "a.bin", (np.arange(2000) % 97).astype(np.uint16))
    arguments = ("--tokenizer", "none", "--vocab-size", 97, "--steps", 1, "--out", tmp_path / "run")
    run_here(*QUICK, "--data", tmp_path / "a.bin", *arguments)
    line = refused(capfd, tmp_path / "run", program=sample)
    assert str(tmp_path / "run") in line and "--tokenizer none" in line
