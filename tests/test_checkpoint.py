"""A checkpoint comes back bit for bit or not at all, and no crash, full disk or flipped bit goes unnoticed."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from llm_numba.training import checkpoint as module
from llm_numba.training.checkpoint import checkpoint_path, load, newest, prune, save
from llm_numba.util.cli import UserError

ROOT = Path(__file__).parents[1]
TOKENIZER = ({"kind": "bpe", "pattern": "\\p{L}+é\n"}, bytes(range(256)))
STATE = {"step": 100, "floats": [0.1, 5e-324, 1e308, -0.0, float("nan"), float("-inf")], "big": 2**70, "text": "é\n"}


def tensors_of(seed=0):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (3, 97), dtype=np.uint32)  # every kind of float32: subnormals, infinities, NaNs
    return {
        "wte": bits.view(np.float32),
        "transposed": rng.standard_normal((5, 3)).astype(np.float32).T,
        "every_other": np.arange(10, dtype=np.int64)[::2],
        "tokens": rng.integers(-(2**62), 2**62, 3),
        "bytes": rng.integers(0, 256, 257, dtype=np.uint8),
        "scalar": np.array(1.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }


def bits_of(tensors):
    return {name: (t.dtype, t.shape, t.tobytes()) for name, t in tensors.items()}


def content_of(path):
    tensors, state, tokenizer = load(path)
    return bits_of(tensors), json.dumps(state), tokenizer


def error_of(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.fixture
def small(tmp_path):
    """A small checkpoint in which every byte can be damaged in turn."""
    path = tmp_path / "small.safetensors"
    save(path, {"a": np.arange(3, dtype=np.float32), "b": np.arange(2)}, {"step": 3, "é": [0.5]}, ({"n": 1}, b"abc"))
    return path


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "x.safetensors"
    save(path, tensors_of(), STATE, TOKENIZER)
    tensors, state, tokenizer = load(path)
    assert bits_of(tensors) == bits_of(tensors_of())
    assert struct.pack("6d", *state.pop("floats")) == struct.pack("6d", *STATE["floats"])
    assert state == {name: value for name, value in STATE.items() if name != "floats"}
    assert tokenizer == TOKENIZER
    assert all(t.flags.writeable for t in tensors.values())
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("tokenizer", [None, ({}, b""), ({"kind": "bytes"}, b"")])
def test_tokenizer_may_be_absent_or_empty(tmp_path, tokenizer):
    save(tmp_path / "x", {}, {}, tokenizer)
    assert load(tmp_path / "x") == ({}, {}, tokenizer)


def test_the_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").touch()
    save(tmp_path / "x", {}, {})
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_saving_again_replaces(tmp_path):
    save(tmp_path / "x", tensors_of(0), {"step": 1}, TOKENIZER)
    save(tmp_path / "x", tensors_of(1), {"step": 2})
    tensors, state, tokenizer = load(tmp_path / "x")
    assert (bits_of(tensors), state, tokenizer) == (bits_of(tensors_of(1)), {"step": 2}, None)


def test_a_flipped_bit_is_found(small, tmp_path):
    whole, content, numbers = small.read_bytes(), content_of(small), random.Random(0)
    damaged = tmp_path / "damaged"
    found = 0
    for bit in numbers.sample(range(8 * len(whole)), 200):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(flipped)
        try:
            assert content_of(damaged) == content, f"bit {bit}"
        except UserError as error:
            assert str(damaged) in str(error) and "\n" not in str(error)
            found += 1
    assert found > 190  # only a blank of the header's padding may go unnoticed


def test_a_truncated_file_is_found(small, tmp_path):
    whole = small.read_bytes()
    for length in range(len(whole)):
        (tmp_path / "short").write_bytes(whole[:length])
        assert str(tmp_path / "short") in error_of(load, tmp_path / "short")
    (tmp_path / "long").write_bytes(whole + b"\0")
    assert str(tmp_path / "long") in error_of(load, tmp_path / "long")


@pytest.mark.parametrize("what", ["nothing", "state", "tokenizer", "ranks", "value", "name", "dtype", "shape", "more"])
def test_the_checksum_covers_everything(small, what):
    """A well-formed file, with the old checksum, in which one thing differs."""
    with safe_open(small, "numpy") as file:
        texts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if what in ("state", "tokenizer"):
        texts[what] = texts[what].replace("}", ', "more": 1}')
    elif what == "ranks":
        tensors["tokenizer.ranks"] = np.frombuffer(b"abd", np.uint8)
    elif what == "value":
        tensors["a"][1] = 7
    elif what == "name":
        tensors["c"] = tensors.pop("b")
    elif what == "dtype":
        tensors["a"] = tensors["a"].view(np.int32)
    elif what == "shape":
        tensors["a"] = tensors["a"].reshape(3, 1)
    elif what == "more":
        tensors["more"] = np.zeros(0, np.float32)
    save_file(tensors, small, texts)
    if what == "nothing":
        load(small)
    else:
        assert "checksum" in error_of(load, small)


def test_what_is_no_checkpoint(tmp_path):
    assert "No such file" in error_of(load, tmp_path / "absent")
    assert "directory" in error_of(load, tmp_path)
    (tmp_path / "text").write_text("not a safetensors file, but a text of some length")
    assert "not a safetensors file" in error_of(load, tmp_path / "text")
    save_file({"wte": np.zeros(3, np.float32)}, tmp_path / "other")
    assert "not a checkpoint" in error_of(load, tmp_path / "other")
    save_file({"wte": np.zeros(3, np.float32)}, tmp_path / "other", {"format": "pt"})
    assert "not a checkpoint" in error_of(load, tmp_path / "other")


def test_another_version_s_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(module, "FORMAT", "llm_numba checkpoint 2")
        save(tmp_path / "x", {}, {})
    assert "this version" in error_of(load, tmp_path / "x")


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_names_the_last_whole_one_before_it(tmp_path):
    paths = [checkpoint_path(tmp_path, step) for step in (100, 200, 300, 400)]
    for path in paths:
        save(path, {"a": np.arange(3)}, {})
    damage(paths[2])
    assert error_of(load, paths[2]).endswith(f"{paths[1]}")
    damage(paths[1])
    assert error_of(load, paths[2]).endswith(f"{paths[0]}")
    damage(paths[0])
    assert "--resume" not in error_of(load, paths[2])
    load(paths[3])


def run_script(script, *arguments, prefix=()):
    command = [*prefix, sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


FULL = """
import resource, sys
import numpy as np
from llm_numba.training.checkpoint import checkpoint_path, load, save
from llm_numba.util.cli import UserError
folder, limit = sys.argv[1], int(sys.argv[2])
tensors = {"a": np.arange(1000), "b": np.ones(20_000, np.float32)}
for step in 1, 2:
    save(checkpoint_path(folder, step), tensors, {"step": step})
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # Python ignores SIGXFSZ: write() fails
tensors["b"] = np.ones(200_000, np.float32)
for step in 2, 3:
    try:
        save(checkpoint_path(folder, step), tensors, {"step": step, "again": True})
        sys.exit("nothing was full")
    except UserError as error:
        print(error)
