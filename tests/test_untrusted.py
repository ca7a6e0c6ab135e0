"""Untrusted files are rejected, never executed, and a run writes only to its own folders.

A damaged or crafted file of any of our formats is accepted or gives a UserError: no other exception, and no more memory
than its size explains. Checkpoints have a checksum, so crafted ones with a valid checksum are tried too.
"""

import ast
import contextlib
import json
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from programs import (
    QUICK,
    ROOT,
    cache,  # noqa: F401
    environment,
    files_in,
    refused,
    run_here,
    write_text,
)

from llm_numba import sample
from llm_numba.data import corpus as data
from llm_numba.data.loader import Loader
from llm_numba.data.shards import Span, check_ids, open_shard
from llm_numba.data.tokenizer import tokenizer_from_state, tokenizer_state
from llm_numba.debug import inspect, replay
from llm_numba.training import checkpoint
from llm_numba.training import settings as run_settings
from llm_numba.training.log import RunLog
from llm_numba.training.read_log import read_run
from llm_numba.util.cli import UserError

pytestmark = pytest.mark.compiled
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    text = write_text(folder / "text.txt", 300)
    run_here(*QUICK, "--data", text, "--steps", 2, "--out", folder / "run")
    return folder / "run"


@contextlib.contextmanager
def only_user_errors(size=0):
    """The block raises nothing else, and allocates at most a small multiple of `size` bytes."""
    tracemalloc.start()
    try:
        with contextlib.suppress(UserError):
            yield
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < 30 * size + 3_000_000, f"{peak} bytes for a file of {size}"
    finally:
        tracemalloc.stop()


@st.composite
def damage(draw, content: bytes):
    """The content with a part of it removed, replaced or doubled."""
    start = draw(st.integers(0, len(content)) | st.integers(0, min(64, len(content))))
    stop = draw(st.integers(start, min(len(content), start + 64)) | st.just(len(content)))
    return content[:start] + draw(st.binary(max_size=16) | st.just(content[start:stop] * 2)) + content[stop:]


# ---------------------------------------------------------------------------------------------------------------------
# Token shards, tokenised text


def shard(magic, version, dtype):
    return struct.pack("<3i", magic, version, 50).ljust(1024, b"\0") + np.arange(50, dtype=dtype).tobytes()


SHARD, LARGE = shard(20240520, 1, "<u2"), shard(20240801, 7, "<u4")


@quick
@given(damage(SHARD) | damage(LARGE) | st.binary(max_size=2000))
@example(SHARD[:8] + struct.pack("<i", 2**31 - 1) + SHARD[12:])
@example(SHARD[:8] + struct.pack("<i", -5) + SHARD[12:])
@example(SHARD[:1024])
@example(LARGE[:4] + SHARD[4:8] + LARGE[8:])
@example(SHARD[:8] + LARGE[8:])
def test_a_token_shard(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("shard") / "x.bin"
    path.write_bytes(content)
    with only_user_errors(len(content)):
        check_ids([path], 97)
        tokens = open_shard(path)
        assert tokens.nbytes + 1024 == len(content) and tokens.max() < 97
        Loader([Span(path, 0, len(tokens))], 2, 3, 0, True).next_batch(*np.empty((2, 2, 3), np.int32))


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory):
    """(text file, folder of its shards, contents of the folder)."""
    text = Path(write_text(tmp_path_factory.mktemp("text") / "a.txt", 30))
    corpus = data.prepare([str(text)], [], "bpe", 270, 0.1)
    folder = corpus.train[0].path.parent
    return text, folder, {path.name: path.read_bytes() for path in folder.iterdir()}


@quick
@given(st.data())
def test_tokenised_text(tokenised, draw):
    text, folder, contents = tokenised
    name = draw.draw(st.sampled_from(sorted(contents)))
    content = draw.draw(damage(contents[name]))
    (folder / name).write_bytes(content)
    try:
        with only_user_errors(sum(map(len, contents.values()))):
            corpus = data.prepare([str(text)], [], "bpe", 270, 0.1)
            data.describe_windows([corpus.train[0]])
    finally:
        (folder / name).write_bytes(contents[name])


@quick
@given(st.dictionaries(st.sampled_from(["tokenizer", "shards", "shard_tokens", "starts", "files"]), JSON))
@example({"shard_tokens": 10, "starts": ["a"], "files": []})
@example({"shard_tokens": 0, "starts": [], "files": []})
@example({"shard_tokens": 10, "starts": [0], "files": 3})
@example({"tokenizer": {"name": "x", "pat_str": "(", "special_tokens": {}}, "shards": []})
@example({"tokenizer": {}, "shards": ["../../../etc/passwd"]})
def test_a_corpus_json(tokenised, record):
    text, folder, contents = tokenised
    whole = json.loads(contents["corpus.json"])
    (folder / "corpus.json").write_text(json.dumps(whole | record))
    try:
        with only_user_errors(sum(map(len, contents.values()))):
            data.prepare([str(text)], [], "bpe", 270, 0.1)
        (window,) = data.describe_windows([Span(folder / "000000.bin", 0, 9)])  # damaged during a run: it continues
        assert window["start"] == 0
        json.dumps(window)
    finally:
        (folder / "corpus.json").write_bytes(contents["corpus.json"])


