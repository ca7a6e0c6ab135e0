"""Data sets from a server in this process that cuts, stalls, lies and refuses: a right file, or a clear line.

The server stands in for GitHub and, with the headers that the Hugging Face hub sends, for the hub.
"""

import hashlib
import http.server
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from programs import environment, error_line, files_in

from llm_numba.data import corpus as data
from llm_numba.data import datasets, download, shards
from llm_numba.training import settings
from llm_numba.util.cli import UserError, exit_with

CONTENT = np.random.default_rng(0).bytes(1_000_003)  # several blocks, and a rest
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FAULTS_THAT_PASS = ["cut", "stall", "reset", "500", "429", "short", "no answer"]


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files; the next of server.faults decides how a GET goes, and after the last one all is well."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.server.seen.append(("HEAD", self.path, None))
        content = self.server.files.get(self.path)
        if content is None:
            return self.answer(404)
        facts = {"X-Repo-Commit": "c" * 40, "X-Linked-Size": str(len(content)), "Location": self.elsewhere()}
        self.answer(302, facts | {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'})

    def do_GET(self):
        self.server.seen.append(("GET", self.path, self.headers["Range"]))
        content = self.server.files.get(self.path.replace("/cdn", ""))
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if content is None:
            return self.answer(404)
        if fault.isdigit():
            return self.answer(int(fault))
        if fault == "redirect":
            return self.answer(302, {"Location": self.elsewhere()})
        if fault == "away":
            return self.answer(302, {"Location": "file:///etc/passwd"})
        if fault == "no answer":
            self.close_connection = True
            return
        if fault == "wrong bytes":
            content = bytes(len(content))
        start = int(self.headers["Range"][6:-1]) if self.headers["Range"] else 0
        if start >= len(content):
            return self.answer(416)
        if fault == "ignores range":
            start = 0
        body = content[start + 1 :] if fault == "another range" else content[start:]
        body += b"more" if fault == "long" else b""
        length = len(body) // 2 if fault == "short" else len(body)
        self.send_response(206 if self.headers["Range"] and fault != "ignores range" else 200)
        if self.headers["Range"] and fault != "ignores range":
            first = start + (fault == "another range")
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2 if fault in ("cut", "stall", "reset", "short") else len(body)])
        if fault == "stall":
            self.server.over.wait(10)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close_connection = bool(fault)

    def elsewhere(self):
        return f"http://localhost:{self.server.server_port}/cdn{self.path}"

    def answer(self, status, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", 0)
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):  # a client that has seen enough
        pass


@pytest.fixture
def server(monkeypatch):
    with Server(("127.0.0.1", 0), Handler) as server:
        server.address = f"http://127.0.0.1:{server.server_port}"
        server.files, server.faults, server.seen, server.over = {"/file": CONTENT}, [], [], threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(download, "PAUSE", 0)
        monkeypatch.setattr(download, "READ_TIMEOUT", 0.3)
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def remote(server):
    return download.Remote(f"{server.address}/file", len(CONTENT), SHA256)


def ranges(server):
    return [asked for method, _, asked in server.seen if method == "GET"]


@pytest.mark.parametrize("fault", [*FAULTS_THAT_PASS, "redirect", ""])
def test_a_fault_that_passes(server, remote, tmp_path, fault):
    """Once, and then again in the middle of what is left; what came before it is not fetched again."""
    server.faults[:] = [fault, fault]
    download.fetch(tmp_path / "file", remote)
    assert files_in(tmp_path) == {"file": CONTENT}
    if fault in ("cut", "stall", "short"):  # half, half of the rest; at most the last block of each may be lost
        first, second = (int(asked[6:-1]) for asked in ranges(server)[1:])
        assert len(CONTENT) // 2 - download.BLOCK <= first <= len(CONTENT) // 2 < second < len(CONTENT)


