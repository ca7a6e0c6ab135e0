"""Data sets from a local server that stands in for GitHub and for the Hugging Face hub: a complete file, or one line
that says what is wrong and no file."""

import contextlib
import hashlib
import http.server
import json
import os
import shlex
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from programs import environment, error_line, files_in

from llm_numba.data import datasets, text
from llm_numba.data.find import find_files
from llm_numba.data.shards import open_shard
from llm_numba.training import settings
from llm_numba.util import download
from llm_numba.util.cli import UserError, exit_with

CONTENT = np.random.default_rng(0).bytes(1_000_003)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files. server.fault is what goes wrong with every GET."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.server.seen.append(("HEAD", self.path))
        content = self.server.files.get(self.path)
        if content is None:
            return self.answer(404)
        etag = hashlib.sha256(content).hexdigest()
        self.answer(200, {"X-Repo-Commit": "c" * 40, "ETag": f'"{etag}"'}, len(content))

    def do_GET(self):
        self.server.seen.append(("GET", self.path))
        content, fault = self.server.files.get(self.path), self.server.fault
        if content is None or fault == "404":
            return self.answer(404)
        if fault == "wrong bytes":
            content = bytes(len(content))
        self.answer(200, {}, len(content))
        self.wfile.write(content[: len(content) // 2] if fault in ("cut", "stall") else content)
        if fault == "stall":
            self.server.over.wait(60)
        self.close_connection = bool(fault)

    def answer(self, status, headers=(), length=0):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):  # the client has closed the connection
        pass


@pytest.fixture
def server(monkeypatch):
    with Server(("127.0.0.1", 0), Handler) as server:
        server.address = f"http://127.0.0.1:{server.server_port}"
        server.files, server.fault, server.seen, server.over = {"/file": CONTENT}, "", [], threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield server
        server.over.set()
        server.shutdown()


# --- one file from a URL


def test_a_file(server, tmp_path):
    download.from_url(f"{server.address}/file", tmp_path / "file", SHA256)
    assert files_in(tmp_path) == {"file": CONTENT}
    server.seen.clear()
    download.from_url(f"{server.address}/file", tmp_path / "file", SHA256)
    assert not server.seen
    (tmp_path / "file").write_bytes(b"damaged")
    download.from_url(f"{server.address}/file", tmp_path / "file", SHA256)
    assert files_in(tmp_path) == {"file": CONTENT}


@pytest.mark.parametrize(
    ("fault", "reason"), [("404", "404 Client Error: Not Found"), ("cut", "IncompleteRead"), ("wrong bytes", "SHA256")]
)
def test_a_download_that_fails(server, tmp_path, fault, reason):
    server.fault = fault
    with pytest.raises(UserError) as caught:
        download.from_url(f"{server.address}/file", tmp_path / "file", SHA256)
    line = str(caught.value)
    assert line.startswith(f"{server.address}/file: download failed (") and reason in line and "\n" not in line, line
    assert line.endswith("check the network and the disk, and try again") and files_in(tmp_path) == {}


def test_no_network(tmp_path):
    with pytest.raises(UserError, match=r"127.0.0.1:9/file: download failed \(ConnectionError: .*refused"):
        download.from_url("http://127.0.0.1:9/file", tmp_path / "file", SHA256)
    assert files_in(tmp_path) == {}


def command_to_download(server, path):
    program = "import sys; from pathlib import Path; from llm_numba.util.download import from_url; "
    program += "from llm_numba.util.cli import exit_with; exit_with(lambda: from_url(sys.argv[1], Path(sys.argv[2]), "
    program += "sys.argv[3]))"
    return [sys.executable, "-c", program, f"{server.address}/file", str(path), SHA256]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
def test_a_full_disk(server, tmp_path):
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    command = command_to_download(server, tmp_path / "file")
    done = subprocess.run(command, env=environment(), preexec_fn=limit, capture_output=True, text=True)
    assert "download failed (OSError: File too large)" in error_line(done.returncode, done.stderr)
    assert files_in(tmp_path) == {}


def unfinished(folder):
    """The contents of the files in a folder in which another process creates and deletes files."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield path.read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped(server, tmp_path, number):
    """The file does not appear under its name; the next process downloads it."""
    server.fault = "stall"
    command = command_to_download(server, tmp_path / "file")
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        while not any(len(content) > 400_000 for content in unfinished(tmp_path)):
            assert process.poll() is None
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert not (tmp_path / "file").exists()
    if number == signal.SIGINT:
        assert (process.returncode, err) == (130, "stopped by Ctrl-C\n") and files_in(tmp_path) == {}
    server.fault = ""
    download.from_url(f"{server.address}/file", tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT


# --- the command


@pytest.fixture
def hub(server, monkeypatch):
    """The server with the files of three small data sets, as raw.githubusercontent.com and as the hub."""
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    for i in range(4):
        name = f"fineweb_{'train' if i else 'val'}_{i:06d}.bin"
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, 5000
        server.files[f"/datasets/kjj0/fineweb10B-gpt2/resolve/main/{name}"] = (
            header.tobytes() + np.full(5000, i, "<u2").tobytes()
        )
    content = 'One day.\n\n<|endoftext|>\n\nA café "said" <|end\nof text.\n<|endoftext|>\n  \n<|endoftext|>\nLast'
    for split in "train", "valid":
        path = f"/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{split}.txt"
        server.files[path] = (content + split).encode()
    small = datasets.DATASETS["tinyshakespeare"]._replace(url=f"{server.address}/file", sha256=SHA256)
    monkeypatch.setitem(datasets.DATASETS, "tinyshakespeare", small)
    return server


def fetch(name, tmp_path, *arguments):
    datasets.main([name, "--out", str(tmp_path / "data"), *arguments])
    return {name: content for name, content in files_in(tmp_path / "data").items() if not name.startswith(".")}


def test_shards(hub, tmp_path, capsys):
    """As many as requested; later only the new ones are downloaded."""
    assert list(fetch("fineweb", tmp_path)) == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    hub.seen.clear()
    capsys.readouterr()
    found = fetch("fineweb", tmp_path, "--shards", "3")
    downloaded = {path.rpartition("/")[2] for method, path in hub.seen if method == "GET" and path in hub.files}
    assert downloaded == {f"fineweb_train_{i:06d}.bin" for i in (2, 3)}
    assert found == {path.rpartition("/")[2]: content for path, content in hub.files.items() if "fineweb10B" in path}
    assert (open_shard(tmp_path / "data" / "fineweb_train_000003.bin") == 3).all()
    out, folder = capsys.readouterr().out, tmp_path / "data"
    assert f"--data '{folder}/fineweb_train_*.bin' --val-data {folder}/fineweb_val_000000.bin" in out
    assert "licence: ODC-By 1.0" in out and "source:  https://huggingface.co/datasets/kjj0/fineweb10B-gpt2" in out


def test_the_printed_command_finds_the_shards(hub, tmp_path):
    """In a folder whose name contains characters that are special in a shell and in a glob."""
    folder = tmp_path / "my [data] *"
    fetch("fineweb", folder)
    words = shlex.split(datasets.command("fineweb", folder / "data"))
    assert words[:2] == ["llm-numba", "train"]
    given, _ = settings.parse(words[2:])
    assert [path.name for path in find_files(given.data)] == ["fineweb_train_000001.bin"]
    assert find_files(given.val_data) == [folder / "data" / "fineweb_val_000000.bin"]


def test_not_on_the_hub(hub, tmp_path):
    hub.files.clear()
    with pytest.raises(
        UserError, match="kjj0/fineweb10B-gpt2/fineweb_val_000000.bin: download failed .*404 Not Found"
    ) as caught:
        fetch("fineweb", tmp_path)
    assert "\n" not in str(caught.value)


def test_complete_data_is_not_downloaded_again(hub, tmp_path):
    for name in "tinyshakespeare", "fineweb", "tinystories":
        before = fetch(name, tmp_path)
        hub.seen.clear()
        assert fetch(name, tmp_path) == before
        assert not [path for method, path in hub.seen if method == "GET" and path in hub.files]


@pytest.mark.parametrize("size", [7, 1 << 20])
def test_stories(hub, tmp_path, monkeypatch, size):
    """Each story is a document, the text between two marks; a mark may span two blocks."""
    monkeypatch.setattr(text, "PIECE_BYTES", size)
    found = fetch("tinystories", tmp_path)
    assert set(found) == {"train.jsonl", "valid.jsonl"}
    texts = [json.loads(line)["text"] for line in found["train.jsonl"].splitlines()]
    assert texts == ["One day.", 'A café "said" <|end\nof text.', "Lasttrain"]


def test_as_a_user(hub, tmp_path):
    """The command in its own process: HF_ENDPOINT and HF_HUB_OFFLINE work, and files go to the cache folder only."""
    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    own = {"HOME": str(home), "LLM_NUMBA_CACHE": str(cache), "HF_ENDPOINT": hub.address, "TMPDIR": str(home)}
    own |= {"HF_HOME": None, "XDG_CACHE_HOME": None, "HF_HUB_OFFLINE": None, "HF_TOKEN": None}

    def run(*arguments, **more):
        return subprocess.run(
            [sys.executable, "-m", "llm_numba.data", *arguments],
            env=environment(**own | more), cwd=home, capture_output=True, text=True,
        )  # fmt: skip

    offline = run("fineweb", HF_HUB_OFFLINE="1")
    assert "download failed" in error_line(offline.returncode, offline.stderr)
    done = run("fineweb")
    assert done.returncode == 0, done.stderr
    assert (cache / "datasets" / "fineweb" / "fineweb_train_000001.bin").stat().st_size == 11024
    assert run("fineweb", HF_HUB_OFFLINE="1").returncode == 0
    assert files_in(home) == {}
    assert run().stdout.startswith("tinyshakespeare")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finweb"], "error: finweb: no such data set: choose one of tinyshakespeare, tinystories, fineweb, "),
        (["hellaswag", "--shards", "2"], "error: --shards 2: hellaswag has no shards; leave it out"),
        (["fineweb", "--shards", "104"], "error: --shards 104: fineweb has 103; give 1 to 103"),
        (["fineweb", "--shards", "0"], "error: --shards 0: fineweb has 103; give 1 to 103"),
        (["fineweb", "--shards", "x"], "error: --shards: invalid int value: 'x' (see --help)"),
    ],
)
def test_mistakes(arguments, message, capfd):
    with pytest.raises(SystemExit) as stopped:
        exit_with(lambda: datasets.main(arguments))
    assert error_line(stopped.value.code, capfd.readouterr().err).startswith(message)


def test_a_folder_that_cannot_be_made(hub, tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(UserError, match="data: cannot be used .File exists.: choose another --out"):
        fetch("tinyshakespeare", tmp_path)


def test_without_the_libraries(hub, tmp_path, monkeypatch):
    for name, used_by in ("pooch", "tinyshakespeare"), ("huggingface_hub", "fineweb"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=rf'downloads need {name}: pip install -e ".\[download\]"'):
                fetch(used_by, tmp_path)
