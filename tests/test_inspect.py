"""Every tensor of a step, as a table, as an array and as a picture."""

import re
import shutil

import numpy as np
import pytest
from programs import (
    QUICK,
    cache,  # noqa: F401
    files_in,
    losses_of,
    refused,
    run,
    run_here,
    write_text,
)

from llm_numba.debug import inspect
from llm_numba.training import checkpoint

pytestmark = pytest.mark.compiled
B, T, C, L, NH, V, Vp = 2, 32, 16, 2, 2, 257, 384
PARAMETERS = {"wte": (Vp, C), "wpe": (T, C), "lnfw": (C,), "lnfb": (C,)}
LAYER_PARAMETERS = {
    **{"ln1w": (C,), "ln1b": (C,), "qkvw": (3 * C, C), "qkvb": (3 * C,), "attprojw": (C, C), "attprojb": (C,)},
    **{"ln2w": (C,), "ln2b": (C,), "fcw": (4 * C, C), "fcb": (4 * C,), "fcprojw": (C, 4 * C), "fcprojb": (C,)},
}
STREAM, WIDE, ROWS = (B, T, C), (B, T, 4 * C), (B, T)
ACTIVATIONS = {"encoded": STREAM, "lnf": STREAM, "lnf_mean": ROWS, "lnf_rstd": ROWS, "logits": (B, T, Vp)}
LAYER_ACTIVATIONS = {
    **{
        "ln1": STREAM,
        "ln1_mean": ROWS,
        "ln1_rstd": ROWS,
        "qkv": (B, T, 3 * C),
        "lse": (B, NH, T),
        "att": (B, NH, T, T),
    },
    **{"atty": STREAM, "attproj": STREAM, "residual2": STREAM, "ln2": STREAM, "ln2_mean": ROWS, "ln2_rstd": ROWS},
    **{"fch": WIDE, "fch_gelu": WIDE, "fcproj": STREAM, "residual3": STREAM},
}
GRADIENTS = {"dlogits": (B, T, Vp), "dlnf": STREAM, "dencoded": STREAM}
LAYER_GRADIENTS = {
    **{"dresidual3": STREAM, "dfch": WIDE, "dln2": STREAM, "dresidual2": STREAM},
    **{"datty": STREAM, "dqkv": (B, T, 3 * C), "dln1": STREAM},
}
SHAPES = {
    **PARAMETERS,
    **ACTIVATIONS,
    **GRADIENTS,
    **{"d" + name: shape for name, shape in PARAMETERS.items()},
    "losses": ROWS,
    "tokens": ROWS,
    "targets": ROWS,
}
for layer in LAYER_PARAMETERS, LAYER_ACTIVATIONS, LAYER_GRADIENTS, {"d" + n: s for n, s in LAYER_PARAMETERS.items()}:
    SHAPES |= {f"{l}.{name}": shape for name, shape in layer.items() for l in range(L)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    here = tmp_path_factory.mktemp("trained")
    text = write_text(here / "text.txt")
    run_here(*QUICK, "--data", text, "--steps", 20, "--out", here / "run")
    return here / "run"


def table_of(text):
    """{tensor: (shape, mean, std, min, max, share of zeros, how many not finite)} and the loss."""
    rows = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"(\S+) +(\d+(?: x \d+)*) +(.*?)(?: +<---)?", line):
            shape = tuple(map(int, match[2].split(" x ")))
            numbers = [float(x.rstrip("%").replace(",", "")) for x in match[3].split()]
            assert match[1] not in rows
            rows[match[1]] = (shape, *numbers)
    return rows, float(text.partition("\nloss ")[2])


def look(capsys, *arguments):
    capsys.readouterr()
    run_here(*arguments, program=inspect)
    return table_of(capsys.readouterr().out)


@pytest.fixture(scope="module")
def everything(trained, tmp_path_factory):
    """(the table, all tensors by name) of a batch of two sequences of the run."""
    folder = tmp_path_factory.mktemp("saved")
    flags = [f"--save={name}={name}.npy" for name in SHAPES]
    process = run("inspect", trained, "--batch-size", B, *flags, cwd=folder)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    return table_of(process.stdout), {name: np.load(folder / f"{name}.npy") for name in SHAPES}


def test_every_tensor_has_a_line_with_its_shape(everything):
    (table, _), tensors = everything
    assert {name: row[0] for name, row in table.items()} == SHAPES
    assert {name: tensor.shape for name, tensor in tensors.items()} == SHAPES


def test_the_numbers_are_those_of_the_tensor(everything):
    (table, loss), tensors = everything
    for name, (_, *numbers) in table.items():
        x = tensors[name].astype(np.float64)
        expected = [x.mean(), x.std(), x.min(), x.max()]
        np.testing.assert_allclose(numbers[:4], expected, rtol=1e-3, atol=1e-9, err_msg=name)  # four digits of it
        assert numbers[4] == pytest.approx(100 * np.mean(x == 0), abs=0.051) and numbers[5] == 0, name
    assert loss == pytest.approx(tensors["losses"].mean(), abs=1e-4)