def test_any_number_of_faults_that_bring_something(server, remote, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    server.faults[:] = ["cut", "500"] * 5
    download.fetch(tmp_path / "file", remote)
    assert files_in(tmp_path) == {"file": CONTENT}


@pytest.mark.parametrize("fault", ["500", "no answer", "503"])
def test_a_fault_that_stays(server, remote, tmp_path, fault):
    """What came is kept, and the next start goes on from it."""
    server.faults[:] = ["cut"] + [fault] * download.ATTEMPTS
    with pytest.raises(UserError, match=r"5 times in a row; [\d,]+ of 1,000,003 bytes are here: run the command again"):
        download.fetch(tmp_path / "file", remote)
    (part,) = files_in(tmp_path).items()
    assert part[0] == "file.incomplete" and CONTENT.startswith(part[1]) and len(part[1]) > 400_000
    server.seen.clear()
    download.fetch(tmp_path / "file", remote)
    assert ranges(server) == [f"bytes={len(part[1])}-"]
    assert files_in(tmp_path) == {"file": CONTENT}


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("404", "404 Not Found: has it moved"),
        ("403", "403 Forbidden"),
        ("away", "file:///etc/passwd"),
        ("long", "longer than the 1,000,003"),
    ],
)
def test_a_refusal(server, remote, tmp_path, fault, says):
    """It is told at once, and what came so far stays."""
    (tmp_path / "file.incomplete").write_bytes(CONTENT[:1000])
    server.faults[:] = [fault]
    with pytest.raises(UserError, match=says):
        download.fetch(tmp_path / "file", remote)
    assert len(server.seen) == 1
    assert files_in(tmp_path) == {"file.incomplete": b"" if fault == "long" else CONTENT[:1000]}


def test_wrong_bytes(server, remote, tmp_path):
    server.faults[:] = ["wrong bytes"]
    with pytest.raises(UserError, match="wrong bytes .sha256 [0-9a-f]{12}..., expected " + SHA256[:12]):
        download.fetch(tmp_path / "file", remote)
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize(
    "left",
    [CONTENT[:-1] + b"!", b"of another version", CONTENT + b"!", bytes(len(CONTENT)), CONTENT[:70_000]],
    ids=["last byte", "first bytes", "too long", "all of it", "right"],
)
def test_what_was_left(server, remote, tmp_path, left):
    """It is gone on from where it may be right; where it was not all is fetched again."""
    (tmp_path / "file.incomplete").write_bytes(left)
    download.fetch(tmp_path / "file", remote)
    assert files_in(tmp_path) == {"file": CONTENT}
    assert ranges(server)[-1] == ("bytes=70000-" if CONTENT.startswith(left) else None)


@pytest.mark.parametrize(("fault", "requests"), [("ignores range", 1), ("another range", 2), ("416", 2)])
def test_a_server_that_does_not_go_on(server, remote, tmp_path, fault, requests):
    """What it sends counts from the start, or nothing of it does."""
    (tmp_path / "file.incomplete").write_bytes(CONTENT[:70_000])
    server.faults[:] = [fault]
    download.fetch(tmp_path / "file", remote)
    assert files_in(tmp_path) == {"file": CONTENT}
    assert ranges(server) == ["bytes=70000-", None][:requests]


def command_to_fetch(path, remote):
    program = "import sys; from pathlib import Path; from llm_numba.data.download import Remote, fetch; "
    program += "from llm_numba.util.cli import exit_with; path, url, size, sha256 = sys.argv[1:]; "
    program += "exit_with(lambda: fetch(Path(path), Remote(url, int(size), sha256)))"
    return [sys.executable, "-c", program, str(path), *map(str, remote)]


def test_killed_midway(server, remote, tmp_path):
    """The process ends at once, while it waits for more; the next one goes on from there."""
    server.faults[:] = ["stall"]
    command = command_to_fetch(tmp_path / "file", remote)
    with subprocess.Popen(command, env=environment()) as process:
        part = tmp_path / "file.incomplete"
        while not (part.exists() and part.stat().st_size > 400_000):
            assert process.poll() is None
        process.kill()
    server.seen.clear()
    download.fetch(tmp_path / "file", remote)
    assert ranges(server)[0] > "bytes=4" and files_in(tmp_path) == {"file": CONTENT}


