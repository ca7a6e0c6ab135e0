"""The lessons' tools, on hand-counted cases: accesses, sectors, bank conflicts, races, barriers, bounds, messages."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from numba import config, cuda, njit, prange

from llm_numba.lessons import __main__ as program
from llm_numba.lessons import exercise, notebooks, pictures, results, timing, tracing
from llm_numba.lessons.counting import bank_conflict, count, instructions
from llm_numba.lessons.faults import faults
from llm_numba.lessons.ladder import Ladder, WrongResult, check, ladders, title
from llm_numba.lessons.problem import Problem, find_error, garbage, normal
from llm_numba.lessons.tracing import simulate, simulate_cpu
from llm_numba.util.cli import UserError

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif("not __import__('numba').config.ENABLE_CUDASIM", reason="needs --device cudasim"),
]
float32 = np.float32


def counts_of(trace):
    return {(c.array, c.kind): c for c in count(trace)}


def launch(kernel, threads=32, blocks=1):
    return lambda *args: kernel[blocks, threads](*args)


@cuda.jit
def copy_with_stride(out, inp, stride):
    i = cuda.grid(1)
    out[i] = inp[i * stride]


@pytest.mark.parametrize(("stride", "sectors", "coalesced"), [(1, 4, 1), (2, 8, 0), (8, 32, 0), (0, 1, 1)])
def test_sectors_of_a_warp(stride, sectors, coalesced):
    """32 contiguous floats are 4 sectors of 32 bytes; at stride 8, each float is in a different sector."""
    trace = simulate(launch(copy_with_stride), out=garbage(32), inp=np.arange(256, dtype=float32), stride=stride)
    assert trace.results["out"].tolist() == [i * stride for i in range(32)]
    found = counts_of(trace)
    assert found["inp", "read"][3:8] == (32, 1, sectors, 1 if stride == 0 else 4, coalesced)
    assert found["out", "write"][3:8] == (32, 1, 4, 4, 1)


def test_contiguous_access_that_starts_within_a_sector_is_coalesced():
    trace = simulate(
        lambda out, inp: copy_with_stride[1, 32](out, inp[1:], 1), out=garbage(32), inp=np.zeros(33, float32)
    )
    assert counts_of(trace)["inp", "read"][3:8] == (32, 1, 5, 4, 1)


def test_each_warp_of_each_block_counts_separately():
    trace = simulate(launch(copy_with_stride, 64, 2), out=garbage(128), inp=np.zeros(128, float32), stride=1)
    assert counts_of(trace)["inp", "read"][3:8] == (128, 4, 16, 16, 4)


@cuda.jit
def through_shared(out, stride):
    tile = cuda.shared.array(1024, np.float32)
    i = cuda.threadIdx.x
    tile[i * stride] = i
    out[i] = tile[i * stride]


@pytest.mark.parametrize(("stride", "expected"), [(1, 1), (2, 2), (8, 8), (31, 1), (32, 32)])
def test_bank_conflicts(stride, expected):
    """Word i lies in bank i % 32, so an even stride gives conflicts."""
    trace = simulate(launch(through_shared), out=garbage(32), stride=stride)
    assert [bank_conflict(group) for group in instructions(trace) if group[0].array == "tile"] == [expected, expected]
    (written,) = [c for c in count(trace) if c.array == "tile" and c.kind == "write"]
    assert (written.instructions, written.passes) == (1, expected)
    assert faults(trace) == []


@cuda.jit
def shift(out, inp, with_barrier):
    tile = cuda.shared.array(32, np.float32)
    i = cuda.threadIdx.x
    tile[i] = inp[i]
    if with_barrier:
        cuda.syncthreads()
    out[i] = tile[(i + 1) % 32]


def test_race_within_a_block():
    inp = np.arange(32, dtype=float32)
    right = simulate(launch(shift), out=garbage(32), inp=inp, with_barrier=True)
    assert faults(right) == []
    assert right.results["out"].tolist() == [*range(1, 32), 0]
    wrong = faults(simulate(launch(shift), out=garbage(32), inp=inp, with_barrier=False))
    assert len(wrong) == 2 and "a race: " in wrong[0] and "tile[" in wrong[0] and "no barrier" in wrong[0]
    assert "tile[1] in shared memory before any thread" in wrong[1]


@cuda.jit
def add_up(out, inp, atomically):
    i = cuda.grid(1)
    if atomically:
        cuda.atomic.add(out, 0, inp[i])
    else:
        out[0] += inp[i]


def test_race_between_blocks_and_atomics():
    arrays = dict(out=np.zeros(1, float32), inp=np.ones(4, float32))
    right = simulate(launch(add_up, 2, 2), **arrays, atomically=True)
    assert faults(right) == [] and right.results["out"][0] == 4
    assert counts_of(right)["out", "atomic"].accesses == 4 and ("out", "read") not in counts_of(right)
    (fault,) = faults(simulate(launch(add_up, 1, 2), **arrays, atomically=False))
    assert re.match(r"a race: thread 0 of block 0 writes out\[0\] and thread 0 of block 1 reads it: blocks run", fault)


@cuda.jit
def second_block_waits(out):
    if cuda.blockIdx.x == 1:
        cuda.syncthreads()
    out[0] += 1


def test_a_barrier_does_not_order_two_blocks():
    (fault,) = faults(simulate(launch(second_block_waits, 1, 2), out=np.zeros(1, float32)))
    assert "a race: thread 0 of block 0" in fault and "a barrier does not synchronise them" in fault


@cuda.jit
def early_return(out):
    i = cuda.threadIdx.x
    if i >= 3:
        return
    cuda.syncthreads()
    out[i] = i


@cuda.jit
def two_barriers(out):
    i = cuda.threadIdx.x
    if i % 2:
        cuda.syncthreads()
    else:
        cuda.syncthreads()
    out[i] = i


def test_divergent_barriers():
    (fault,) = faults(simulate(launch(early_return, 4), out=garbage(4)))
    assert "thread 0 of block 0 waits at syncthreads" in fault and "thread 3 of its block has ended" in fault
    (fault,) = faults(simulate(launch(two_barriers, 4), out=garbage(4)))
    assert "thread 1 of its block waits at another barrier" in fault


@pytest.mark.parametrize(
    ("stride", "words"),
    [
        (
            9,
            "thread 29 of block 0 reads inp[261], which is out of bounds: inp has shape (256,), so the index must be",
        ),
        (-1, "thread 1 of block 0 reads inp[-1], which is out of bounds"),
    ],
)
def test_out_of_bounds(stride, words):
    trace = simulate(launch(copy_with_stride), out=garbage(32), inp=np.zeros(256, float32), stride=stride)
    assert (
        len(trace.faults) == 1 and trace.faults[0].startswith(words) and "`out[i] = inp[i * stride]`" in trace.faults[0]
    )


@njit(parallel=True)
def sum_rows(total, inp, racing):
    for r in prange(inp.shape[0]):
        for c in range(inp.shape[1]):
            total[0 if racing else r] += inp[r, c]


def test_prange():
    inp = np.ones((3, 4), float32)
    right = simulate_cpu(sum_rows, total=np.zeros(3, float32), inp=inp, racing=False)
    assert faults(right) == [] and right.results["total"].tolist() == [4, 4, 4]
    (fault,) = faults(simulate_cpu(sum_rows, total=np.zeros(3, float32), inp=inp, racing=True))
    assert fault.startswith("a race: iteration 0 of prange writes total[0] and iteration 1 of prange reads it: iter")
    assert sum_rows.py_func.__globals__["prange"] is prange


def test_inputs_are_not_changed():
    given = np.zeros(32, float32)
    simulate(launch(copy_with_stride), out=given, inp=np.ones(32, float32), stride=1)
    assert not given.any()


def twice(out, inp):
    out[...] = 2 * inp


def problem(**changes):
    of_n = lambda rng, n: dict(out=garbage(n), inp=normal(rng, n))  # noqa: E731
    return Problem(twice, of_n, ("out",), (dict(n=1), dict(n=5)))._replace(**changes)


@njit
def right(out, inp):
    for i in range(inp.shape[0]):
        out[i] = 2 * inp[i]


@njit
def one_too_many(out, inp):
    for i in range(inp.shape[0] + 1):
        out[i] = 2 * inp[i - 1] if i == inp.shape[0] else 2 * inp[i]


@njit
def all_but_the_last(out, inp):
    for i in range(max(1, inp.shape[0] - 1)):
        out[i] = 2 * inp[i]


@njit
def changes_its_input(out, inp):
    for i in range(inp.shape[0]):
        inp[i] *= 2
        out[i] = inp[i]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (one_too_many, "with n=1: it writes after the end of out, which has shape (1,)"),
        (all_but_the_last, "with n=5: out[4] is nan, but should be "),
        (changes_its_input, "with n=1: it changes its input inp, at inp[0]"),
        (lambda out: None, "with n=1: it raises TypeError: "),
    ],
)
def test_errors_of_compiled_functions(function, message):
    assert find_error(right, problem()) is None
    assert find_error(function, problem()).startswith(message)


def test_errors_of_recorded_functions():
    assert find_error(right, problem(), recorded=True) is None
    assert "out[1], which is out of bounds" in find_error(one_too_many, problem(), recorded=True)
    assert "out[4] is never written" in find_error(all_but_the_last, problem(), recorded=True)


def ladder(*rungs):
    return Ladder("twice", problem(), rungs, timed=dict(n=9), quick=dict(n=9), nbytes=lambda n: 8 * n)


def test_check_of_a_ladder(capsys):
    check(ladder(right))
    assert "right: correct; largest error 0.0e+00" in capsys.readouterr().out
    with pytest.raises(WrongResult, match=r"all_but_the_last: with n=5: out\[4\] is nan"):
        check(ladder(right, all_but_the_last))


def test_times():
    found = timing.times(ladder(right), dict(n=64))
    assert found["work"] == 512 and found["unit"] == "bytes" and 0 < found["rows"]["right"] < 1
    table = timing.time_table(found | {"rows": {"right": 1e-3, "PyTorch": 5e-4}, "limit": 1e6})
    assert re.search(r"\| right +\| +1 \| +0.0 GB/s \| +51% \| +50% \|", "\n".join(table))
    with pytest.raises(WrongResult):
        timing.times(ladder(right, all_but_the_last), dict(n=64))


def test_a_separate_process_times_a_ladder(monkeypatch):
    """As for a GPU, in a process without the simulator; here with a CPU ladder."""
    monkeypatch.setenv("LESSONS_FAST", "1")
    file = timing.FOLDER / "rungs" / "layernorm_cpu.py"
    forward = next(ladder for ladder in ladders(file) if ladder.name == "layernorm_forward")
    found = timing.times_on_gpu(forward, dict(B=1, T=2, C=8))
    assert found["sizes"] == dict(B=1, T=2, C=8) and found["limit"] is None
    assert list(found["rows"]) == [title(rung) for rung in forward.rungs]
    with pytest.raises(UserError, match="layernorm_forward: cannot be timed on the GPU"):
        timing.times_on_gpu(forward, dict(B=1, T=2))


def test_the_limit_depends_on_the_dtype(monkeypatch):
    ops = SimpleNamespace(peak_flops={"float32": 1.0, "bfloat16": 8.0}.get, peak_bandwidth=dict)
    monkeypatch.setattr(timing, "FAST", False)
    monkeypatch.setattr(timing, "_peaks", {})
    monkeypatch.setattr(timing, "device_ops", lambda device: (ops, device))
    assert timing.peaks("cuda")["flops"] == 1.0
    assert timing.peaks("cuda", "bfloat16")["flops"] == 8.0


def test_results(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- lessons -->\nold\n<!-- end of lessons -->\nafter\n")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "PAGE", page)
    monkeypatch.setattr(results, "all_ladders", lambda device: [ladder(right)] if device == "cpu" else [])
    path = results.write("cpu")
    assert json.loads(path.read_text())["ladders"]["twice"]["sizes"] == {"n": 9}
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| twice, n = 9 | right |" in text
    assert results.write("cuda") is None
    assert results.slug("A B (c), 2 threads, 512-bit vectors") == "a-b-c-2-threads"


LESSON = """# %% [markdown]
# # A title
#
# Text.