def test_a_tensor_holds_what_its_name_says(everything, trained):
    """The relations of a step that NumPy can check from outside."""
    x = everything[1]
    parameters, _, _ = checkpoint.load(checkpoint.newest(trained))
    for name in SHAPES:
        layer, _, own = name.rpartition(".")
        if own in parameters:
            expected = parameters[own][int(layer)] if layer else parameters[own]
            assert x[name].tobytes() == expected.tobytes(), name

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    close(x["0.residual2"], x["encoded"] + x["0.attproj"])
    close(x["1.residual3"], x["1.residual2"] + x["1.fcproj"])
    close(x["0.qkv"], x["0.ln1"] @ x["0.qkvw"].T + x["0.qkvb"])
    close(x["logits"][..., :V], x["lnf"] @ x["wte"][:V].T)
    z = x["logits"][..., :V].astype(np.float64)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    close((x["dlogits"][..., :V] - p / (B * T)).min(-1) * B * T, -np.ones(ROWS))  # p - 1 at the target
    targets = (x["dlogits"][..., :V] - p / (B * T)).argmin(-1)
    close(x["losses"], -np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0]))
    close(x["1.dfcw"], np.einsum("bto,btc->oc", x["1.dfch"], x["1.ln2"]))
    close(x["0.dqkvb"], x["0.dqkv"].sum((0, 1)))


def test_the_loss_is_the_run_s(trained, capsys):
    """Of a batch of its own text, at the end of the run: not far from its last losses."""
    _, loss = look(capsys, trained, "--batch-size", 8)
    assert loss == pytest.approx(losses_of(trained)[-1], abs=0.3)


def test_another_length_and_another_batch(trained, capsys):
    table, loss = look(capsys, trained, "--sequence-length", 5, "--seed", 1)
    assert table["0.lse"][0] == (1, NH, 5) and table["logits"][0] == (1, 5, Vp)
    assert look(capsys, trained, "--sequence-length", 5, "--seed", 1) == (table, loss)
    assert look(capsys, trained, "--sequence-length", 5, "--seed", 2)[1] != loss


def test_a_preset(capsys, tmp_path, monkeypatch):
    """With random weights every token is about as likely."""
    monkeypatch.chdir(tmp_path)
    table, loss = look(capsys, "nano", "--batch-size", B)
    assert {name: row[0] for name, row in table.items()} == SHAPES
    assert loss == pytest.approx(np.log(V), abs=0.05)
    assert table["wte"][2] == pytest.approx(0.02 * np.sqrt(V / Vp), rel=0.02)  # its padding is zeros
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("name", ["1.lse", "0.qkv", "wte", "dwte", "0.ln1b", "losses"])
def test_a_picture(trained, tmp_path, capsys, name):
    look(capsys, trained, "--save", f"{name}={tmp_path / 'x.png'}")
    import matplotlib.pyplot as plt

    picture = plt.imread(tmp_path / "x.png")
    assert picture.ndim == 3 and picture[..., :3].std() > 0.05


def test_values_that_are_not_finite_are_counted(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    path = checkpoint.newest(folder)
    tensors, state, tokenizer = checkpoint.load(path)
    tensors["fcw"][1, 5, 3], tensors["wpe"][7, :3] = np.nan, np.inf
    checkpoint.save(path, tensors, state, tokenizer)
    run_here(folder, "--save", f"1.fcproj={tmp_path / 'x.png'}", program=inspect)
    out = capsys.readouterr().out
    table, _ = table_of(out)
    assert table["1.fcw"][-1] == 1 and table["wpe"][-1] == 3 and table["encoded"][-1] == 3
    assert table["1.fch"][-1] > 0 and table["0.fcw"][-1] == 0
    x = np.delete(tensors["wpe"].ravel(), [7 * C, 7 * C + 1, 7 * C + 2])
    np.testing.assert_allclose(table["wpe"][1:5], [x.mean(), x.std(), x.min(), x.max()], rtol=1e-3)
    marked = [line.split()[0] for line in out.splitlines() if line.endswith("<---")]
    assert marked == [name for name, row in table.items() if row[-1]]
    assert table["1.fcproj"][-1] == T * C and (tmp_path / "x.png").stat().st_size  # nothing to see, but no crash


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["absent"], ["absent", "nano"]),
        ([], ["RUN_OR_PRESET"]),
        (["nano", "--batch-size", 0], ["--batch-size 0"]),
        (["nano", "--batch-size", "x"], ["--batch-size", "x"]),
        (["nano", "--sequence-length", 33], ["--sequence-length 33", "32"]),
        (["nano", "--sequence-length", -1], ["--sequence-length -1"]),
        (["nano", "--seed", -1], ["--seed -1"]),
        (["nano", "--save", "0.qkv"], ["--save 0.qkv"]),
        (["nano", "--save", "0.qkv=x.jpg"], ["--save 0.qkv=x.jpg", ".npy", ".png"]),
        (["nano", "--save", "0.qkv=absent/x.npy"], ["--save 0.qkv=absent/x.npy"]),
        (["nano", "--save", "0.qkv=absent/x.png"], ["--save 0.qkv=absent/x.png"]),
        (["nano", "--save", "2.qkv=x.npy"], ["--save 2.qkv"]),
        (["nano", "--save", "qkv=x.npy"], ["--save qkv"]),
        (["nano", "--what"], ["--what"]),
        (["d48", "--batch-size", 10_000_000], ["--batch-size 10000000"]),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, capfd, arguments, names):
    monkeypatch.chdir(tmp_path)
    line = refused(capfd, *arguments, program=inspect)
    assert all(name in line for name in names), line
    assert files_in(tmp_path) == {}