@pytest.mark.skipif(os.name == "nt", reason="no such limit there")
def test_a_disk_that_takes_no_more(remote, tmp_path):
    """Found while it writes; what is there counts when there is room again."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    command = command_to_fetch(tmp_path / "file", remote)
    done = subprocess.run(command, env=environment(), preexec_fn=limit, capture_output=True, text=True)
    assert f"{tmp_path / 'file'}: cannot be written (File too large)" in error_line(done.returncode, done.stderr)
    assert list(files_in(tmp_path)) == ["file.incomplete"]
    download.fetch(tmp_path / "file", remote)
    assert files_in(tmp_path) == {"file": CONTENT}


def test_a_full_disk(server, remote, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match="976.6 KiB needed, 9.766 KiB free: give another --out"):
        download.fetch(tmp_path / "file", remote)
    assert not server.seen


# --- the command


@pytest.fixture
def hub(server, monkeypatch):
    """The server with all files of two small data sets, as raw.githubusercontent.com and as the hub."""
    pytest.importorskip("huggingface_hub")
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    for i in range(4):
        name = f"fineweb_{'train' if i else 'val'}_{i:06d}.bin"
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, 5000
        server.files[f"/datasets/kjj0/fineweb10B-gpt2/resolve/main/{name}"] = (
            header.tobytes() + np.full(5000, i, "<u2").tobytes()
        )
    text = 'One day.\n\n<|endoftext|>\n\nA café "said" <|end\nof text.\n<|endoftext|>\n  \n<|endoftext|>\nLast'
    for split in "train", "valid":
        path = f"/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{split}.txt"
        server.files[path] = (text + split).encode()
    ours = datasets.DATASETS["tinyshakespeare"]
    ours = ours._replace(files={"tinyshakespeare.txt": download.Remote(f"{server.address}/file", len(CONTENT), SHA256)})
    monkeypatch.setitem(datasets.DATASETS, "tinyshakespeare", ours)
    return server


def fetch(name, tmp_path, *arguments):
    datasets.main([name, "--out", str(tmp_path / "data"), *arguments])
    return {name: content for name, content in files_in(tmp_path / "data").items() if not name.startswith(".")}


def test_shards(hub, tmp_path, capsys):
    """As many as asked; more later, of which only the new ones are fetched; in a form that training reads."""
    assert list(fetch("fineweb", tmp_path)) == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    hub.seen.clear()
    capsys.readouterr()
    found = fetch("fineweb", tmp_path, "--shards", "3")
    assert {path.rpartition("/")[2] for _, path, _ in hub.seen} == {f"fineweb_train_{i:06d}.bin" for i in (2, 3)}
    assert found == {path.rpartition("/")[2]: content for path, content in hub.files.items() if "fineweb10B" in path}
    assert (shards.open_shard(tmp_path / "data" / "fineweb_train_000003.bin", 4) == 3).all()
    out = capsys.readouterr().out
    folder = tmp_path / "data"
    assert f"--data '{folder}/fineweb_train_*.bin' --val-data {folder}/fineweb_val_000000.bin" in out
    assert "licence: ODC-By 1.0" in out and "source:  https://huggingface.co/datasets/kjj0/fineweb10B-gpt2" in out
    if shutil.which("sha256sum"):
        sums = subprocess.run(["sha256sum", "-c", ".SHA256SUMS"], cwd=folder, capture_output=True, text=True)
        assert sums.returncode == 0 and sums.stdout.count(": OK\n") == 4


def test_the_command_that_is_said_finds_the_shards(hub, tmp_path):
    """In a folder whose name is one a shell, or a glob, takes for something else."""
    folder = tmp_path / "my [data] *"
    fetch("fineweb", folder)
    words = shlex.split(datasets.command("fineweb", folder / "data"))
    assert words[:3] == ["python", "-m", "llm_numba.train"]
    given, _ = settings.parse(words[3:])
    assert [path.name for path in data.find_files(given.data)] == ["fineweb_train_000001.bin"]
    assert data.find_files(given.val_data) == [folder / "data" / "fineweb_val_000000.bin"]


def test_the_hub_and_its_files_disagree(hub, tmp_path):
    hub.faults[:] = ["wrong bytes"]
    with pytest.raises(UserError, match="wrong bytes"):
        fetch("fineweb", tmp_path)
    assert files_in(tmp_path / "data") == {".lock": b""}


def test_a_hub_without_checksums(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "do_HEAD", lambda self: self.answer(200, {"X-Repo-Commit": "c", "ETag": '"abc"'}))
    with pytest.raises(UserError, match="the hub gives no SHA-256 and size"):
        fetch("fineweb", tmp_path)


def test_not_on_the_hub(hub, tmp_path):
    hub.files.clear()
    with pytest.raises(UserError, match="fineweb_val_000000.bin: the hub answers 404"):
        fetch("fineweb", tmp_path)


def test_whatever_is_there_is_checked_without_a_network(hub, tmp_path, capsys):
    for name in "tinyshakespeare", "fineweb", "tinystories":
        fetch(name, tmp_path)
        hub.seen.clear()
        capsys.readouterr()
        before = files_in(tmp_path)
        fetch(name, tmp_path)
        assert not hub.seen and "here already, and whole" in capsys.readouterr().out
        assert files_in(tmp_path) == before

    for data_set, name in (
        ("tinyshakespeare", "tinyshakespeare.txt"),
        ("fineweb", "fineweb_train_000001.bin"),
        ("tinystories", "train.jsonl"),
    ):
        path = tmp_path / "data" / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"!")
        with pytest.raises(UserError, match=f"{path}: damaged or changed .*: delete it and run again"):
            fetch(data_set, tmp_path)
        path.unlink()
        fetch(data_set, tmp_path)
        assert path.read_bytes() == content


@pytest.mark.parametrize("right", [True, False])
def test_a_file_put_there_by_hand(hub, tmp_path, right):
    """It is what the hub has, or it is not touched."""
    (tmp_path / "data").mkdir()
    (path,) = (path for path in hub.files if "val_000000" in path)
    mine = tmp_path / "data" / "fineweb_val_000000.bin"
    mine.write_bytes(hub.files[path] if right else b"mine")
    if right:
        fetch("fineweb", tmp_path)
        assert not any("val_000000" in path for method, path, _ in hub.seen if method == "GET")
    else:
        with pytest.raises(UserError, match="damaged or changed"):
            fetch("fineweb", tmp_path)
        assert mine.read_bytes() == b"mine"


def test_stories(hub, tmp_path, monkeypatch):
    """Every story is a document, whose text is what stands between the marks; a mark may lie across two blocks."""
    for size in 7, 1 << 20:
        monkeypatch.setattr(datasets, "BLOCK", size)
        found = fetch("tinystories", tmp_path / str(size))
        assert set(found) == {"train.jsonl", "train.txt", "valid.jsonl", "valid.txt"}
        texts = [json.loads(line)["text"] for line in found["train.jsonl"].splitlines()]
        assert texts == ["One day.", 'A café "said" <|end\nof text.', "Lasttrain"]


def test_a_file_in_the_way(hub, tmp_path):
    """One that nobody fetched, under the name of one that is made here."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("mine")
    with pytest.raises(UserError, match="train.jsonl: in the way, .* move it away, or give another --out"):
        fetch("tinystories", tmp_path)
    assert (tmp_path / "data" / "train.jsonl").read_text() == "mine"


