"""The benchmark: tables from made-up results, rejected arguments, checks of the ops, and one small real run."""

import ctypes
import inspect
import json
import shutil
import stat
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from training import random_parameters, set_parameters

from llm_numba import bench
from llm_numba.arena import Arena
from llm_numba.bench import breakdown, curves, datasheets, machine, measuring, op_cases, races, tables, worker
from llm_numba.cpu import peak
from llm_numba.models import preset
from llm_numba.ops import WRITES, get_ops
from llm_numba.util.cli import UserError

NANO = preset("nano")
BEGIN, END = "<!-- bench cpu fp32 -->", "<!-- end of bench cpu fp32 -->"
SMALL = op_cases.op_list(NANO, op_cases.SIMULATED)


def row(name, shape, ours, flops=0.0, nbytes=0, pattern="", memory=None, vocabulary=False, **times):
    made = races.new_row(name, shape, flops, nbytes, pattern)
    made["times"] = {"ours": ours} | {column.replace("_", " "): taken for column, taken in times.items()}
    return made | {"memory": memory or {}, "vocabulary": vocabulary}


def results(*rows, builds=("torch", "avx512"), device="cpu", dtype="fp32"):
    made = bench.new_results("d12", 2, device, dtype) | {"machine": "a machine, 2 threads"}
    made |= {"rows": list(rows), "builds": list(builds), "peak_flops": 100.0}
    return made | {"bandwidth": {"read": 10.0, "copy": 20.0, "add": 30.0, "update": 40.0}}


# --- ratios, shares and targets


def test_ratio_is_of_medians_to_the_faster_of_eager_and_compiled():
    r = row("step", "4 x 64", [1, 2, 90], torch_eager=[8, 8, 1], torch_compiled=[5, 4, 4], avx512_eager=[10])
    assert tables.ratio(r, "torch") == 2 / 4
    assert tables.ratio(r, "avx512") == 2 / 10
    assert tables.ratio(row("step", "4 x 64", [1]), "torch") is None


def test_memory_ratio_is_to_the_smaller_of_eager_and_compiled():
    memory = {"ours": 30, "torch eager": 60, "torch compiled": 40, "avx512 eager": None}
    r = row("step", "4 x 64", [1], memory=memory)
    assert tables.memory_ratio(r, "torch") == 30 / 40
    assert tables.memory_ratio(r, "avx512") is None


def test_share_of_peak_or_of_the_pattern_s_bandwidth():
    assert tables.share(row("matmul_forward", "", [2.0, 2, 9], flops=50), results()) == 0.25
    assert tables.share(row("gelu_forward", "", [2.0], nbytes=30, pattern="add"), results()) == 0.5


@pytest.mark.parametrize(
    "made, missed",
    [
        (row("step", "4 x 64", [3.3], flops=250.0, torch_eager=[10], avx512_eager=[7]), 0),
        (row("step", "4 x 64", [3.3], flops=240.0, torch_eager=[10], avx512_eager=[7]), 1),
        (row("step", "4 x 64", [3.3], flops=250.0, torch_eager=[9.9], avx512_eager=[7]), 1),
        (row("step", "4 x 64", [3.3], flops=250.0, torch_eager=[10], avx512_eager=[6]), 1),
        (row("step", "4 x 64", [3.3], flops=250.0, torch_eager=[10]), 1),
        (row("step", "4 x 256", [3.5], flops=1.0, torch_eager=[10], avx512_eager=[4.6]), 0),
        (row("step", "4 x 256", [3.6], flops=1.0, torch_eager=[10], avx512_eager=[4.6]), 2),
        (row("step", "4 x 1024", [3.2], flops=1.0, torch_eager=[10], avx512_eager=[5.7]), 0),
        (row("step", "4 x 1024", [3.3], flops=1.0, torch_eager=[10], avx512_eager=[5.7]), 2),
        (row("step", "2 x 32", [9.0], flops=1.0, torch_eager=[1]), 0),
        (row("sampling", "64 tokens", [7.0], nbytes=1, pattern="read", torch_eager=[10], avx512_eager=[10]), 0),
        (row("sampling", "64 tokens", [8.0], nbytes=1, pattern="read", torch_eager=[10], avx512_eager=[10]), 2),
        (row("matmul_forward", "", [1.0], flops=86), 0),
        (row("matmul_backward", "", [1.0], flops=84), 1),
        (row("matmul_backward", "", [1.0], flops=81, vocabulary=True), 0),
        (row("matmul_backward", "", [1.0], flops=79, vocabulary=True), 1),
        (row("adamw_update", "", [1.0], nbytes=33, pattern="update"), 0),
        (row("adamw_update", "", [1.0], nbytes=31, pattern="update"), 1),
        (row("layernorm_backward", "", [1.0], nbytes=31, pattern="update"), 1),
        (row("gelu_backward", "", [1.0], nbytes=23, pattern="add"), 1),
        (row("residual_layernorm_forward", "", [1.0], nbytes=23, pattern="add"), 1),
        (row("encoder_backward", "", [1.0], nbytes=1, pattern="update"), 0),  # no target
    ],
    ids=lambda x: f"{x['name']} {x['shape']}" if isinstance(x, dict) else str(x),
)
def test_targets(made, missed):
    small = {"ours": 1, "torch eager": 1, "avx512 eager": 1}
    found = tables.verdicts(results(made | {"memory": small if made["name"] == "step" else {}}))
    assert sum(not verdict.met for verdict in found) == missed, tables.verdict_table(found)