RANKS = tokenizer_state(data.load_tokenizer("bytes", (), None))


@quick
@given(JSON | st.fixed_dictionaries({"name": JSON, "pat_str": JSON, "special_tokens": JSON}), damage(RANKS[1]))
@example({"name": "x", "pat_str": "(", "special_tokens": {"<|endoftext|>": 256}}, RANKS[1])
@example(RANKS[0] | {"special_tokens": {"<|endoftext|>": 2**70}}, RANKS[1])
def test_a_tokenizer(state, ranks):
    for pair in (state, RANKS[1]), (RANKS[0], ranks), (state, ranks):
        with only_user_errors(len(ranks)):
            tokenizer_from_state(*pair)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@quick
@given(st.data())
def test_a_damaged_checkpoint(run_folder, tmp_path_factory, draw):
    whole = checkpoint.newest(run_folder).read_bytes()
    content = draw.draw(damage(whole))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    with only_user_errors(len(whole)):
        checkpoint.load(path)


@quick
@given(st.dictionaries(st.sampled_from(["format", "state", "tokenizer", "sha256", "x"]), st.text()), JSON)
@example({"state": "[" * 100_000, "tokenizer": "null"}, None)
@example({"state": "9" * 5000, "tokenizer": "null"}, None)
@example({"state": "{}", "tokenizer": "[1]"}, None)
def test_the_texts_of_a_checkpoint(tmp_path_factory, texts, more):
    """With a valid checksum: only the texts are wrong."""
    from safetensors.numpy import save_file

    tensors = {"a": np.zeros(3, np.float32)}
    texts = {"format": checkpoint.FORMAT, "state": json.dumps(more), "tokenizer": json.dumps(more)} | texts
    texts["sha256"] = checkpoint._sha256({k: v for k, v in texts.items() if k != "sha256"}, tensors)
    path = tmp_path_factory.getbasetemp() / "texts.safetensors"
    save_file(tensors, path, texts)
    with only_user_errors(path.stat().st_size):
        checkpoint.load(path)


@quick
@given(st.data())
def test_the_state_of_a_checkpoint(run_folder, draw):
    """One part is replaced: everything that reads it rejects it or can use it."""
    tensors, state, tokenizer = checkpoint.load(checkpoint.newest(run_folder))
    size = sum(tensor.nbytes for tensor in tensors.values())
    name = draw.draw(st.sampled_from(sorted(state)))
    inside = sorted(state[name]) if isinstance(state[name], dict) else []
    value = draw.draw(JSON)
    if inside and draw.draw(st.booleans()):
        value = state[name] | {draw.draw(st.sampled_from(inside)): value}
    with only_user_errors(size):
        crafted = state | {name: value}
        checkpoint.check_record("x", tensors, crafted)
        run_settings.check(run_settings.from_record(crafted["settings"], "x"))


