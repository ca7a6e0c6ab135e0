"""Weights to start from and weights for other programs: --init, export, downloads, and damaged files."""

import json
import os
import re
import resource
import shutil
import struct
import threading
import tracemalloc
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from programs import (
    QUICK,
    cache,  # noqa: F401
    content_of,
    environment,
    error_line,
    files_in,
    losses_of,
    refused,
    rows_of,
    run,
    run_here,
    write_text,
)
from training import random_parameters

from llm_numba import export
from llm_numba.data import corpus as data
from llm_numba.data.shards import open_shard
from llm_numba.data.tokenizer import END_OF_TEXT, checked_encoding, load_tokenizer, tokenizer_from_state
from llm_numba.formats import huggingface, llmc
from llm_numba.models.gpt2 import GPT2
from llm_numba.training import checkpoint
from llm_numba.training.weights import Weights, open_weights
from llm_numba.util.cli import UserError

pytestmark = pytest.mark.compiled
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
START = ("--batch-size", 8, "--sequence-length", 32, "--val-batches", 1, "--sample-tokens", 4)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    """A run of 30 steps, with its own tokenizer."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_here(*QUICK, "--tokenizer", "bpe", "--vocab-size", 290, "--data", text, "--steps", 30, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory, trained):
    """The same weights in every form that --init takes."""
    folder = tmp_path_factory.mktemp("sources")
    for format in "hf", "llmc":
        run_here(trained, "--format", format, "--out", folder / format, program=export)
    return {
        "run": trained,
        "checkpoint": checkpoint.newest(trained),
        "hf": folder / "hf",
        "llmc": folder / "llmc" / "model.bin",
        "llmc_folder": folder / "llmc",
    }


# ---------------------------------------------------------------------------------------------------------------------
# --init


@pytest.mark.parametrize("form", ["run", "checkpoint", "hf", "llmc", "llmc_folder"])
def test_a_run_starts_from_other_weights(trained, sources, text, tmp_path, form, capsys):
    run_here("--init", sources[form], "--data", text, *START, "--steps", 2, "--out", tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    before = rows_of(trained, "val_loss")[-1]["val_loss"]
    assert before < 5.2 < np.log(290) - 0.4
    assert rows[0]["loss"] == pytest.approx(before, abs=0.15)  # on other batches of similar text
    assert rows[0]["learning_rate"] == pytest.approx(3e-5)
    _, state, tokenizer = checkpoint.load(checkpoint.newest(tmp_path / "run"))
    assert state["config"] == checkpoint.load(checkpoint.newest(trained))[1]["config"]
    assert (state["settings"]["init"], state["settings"]["preset"]) == (str(sources[form]), "")
    ours, theirs = (tokenizer_from_state(*x) for x in (tokenizer, checkpoint.load(checkpoint.newest(trained))[2]))
    assert ours._mergeable_ranks == theirs._mergeable_ranks and ours._special_tokens == theirs._special_tokens


def test_each_form_gives_the_same_losses(sources, text, tmp_path, capsys):
    losses = []
    for form, source in sources.items():
        run_here("--init", source, "--data", text, *START, "--steps", 3, "--out", tmp_path / form)
        losses.append(losses_of(tmp_path / form))
    assert losses.count(losses[0]) == len(sources) and len(set(losses[0])) == 3


def test_a_resumed_run_does_not_need_its_source(sources, text, tmp_path, capsys):
    source = shutil.copytree(sources["hf"], tmp_path / "source")
    arguments = ("--init", source, "--data", text, *START, "--checkpoint-every", 3)
    run_here(*arguments, "--steps", 6, "--out", tmp_path / "whole")
    stopped = shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    (stopped / "checkpoints" / "step_000006.safetensors").unlink()
    shutil.rmtree(source)
    run_here("--resume", stopped)
    assert rows_of(stopped) == rows_of(tmp_path / "whole")
    assert content_of(stopped) == content_of(tmp_path / "whole")


def test_plan_memory_uses_the_sizes_of_the_source(sources, capsys):
    run_here("--init", sources["hf"], "--plan-memory")
    assert re.search(r"wte +384 x 16 ", capsys.readouterr().out)


def test_text_is_tokenised_again_for_another_tokenizer(text):
    """Of the same size and name, in the same cache."""
    contents = Path(text).read_text()
    for learned_from in contents, contents[::-1], contents:
        encoding = load_tokenizer("bpe", [learned_from], 290)
        corpus = data.prepare([text], [], encoding, None, 0.0)
        tokens = open_shard(corpus.train[0].path)
        assert corpus.vocab_size == 290 and tokens[1:].tolist() == encoding.encode_ordinary(contents)


def test_the_next_free_folder(sources, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run_here("--init", sources["hf"], "--data", text, *START, "--steps", 1)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["init-000", "init-001"]


def test_settings_that_do_not_fit_the_weights(sources, text, tmp_path, capfd):
    shutil.copy(sources["llmc"], tmp_path / "model_alone.bin")
    shards = tmp_path / "shards.bin"
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 3000
    shards.write_bytes(header.tobytes() + np.full(3000, 290, "<u2").tobytes())
    hf, alone = sources["hf"], tmp_path / "model_alone.bin"
    for arguments, words in (
        (("--init", "nosuch"), ["nosuch", "gpt2-medium", "config.json", ".bin", "run folder"]),
        (("--init", tmp_path), [str(tmp_path), "expected one of"]),
        (("--init", hf, "--preset", "d12"), ["--preset d12", "leave --preset out"]),
        (("--init", "gpt2", "--preset", "nano"), ["--preset nano", "--init gpt2"]),  # before anything is downloaded
        (("--init", "gpt2", "--steps", -1), ["--steps -1"]),
        (("--init", hf, "--sequence-length", 33), ["--sequence-length 33", "is 32"]),
        (("--init", hf, "--tokens-per-step", 100), ["--tokens-per-step 100", "256"]),
        (("--init", hf, "--tokenizer", "bytes"), ["290 tokens", "--tokenizer bytes 257"]),
        (("--init", hf, "--tokenizer", "gpt2"), ["290 tokens", "--tokenizer gpt2 50257"]),
        (("--init", hf, "--tokenizer", "bpe"), ["--tokenizer bpe", "leave it out"]),
        (("--init", hf, "--tokenizer", "none"), ["--tokenizer none", ".bin shards"]),
        (("--init", hf, "--vocab-size", 290), ["--vocab-size 290", "fixed"]),
        (("--init", alone), ["--tokenizer none"]),
        (("--init", alone, "--data", shards), ["token 0 is 290", "290"]),
        (("--init", hf, "--tokenizer", "none", "--vocab-size", 291, "--data", shards), ["290 tokens", "none 291"]),
    ):
        data = () if "--data" in arguments else ("--data", text)
        line = refused(capfd, *data, "--batch-size", 8, "--out", tmp_path / "run", *arguments)
        assert all(word in line for word in words), line
        assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# export


def weights_of(model, encoding=None):
    parameters = random_parameters(model, np.random.default_rng(0))
    return Weights(model, lambda: encoding, iter(parameters.items()))


def test_an_export_overwrites_only_an_export(trained, tmp_path, capfd):
    arguments = (trained, "--format", "hf", "--out", tmp_path / "out")
    run_here(*arguments, program=export)
    before = files_in(tmp_path / "out")
    assert before.keys() == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert "--overwrite" in refused(capfd, *arguments, program=export)
    assert files_in(tmp_path / "out") == before
    run_here(*arguments[:-3], "llmc", "--overwrite", *arguments[-2:], program=export)
    assert files_in(tmp_path / "out").keys() == {"model.bin", "gpt2_tokenizer.bin"}

    (tmp_path / "out" / "thesis.txt").write_text("mine")
    before = files_in(tmp_path / "out")
    assert "something other than an export" in refused(capfd, *arguments, "--overwrite", program=export)
    (tmp_path / "file").write_text("mine")
    assert "something other" in refused(capfd, *arguments[:-1], tmp_path / "file", "--overwrite", program=export)
    assert files_in(tmp_path / "out") == before and (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


@posix
@pytest.mark.parametrize("format", ["hf", "llmc"])
@pytest.mark.parametrize("most", [100, 3000, 20_000])
def test_a_full_disk_leaves_the_folder_as_it_was(trained, tmp_path, format, most, capfd):
    """Files cannot exceed `most` bytes: the tokenizer, or the model."""
    run_here(trained, "--format", "hf", "--out", tmp_path / "old", program=export)
    before = files_in(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for out in "new", "old":
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            with pytest.raises(UserError) as caught:
                weights = open_weights(str(trained))
                export.write_folder(tmp_path / out, True, lambda f, w=weights: export.export(w, format, "fp32", f))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "cannot be written" in str(caught.value) and "\n" not in str(caught.value)
        assert files_in(tmp_path) == before


@posix
def test_an_interrupted_export_restores_the_old_one(trained, tmp_path, monkeypatch):
    run_here(trained, "--format", "hf", "--out", tmp_path / "old", program=export)
    before, rename = files_in(tmp_path), Path.rename

    def interrupted(path, target):
        if path.name == "whole":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.write_folder(tmp_path / "old", True, lambda folder: None)
    assert files_in(tmp_path) == before


def test_a_tokenizer_of_another_size_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="300 tokens, its tokenizer 257"):
        export.export(weights_of(GPT2(8, 300, 1, 1, 4), load_tokenizer("bytes", (), None)), "hf", "fp32", tmp_path)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# llm.c's tokenizer, read and written here independently


def tokenizer_file(tokens, version=2, end=None):
    header = struct.pack("<4i", 20240328, version, len(tokens), end or 0).ljust(1024, b"\0")
    return header + b"".join(struct.pack("B", len(token)) + token for token in tokens)


def tokens_in(data):
    magic, version, V, end = struct.unpack_from("<4i", data)
    tokens, at = [], 1024
    for _ in range(V):
        tokens.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    assert at == len(data)
    return magic, version, end, tokens


BPE = load_tokenizer("bpe", ["the cat sat on the mat, the cat's hat – naïve façade 東京, one dog ran far\n" * 9], 300)


@pytest.mark.parametrize("encoding", [BPE, load_tokenizer("bytes", (), None)], ids=["bpe", "bytes"])
def test_a_tokenizer_is_written_as_llmc_reads_it(tmp_path, encoding):
    llmc.write_tokenizer(tmp_path / "t.bin", encoding)
    magic, version, end, tokens = tokens_in((tmp_path / "t.bin").read_bytes())
    assert (magic, version, end) == (20240328, 2, encoding.eot_token)
    assert tokens == [encoding.decode_single_token_bytes(id) for id in range(encoding.n_vocab)]
    again = llmc.read_tokenizer(tmp_path / "t.bin")
    assert again._mergeable_ranks == encoding._mergeable_ranks and again._special_tokens == encoding._special_tokens


def many_tokens():
    """As many as GPT-2 has, in its order: the bytes from ! on first, the end of text last."""
    order = [*range(33, 256), *range(33)]
    pairs = (bytes([a, b]) for a in range(97, 256) for b in range(256))
    longer = (bytes([a, b, 97]) for a in range(97, 256) for b in range(256))
    tokens = [*(bytes([byte]) for byte in order), *pairs, *longer][:50256]
    return [*tokens, END_OF_TEXT.encode()]


@pytest.mark.parametrize("version, end", [(1, None), (2, 50256), (2, 7)])
def test_llmcs_tokenizer_is_read(tmp_path, version, end):
    tokens = many_tokens()
    if end == 7:
        tokens = [*tokens[:7], tokens[-1], *tokens[7:-1]]
    (tmp_path / "t.bin").write_bytes(tokenizer_file(tokens, version, end))
    encoding = llmc.read_tokenizer(tmp_path / "t.bin")
    assert encoding.n_vocab == 50257 and encoding.eot_token == (end or 50256)
    ids = {token: id for id, token in enumerate(tokens)}
    assert encoding.encode_ordinary("ab") == [ids[b"ab"]]
    assert encoding.encode_ordinary("é!") == [ids["é".encode()], ids[b"!"]]


BYTES = [bytes([byte]) for byte in range(256)]
END = END_OF_TEXT.encode()


@pytest.mark.parametrize(
    "data, words",
    [
        (tokenizer_file([*BYTES, END], 1), ["version 1", "257", "50257"]),
        (tokenizer_file([*BYTES, END], 3), ["version 3", "1 or 2"]),
        (tokenizer_file([*BYTES, END], 2, 257), ["end-of-text token is 257, but there are 257"]),
        (tokenizer_file([*BYTES, END], 2, -1), ["token is -1"]),
        (tokenizer_file([*BYTES, b"a", END], 2, 257), ["twice"]),
        (tokenizer_file([*BYTES[1:], b"ab", END], 2, 256), ["byte"]),
        (tokenizer_file([*BYTES, b"", END], 2, 257), ["token 256 is empty"]),
        (tokenizer_file([*BYTES, END], 2, 256)[:-1], ["token 256", "truncated"]),
        (tokenizer_file([*BYTES, END], 2, 256)[:-14], ["256 tokens", "header says 257"]),
        (tokenizer_file([*BYTES, END], 2, 256) + b"\1a", ["2 more bytes"]),
        (tokenizer_file([*BYTES, END], 2, 256)[:1000], ["1,000 bytes"]),
        (b"", ["0 bytes"]),
    ],
)
def test_a_tokenizer_file_that_is_rejected(tmp_path, data, words):
    (tmp_path / "t.bin").write_bytes(data)
    with pytest.raises(UserError) as caught:
        llmc.read_tokenizer(tmp_path / "t.bin")
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in ["t.bin", *words]), message


@pytest.mark.parametrize(
    "tokens, changes, words",
    [
        ([b"=" * 256], {}, ["255 bytes"]),
        ([], {"pattern": r"\w+|\W"}, ["split words"]),
        ([], {"special": {END_OF_TEXT: 256, "<|pad|>": 257}}, [END_OF_TEXT, "only"]),
    ],
)
def test_a_tokenizer_that_llmcs_format_cannot_represent(tmp_path, tokens, changes, words):
    ranks = {token: id for id, token in enumerate([*BYTES, *tokens])}
    encoding = checked_encoding("bpe", ranks, **({"special": {END_OF_TEXT: len(ranks)}} | changes))
    with pytest.raises(UserError) as caught:
        llmc.write_tokenizer(tmp_path / "t.bin", encoding)
    assert all(word in str(caught.value) for word in words) and not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Downloads, from a server that implements the necessary part of the hub's protocol


REVISION = "0123456789abcdef0123456789abcdef01234567"
WRITTEN = 10 * 2**20  # bytes that the library writes at a time
CUT_AT = WRITTEN + 500_000  # bytes of the model after which the connection is closed once


@contextmanager
def hub(folder):
    """(address, requests): a server with the folder's files as openai-community/gpt2."""
    requests, cut = [], []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, with_body):
            requests.append((self.command, self.path, self.headers.get("Range")))
            prefix, _, name = self.path.rpartition("/")
            known = [f"/openai-community/gpt2/resolve/{revision}" for revision in ("main", REVISION)]
            if prefix not in known or not (folder / name).exists():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = (folder / name).read_bytes()
            start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("ETag", f'"{name}-1"')
            self.send_header("X-Repo-Commit", REVISION)
            self.end_headers()
            if with_body and name == "model.safetensors" and not cut:
                cut.append(True)
                self.wfile.write(data[start:CUT_AT])
                self.close_connection = True
            elif with_body:
                self.wfile.write(data[start:])

        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_published_weights_are_downloaded_once(text, tmp_path, capsys):
    pytest.importorskip("huggingface_hub")
    arguments = ("--data", text, *START, "--steps", 2)
    served = tmp_path / "served"
    served.mkdir()
    model = GPT2(max_seq_len=200_000, vocab_size=257, num_layers=1, num_heads=1, channels=16)
    export.export(weights_of(model, load_tokenizer("bytes", (), None)), "hf", "fp32", served)
    assert (served / "model.safetensors").stat().st_size > CUT_AT
    (served / "pytorch_model.bin").write_bytes(b"not needed")
    variables = dict(HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE=None, HF_HUB_CACHE=None)
    with hub(served) as (address, requests):
        online = environment(**variables, HF_ENDPOINT=address)
        process = run("train", "--init", "gpt2", *arguments, "--plan-memory", cwd=tmp_path, env=online)
        assert process.returncode == 0, process.stderr
        fetched = {path.rpartition("/")[2] for _, path, _ in requests}
        assert fetched == {
            "config.json",
            "tokenizer.json",
        }  # --plan-memory needs no weights

        process = run("train", "--init", "gpt2", *arguments, "--out", "online", cwd=tmp_path, env=online)
        assert process.returncode == 0, process.stderr
        fetched = {path.rpartition("/")[2] for _, path, _ in requests}
        assert fetched == {"config.json", "tokenizer.json", "model.safetensors"}
        parts = [part for command, path, part in requests if command == "GET" and "model" in path]
        assert len(parts) == 2 and re.fullmatch(rf"bytes={WRITTEN}-\d*", parts[1]), parts
    offline = environment(**variables | {"HF_HUB_OFFLINE": "1"})
    process = run("train", "--init", "gpt2", *arguments, "--out", "offline", cwd=tmp_path, env=offline)
    assert process.returncode == 0, process.stderr
    run_here("--init", served, *arguments, "--out", tmp_path / "folder")
    assert losses_of(tmp_path / "online") == losses_of(tmp_path / "offline") == losses_of(tmp_path / "folder")

    process = run("train", "--init", "gpt2-xl", *arguments, cwd=tmp_path, env=offline)
    line = error_line(process.returncode, process.stderr)
    assert "openai-community/gpt2-xl/" in line and "download failed" in line


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'pip install -e ".\[download\]"'):
        open_weights("gpt2")


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and crafted files