def test_memory_target_and_a_build_that_is_absent():
    memory = {"ours": 41, "torch eager": 40}
    made = row("step", "4 x 64", [1.0], flops=90.0, torch_eager=[10], memory=memory)
    missed = [v for v in tables.verdicts(results(made, builds=["torch"])) if not v.met]
    assert [(v.measured, v.bound) for v in missed] == [(41 / 40, 1.0)]
    assert all(v.met for v in tables.verdicts(results(made | {"memory": {}}, builds=[])))


def test_report():
    step = row("step", "4 x 64", [0.5, 0.25, 1.0], flops=25.0, torch_eager=[2.0], memory={"ours": 1536})
    step["absent"] = {"torch compiled": "no C++ compiler"}
    made = results(step, row("gelu_forward", "n=3", [1.0], nbytes=10**9, pattern="read"), builds=["torch"])
    made |= {"no_build": {"avx512": "this processor has no AVX-512"}, "peak_flops": 2e11}
    made["scaling"] = [{"shape": "4 x 64", "threads": n, "times": [t]} for n, t in ((1, 3.0), (2, 2.0))]
    text = tables.report(made)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| | ours, ms | rate | share of | torch eager, ms | torch compiled, ms | ours / torch |" in lines
    assert "| step 4 x 64 | 500 (250-1000) | 0.0 GFLOP/s | 0% peak | 2000 (2000-2000) | failed | 0.250 |" in lines
    assert "| | ours, ms | rate | share of |" in lines  # ops: no PyTorch times, so no columns
    assert "| step 4 x 64 | 1.5 KiB |" in lines
    assert "| 2 | 2000 (2000-2000) | 1.50 | 75% |" in lines
    assert "failed: no C++ compiler" in lines
    assert "avx512, PyTorch with MKL's AVX-512 path: absent, this processor has no AVX-512." in lines
    assert (
        "measured peak 200 GFLOP/s" in text and "2 threads" in text and made["machine"] in text and made["date"] in text
    )


def test_report_of_a_gpu():
    step = row("step", "4 x 64", [0.5], flops=25e12, no_graph=[1.0])
    step["times"] |= {"bf16 eager": [0.4], "bf16+cudnn compiled": [0.25]}
    builds = ["bf16", "bf16+cudnn"]
    made = results(step, builds=builds, device="cuda", dtype="bf16") | {"peak_flops": 1e14, "wrong": ["gelu differs"]}
    made["datasheet"] = 2e14
    lines = [" ".join(line.split()) for line in tables.report(made).splitlines()]
    assert (
        "| | ours, ms | rate | share of | of data sheet | no graph, ms | bf16 eager, ms | ours / bf16 | "
        "bf16+cudnn compiled, ms | fastest PyTorch |" in lines
    )
    assert (
        "| step 4 x 64 | 500 (500-500) | 50.0 TFLOP/s | 50% peak | 25.0% | 1000 (1000-1000) | 400 (400-400) | 2.000 | "
        "250 (250-250) | bf16+cudnn compiled |" in lines
    )
    assert "wrong result, not timed: gelu differs" in lines and "d12, bf16: a machine" in lines[0]
    assert "measured peak 100.0 TFLOP/s (data sheet 200.0 TFLOP/s)" in lines[0] and any(
        "GPU memory" in line for line in lines
    )