HOSTILE = {
    "no state": lambda tensors, state: state.clear(),
    "sizes": lambda tensors, state: state["config"].update(num_layers=10**9),
    "a size of the wrong type": lambda tensors, state: state["config"].update(channels=16.0),
    "a missing size": lambda tensors, state: state["config"].pop("num_heads"),
    "heads": lambda tensors, state: state["config"].update(num_heads=-2),
    "a missing tensor": lambda tensors, state: tensors.pop("wte"),
    "a missing moment": lambda tensors, state: tensors.pop("m.qkvw"),
    "a shape": lambda tensors, state: tensors.update(wpe=np.zeros((1, 1), np.float32)),
    "a dtype": lambda tensors, state: tensors.update(wpe=np.zeros((32, 16), np.int64)),
    "a step": lambda tensors, state: state.update(step="2"),
    "a window": lambda tensors, state: state.update(loss_history=[None]),
    "a position": lambda tensors, state: state.update(loader=[1, 2]),
    "settings": lambda tensors, state: state.update(settings=None),
    "data": lambda tensors, state: state.update(data=7),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_crafted_checkpoint(run_folder, tmp_path, capfd, what):
    """With a valid checksum: train, sample, inspect and replay reject it in one line."""
    path = checkpoint.checkpoint_path(tmp_path / "run", 2)
    tensors, state, tokenizer = checkpoint.load(checkpoint.newest(run_folder))
    HOSTILE[what](tensors, state)
    checkpoint.save(path, tensors, state, tokenizer)
    for program, arguments in (None, ("--resume", path, "--steps", 4)), (sample, (path,)), (inspect, (path,)):
        line = refused(capfd, *arguments, **({"program": program} if program else {}))
        assert str(path) in line and ("is not a run's checkpoint" in line or "settings" in line)
    assert str(path) in refused(capfd, path, program=replay)
    assert files_in(tmp_path / "run").keys() == {"checkpoints", "checkpoints/step_000002.safetensors"}


def test_a_tokenizer_in_a_checkpoint(run_folder, tmp_path, capfd):
    path = tmp_path / "x.safetensors"
    tensors, state, (tokenizer, ranks) = checkpoint.load(checkpoint.newest(run_folder))
    for pair in ({"name": "x"}, ranks), (tokenizer, ranks[:100]), ([1], b"\xff"):
        checkpoint.save(path, tensors, state, pair)
        assert "tokenizer is damaged" in refused(capfd, path, program=sample)


# ---------------------------------------------------------------------------------------------------------------------
# Logs and settings


LOG = b'{"step": 1, "loss": 2.5}\n{"step": 2, "val_loss": 2.5}\n{"step": 3, "sample": "x"}\n'


@quick
@given(damage(LOG) | JSON.map(lambda value: json.dumps(value).encode() + b"\n") | st.binary(max_size=99))
@example(b"[" * 100_000 + b"\n")
@example(b"\xff\xfe\n")
@example(b'{"step": "1"}\n')
@example(b'{"step": 1e400}\n')
def test_a_log(tmp_path_factory, content):
    """On resume, in the plot at the end of a run, and when runs are compared."""
    folder = tmp_path_factory.getbasetemp() / "log"
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_bytes(content)
    with only_user_errors(len(content)):
        read_run(folder)
    with only_user_errors(len(content)), RunLog(folder, {}, 2) as log:
        log.picture([])


@quick
@given(JSON | st.dictionaries(st.sampled_from(sorted(run_settings.FIELDS)), JSON))
def test_settings(record):
    whole = run_settings.to_record(run_settings.Settings())
    for crafted in record, whole | record if isinstance(record, dict) else record:
        with only_user_errors():
            run_settings.check(run_settings.from_record(crafted, "settings.json"))


# ---------------------------------------------------------------------------------------------------------------------
# What the code does

UNSAFE = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def unsafe_in(source: str) -> list[str]:
    """Modules, functions and arguments that could execute code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.partition(".")[0] in UNSAFE]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in UNSAFE:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in ("eval", "exec", "compile", "__import__", "os.system", "torch.load") else []
            unsafe = [word for word in node.keywords if word.arg in ("allow_pickle", "shell", "weights_only")]
            found += [f"{name}({ast.unparse(word)})" for word in unsafe]
    return found


def test_nothing_unpickles_or_evaluates():
    files = sorted((ROOT / "llm_numba").rglob("*.py"))
    assert len(files) > 40
    assert {str(file): found for file in files if (found := unsafe_in(file.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "import a, dill", "eval(x)", "exec('1')", "torch.load(f)",
     "np.load(f, allow_pickle=True)", "run(x, shell=True)", "import joblib.numpy_pickle"],
)  # fmt: skip
def test_unsafe_code_is_found(source):
    assert unsafe_in(f"def f():\n    {source}")


WATCHED = """
import json, os, sys
written = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(arguments[0])
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate"):
        written.extend(str(x) for x in arguments[:2] if isinstance(x, str))
sys.addaudithook(watch)
from llm_numba import train
train.main(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    json.dump([os.path.abspath(path) for path in written], file)
"""


def test_a_run_writes_only_to_its_folders(tmp_path):
    """The run folder, the cache, the temporary folder and matplotlib's font list: no file is elsewhere afterwards, and
    Python opened none elsewhere for writing."""
    text = write_text(tmp_path / "text.txt", 300)
    places = {name: tmp_path / name for name in ("home", "here", "cache", "tmp", "fonts")}
    for folder in places.values():
        folder.mkdir()
    mine = environment(
        HOME=str(places["home"]), TMPDIR=str(places["tmp"]), LLM_NUMBA_CACHE=str(places["cache"]),
        MPLCONFIGDIR=str(places["fonts"]), PYTHONDONTWRITEBYTECODE="1", XDG_CACHE_HOME=None, XDG_CONFIG_HOME=None,
    )  # fmt: skip
    arguments = ("--data", text, *QUICK, "--steps", 4, "--checkpoint-every", 2, "--device", "cpu", "--out", "run")
    record = tmp_path / "written.json"
    process = subprocess.run(
        [sys.executable, "-c", WATCHED, str(record), *map(str, arguments)],
        cwd=places["here"],
        env=mine,
        capture_output=True,
    )
    assert process.returncode == 0, process.stderr
    assert [path.name for path in places["here"].iterdir()] == ["run"]
    assert files_in(places["home"]) == files_in(places["tmp"]) == {}
    allowed = (
        places["here"] / "run",
        places["cache"],
        places["tmp"],
        places["fonts"],
        Path(numba.config.CACHE_DIR),
        record,
    )
    written = json.loads(record.read_text())
    assert any(path.endswith("log.jsonl") for path in written)
    assert [path for path in written if path != "/dev/null" and not path.startswith(tuple(map(str, allowed)))] == []
    shutil.rmtree(places["cache"])
