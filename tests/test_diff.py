"""Two devices side by side: that faults are found where they are, in whom they are, and nowhere else.

Most tests compare two devices that both are NumPy in float32 (oracle.py), one of which is broken on purpose.
"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from programs import cache, files_in, refused, run_here, write_text  # noqa: F401

from llm_numba import oracle
from llm_numba.debug import diff
from llm_numba.models.gpt2 import GPT2
from llm_numba.ops import WRITES, Ops, get_ops

B, T, L = 2, 3, 2
LEAST = GPT2(max_seq_len=4, vocab_size=5, num_layers=L, num_heads=2, channels=8)
FORWARD = "ln1 ln1_mean ln1_rstd qkv lse atty attproj residual2 ln2 ln2_mean ln2_rstd fch fch_gelu fcproj residual3"
BACKWARD = "dresidual3 dfch dln2 dresidual2 datty dqkv dln1"
GRADIENTS = "dfcprojb dfcprojw dfcb dfcw dln2b dln2w dattprojb dattprojw dqkvb dqkvw dln1b dln1w"
ORDER = [
    "encoded",
    *(f"{l}.{name}" for l in range(L) for name in FORWARD.split()),
    *("lnf", "lnf_mean", "lnf_rstd", "logits", "losses", "dlogits", "dlnf"),
    *(f"{l}.{name}" for l in reversed(range(L)) for name in BACKWARD.split()),
    *("dencoded", "dlnfb", "dlnfw"),
    *(f"{l}.{name}" for l in reversed(range(L)) for name in GRADIENTS.split()),
    *("dwpe", "dwte"),
]


def numpy_device(dtype, faults=None):
    """NumPy in the place of a device. faults: {op: function(call, *arguments) after the op's call-th call}."""
    faults, calls = faults or {}, dict.fromkeys(WRITES, 0)

    def follow(name):
        op = diff.through_float32(getattr(oracle, name)) if dtype == "bf16" else getattr(oracle, name)

        def call(*arguments):
            op(*arguments)
            if name in faults:
                faults[name](calls[name], *arguments)
            calls[name] += 1

        return call

    return Ops(**{**vars(oracle), **{name: follow(name) for name in WRITES}})


@pytest.fixture
def compare(monkeypatch, capsys):
    """A function that runs the command with a broken device; returns its exit status, its rows and its last line."""
    monkeypatch.setitem(GPT2.PRESETS, "least", LEAST)

    def run(*flags, broken=None, faults=None, preset="least"):
        monkeypatch.setattr(
            diff, "get_ops", lambda device, dtype: numpy_device(dtype, faults if device == broken else None)
        )
        flags = flags or ("--devices", "cpu", "cudasim")
        status = run_here("--preset", preset, "--batch-size", B, "--sequence-length", T, *flags, program=diff)
        return status, *read(capsys.readouterr().out)

    return run


def read(out):
    """({tensor: its columns and whether it is marked}, last line) of what the command printed."""
    number = r"(\d\S*|inf|nan)"
    row = rf"(\S+) +(?:none|(\S+) at \[([\d, ]+)\]) +{number} +{number} +{number} +{number}( +<---)?"
    rows = {}
    for found in filter(None, (re.fullmatch(row, line) for line in out.splitlines())):
        index = tuple(map(int, found[3].split(", "))) if found[3] else None
        numbers = [float(x or 0) for x in (found[2], *found.groups()[3:7])]
        rows[found[1]] = SimpleNamespace(
            largest=numbers[0],
            index=index,
            relative=numbers[1],
            ulps=numbers[2],
            errors=numbers[3:],
            marked=bool(found[8]),
        )
    return rows, out.splitlines()[-1]


def scaled(position, call=None, by=1.02):
    """Everything in the argument at this position is 2% too large, in one call of the op or in all."""

    def fault(this, *arguments):
        if call in (None, this):
            arguments[position][...] *= arguments[position].dtype.type(by)

    return fault


def one_element(position, call=None, by=1e-3):
    """The last element of that argument is off, by this part of the tensor's root mean square."""

    def fault(this, *arguments):
        if call in (None, this):
            x = arguments[position]
            x.reshape(-1)[-1] += by * np.sqrt(np.mean(np.square(x.astype(np.float64))))

    return fault


def test_the_order_is_the_step_s(compare):
    status, rows, last = compare("--devices", "cpu", "cudasim", "--all")
    assert list(rows) == ORDER and status == 0
    assert last == f"cpu and cudasim agree: both are within rounding in all {len(ORDER)} tensors"
    assert all(row.largest == row.ulps == row.relative == 0 and row.errors[0] == row.errors[1] for row in rows.values())


# op, its argument, the call of it (forward: layer 0 first, backward: layer 1 first) -> the tensor it is
FAULTS = [
    ("encoder_forward", 0, 0, "encoded"),
    ("layernorm_forward", 0, 0, "0.ln1"),
    ("residual_layernorm_forward", 0, 0, "0.residual2"),
    ("residual_layernorm_forward", 2, 0, "0.ln2_mean"),
    ("residual_layernorm_forward", 3, 1, "1.ln1_rstd"),
    ("residual_layernorm_forward", 0, 3, "1.residual3"),
    ("residual_layernorm_forward", 1, 3, "lnf"),
    ("matmul_forward", 0, 3, "1.qkv"),
    ("matmul_forward", 0, 6, "logits"),
    ("attention_forward", 0, 1, "1.atty"),
    ("attention_forward", 1, 0, "0.lse"),
    ("matmul_gelu_forward", 0, 1, "1.fch_gelu"),
    ("matmul_gelu_forward", 1, 0, "0.fch"),
    ("fused_classifier", 1, 0, "losses"),
    ("fused_classifier", 0, 1, "dlogits"),  # the second time with gradients
    ("matmul_backward", 0, 0, "dlnf"),
    ("layernorm_backward", 0, 0, "1.dresidual3"),
    ("gelu_matmul_backward", 0, 0, "1.dfch"),
    ("gelu_matmul_backward", 0, 1, "0.dfch"),
    ("matmul_backward", 0, 1, "1.dln2"),
    ("layernorm_backward", 0, 1, "1.dresidual2"),
    ("layernorm_backward", 0, 2, "0.dresidual3"),
    ("attention_backward", 0, 1, "0.dqkv"),
    ("layernorm_backward", 0, 4, "dencoded"),
    ("layernorm_backward", 1, 0, "dlnfw"),
    ("gelu_matmul_backward", 1, 0, "1.dfcprojw"),
    ("matmul_backward", 1, 1, "1.dfcw"),
    ("matmul_backward", 2, 6, "0.dqkvb"),
    ("layernorm_backward", 2, 4, "0.dln1b"),
    ("encoder_backward", 1, 0, "dwpe"),
    ("encoder_backward", 0, 0, "dwte"),
]


@pytest.mark.parametrize("kind", [scaled, one_element])
@pytest.mark.parametrize("op, position, call, tensor", FAULTS, ids=[fault[-1] for fault in FAULTS])
def test_a_fault_is_found_where_it_is(compare, op, position, call, tensor, kind):
    """In the one or the other device; all that comes before is clean, and a gradient of a parameter spoils no other."""
    if op == "encoder_backward" and position == 0 and kind is one_element:
        pytest.skip("the last row of wte is padding, where no gradient ever is")
    broken = ("cpu", "cudasim")[call % 2]
    status, rows, last = compare(
        "--devices", "cpu", "cudasim", "--all", broken=broken, faults={op: kind(position, call)}
    )
    assert status == 1
    marked = [name for name, row in rows.items() if row.marked]
    assert marked[0] == tensor
    assert marked == [tensor] or tensor not in ("losses", *ORDER[ORDER.index("dlnfb") :])
    other = {"cpu": "cudasim", "cudasim": "cpu"}[broken]
    assert last.startswith(f"{broken} is wrong: {tensor} (") and last.endswith(f"{other} is within rounding")
    assert f" is the first of {len(marked)} of {len(ORDER)} tensors" in last


def test_the_numbers_of_a_row(compare):
    """One element of 0.dfch is off by a tenth of the root mean square of all 2 * 3 * 32."""
    fault = {"gelu_matmul_backward": one_element(0, 1, 0.1)}
    row = compare(broken="cudasim", faults=fault)[1]["0.dfch"]
    assert row.index == (1, 2, 31) and row.marked
    assert row.relative == pytest.approx(0.1 / np.sqrt(B * T * 32), rel=0.06)  # printed with two digits
    assert row.errors[0] < 1e-6 and row.errors[1] == pytest.approx(row.relative, rel=0.06)
    swapped = compare("--devices", "cudasim", "cpu", broken="cudasim", faults=fault)[1]["0.dfch"]
    assert swapped.errors == row.errors[::-1]


def test_ulps():
    """Float32 numbers that lie between, at the element of the largest difference."""
    exact_one = np.array([1.0, 3.0, -200.0])
    a, b = (exact_one.astype(np.float32) for _ in range(2))
    b[2] -= 5 * np.spacing(b[2], dtype=np.float32) * -1
    a[0] += np.float32(2.0**-23)
    row = diff.compare("heading", "name", (a, b), exact_one, (a, a), ("float32", "float32"))
    assert row.ulps == 5 and row.index == (2,) and row.largest == 5 * 2.0**-16


def test_one_element_of_many():
    """It is lost among 40,000 in the error of the whole, but not among the errors of single elements."""
    good = np.random.default_rng(0).standard_normal(40_000)
    bad = good.copy()
    bad[777] += 5e-5
    row = diff.compare("heading", "name", (good, bad), good, (good, good), ("float32", "float32"))
    assert row.errors[1] < diff.MULTIPLE["float32"] * diff.LEAST and row.index == (777,)
    assert row.excess[0] == 0 and row.excess[1] > 10 and row.differs


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite(compare, value):
    def fault(call, dinp, *_):
        if call == 0:
            dinp[0, 1, 2] = value

    status, rows, last = compare(broken="cpu", faults={"gelu_matmul_backward": fault})
    assert status == 1 and last.startswith("cpu is wrong: 1.dfch (") and last.endswith("cudasim is within rounding")
    assert rows["1.dfch"].index == (0, 1, 2) and rows["1.dfch"].errors[0] == np.inf


def test_weights_that_are_not_finite(compare, monkeypatch):
    """Then all devices have the same NaN in the same places, and agree."""

    initial_parameters = GPT2.initial_parameters

    def broken(model, seed):
        for name, values in initial_parameters(model, seed):
            if name == "fcb":
                values = np.zeros((L, 4 * model.channels), np.float32)
                values[1, 3] = np.nan
            yield name, values

    monkeypatch.setattr(GPT2, "initial_parameters", broken)
    assert compare()[0] == 0


def test_both_are_wrong(compare, monkeypatch):
    """The same fault in both, where a comparison of the two alone would see nothing; and one that is worse."""
    both = {"gelu_matmul_backward": scaled(0, 0)}
    worse = {"gelu_matmul_backward": scaled(0, 0, 1.04)}
    for faults, said in ((both, both), "as far"), ((both, worse), "cudasim is wrong: 1.dfch"):
        given = dict(zip(("cpu", "cudasim"), faults, strict=True))
        monkeypatch.setattr(diff, "get_ops", lambda device, dtype: numpy_device(dtype, given[device]))  # noqa: B023
        source = diff.read_source("least", B, T, 1)
        rows = diff.rows_of(source, [diff.get_ops(name, "fp32") for name in given], ["float32"] * 2)
        last = diff.verdict(rows, list(given))
        assert "1.dfch" in last and said in last and "is wrong too" in last


def test_what_is_printed_of_a_heading(compare):
    """One row of each part, and every one that differs."""
    whole = compare("--devices", "cpu", "cudasim", "--all")[1]
    assert len(compare()[1]) == 2 + L + 3 + L + 2 + L - 1 < len(whole)
    fault = {"gelu_matmul_backward": scaled(0, 1)}
    rows = compare(broken="cpu", faults=fault)[1]
    everything = compare("--devices", "cpu", "cudasim", "--all", broken="cpu", faults=fault)[1]
    assert [name for name, row in rows.items() if row.marked] == [
        name for name, row in everything.items() if row.marked
    ]
    assert len(rows) < len(everything)


def test_the_weights_are_those_of_bf16(compare):
    """In all runs, whichever device is named first: each then has the same errors as when it is the other."""
    rows = [compare("--devices", *names, "--dtype", "bf16", "--all")[1] for names in (("cuda", "cpu"), ("cpu", "cuda"))]
    assert {name: row.errors for name, row in rows[0].items()} == {n: row.errors[::-1] for n, row in rows[1].items()}


@pytest.mark.parametrize("position", [0, 1])
def test_bf16(compare, position):
    """The device that has it may lose what NumPy loses in it, and no more; the CPU nothing of the kind."""
    names = [["cuda", "cpu"], ["cpu", "cuda"]][position]
    flags = ("--devices", *names, "--dtype", "bf16", "--all")
    status, rows, _ = compare(*flags)
    assert status == 0
    errors = np.array([row.errors for row in rows.values()])
    assert 1e-3 < np.median(errors[:, position]) < 1e-2 and errors[:, 1 - position].max() < 1e-5
    status, rows, last = compare(*flags, broken="cuda", faults={"gelu_matmul_backward": scaled(0, 0, 1.04)})
    assert status == 1 and last.startswith("cuda is wrong: 1.dfch") and last.endswith("cpu is within rounding")
    status, rows, last = compare(*flags, broken="cpu", faults={"gelu_matmul_backward": scaled(0, 0, 1.0001)})
    assert status == 1 and last.startswith("cpu is wrong: 1.dfch") and last.endswith("cuda is within rounding")


def test_a_checkpoint(monkeypatch, tmp_path):
    """Its weights and its data, in both devices."""
    text = write_text(tmp_path / "text.txt", 100)
    train = ("--preset", "nano", "--batch-size", 2, "--sequence-length", 8, "--val-batches", 1, "--sample-tokens", 1)
    run_here(*train, "--data", text, "--steps", 2, "--out", tmp_path / "run")
    arguments = (tmp_path / "run", "--sequence-length", T, "--devices", "cpu", "cudasim")
    monkeypatch.setattr(diff, "get_ops", lambda device, dtype: numpy_device(dtype))
    assert run_here(*arguments, program=diff) == 0


def test_the_cpu_and_the_simulator(request, monkeypatch, capsys):
    """The real ones, at sizes at which the simulator takes a few seconds."""
    if "cudasim" not in request.config.getoption("--device"):
        pytest.skip("this process has no simulator")
    monkeypatch.setitem(GPT2.PRESETS, "least", GPT2(max_seq_len=2, vocab_size=5, num_layers=1, num_heads=1, channels=4))
    assert run_here("--preset", "least", "--devices", "cpu", "cudasim", program=diff) == 0
    rows, last = read(capsys.readouterr().out)
    assert "agree" in last and any(row.largest for row in rows.values())


def test_a_fault_in_the_cpu(monkeypatch, capsys):
    """The real CPU beside NumPy, first as it is, then with one gradient 2% off."""
    monkeypatch.setitem(GPT2.PRESETS, "least", LEAST)
    cpu, given = get_ops("cpu"), {"cuda": numpy_device("fp32")}
    gelu_matmul_backward = cpu.gelu_matmul_backward

    def broken(dpre, *arguments):
        gelu_matmul_backward(dpre, *arguments)
        dpre *= np.float32(1.02)

    monkeypatch.setattr(diff, "get_ops", lambda device, dtype: given[device])
    for ops, said in (cpu, "agree"), (cpu.replace(gelu_matmul_backward=broken), "cpu is wrong: 1.dfch"):
        given["cpu"] = ops
        assert run_here("--preset", "least", "--batch-size", B, program=diff) == int(said != "agree")
        assert said in read(capsys.readouterr().out)[1]


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--devices", "cpu", "cpu"], ["--devices cpu cpu", "cuda", "cudasim"]),
        (["--devices", "cuda", "cudasim"], ["--devices cuda cudasim", "cpu"]),
        (["--devices", "cpu"], ["--devices"]),
        (["--devices", "cpu", "gpu"], ["--devices", "gpu", "cudasim"]),
        (["--devices", "cpu", "auto"], ["--devices", "auto"]),
        (["--preset", "absent"], ["--preset", "absent", "nano"]),
        (["absent"], ["absent", "nano"]),
        (["absent", "--preset", "nano"], ["--preset"]),
        (["--batch-size", 0], ["--batch-size 0"]),
        (["--sequence-length", 33], ["--sequence-length 33", "32"]),
        (["--seed", -1], ["--seed -1"]),
        (["--dtype", "fp16"], ["--dtype", "fp16"]),
        (["--preset", "d48", "--batch-size", 10_000_000], ["--batch-size 10000000"]),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, capfd, arguments, names):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diff, "get_ops", lambda device, dtype: numpy_device(dtype))
    line = refused(capfd, *arguments, program=diff)
    assert all(name in line for name in names), line
    assert files_in(tmp_path) == {}