def test_report_of_the_simulator_has_no_shares():
    made = results(row("step", "1 x 8", [0.5], flops=1e9), builds=[], device="cudasim")
    made |= {"peak_flops": 0.0, "bandwidth": {}}
    lines = [" ".join(line.split()) for line in tables.report(made).splitlines()]
    assert "| step 1 x 8 | 500 (500-500) | 2.0 GFLOP/s |" in lines


def test_table_is_aligned_markdown():
    assert tables.table(["op", "ms"], [["gelu", "1"], ["a", "100"]]) == [
        "| op   |  ms |",
        "|------|----:|",
        "| gelu |   1 |",
        "| a    | 100 |",
    ]


@pytest.mark.parametrize("check, seconds, status", [(True, 1.0, 1), (True, 0.1, 0), (False, 1.0, 0)])
def test_exit_status_and_files(tmp_path, monkeypatch, capsys, check, seconds, status):
    page = tmp_path / "benchmarks.md"
    page.write_text(f"a\n{BEGIN}\n{END}\nb")
    monkeypatch.setattr(bench, "DOCS", page)
    made = results(row("matmul_forward", "R=1", [seconds], flops=9.0))
    args = SimpleNamespace(check=check, json=tmp_path / "out.json", docs=True)
    assert bench.deliver(args, made) == status
    assert bench.deliver(args, made | {"wrong": ["gelu"]}) == 1
    assert bench.deliver(args, made) == status
    printed = capsys.readouterr().out
    assert ("MISSED" in printed, "met" in printed) == (status == 1, check and status == 0)
    assert json.loads((tmp_path / "out.json").read_text()) == made
    assert tables.report(made) in page.read_text()


def test_report_of_loss_curves():
    found = {"ours fp32": [3.0] * 20 + [2.0] * 20, "PyTorch fp32": [3.0] * 20 + [2.0] * 19 + [1.9]}
    lines = [" ".join(line.split()) for line in curves.report(found, "a GPU").splitlines()]
    assert "| 21 to 40 | 2.0000 | 1.9950 |" in lines
    assert "- ours fp32 and PyTorch fp32: mean distance per step 0.00250, largest 0.10000" in lines


# --- docs/benchmarks.md


