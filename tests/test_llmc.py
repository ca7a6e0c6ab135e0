"""llm.c's files, written here field by field, and its acceptance test on models whose results PyTorch computes."""

import ml_dtypes
import numpy as np
import pytest
from programs import error_line
from training import random_batch, random_parameters

from llm_numba.debug import llmc_parity
from llm_numba.formats import llmc
from llm_numba.models import gpt2
from llm_numba.models.gpt2 import GPT2
from llm_numba.util.cli import UserError, exit_with

torch = pytest.importorskip("torch", reason="needs PyTorch")
torch_gpt2 = pytest.importorskip("torch_gpt2")

pytestmark = pytest.mark.compiled
CONFIG, B, T = GPT2(max_seq_len=9, vocab_size=37, num_layers=2, num_heads=3, channels=15), 2, 5
ORDER = (
    "wte wpe ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb lnfw lnfb"  # llm.c's own
).split()


def ten_losses(parameters, batch):
    """AdamW as llm.c's test has it: decay on every tensor, no clipping."""
    p = torch_gpt2.leaves(parameters)
    tokens, targets = (torch.tensor(x, dtype=torch.long) for x in batch)
    optimiser = torch.optim.AdamW(p.values(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        logits = torch_gpt2.forward(p, tokens, CONFIG.num_heads, lambda name, layer, x: x)
        loss = torch_gpt2.cross_entropy(logits, targets)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(params=[40, 384], ids=["little_padding", "padded_as_ours"])
def files(request, tmp_path):
    """A function (change(name, tensor) -> tensor) that writes model.bin, state.bin and losses.txt."""
    Vp = request.param
    rng = np.random.default_rng(0)
    weights = random_parameters(CONFIG, rng)
    batch = random_batch(CONFIG, B, T, rng)
    answer = torch_gpt2.forward_backward(weights, *batch, CONFIG.num_heads)
    losses = ten_losses(weights, batch)

    def write(change=lambda name, x: x):
        def pad(name, x):
            return np.concatenate([x, np.zeros((Vp - len(x), *x.shape[1:]))]) if name == "wte" else x

        header = np.zeros(256, "<i4")
        header[:8] = 20240326, 3, 9, 37, 2, 3, 15, Vp
        body = b"".join(pad(name, weights[name]).astype("<f4").tobytes() for name in ORDER)
        (tmp_path / "model.bin").write_bytes(header.tobytes() + body)

        header = np.zeros(256, "<i4")
        header[:4] = 20240327, 2, B, T
        logits = change("logits", answer.activations["logits", None])
        parts = [header, *(x.astype("<i4") for x in batch), logits.astype("<f4"), np.array([answer.loss], "<f4")]
        parts += [change(name, pad(name, answer.gradients[name])).astype("<f4") for name in ORDER]
        (tmp_path / "state.bin").write_bytes(b"".join(x.tobytes() for x in parts))
        (tmp_path / "losses.txt").write_text("\n".join(map(str, losses)))
        return tmp_path

    return write


def replay(folder, *arguments):
    files = [folder / "model.bin", folder / "state.bin"]
    return llmc_parity.main([*map(str, files), "--device", "cpu", *map(str, arguments)])


@pytest.mark.parametrize("rows", [B * T, 4], ids=["logits_at_once", "in_parts"])
def test_all_agree(files, capsys, monkeypatch, rows):
    monkeypatch.setattr(gpt2, "logits_rows", lambda _: rows)
    folder = files()
    assert replay(folder, "--losses", folder / "losses.txt") == 0
    out = capsys.readouterr().out
    assert "all 28 agree" in out and "DIFFERS" not in out  # logits, 16 gradients, the loss, ten more
    assert all(f"d{name} " in out for name in ORDER)


@pytest.mark.parametrize("tensor", [*ORDER, "logits"])
def test_one_tensor_two_percent_off(files, capsys, tensor):
    folder = files(lambda name, x: x * 1.02 if name == tensor else x)
    assert replay(folder) == 1
    what = tensor if tensor == "logits" else f"d{tensor}"
    assert f"1 of 18 differ: {what}" in capsys.readouterr().out


def test_losses_that_differ(files, capsys):
    folder = files()
    losses = (folder / "losses.txt").read_text().split()
    losses[6] = str(float(losses[6]) * 1.02)
    (folder / "losses.txt").write_text(", ".join(losses))
    assert replay(folder, "--losses", folder / "losses.txt") == 1
    assert "differ: loss of step 7" in capsys.readouterr().out


@pytest.mark.parametrize("tensor", ["wte", "qkvw", "lnfb", "logits"])
@pytest.mark.parametrize("factor", [1.01, np.nan])
def test_one_element_differs(files, capsys, tensor, factor):
    """An element of ordinary size, the median; the norm of the tensor hardly changes by 1% of it."""

    def change(name, x):
        x = x.copy()
        if name == tensor:
            flat = x.reshape(-1)
            used = np.abs(flat[: CONFIG.vocab_size * CONFIG.channels])
            flat[np.argsort(used)[len(used) // 2]] *= factor
        return x

    assert replay(files(change)) == 1
    assert f"1 of 18 differ: {tensor if tensor == 'logits' else f'd{tensor}'}\n" in capsys.readouterr().out


def test_a_bf16_model_is_refused(files):
    """The debug state belongs to the weights before they were rounded."""
    folder = files()
    config, _, parameters = llmc.read_model(folder / "model.bin")
    llmc.write_model(folder / "model.bin", config, parameters, 5)
    with pytest.raises(UserError, match="model.bin: a model of version 5, expected 3"):
        replay(folder)


def test_round_trip(tmp_path):
    parameters = random_parameters(CONFIG, np.random.default_rng(1))
    parameters["wte"] = np.concatenate([parameters["wte"], np.zeros((11, 15), np.float32)])
    for version in 3, 5:
        llmc.write_model(tmp_path / "model.bin", CONFIG, parameters, version)
        config, Vp, found = llmc.read_model(tmp_path / "model.bin")
        assert (config, Vp, list(found)) == (CONFIG, 48, ORDER)
        for name, x in found.items():
            expected = parameters[name] if version == 3 else parameters[name].astype(ml_dtypes.bfloat16)
            assert x.dtype == np.float32 and np.array_equal(x, expected.astype(np.float32)), name


def cut(path, nbytes):
    path.write_bytes(path.read_bytes()[:nbytes])


def poke(path, index, value):
    data = bytearray(path.read_bytes())
    data[4 * index : 4 * index + 4] = np.int32(value).tobytes()
    path.write_bytes(data)


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda f: (f / "model.bin").unlink(), ["model.bin", "No such file"]),
        (lambda f: cut(f / "model.bin", 100), ["model.bin", "100 bytes", "truncated"]),
        (lambda f: cut(f / "model.bin", 2000), ["model.bin", "2,000 bytes", "expected"]),
        (lambda f: cut(f / "state.bin", 3000), ["state.bin", "3,000 bytes"]),
        (lambda f: poke(f / "model.bin", 0, 7), ["model.bin", "not a model of llm.c", "20240326"]),
        (lambda f: poke(f / "state.bin", 0, 20240326), ["state.bin", "not a debug state", "20240327"]),
        (lambda f: poke(f / "model.bin", 1, 2), ["model.bin", "version 2", "expected 3"]),
        (lambda f: poke(f / "model.bin", 5, 4), ["model.bin", "channels (15)"]),
        (lambda f: poke(f / "model.bin", 7, 36), ["model.bin", "37 padded to 36"]),
        (lambda f: poke(f / "state.bin", 3, 10), ["state.bin", "2 x 10", "context is 9"]),
        (lambda f: poke(f / "state.bin", 256, 37), ["state.bin", "vocabulary of 37"]),
        (lambda f: (f / "losses.txt").write_text("5.2 x"), ["--losses", "losses.txt", "numbers"]),
    ],
)
def test_damaged_files(files, capfd, break_it, words):
    folder = files()
    break_it(folder)
    with pytest.raises(SystemExit) as stopped:
        exit_with(lambda: replay(folder, "--losses", folder / "losses.txt"))
    line = error_line(stopped.value.code, capfd.readouterr().err)
    assert all(word in line for word in words), line


def test_a_size_that_overflows_is_refused(tmp_path):
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, 3, 2**31 - 1, 2**31 - 1, 2**31 - 1, 1, 2**31 - 1, 2**31 - 1
    (tmp_path / "model.bin").write_bytes(header.tobytes())
    with pytest.raises(UserError, match="truncated"):
        llmc.read_model(tmp_path / "model.bin")
