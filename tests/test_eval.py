"""Evaluation: against losses that PyTorch computes, one ending at a time, and on known answers."""

import json
import math
import os
from dataclasses import asdict

import numpy as np
import pytest
from programs import (
    DEVICE,
    QUICK,
    cache,  # noqa: F401
    environment,
    error_line,
    refused,
    rows_of,
    run,
    run_here,
)
from training import random_parameters

from llm_numba import eval as evaluation
from llm_numba.arena import DTYPES, layout
from llm_numba.data import corpus as data
from llm_numba.data import hellaswag
from llm_numba.data.shards import write_shard
from llm_numba.data.tokenizer import load_tokenizer, tokenizer_state
from llm_numba.models import preset
from llm_numba.ops import get_ops
from llm_numba.training import checkpoint
from llm_numba.training.checkpoint import open_checkpoint
from llm_numba.training.settings import Settings, to_record

pytestmark = pytest.mark.compiled
NANO = preset("nano")
BYTES = load_tokenizer("bytes", (), None)
WORDS = "the cat sat on a mat and saw one dog run far off to big old red sea".split()
SENTENCES = "a cat sat on the mat. the dog ran to the sea. yes! "  # 51 letters, of which no window knows its place
LEARN = (*QUICK, "--steps", 300, "--learning-rate", 1e-2, "--checkpoint-every", 0)
# float32 against float64: a loss is around 6, of sums of 16 terms and logits that deviate by 3; measured 4e-6
TOLERANCE = 3e-5


def write_examples(path, examples):
    path.write_text("\n".join(json.dumps(dict(zip(("ctx", "endings", "label"), e, strict=True))) for e in examples))
    return str(path)


def some_examples(rng, count, words=6):
    """Contexts and endings of random words and lengths; no two endings are the same."""

    def text(most):
        return " ".join(rng.choice(WORDS, rng.integers(1, most + 1)))

    return [(text(words), [f"{text(3)} {last}" for last in "abcd"], int(rng.integers(4))) for _ in range(count)]


def write_checkpoint(folder, model, parameters, encoding=BYTES, **changes):
    """A run folder with a checkpoint of these parameters."""
    tensors = {}
    for spec in model.parameters():
        layers = (model.num_layers,) if spec.per_layer else ()
        for name in spec.name, f"m.{spec.name}", f"v.{spec.name}":
            tensors[name] = np.zeros((*layers, *spec.shape), np.float32)
        tensors[spec.name][tuple(map(slice, parameters[spec.name].shape))] = parameters[spec.name]
    s = Settings(preset="nano", **changes)
    record = {"settings": to_record(s), "config": asdict(model), "step": 7, "data": [], "loader": {}}
    record |= {"loss_history": [], "norm_history": []}
    path = checkpoint.checkpoint_path(folder, 7)
    checkpoint.save(path, tensors, record, tokenizer_state(encoding) if encoding else None)
    return folder


@pytest.fixture(scope="module")
def parameters():
    return random_parameters(NANO, np.random.default_rng(1))


@pytest.fixture
def folder(tmp_path, parameters):
    return write_checkpoint(tmp_path / "run", NANO, parameters)


def by_torch(parameters, tokens):
    """The loss of each token but the first, by a model that sees nothing else, in float64."""
    torch = pytest.importorskip("torch")
    from torch_gpt2 import forward, leaves

    ids = torch.tensor(np.array([tokens]), dtype=torch.long)
    logits = forward(leaves(parameters), ids[:, :-1], NANO.num_heads, lambda name, layer, x: x)
    return torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none").detach().numpy()


def evaluate(*arguments, capsys):
    capsys.readouterr()
    run_here(*arguments, "--device", DEVICE, "--json", program=evaluation)
    out, err = capsys.readouterr()
    return json.loads(out), err


# --- HellaSwag