def test_tables_replace_the_text_between_the_markers(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter – é\n", encoding="utf-8")
    for _ in range(2):
        tables.write_tables(page, "bench cpu fp32", "| new |")
        assert page.read_text(encoding="utf-8") == f"before\n\n{BEGIN}\n| new |\n{END}\n\nafter – é\n"


@pytest.mark.parametrize("text", ["none", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_markers_is_rejected_and_kept(tmp_path, text):
    page = tmp_path / "benchmarks.md"
    page.write_text(text)
    with pytest.raises(UserError, match="benchmarks.md: expected .*bench cpu fp32"):
        tables.write_tables(page, "bench cpu fp32", "new")
    assert page.read_text() == text


def test_the_page_has_a_section_for_every_device_and_dtype():
    for device, dtype in (("cpu", "fp32"), ("cuda", "bf16")):
        tables.split_at_marker(bench.DOCS, bench.marker(device, dtype))


# --- the command line


@pytest.mark.compiled
@pytest.mark.parametrize(
    "line, message",
    [
        ("--shapes 4by64", "--shapes 4by64: expected"),
        ("--shapes 0x64", "--shapes 0x64: expected"),
        ("--shapes 4x2000", "exceed the model's context of 1024"),
        ("--shapes 99999x1024", "of memory are available"),
        ("--preset nano --check", "--check: targets exist only for --preset d12"),
        ("--device cudasim --check", "--check: targets exist only for .* --device cpu"),
        ("--device cudasim --scaling", "--scaling: .* use --device cpu"),
        ("--dtype bf16", "--dtype bf16: the CPU computes in float32 only"),
        ("--json /no/such/folder/x.json", "does not exist; create it"),
        ("--docs", "no-such-page.md: cannot be read"),
        ("--threads 99999", "--threads 99999: must be 0 to"),
        ("--threads -1", "--threads -1: must be 0 to"),
        ("--against torch", "pip install torch"),
    ],
)
def test_rejected_arguments(monkeypatch, line, message):
    monkeypatch.setattr(bench, "DOCS", Path("no-such-page.md"))
    monkeypatch.setattr(worker.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "precompile", lambda *_: pytest.fail("it started"))
    with pytest.raises(UserError, match=message):
        bench.main([*(() if "--device" in line else ("--device", "cpu")), *line.split()])


# --- MKL's AVX-512 path


@pytest.mark.parametrize(
    "cpu, features, platform, path, why",
    [
        ("skylake-avx512", {"avx512f": True}, "linux", None, "not needed"),
        ("znver3", {"avx512f": False}, "linux", None, "has no AVX-512"),
        ("znver4", {"avx512f": True}, "win32", None, "works only on Linux"),
        ("znver4", {"avx512f": True}, "linux", "", "no C compiler"),
    ],
)
def test_reason_without_a_shim(monkeypatch, tmp_path, cpu, features, platform, path, why):
    monkeypatch.setattr(worker, "sys", SimpleNamespace(platform=platform))
    if path is not None:
        monkeypatch.setenv("PATH", path)
    library, reason = worker.build_shim(tmp_path, cpu, features)
    assert library is None and why in reason


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no headers >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert worker.build_shim(tmp_path, "znver4", {"avx512f": True}) == (None, f"{compiler} failed: no headers")


@pytest.mark.skipif(not (sys.platform == "linux" and shutil.which("cc")), reason="needs Linux and a C compiler")
def test_the_shim_returns_1(tmp_path):
    library, why = worker.build_shim(tmp_path, "znver4", {"avx512f": True})
    assert not why and ctypes.CDLL(str(library)).mkl_serv_intel_cpu_true() == 1


# --- measuring


def test_measure_drops_the_first_of_several_runs(monkeypatch):
    clock, durations = [0.0], iter([5.0, 1.0, 1.5, 2.0, 9.0])

    def run():
        clock[0] += next(durations)

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])
    assert measuring.measure(run, 8.0) == [1.0, 1.5, 2.0]
    assert measuring.measure(run, 8.0) == [9.0]


def test_measure_stops_at_a_number_of_runs():
    assert len(measuring.measure(lambda: None, 1e9)) == measuring.MAX_RUNS - 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_includes_freed_memory():
    before, nbytes = measuring.resident_memory(), 1 << 28
    np.ones(2 * nbytes, np.uint8)  # an earlier peak
    found = measuring.peak_memory(lambda: np.ones(nbytes, np.uint8), before)
    assert found == pytest.approx(nbytes, rel=0.1)


def test_turns_alternate_and_continue_without_one_that_fails():
    order = []

    def turn(name):
        def run(seconds):
            order.append(name)
            if order.count("b") == 2 and name == "b":
                raise worker.WorkerFailed("out of memory")
            return [seconds]

        return run

    times, absent = races.take_turns("", {name: turn(name) for name in "abc"}, 3, 0.5)
    assert order == list("abcabcac")
    assert times == {"a": [0.5] * 3, "c": [0.5] * 3} and absent == {"b": "out of memory"}


@pytest.mark.compiled
def test_bandwidth():
    x, y, z = (np.full(2 * peak.BLOCK, value, np.float32) for value in (1, 2, 0))
    peak.stream_read(x, y, z)
    assert z[:2].tolist() == [peak.BLOCK] * 2
    peak.stream_copy(x, y, z)
    assert (z == 2).all()
    peak.stream_add(x, y, z)
    assert (z == 3).all()
    peak.stream_update(x, y, z)
    assert (x == 2).all()
    found = peak.peak_bandwidth(4 * peak.BLOCK)
    assert list(found) == ["read", "copy", "add", "update"] and min(found.values()) > 1e6


def test_bandwidth_of_a_gpu(device):
    if device == "cpu":
        pytest.skip("tested above")
    from llm_numba.cuda import jit, memory
    from llm_numba.cuda import peak as gpu

    n = 2 * jit.THREADS * gpu.EACH
    x, y, z = arrays = [memory.view(memory.allocate(4 * n), 0, (n,), "float32") for _ in range(3)]
    for array, value in zip(arrays, (1, 2, 0), strict=True):
        memory.to_device(array, value)
    found = []
    for pattern, result in (("read", z), ("copy", z), ("add", z), ("update", x)):
        gpu.STREAMS[pattern][0][2, jit.THREADS, jit.stream()](x, y, z)
        found.append(memory.to_host(result))
    assert found[0].tolist() == [n // 2] * 2 + [0] * (n - 2)
    assert (found[1] == 1).all() and (found[2] == 3).all() and (found[3] == 2).all()
    if device == "cuda":
        rates = gpu.peak_bandwidth(4 * n)
        assert list(rates) == ["read", "copy", "add", "update"] and min(rates.values()) > 1e6
        assert min(gpu.peak_flops(), gpu.peak_flops("bfloat16")) > 1e11
        assert 0 < gpu.timed(lambda: memory.zero(x)) < 0.1
    else:
        assert gpu.peak_bandwidth() == {} and gpu.peak_flops() is None
        assert gpu.timed(lambda: time.sleep(0.01)) >= 0.01


# --- the ops of a step


def test_the_ops_of_a_step(device):
    """Every call of an op is in the table, with its work."""
    if device == "cudasim":
        pytest.skip("the simulator takes minutes; a GPU counts its launches in a graph")
    ops = get_ops(device)
    found = {
        (r["name"], r["shape"]): r
        for r in breakdown.break_down(ops, NANO, races.new_training(ops, NANO, 2, 16), device, 2)
    }
    assert found["matmul_forward", "R=32 C=16 OC=48"]["calls"] == NANO.num_layers
    assert found["matmul_forward", "R=32 C=16 OC=48"]["flops"] == NANO.num_layers * 2 * 32 * 16 * 48
    assert found["attention_backward", "B=2 T=16 C=16"]["flops"] == NANO.num_layers * 4 * 2 * 16 * 16 * 16
    assert found["adamw_update", ""]["calls"] == 1
    assert found["encoder_forward", ""]["bytes"] == 4 * (2 * 32 * 16 + 32 + 32 * 16)  # wpe has 32 rows
    assert {name for name, _ in found} <= set(WRITES) and min(r["seconds"] for r in found.values()) >= 0
    made = results() | {"breakdown": {"2 x 16": list(found.values())}}
    assert "| step 2 x 16, by op " in tables.report(made)


@pytest.mark.parametrize(
    "name, tflops",
    [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
     ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165.2),
     ("NVIDIA GeForce RTX 4090 Laptop GPU", 0), ("NVIDIA A1000", 0)],
)  # fmt: skip
def test_peaks_of_data_sheets(name, tflops):
    assert datasheets.datasheet_peak(name, "bf16") == pytest.approx(1e12 * tflops)
    assert datasheets.datasheet_peak(name, "fp32") == 0


# --- ops are checked before they are timed


def test_op_list_has_all_matmuls_of_gpt2_and_every_op():
    cases = op_cases.op_list(preset("d12"), op_cases.CPU)
    matmuls = {tuple(sizes.values()) for op, sizes in cases if op == "matmul_backward"}
    shapes = [(768, 2304, True), (768, 768, True), (768, 3072, True), (3072, 768, True), (768, 50304, False)]
    assert matmuls == {(R, *shape) for R in (256, 1024) for shape in shapes}
    left_out = {"zero", "copy", "to_device", "residual_backward", "add_mean", "clip"}
    left_out |= {"attention_cached_forward", "attention_weights", "encoder_forward_at", "sample_token"}
    assert {op for op, _ in cases} == set(WRITES) - left_out
    for op, sizes in cases:  # larger than the caches
        if "B" in sizes and "attention" not in op and op != "fused_classifier":
            assert sizes["B"] * sizes["T"] == 16384


CHECKED = {
    (op, name): sizes
    for op, sizes in SMALL
    for name in WRITES[op]
    if name not in ("mean", "rstd", "lse", "master") and not (name == "dbias" and not sizes.get("bias", True))
}


@pytest.mark.parametrize(
    "name, preset_name, shapes",
    [
        ("cpu", "d12", [(4, 64), (4, 256), (4, 1024)]),
        ("cpu", "nano", [(4, 32)]),
        ("cuda", "tiny", [(4, 128), (32, 128)]),
    ],
)
def test_default_shapes_fit_the_context(name, preset_name, shapes):
    assert op_cases.shapes_within(op_cases.SIZES[name], preset(preset_name)) == shapes


@pytest.mark.compiled
@pytest.mark.parametrize("op, name", CHECKED)
def test_an_op_with_a_wrong_result_is_not_timed(op, name):
    ops, sizes = get_ops("cpu"), CHECKED[op, name]
    op_cases.build(ops, op, sizes)
    right = getattr(ops, op)
    position = list(inspect.signature(right).parameters).index(name)

    def wrong(*args):
        right(*args)
        args[position].reshape(-1)[...] *= 1.01

    setattr(ops, op, wrong)
    with pytest.raises(AssertionError, match=f"{op} .*differs from the oracle"):
        op_cases.build(ops, op, sizes)


def test_a_wrong_op_has_no_row_and_the_others_have_one(device, monkeypatch):
    """Tiny sizes: the simulator runs every GPU thread as a Python thread."""
    monkeypatch.setattr(races, "OP_SECONDS", 0.001)
    ops, made = get_ops(device), results(builds=[], device=device)
    tiny = dict(B=1, T=4, C=16)
    right = ops.gelu_forward

    def wrong(out, inp):
        right(out, inp)
        ops.to_device(out, 1.01 * ops.to_host(out))

    ops.gelu_forward = wrong
    cases = [("residual_layernorm_forward", tiny), ("gelu_forward", tiny), ("adamw_update", dict(n=64))]
    races.run_ops(ops, NANO, cases, 1, {}, made)
    assert [row["name"] for row in made["rows"]] == ["residual_layernorm_forward", "adamw_update"]
    assert all(min(row["times"]["ours"]) > 0 for row in made["rows"])
    assert len(made["wrong"]) == 1 and made["wrong"][0].startswith("gelu_forward")
    json.dumps(made)
    assert "wrong result, not timed: gelu_forward" in tables.report(made)


@pytest.mark.gpu
def test_ops_in_bf16(device, monkeypatch):
    ops, tiny = get_ops(device, "bf16"), dict(B=1, T=4, C=16)
    cases = {("residual_layernorm_forward", 4 * 4 * 16 * 2): tiny, ("adamw_update", 64 * 30): dict(n=64)}
    for (op, nbytes), sizes in cases.items():
        assert op_cases.build(ops, op, sizes, "bfloat16").nbytes == nbytes
    right = ops.residual_layernorm_forward

    def wrong(residual, out, *rest):
        right(residual, out, *rest)
        ops.to_device(out, 1.03 * ops.to_host(out))

    ops.residual_layernorm_forward = wrong
    with pytest.raises(AssertionError, match="residual_layernorm_forward .*differs from the oracle"):
        op_cases.build(ops, "residual_layernorm_forward", tiny, "bfloat16")


def test_large_inputs_are_periodic(monkeypatch):
    monkeypatch.setattr(op_cases, "PERIOD", 64)
    ops = SimpleNamespace(**vars(get_ops("cpu")), rng=np.random.default_rng(0), dtype="float32")
    made = op_cases.normal(ops, 3, 50)
    assert (made.reshape(-1)[64:] == made.reshape(-1)[:-64]).all() and len(np.unique(made)) == 64


def test_a_step_on_a_gpu_is_timed_with_and_without_a_graph(monkeypatch):
    monkeypatch.setattr(races, "STEP_SECONDS", 0.001)
    monkeypatch.setattr(races, "break_down", lambda *_: [])
    ops, captured, available = get_ops("cpu"), [], iter([5000, 2000])
    ops.capture = lambda function: lambda: captured.append("replayed") or function()
    ops.available_memory = lambda: next(available)
    made = results(builds=[], device="cuda")
    races.run_step(ops, NANO, 1, 4, 2, {}, made)
    (step,) = made["rows"]
    assert list(step["times"]) == ["ours", "no graph"] and step["memory"] == {"ours": 3000}
    assert len(captured) >= 2 + len(step["times"]["ours"])


def test_a_nan_loss_is_reported(monkeypatch):
    monkeypatch.setattr(races, "initialise", lambda ops, arena, seed: arena.tensors["parameters", "wpe"].fill(np.nan))
    made = results(builds=[])
    races.run_step(get_ops("cpu"), NANO, 1, 4, 1, {}, made)
    assert not made["rows"] and made["wrong"] == ["step 1 of 1 x 4: the loss is nan"]


# --- the machine


@pytest.mark.skipif(sys.platform == "win32", reason="uses a shell script as nvidia-smi")
@pytest.mark.parametrize(
    "script, text",
    [
        ("echo 'NVIDIA X, 580.1, 1980 MHz, 1990 MHz, 3201 MHz, 700.00 W'",
         "NVIDIA X, driver 580.1, SM clock 1980 MHz (max 1990 MHz), memory clock 3201 MHz, power limit 700.00 W"),
        ("echo none; exit 6", "in words"),
        ("echo 'Field is not a valid field'", "in words"),
    ],
)  # fmt: skip
def test_the_gpu_in_one_line(monkeypatch, tmp_path, script, text):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("numba.cuda.get_current_device", lambda: SimpleNamespace(uuid="GPU-1"))
    ops = SimpleNamespace(describe_device=lambda: "in words")
    assert machine.describe_machine("cuda", 2, ops) == text
    assert "--id=GPU-1 --query-gpu=name," in (tmp_path / "asked").read_text()
    assert machine.describe_machine("cudasim", 2, ops) == "in words"
    assert "2 threads" in machine.describe_machine("cpu", 2, ops)


# --- PyTorch's side


@pytest.mark.parametrize(
    "dtype, expected",
    [
        ("fp32", {"torch": ("fp32", ""), "tf32": ("tf32", "")}),
        ("bf16", {"autocast": ("autocast", ""), "autocast+cudnn": ("autocast", "cudnn"),
                  "bf16": ("bf16", ""), "bf16+cudnn": ("bf16", "cudnn")}),
    ],
)  # fmt: skip
def test_builds_on_a_gpu(monkeypatch, dtype, expected):
    asked = []

    @contextmanager
    def torch_worker(build):
        yield lambda name, **arguments: asked.append((build.device, name, arguments)) or {"version": "9"}

    monkeypatch.setattr(bench, "torch_worker", torch_worker)
    made = results(device="cuda", dtype=dtype)
    with bench.torch_builds(True, made) as builds:
        assert {name: (build.precision, build.attention) for name, build in builds.items()} == expected
        assert {build.device for build in builds.values()} == {"cuda"} and made["builds"] == list(builds)
    assert asked == [("cuda", "start", {"threads": 2, "device": "cuda", "precision": "fp32"})]
    assert made["versions"].endswith(", torch 9") and set(builds) <= set(tables.BUILDS)


@pytest.mark.compiled
@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_pytorch_precisions(monkeypatch, precision):
    torch = pytest.importorskip("torch")
    from llm_numba.bench import torch_side

    seen, cross_entropy = [], torch_side.F.cross_entropy
    monkeypatch.setattr(torch_side.F, "cross_entropy", lambda x, y: seen.append(x) or cross_entropy(x, y))
    monkeypatch.setattr(torch_side, "device", "cpu")
    monkeypatch.setattr(torch_side, "precision", "fp32")
    try:
        torch_side.start(torch.get_num_threads(), "cpu", precision)
        torch_side.prepare_step(races.sizes_of(NANO), 1, 4)
        assert torch_side.runs["eager"]() == pytest.approx(np.log(NANO.padded_vocab_size), abs=0.3)
        assert seen[0].dtype == torch.bfloat16  # the logits
        for op, sizes in SMALL:
            torch_side.prepare_op(op, sizes)
            torch_side.runs["eager"]()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_worker_that_dies_is_reported_with_its_last_line(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho something >&2\necho cannot load torch >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with worker.torch_worker() as ask, pytest.raises(worker.WorkerFailed, match="status 3: cannot load"):
        ask("start", threads=1, device="cpu", precision="fp32")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, UserError])