def check_only_user_errors(read, path):
    """Any error is a UserError of one line, and the memory used is in proportion to the file."""
    size = sum(p.stat().st_size for p in (path.iterdir() if path.is_dir() else [path]))
    tracemalloc.start()
    try:
        read(path)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1_000_000 + 30 * size


INT = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-1, 400), st.sampled_from([1, 2, 3, 2**16, 2**31 - 1]))
HEADER = st.dictionaries(st.integers(0, 8), INT, max_size=4)
DAMAGE = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4)
CUT = st.one_of(st.just(1.0), st.floats(0, 1.2))
JSON = st.recursive(
    st.none() | st.booleans() | INT | st.floats() | st.text(max_size=5) | st.sampled_from([10**300, "\n", "\0"]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)
FIELDS = GPT2.huggingface
fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def damaged(data, header, damage, cut):
    """The data with int32s at the start replaced, bytes overwritten anywhere, and the end truncated or extended."""
    data = bytearray(data)
    for place, value in header.items():
        data[4 * place : 4 * place + 4] = struct.pack("<i", value)
    for at, new in damage:
        start = int(at * (len(data) - len(new)))
        data[start : start + len(new)] = new
    length = int(cut * len(data))
    return bytes(data[:length].ljust(length, b"\0"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """name -> the bytes of a small valid file."""
    folder = tmp_path_factory.mktemp("whole")
    export.export(weights_of(GPT2(9, 300, 2, 3, 15), BPE), "hf", "fp32", folder)
    export.export(weights_of(GPT2(9, 300, 2, 3, 15), BPE), "llmc", "bf16", folder)
    model, Vp, parameters = llmc.read_model(folder / "model.bin")
    header = struct.pack("<4i", 20240327, 2, 2, 5).ljust(1024, b"\0")
    tokens = np.arange(20, dtype="<i4")
    rest = np.zeros(2 * 5 * 300 + 1 + sum(x.size for x in parameters.values()), "<f4")
    (folder / "state.bin").write_bytes(header + tokens.tobytes() + rest.tobytes())
    found = files_in(folder)
    for name, read in READERS.items():
        read(folder if name == "model.safetensors" else folder / name)
    return found


def read_state(path):
    llmc.read_state(path, GPT2(9, 300, 2, 3, 15), 384)


def read_model(path):
    for _ in llmc.read_model(path)[2].values():
        pass


def read_folder(folder):
    for _ in open_weights(str(folder)).parameters:
        pass


READERS = {
    "model.bin": read_model,
    "gpt2_tokenizer.bin": llmc.read_tokenizer,
    "state.bin": read_state,
    "model.safetensors": read_folder,
    "config.json": lambda path: huggingface.read_config(path.parent),
    "tokenizer.json": lambda path: huggingface.read_tokenizer(path.parent),
}


@fuzz
@given(header=HEADER, damage=DAMAGE, cut=CUT)
@pytest.mark.parametrize("name", ["model.bin", "gpt2_tokenizer.bin", "state.bin"])
def test_damaged_files_of_llmc(whole, tmp_path, name, header, damage, cut):
    (tmp_path / name).write_bytes(damaged(whole[name], header, damage, cut))
    check_only_user_errors(READERS[name], tmp_path / name)


@fuzz
@given(damage=DAMAGE, front=DAMAGE, cut=CUT)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_files_of_hugging_face(whole, tmp_path, name, damage, front, cut):
    data = damaged(whole[name][:3000], {}, front, 1.0) + whole[name][3000:]  # its header
    (tmp_path / "config.json").write_bytes(whole["config.json"])
    (tmp_path / name).write_bytes(damaged(data, {}, damage, cut))
    check_only_user_errors(READERS[name], tmp_path if name == "model.safetensors" else tmp_path / name)


@fuzz
@example(key="n_layer", value=2**31 - 1)  # names for so many layers would not fit in memory
@example(key="n_layer", value=10**400)  # no float is as large
@given(key=st.sampled_from([*FIELDS.sizes.values(), *FIELDS.accepted, "n_inner"]), value=JSON | INT)
def test_any_config(whole, tmp_path, key, value):
    config = json.loads(whole["config.json"]) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(whole["model.safetensors"])
    check_only_user_errors(read_folder, tmp_path)


@fuzz
@given(st.data())
def test_any_safetensors_header(whole, tmp_path, draws):
    """Wrong shapes, dtypes, offsets and names."""
    size = struct.unpack_from("<Q", whole["model.safetensors"])[0]
    header = json.loads(whole["model.safetensors"][8 : 8 + size])
    for _ in range(draws.draw(st.integers(1, 3))):
        name = draws.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
        key = draws.draw(st.sampled_from(["shape", "dtype", "data_offsets", "name"]))
        if key == "name":
            header[draws.draw(st.text("\n\0aé", max_size=3))] = header.pop(name)
        elif isinstance(header[name], dict):
            value = JSON | st.lists(INT, max_size=3) | st.sampled_from(["F64", "BF16", "I64", "F8_E4M3", "BOOL", "F4"])
            header[name][key] = draws.draw(value)
    written = json.dumps(header).encode()
    (tmp_path / "config.json").write_bytes(whole["config.json"])
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(written)) + written + whole["model.safetensors"][8 + size :]
    )
    check_only_user_errors(read_folder, tmp_path)


@fuzz
@given(part=st.sampled_from([None, "model", "pre_tokenizer", "vocab"]), key=st.integers(0, 400), value=JSON)
def test_any_tokenizer(whole, tmp_path, part, key, value):
    document = json.loads(whole["tokenizer.json"])
    changed = {None: document, "vocab": document["model"]["vocab"]}.get(part) or document[part]
    names = [*sorted(changed), "another"]
    changed[names[key % len(names)]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    check_only_user_errors(READERS["tokenizer.json"], tmp_path / "tokenizer.json")


@fuzz
@given(vocabulary=JSON, merges=st.text(max_size=20))
def test_any_vocabulary_and_merges(whole, tmp_path, vocabulary, merges):
    known = json.loads(whole["tokenizer.json"])["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(known | vocabulary if isinstance(vocabulary, dict) else vocabulary))
    (tmp_path / "merges.txt").write_text(merges)
    check_only_user_errors(huggingface.read_tokenizer, tmp_path)