@pytest.mark.parametrize(("T", "words"), [(32, 6), (32, 1), (5, 6)], ids=["some are cut", "none is cut", "endings too"])
def test_hellaswag_is_what_pytorch_says(tmp_path, capsys, rng, parameters, T, words):
    """The losses of each ending, whatever the batch; and both accuracies through the command."""
    examples = some_examples(rng, 25, words) if words > 1 else [(c[:3], e, n) for c, e, n in some_examples(rng, 25, 1)]
    file, ops = write_examples(tmp_path / "h.jsonl", examples), get_ops("cpu")
    folder = write_checkpoint(tmp_path / "run", NANO, parameters, sequence_length=T)
    sums, means, cut = np.empty((25, 4)), np.empty((25, 4)), 0
    for i, (beginning, endings, _) in enumerate(examples):
        for j, ending in enumerate(endings):
            tokens, n = list(f"{beginning} {ending}".encode()), 1 + len(ending)
            cut += len(tokens) > T + 1
            losses = by_torch(parameters, tokens[-(T + 1) :])[-n:]
            sums[i, j], means[i, j] = losses.sum(), losses.mean()

    trained = open_checkpoint(folder)
    read, note = hellaswag.read_examples(file, trained.encoding, T, 0, "--data")
    assert (f"{cut} of 100 contexts with endings are longer than {T} tokens" in note) if cut else note is None
    assert (cut > 0) == (words > 1)
    for B in 1, 7, 100:
        found = hellaswag.losses_of(read, evaluation.on_device(trained, B, T, ops, "float32"), B, T)
        np.testing.assert_allclose(found[1], means, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(found[0], sums, rtol=0, atol=TOLERANCE * 16)

    labels = np.array([label for *_, label in examples])
    for losses in sums, means:  # no tie that rounding could decide
        assert np.diff(np.sort(losses), axis=1)[:, 0].min() > 2e-3 or T == 5
    results, err = evaluate(folder, "--task", "hellaswag", "--data", file, capsys=capsys)
    assert err.count("note: ") == bool(cut)
    if T == 32:
        assert results["acc"] == np.mean(sums.argmin(1) == labels) and results["examples"] == 25
        assert results["acc_norm"] == np.mean(means.argmin(1) == labels) != results["acc"]


def test_scores():
    """By hand: the sum prefers short endings, the mean does not; of equal ones the first wins."""
    sums = np.array([[2.0, 3.0, 9.0, 9.0], [4.0, 4.0, 4.0, 4.0], [9.0, 8.0, 7.0, 6.0]])
    means = np.array([[2.0, 1.0, 3.0, 3.0], [4.0, 4.0, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    assert hellaswag.score(sums, means, np.array([0, 0, 3])) == (0.0, 1.0, 3)
    assert hellaswag.score(sums, means, np.array([1, 2, 3])) == (2 / 3, 1 / 3, 3)
    assert str(hellaswag.score(sums, means, np.array([1, 2, 3]))) == "acc_norm 0.6667, acc 0.3333 over 3 examples"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that knows its text, and a file of questions on it, all answered right."""
    here = tmp_path_factory.mktemp("trained")
    (here / "text.txt").write_text(SENTENCES * 500)
    questions = [
        ("a cat sat on", ["the mat.", "the sea.", "a mat.", "mat the."], 0),
        ("mat. the dog ran", ["on the mat.", "to the cat.", "to the sea.", "sea the to."], 2),
        ("sea. yes! a cat", ["ran to", "the mat", "dog ran", "sat on"], 3),
    ]
    write_examples(here / "right.jsonl", questions)
    write_examples(here / "wrong.jsonl", [(c, e, (n + 1) % 4) for c, e, n in questions])
    run_here(*LEARN, "--data", here / "text.txt", "--out", here / "run", "--eval-every", 120,
             "--eval-data", here / "right.jsonl")  # fmt: skip
    return here


def test_known_answers(trained, capsys):
    for file, share in ("right", 1.0), ("wrong", 0.0):
        results, _ = evaluate(
            trained / "run", "--task", "hellaswag", "--data", trained / f"{file}.jsonl", capsys=capsys
        )
        assert results["acc_norm"] == share and results["acc"] == share and results["step"] == 300


def test_during_training(trained, capsys):
    """Every 120 steps and at the end, on the screen and in the log; at the end it is what the command says."""
    rows = rows_of(trained / "run", "hellaswag_acc_norm")
    assert [row["step"] for row in rows] == [120, 240, 300]
    assert rows[-1] == {"step": 300, "hellaswag_acc_norm": 1.0, "hellaswag_acc": 1.0, "hellaswag_examples": 3}
    assert (
        "hellaswag at step 300: acc_norm 1.0000, acc 1.0000 over 3 examples"
        in (trained / "run" / "train.log").read_text()
    )


def test_training_is_not_changed_by_it(trained, tmp_path):
    run_here(*LEARN, "--data", trained / "text.txt", "--out", tmp_path / "run")
    assert rows_of(tmp_path / "run") == rows_of(trained / "run")


def test_a_resumed_run_takes_it_up(trained, tmp_path, capfd, rng):
    """With other examples, some longer than the context; a step's result is that of the command, as is each run."""
    file = write_examples(tmp_path / "h.jsonl", some_examples(rng, 13, 9))
    more = ["--steps", 304, "--eval-every", 2, "--eval-data", file]
    results = []
    for copy in "a", "b":
        out = tmp_path / copy
        os.makedirs(out / "checkpoints")
        for name in "settings.json", "log.jsonl", "checkpoints/step_000300.safetensors":
            (out / name).write_bytes((trained / "run" / name).read_bytes())
        run_here("--resume", out, *more)
        results.append(rows_of(out, "hellaswag_acc")[3:])
    assert results[0] == results[1] and [row["step"] for row in results[0]] == [302, 304]
    assert "contexts with endings are longer than 32 tokens" in (tmp_path / "a" / "train.log").read_text()
    found, _ = evaluate(tmp_path / "a", "--task", "hellaswag", "--data", file, capsys=capfd)
    assert (found["acc"], found["acc_norm"]) == (results[0][1]["hellaswag_acc"], results[0][1]["hellaswag_acc_norm"])


def test_a_signal_cuts_it_short(folder, tmp_path, rng):
    examples, _ = hellaswag.read_examples(
        write_examples(tmp_path / "h", some_examples(rng, 9, 1)), BYTES, 32, 0, "--data"
    )
    asked, stop = [], []

    def losses(tokens, targets):
        asked.append(len(tokens))
        if len(asked) == 3:
            stop.append(15)
        return np.ones(tokens.shape, np.float32)

    hellaswag.losses_of(examples, losses, 4, 32, stop)
    assert asked == [4, 4, 4]


# --- loss


@pytest.mark.parametrize("B", [1, 4, 100])
def test_val_is_what_pytorch_says(tmp_path, capsys, rng, parameters, B):
    """Over all windows of two shards, each token counted once; and over the first few of them."""
    folder, T, losses = write_checkpoint(tmp_path / "run", NANO, parameters, sequence_length=7), 7, []
    for name, n in ("a", 80), ("b", 30):
        tokens = rng.integers(0, 257, n)
        write_shard(tmp_path / f"{name}.bin", tokens)
        losses += [by_torch(parameters, tokens[s : s + T + 1]).mean() for s in range(0, n - T, T)]
    assert len(losses) == 11 + 4
    arguments = [folder, "--data", tmp_path / "*.bin", "--batch-size", B]
    results, _ = evaluate(*arguments, capsys=capsys)
    assert results["loss"] == pytest.approx(np.mean(losses), abs=TOLERANCE)
    assert results["perplexity"] == math.exp(results["loss"])
    assert (results["windows"], results["sequence_length"], results["step"]) == (15, 7, 7)
    results, _ = evaluate(*arguments, "--limit", 6, capsys=capsys)
    assert results["loss"] == pytest.approx(np.mean(losses[:6]), abs=TOLERANCE) and results["windows"] == 6


def test_val_of_the_run(trained, capsys):
    """On what the run held out, and on a text: in its own tokenizer, each behind an end-of-text token."""
    own, _ = evaluate(trained / "run", capsys=capsys)
    assert own["windows"] == (25_501 // 20 - 1) // 32 and 0 < own["loss"] < 0.5
    assert evaluate(trained / "run", capsys=capsys)[0] == own
    text, _ = evaluate(trained / "run", "--data", trained / "text.txt", capsys=capsys)
    assert text["windows"] == 25_500 // 32 and text["loss"] == pytest.approx(own["loss"], rel=0.3)


def test_text_in_the_tokenizer_of_the_model(tmp_path):
    """The same text for two models, in two vocabularies of one size, neither of which it would have taught."""
    (tmp_path / "t.txt").write_text("mats and cats")
    for learned_from in "the cat sat on the mat " * 9, "and and and so so " * 9:
        encoding = load_tokenizer("bpe", [learned_from], 260)
        (span,) = data.spans_of([str(tmp_path / "t.txt")], encoding, 260)
        tokens = np.memmap(span.path, "<u2", "r", 1024)
        assert tokens.tolist() == [259, *encoding.encode_ordinary("mats and cats")]


# --- memory, devices, mistakes


def test_all_layers_share_their_activations():
    """Of 12 layers it takes the memory of one; that is what makes room for a batch."""
    ops, model = get_ops("cpu"), preset("d12")
    places, nbytes = layout(evaluation.forward_groups(model, 4, 1024, ops), model.num_layers, "reuse")
    assert nbytes < 2.1 * 2**30 and not any(place.stacked and place.group != "parameters" for place in places)


def test_a_batch_fits(monkeypatch):
    ops = get_ops("cpu")
    size = lambda B: layout(evaluation.forward_groups(NANO, B, 32, ops), 2, "reuse")[1]  # noqa: E731
    monkeypatch.setattr(ops, "available_memory", lambda: size(40))
    assert evaluation.batch_size(NANO, 32, 1000, ops, "float32") == 32  # 128 would be 4096 tokens
    assert evaluation.batch_size(NANO, 32, 9, ops, "float32") == 9
    with pytest.raises(evaluation.UserError, match="--batch-size 41: .* needed, but .* of memory are available"):
        evaluation.batch_size(NANO, 32, 9, ops, "float32", 41)


@pytest.mark.gpu
def test_on_every_device(tmp_path, rng, parameters):
    """The simulator's, or the card's, and the CPU's answers are the same."""
    device = "cuda" if DEVICE == "cuda" else "cudasim"
    folder = write_checkpoint(tmp_path / "run", NANO, parameters, sequence_length=2)
    file = write_examples(tmp_path / "h.jsonl", some_examples(rng, 1))
    trained = open_checkpoint(folder)
    examples, _ = hellaswag.read_examples(file, BYTES, 2, 0, "--data")
    found = []
    for name in "cpu", device:
        losses = evaluation.on_device(trained, 4, 2, get_ops(name), DTYPES["fp32"])
        found.append(hellaswag.losses_of(examples, losses, 4, 2))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=TOLERANCE)


GOOD = {"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"\xff",
        {"ctx": "a", "endings": ["b"] * 4},
        *(GOOD | change for change in ({"endings": ["b"] * 3}, {"endings": "bcde"}, {"endings": ["b", "c", "d", 1]})),
        *(GOOD | change for change in ({"ctx": ""}, {"ctx": 1}, {"label": 4}, {"label": -1}, {"label": "0"})),
    ],
    ids=str,
)
def test_a_bad_line(folder, tmp_path, capfd, line):
    file = tmp_path / "h.jsonl"
    line = line if isinstance(line, bytes) else json.dumps(line).encode()
    file.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line)
    told = refused(capfd, folder, "--task", "hellaswag", "--data", file, program=evaluation)
    assert told == f"error: --data {file}: line 3: expected a JSON object with {hellaswag.EXPECTED}\n"


def test_mistakes(folder, tmp_path, capfd, parameters, trained):
    def told(*arguments, program=evaluation):
        return refused(capfd, *arguments, program=program)

    fetch_it = "hellaswag_val.jsonl: cannot be read (No such file or directory): download it with llm-numba data "
    assert fetch_it in told(folder, "--task", "hellaswag")
    assert "--data nowhere: cannot be read (No such" in told(folder, "--task", "hellaswag", "--data", "nowhere")
    assert "takes one file" in told(folder, "--task", "hellaswag", "--data", "a", "b")
    (tmp_path / "empty").write_text("\n")
    assert "has no examples" in told(folder, "--task", "hellaswag", "--data", tmp_path / "empty")
    assert "--limit -1: must be an integer, at least 0" in told(folder, "--limit", -1)
    assert "the run's data is no longer what it was trained on: give some with --data" in told(folder)
    assert "3 tokens in a row, but one window needs 33" in told(folder, "--data", write_text(tmp_path / "t", "ab"))
    assert "checkpoint" in told(tmp_path)

    none = write_checkpoint(tmp_path / "none", NANO, parameters, encoding=None)
    assert "--tokenizer none" in told(none, "--task", "hellaswag", "--data", "x")
    assert "needs .bin shards" in told(none, "--data", tmp_path / "t")
    broken = {**parameters, "lnfb": np.full_like(parameters["lnfb"], np.nan)}
    broken = write_checkpoint(tmp_path / "broken", NANO, broken)
    questions = trained / "right.jsonl"
    assert "losses are not finite" in told(broken, "--task", "hellaswag", "--data", questions)
    assert "losses are not finite" in told(broken, "--data", trained / "text.txt", "--limit", 2)

    for arguments, says in (
        (("--eval-every", 5, "--tokenizer", "none"), "--eval-every 5: HellaSwag is text"),
        (("--eval-every", 5, "--eval-data", "nowhere"), "/nowhere: cannot be read"),
        (("--eval-every", 5), "give --eval-data FILE"),
        (("--eval-every", -1), "--eval-every -1: must be at least 0"),
    ):
        out = ["--data", trained / "text.txt", "--out", tmp_path / "out"]
        if "none" not in arguments:
            assert says in refused(capfd, *QUICK, *arguments, *out)
            assert not (tmp_path / "out").exists()
        else:
            assert says in refused(capfd, *QUICK, *arguments)


def write_text(path, text):
    path.write_text(text)
    return path


def test_as_a_user(trained, tmp_path):
    """In a process of its own: one line, nothing else; a mistake is one line too."""
    done = run("eval", trained / "run", "--device", DEVICE, cwd=tmp_path, env=environment())
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"val of {trained / 'run'}/checkpoints/step_000300.safetensors (step 300): loss 0.")
    assert done.stdout.count("\n") == 1
    done = run("eval", "nowhere", cwd=tmp_path, env=environment())
    assert "nowhere" in error_line(done.returncode, done.stderr)