def test_no_process_is_left_behind(monkeypatch, tmp_path, failure):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 20\nexit\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(failure), worker.torch_worker():
        while len(started := set(psutil.Process().children(recursive=True)) - before) < 2:
            time.sleep(0.01)  # until it has a child, as it does while it compiles
        start = time.perf_counter()
        raise failure
    assert time.perf_counter() - start < 10
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in started):
        assert time.perf_counter() - start < 10  # a killed process takes a moment to end
        time.sleep(0.01)


def torch_model(torch_side, torch, config, parameters):
    """torch_side's GPT2 with these parameters, named as in llm.c, with one array per name for all layers."""
    found = torch_side.GPT2(races.sizes_of(config))

    def fill(module, name, values):
        getattr(module, "weight" if name.endswith("w") else "bias").copy_(torch.tensor(values))

    with torch.no_grad():
        found.wte.weight.copy_(torch.tensor(parameters.pop("wte")))
        found.wpe.weight.copy_(torch.tensor(parameters.pop("wpe")))
        for name in ("lnfw", "lnfb"):
            fill(found.lnf, name, parameters.pop(name))
        for name, stacked in parameters.items():
            for layer, values in zip(found.layers, stacked, strict=True):
                fill(getattr(layer, name[:-1]), name, values)
    return found