def test_as_a_user(hub, tmp_path):
    """The command in a process of its own: HF_ENDPOINT and HF_HUB_OFFLINE, and nothing written outside the cache."""
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
    assert "fline" in error_line(offline.returncode, offline.stderr)
    done = run("fineweb")
    assert done.returncode == 0, done.stderr
    assert (cache / "datasets" / "fineweb" / "fineweb_train_000001.bin").stat().st_size == 11024
    assert run("fineweb", HF_HUB_OFFLINE="1").returncode == 0
    assert files_in(home) == {}
    assert run("--list").stdout.startswith("tinyshakespeare") and run().stdout == run("--list").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["finweb"], "error: finweb: no such data set: choose one of tinyshakespeare, tinystories, fineweb, "),
        (["hellaswag", "--shards", "2"], "error: --shards 2: hellaswag is not in shards; leave it out"),
        (["fineweb", "--shards", "104"], "error: --shards 104: fineweb has 103; give 1 to 103"),
        (["fineweb", "--shards", "0"], "error: --shards 0: fineweb has 103; give 1 to 103"),
        (["fineweb", "--shards", "x"], "error: --shards: invalid int value: 'x' (see --help)"),
    ],
)
def test_mistakes(arguments, says, capfd):
    with pytest.raises(SystemExit) as stopped:
        exit_with(lambda: datasets.main(arguments))
    assert error_line(stopped.value.code, capfd.readouterr().err).startswith(says)


def test_a_folder_that_cannot_be(hub, tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(UserError, match="data: cannot be used .File exists.: choose another --out"):
        fetch("tinyshakespeare", tmp_path)


def test_two_at_once(hub, tmp_path):
    filelock = pytest.importorskip("filelock")
    (tmp_path / "data").mkdir()
    with filelock.FileLock(tmp_path / "data" / ".lock"), pytest.raises(UserError, match="another download"):
        fetch("tinyshakespeare", tmp_path)
    assert fetch("tinyshakespeare", tmp_path) == {"tinyshakespeare.txt": CONTENT}


def test_without_the_libraries(hub, tmp_path, monkeypatch):
    for name, used_by in ("requests", "tinyshakespeare"), ("huggingface_hub", "fineweb"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=rf'{name} is not installed: pip install -e "\.\[download\]"'):
                fetch(used_by, tmp_path)