for step in 1, 2:
    assert load(checkpoint_path(folder, step))[1] == {"step": step}
import os
print(*sorted(os.listdir(folder + "/checkpoints")))
"""


def check_full(result, reason):
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for line, name in zip(lines, ["step_000002.safetensors", "step_000003.safetensors"], strict=False):
        assert name in line and reason in line
    assert lines[2:] == ["step_000001.safetensors step_000002.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
@pytest.mark.parametrize("limit", [1, 300_000])
def test_a_file_that_may_not_grow_leaves_everything_as_it_was(tmp_path, limit):
    check_full(run_script(FULL, tmp_path, limit), "File too large")


def test_a_full_disk_leaves_everything_as_it_was(tmp_path):
    unshare = ["unshare", "--mount", "--map-root-user"]  # the file system goes when the process does
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("cannot make a small file system here")
    mount = 'mount -t tmpfs -o size=500k none "$0" && exec "$@"'
    result = run_script(FULL, tmp_path, 0, prefix=[*unshare, "sh", "-c", mount, str(tmp_path)])
    if result.returncode == 32:  # mount's own status
        pytest.skip("cannot mount a small file system here")
    check_full(result, "No space left on device")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    path = checkpoint_path(tmp_path, 3)
    assert str(path) in error_of(save, path, {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


def test_a_state_that_is_not_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path / "x", {}, {"loss": np.float32(1)})
    assert not list(tmp_path.iterdir())


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """No test can pull the plug: that the file is flushed, renamed, and the folder flushed is read off the calls."""
    calls = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append((Path(a).parent, b)), rename(a, b)))
    save(tmp_path / "x", {"a": np.arange(3)}, {})
    expected = [(tmp_path / "x").stat().st_ino, (tmp_path, tmp_path / "x")]
    assert calls == expected + ([] if os.name == "nt" else [tmp_path.stat().st_ino])


KILLED = """
import sys
import numpy as np
from llm_numba.training.checkpoint import checkpoint_path, prune, save
for step in range(1, 10**9):
    save(checkpoint_path(sys.argv[1], step), {"a": np.full(2_000_000, step)}, {"step": step})
    prune(sys.argv[1], 3, 0)
