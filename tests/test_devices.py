"""Runs on a GPU or in the simulator: the losses of the CPU, moving between devices, the same bits every time."""

import subprocess
import sys

import numpy as np
import pytest
from programs import cache, content_of, environment, losses_of, rows_of, run_here, write_text  # noqa: F401

TINY = ("--preset", "nano", "--sequence-length", 3, "--batch-size", 1, "--val-every", 0, "--val-batches", 1)
TINY = (*TINY, "--sample-tokens", 1, "--schedule", "constant")
REAL = ("--preset", "tiny", "--tokenizer", "bytes", "--batch-size", 4, "--tokens-per-step", 1024, "--val-batches", 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def test_a_run_moves_between_devices(device, text, tmp_path):
    """One step on the CPU, one on the device, one on the CPU: the losses of a run that stayed on the CPU."""
    for steps, where in (1, "cpu"), (2, device), (3, "cpu"):
        begin = ("--resume", tmp_path / "run") if steps > 1 else (*TINY, "--data", text, "--out", tmp_path / "run")
        run_here(*begin, "--steps", steps, "--device", where)
    run_here(*TINY, "--data", text, "--steps", 3, "--device", "cpu", "--out", tmp_path / "cpu")
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(tmp_path / "cpu"), rtol=1e-6)


# on a GPU only: too slow for the simulator


@pytest.fixture
def train(device, text, tmp_path):
    """A function that trains on the device with these flags and returns the folder of the run."""

    def run(name, *flags, steps=6):
        run_here(*REAL, "--data", text, "--steps", steps, "--device", device, "--out", tmp_path / name, *flags)
        return tmp_path / name

    return run


PRECISIONS = [("--dtype", "fp32"), ("--dtype", "bf16"), ("--dtype", "bf16", "--stochastic-rounding")]
ALIKE = ["--no-graph", "--recompute=gelu", "--recompute=gelu+layernorm", "--check-finite"]


@pytest.mark.real
@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda flags: flags[-1].strip("-"))
@pytest.mark.parametrize("how", ["", *ALIKE])
def test_the_same_bits_in_every_mode(train, precision, how):
    """A second run, without a CUDA graph, with recomputation, or with the NaN check."""
    first, second = train("first", *precision), train("second", *precision, *([how] if how else []))
    assert rows_of(first) == rows_of(second)
    assert content_of(first)[0] == content_of(second)[0]


@pytest.mark.real
@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda flags: flags[-1].strip("-"))
def test_a_resumed_run_ends_with_the_same_bytes(device, train, precision):
    whole, stopped = train("whole", *precision), train("stopped", *precision, "--checkpoint-every", 2)
    run_here("--resume", stopped / "checkpoints" / "step_000002.safetensors", "--device", device)
    assert rows_of(stopped) == rows_of(whole)
    assert content_of(stopped)[0] == content_of(whole)[0]


@pytest.mark.real
@pytest.mark.gpu
def test_bf16_learns_like_float32(train):
    """Sixty steps at a rate that is not chaotic: the losses differ by far less than they fall."""
    calm = ("--learning-rate", 5e-4)
    runs = {flags: losses_of(train("-".join(flags), *flags, *calm, steps=60)) for flags in PRECISIONS}
    exact = np.array(runs[PRECISIONS[0]])
    assert exact[0] - exact[-1] > 1
    for flags in PRECISIONS[1:]:
        assert np.abs(np.array(runs[flags]) - exact).max() < 0.05 * (exact[0] - exact[-1]), flags


BOTH_DEVICES = """
import sys
from numba import config
from llm_numba.ops import get_ops
for device in sys.argv[1:]:
    get_ops(device)
config.reload_config()  # as Numba does before it compiles
assert config.CPU_FEATURES and config.CACHE_DIR
"""


@pytest.mark.parametrize("devices", [("cpu", "cudasim"), ("cudasim", "cpu")])
def test_the_simulator_keeps_the_compiler_options_of_the_cpu(devices):
    env = {name: value for name, value in environment().items() if not name.startswith("NUMBA_")}
    run = subprocess.run([sys.executable, "-c", BOTH_DEVICES, *devices], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


WITHOUT_NUMBA_CUDA = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if type(finder).__name__ != "NumbaCudaFinder"]
import numpy as np
from llm_numba.ops import get_ops
ops = get_ops("cudasim")
from numba import cuda
assert "numba_cuda" not in cuda.__file__
x, weight, out = (ops.view(ops.allocate(4 * 9 * 9), 0, (1, 9, 9), "float32") for _ in range(3))
for tensor in x, weight:
    ops.to_device(tensor, np.arange(81).reshape(1, 9, 9) % 7)
ops.matmul_forward(out, x, weight[0], None, ops.view(ops.allocate(4096), 0, (1024,), "float32"))
assert np.array_equal(ops.to_host(out), ops.to_host(x) @ ops.to_host(weight)[0].T)
print("right")
"""


def test_the_simulator_without_numba_cuda():
    """A plain install has the older simulator that is part of Numba."""
    run = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA_CUDA], env=environment(), capture_output=True, text=True)
    assert run.stdout == "right\n", run.stderr