@pytest.mark.compiled
def test_both_sides_compute_the_same(monkeypatch):
    """Same parameters and batch: the same losses in every step, and the same generated tokens."""
    torch = pytest.importorskip("torch")
    from llm_numba.bench import torch_side

    config = preset("nano", vocab_size=256)  # no padding, which PyTorch's softmax would include
    arenas = []
    monkeypatch.setattr(races, "Arena", lambda *args: arenas.append(Arena(*args)) or arenas[-1])
    ops = get_ops("cpu")
    step, sampling = races.new_steps(ops, config, 2, 16)["ours"], races.new_sampling(ops, config, 20)
    parameters = random_parameters(config, np.random.default_rng(1))  # large, so that gradients are clipped
    parameters["wpe"] *= 4  # otherwise the likeliest token is always the last one
    for arena in arenas:
        set_parameters(arena, parameters)
    tokens, targets = arenas[0].tensors["inputs", "batches"][0]
    stream = torch.tensor(np.hstack([tokens, targets[:, -1:]]), dtype=torch.long)
    model = torch_model(torch_side, torch, config, parameters)
    monkeypatch.setattr(torch_side, "GPT2", lambda sizes: model)
    monkeypatch.setattr(torch, "randint", lambda *args: stream)

    torch_side.prepare_sampling(races.sizes_of(config), 20)
    text = sampling()
    assert torch_side.runs["eager"]() == text and len(set(text)) > 5
    torch_side.prepare_step(races.sizes_of(config), 2, 16)
    losses = [step() for _ in range(20)]
    assert losses[0] - losses[-1] > 0.01  # a learning rate that is off by 1% changes the last loss by 1e-4
    assert arenas[0].tensors["inputs", "grad_scale"][0] < 0.9
    theirs = [torch_side.runs["eager"]() for _ in range(20)]
    assert theirs == pytest.approx(losses, abs=4e-6)  # losses near 10; the erf form of GELU differs by 9e-6
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert norm.item() == pytest.approx(1.0, abs=1e-3)  # clipped; AdamW hardly depends on the gradient's scale