# %%
print("text")

# %%
1 + 1
"""


def test_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    script = tmp_path / "00_first.py"
    script.write_text(LESSON)
    assert notebooks.script_of("0") == notebooks.script_of("00_first") == script
    assert notebooks.title_of(script) == "A title"
    with pytest.raises(UserError, match="no such lesson"):
        notebooks.script_of("77")
    assert "is missing" in notebooks.complaints(script)[0]
    target = notebooks.build(script)
    assert notebooks.complaints(script) == []
    notebook = json.loads(target.read_text())
    assert notebook["cells"][1]["outputs"][0]["text"] == ["text\n"] and notebook["metadata"] == notebooks.KERNEL
    script.write_text(LESSON + "2 + 2\n")
    assert "have different cells" in notebooks.complaints(script)[0]
    script.write_text(LESSON)
    notebook["cells"][2]["execution_count"] = None
    target.write_text(json.dumps(notebook))
    assert "cell 2 was not run, or not in order" in notebooks.complaints(script)[0]
    script.write_text(LESSON + "1 / 0\n")
    with pytest.raises(UserError, match="00_first.py: a cell raised ZeroDivisionError"):
        notebooks.build(script)


def test_program(tmp_path, capsys):
    assert program.main([]) == 0
    assert "python lessons/01_layernorm.py" in capsys.readouterr().out
    copy = tmp_path / "llm_numba" / "numba" / "mine.py"  # a folder named like a library does not hide your lines
    copy.parent.mkdir(parents=True)
    shutil.copy(exercise.FOLDER / "exercises" / "layernorm_mean.py", copy)
    assert program.main(["check", str(copy)]) == 1
    printed = capsys.readouterr().out
    assert "the function is unfinished: write your code at" in printed and "`raise NotImplementedError" in printed
    copy.write_text(copy.read_text().replace("EXERCISE =", "OTHER ="))
    for bad, message in ((str(copy), "is not an exercise"), ("nothing", "there is no such exercise")):
        with pytest.raises(UserError, match=message):
            program.main(["check", bad])
    with pytest.raises(UserError, match="--device"):
        program.main(["results", "--device", "tpu"])


@pytest.mark.parametrize("name", ["layernorm_mean", "softmax_merge"])
def test_a_missing_package_is_not_the_learners_error(name, monkeypatch):
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'numba-cuda.* is not installed: pip install -e "\.\[lessons\]"'):
        exercise.check(name)


def test_a_file_that_cannot_be_loaded(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("import no_such_package\n")
    with pytest.raises(UserError, match=r"mine\.py: cannot be loaded \(ModuleNotFoundError: .*no_such_package"):
        exercise.check(str(mine))


def test_tera_flops_are_labelled_as_such():
    found = {"rows": {"op_v1": 1.0, "op_v2": 0.5}, "work": 12.8e12, "unit": "flops", "limit": 50e12}
    (axis,) = pictures.draw_times(found).axes
    assert axis.get_xlabel() == "TFLOP/s"
    assert [text.get_text() for text in axis.texts] == ["12.8", "25.6", "the machine's limit: 50 TFLOP/s "]


def test_the_simulator_must_be_on(monkeypatch):
    monkeypatch.setattr(config, "ENABLE_CUDASIM", 0)
    with pytest.raises(UserError, match="simulator"):
        simulate(launch(copy_with_stride))