"""


def test_a_killed_writer_leaves_only_whole_checkpoints(tmp_path):
    numbers, interrupted = random.Random(0), 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        writer = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], env=environment)
        deadline = time.monotonic() + 60
        while not checkpoint_path(folder, 1).exists() and writer.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(numbers.uniform(0, 0.15))
        writer.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
        assert writer.wait() != 0
        names = [p.name for p in (folder / "checkpoints").iterdir()]
        whole = [name for name in names if module.NAME.fullmatch(name)]
        interrupted += len(whole) < len(names)
        assert whole
        for name in whole:
            tensors, state, _ = load(folder / "checkpoints" / name)
            assert checkpoint_path(folder, state["step"]).name == name and (tensors["a"] == state["step"]).all()
        last = newest(folder)
        prune(folder, 1, 0)
        assert list((folder / "checkpoints").iterdir()) == [last]
        shutil.rmtree(folder)
    assert interrupted, "no kill came while a file was being written: the test has tested nothing"


def make_run(folder, steps):
    for step in steps:
        checkpoint_path(folder, step).parent.mkdir(exist_ok=True)
        checkpoint_path(folder, step).touch()


def steps_of(folder):
    return sorted(int(p.stem.removeprefix("step_")) for p in (folder / "checkpoints").iterdir())


def test_paths(tmp_path):
    assert checkpoint_path("runs/a", 100) == Path("runs/a/checkpoints/step_000100.safetensors")
    assert checkpoint_path("runs/a", 12345678).name == "step_12345678.safetensors"


def test_newest_goes_by_number_and_passes_over_other_files(tmp_path):
    make_run(tmp_path, [3, 999_999, 1_000_000])
    for name in (
        "step_2000000.safetensors.tmp",
        ".tmpAb3dE9",
        "step_last.safetensors",
        "step_7000000.safetensors.safetensors",
    ):
        (tmp_path / "checkpoints" / name).touch()
    assert newest(tmp_path) == checkpoint_path(tmp_path, 1_000_000)


def test_newest_of_no_run(tmp_path):
    assert str(tmp_path / "absent") in error_of(newest, tmp_path / "absent")
    (tmp_path / "checkpoints").mkdir()
    assert str(tmp_path) in error_of(newest, tmp_path)


@pytest.mark.parametrize(
    "keep, keep_every, left",
    [
        (3, 0, [300, 400, 1_000_000]),
        (1, 0, [1_000_000]),
        (7, 0, [97, 100, 200, 300, 400, 1_000_000]),
        (97, 0, [97, 100, 200, 300, 400, 1_000_000]),
        (1, 200, [200, 400, 1_000_000]),
        (2, 97, [97, 400, 1_000_000]),
    ],
)
def test_prune(tmp_path, keep, keep_every, left):
    make_run(tmp_path, [97, 100, 200, 300, 400, 1_000_000])
    prune(tmp_path, keep, keep_every)
    assert steps_of(tmp_path) == left


def test_prune_removes_stale_temporary_files_and_nothing_else(tmp_path):
    make_run(tmp_path, [1])
    others = [tmp_path / "checkpoints" / name for name in ("notes.txt", "mine.safetensors", "step_x.safetensors")]
    stale = [tmp_path / "checkpoints" / name for name in ("step_000002.safetensors.tmp", ".tmpAb3dE9")]
    for path in others + stale:
        path.touch()
    prune(tmp_path, 1, 0)
    assert set((tmp_path / "checkpoints").iterdir()) == {checkpoint_path(tmp_path, 1), *others}


def test_prune_before_the_first_checkpoint(tmp_path):
    prune(tmp_path, 3, 0)