@pytest.mark.compiled
def test_a_small_run(monkeypatch):
    """Real processes and every kind of row; a mode that fails gives its reason instead of times."""
    pytest.importorskip("torch")
    monkeypatch.setattr(tables, "MODES", ("eager", "another"))
    monkeypatch.setattr(races, "OP_SECONDS", 0.001)
    monkeypatch.setattr(races, "STEP_SECONDS", 0.001)
    ops, made, builds = get_ops("cpu"), results(builds=["torch"]), {"torch": worker.Build()}
    races.run_ops(ops, NANO, SMALL, 1, builds, made)
    races.run_step(ops, NANO, 2, 8, 2, builds, made)
    races.run_sampling(ops, NANO, 3, 1, builds, made)
    races.run_scaling(ops, NANO, 2, 8, 1, made)
    *rows, step, sampling = made["rows"]
    assert [row["name"] for row in rows] == [op for op, _ in SMALL]
    assert all(set(row["times"]) == {"ours", "torch eager"} and not row["absent"] for row in rows)
    for row in (step, sampling):
        assert set(row["times"]) == {"ours", "torch eager"} and row["absent"] == {
            "torch another": "KeyError: 'another'"
        }
    assert all(min(times) > 0 for row in made["rows"] for times in row["times"].values())
    if sys.platform == "linux":
        assert step["memory"]["torch eager"] > 1e5
    assert [row["threads"] for row in made["scaling"]] == [1, 2]
    json.dumps(made)
    assert tables.report(made).count("failed") == 3
    assert not psutil.Process().children()
