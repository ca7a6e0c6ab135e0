"""Finding files, shards, tokenised text and the loader."""

import json
import os
import subprocess
import sys
import sysconfig
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import platformdirs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import QUICK, losses_of, refused, run_here

from llm_numba import eval as evaluation
from llm_numba.data import corpus as data
from llm_numba.data import shards as shard_files
from llm_numba.data import text as text_files
from llm_numba.data.corpus import prepare
from llm_numba.data.find import find_files, standard_library_files
from llm_numba.data.loader import Loader
from llm_numba.data.shards import Span, check_ids, fingerprint, open_shard, write_shard
from llm_numba.data.tokenizer import END_OF_TEXT, checked_encoding, load_tokenizer
from llm_numba.training import checkpoint
from llm_numba.util.cache import cache_folder
from llm_numba.util.cli import UserError

BPE = load_tokenizer("bpe", ["the cat sat on the mat\n\n  and so on, 12 times; été à 東京\n" * 9], 280)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLM_NUMBA_CACHE", str(folder))
    return folder


@pytest.fixture
def text(tmp_path):
    """A folder with 12 documents of different lengths."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02d}.txt").write_text(f"document {i}: " + "the cat sat on the mat\n" * (i + 1))
    return folder


def read(spans):
    return np.concatenate([open_shard(span.path)[span.start : span.stop] for span in spans])


def sparse_shard(path, count):
    """A sparse file: a shard of `count` zeros that takes almost no disk space."""
    write_shard(path, np.zeros(1, np.uint16))
    with path.open("r+b") as file:
        file.seek(8)
        file.write(count.to_bytes(4, "little"))
        file.truncate(1024 + 2 * count)
    return path


def peak_memory(action):
    """The most bytes that Python and NumPy had allocated during `action`, without memory-mapped files."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- the cache folder


def test_cache_folder_is_made(cache):
    assert cache_folder() == cache
    assert cache.is_dir()


def test_cache_folder_by_default_is_the_platforms(monkeypatch, tmp_path):
    monkeypatch.delenv("LLM_NUMBA_CACHE")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "user" / name)
    assert cache_folder() == tmp_path / "user" / "llm_numba"


def test_cache_folder_under_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLM_NUMBA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="file/cache: .*set LLM_NUMBA_CACHE"):
        cache_folder()


def test_cache_folder_that_is_read_only(monkeypatch, cache):
    monkeypatch.setattr(os, "access", lambda *_: False)  # chmod does not stop root
    with pytest.raises(UserError, match=f"{cache}: .*Permission denied.*LLM_NUMBA_CACHE"):
        cache_folder()


# --- shards


@pytest.mark.parametrize("count", [1, 3, 97, 257])
@pytest.mark.parametrize("V", [65_536, 65_537, 2**31 - 128])
def test_shard_round_trip(tmp_path, count, V):
    tokens = np.random.default_rng(count).integers(0, V, count)
    write_shard(tmp_path / "a.bin", tokens, V)
    shard = open_shard(tmp_path / "a.bin")
    assert isinstance(shard, np.memmap)
    assert shard.dtype == (np.uint16 if V == 65_536 else np.uint32)
    np.testing.assert_array_equal(shard, tokens)


@pytest.mark.parametrize(
    ("V", "magic", "version", "content"),
    [
        (50257, 20240520, 1, b"\x01\x00\x02\x00\x50\xc4"),
        (128256, 20240801, 7, b"\x01\x00\x00\x00\x02\x00\x00\x00\x50\xc4\x00\x00"),
    ],
)
def test_shard_is_llm_cs_format(tmp_path, V, magic, version, content):
    write_shard(tmp_path / "a.bin", np.array([1, 2, 50256]), V)
    found = (tmp_path / "a.bin").read_bytes()
    assert found[:12] == b"".join(n.to_bytes(4, "little") for n in (magic, version, 3))
    assert found[12:1024] == bytes(1012)
    assert found[1024:] == content


def change_header(index, value):
    def change(path):
        header = np.memmap(path, "<i4", "r+", shape=256)
        header[index] = value
        header.flush()

    return change


@pytest.mark.parametrize("V", [97, 128256])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path, _: path.unlink(), "No such file"),
        (lambda path, _: path.write_bytes(b"short"), "20240520 .uint16 tokens. or 20240801 .uint32 tokens."),
        (lambda path, _: change_header(0, 20240326)(path), "20240520"),
        (lambda path, _: change_header(1, 2)(path), "version 2: expected version [17] .uint"),
        (lambda path, _: change_header(2, 0)(path), "empty"),
        (lambda path, _: change_header(2, -1)(path), "empty"),
        (lambda path, n: change_header(2, 11)(path), "{0} bytes, .* 11 tokens, {1} bytes"),
        (lambda path, n: change_header(2, 9)(path), "{0} bytes, .* 9 tokens, {2} bytes"),
        (lambda path, n: os.truncate(path, n - 1), "{3} bytes, .* 10 tokens, {0} bytes"),
        (lambda path, n: change_header(0, 20240801 if n == 1044 else 20240520)(path), "version [17]: expected version"),
    ],
)
def test_damaged_shard(tmp_path, damage, message, V):
    path, size = tmp_path / "a.bin", 2 if V == 97 else 4
    n = 1024 + 10 * size
    write_shard(path, np.arange(10), V)
    open_shard(path)
    damage(path, n)
    with pytest.raises(UserError, match=f"{path}: .*{message.format(n, n + size, n - size, n - 1)}"):
        open_shard(path)


@pytest.mark.parametrize("at", [0, 7, 8, 20])
@pytest.mark.parametrize("V", [257, 70_000])
def test_token_outside_the_vocabulary(tmp_path, monkeypatch, at, V):
    monkeypatch.setattr(shard_files, "BLOCK_TOKENS", 8)
    tokens = np.full(21, V - 1)
    tokens[at:] = V  # the first one is reported
    write_shard(tmp_path / "a.bin", tokens, V + 1)
    check_ids([tmp_path / "a.bin"], V + 1)
    with pytest.raises(UserError, match=f"a.bin: token {at} is {V}, but the vocabulary has {V}: .*--vocab-size"):
        check_ids([tmp_path / "a.bin"], V)


def test_checking_tokens_takes_little_memory(tmp_path):
    path = sparse_shard(tmp_path / "a.bin", 20_000_000)

    def check():
        check_ids([path], 1)
        with pytest.raises(UserError):
            check_ids([path], 0)

    assert peak_memory(check) < 4e6  # bytes; the shard has 40e6


class Reads:
    """Counts how often each shard is read."""

    def __init__(self, monkeypatch):
        self.paths, blocks = [], shard_files._blocks

        def counted(path):
            self.paths.append(path.name)
            return blocks(path)

        monkeypatch.setattr(shard_files, "_blocks", counted)

    def of(self, *arguments):
        self.paths.clear()
        check_ids(*arguments)
        return self.paths


def test_a_shard_is_read_once(tmp_path, monkeypatch):
    """For any vocabulary, until the file changes."""
    reads, paths = Reads(monkeypatch), [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path in paths:
        write_shard(path, np.arange(9))
    assert reads.of(paths, 9) == ["a.bin", "b.bin"]
    assert reads.of(paths, 9) == reads.of(paths[1:], 10) == []
    with pytest.raises(UserError, match="a.bin: token 8 is 8"):
        check_ids(paths, 8)
    time = paths[0].stat().st_mtime_ns
    os.utime(paths[0], ns=(1, time + 1))
    assert reads.of(paths, 9) == ["a.bin"]
    write_shard(paths[1], np.arange(1, 10))  # of the same size, and the same time
    os.utime(paths[1], ns=(1, time))
    with pytest.raises(UserError, match="b.bin: token 8 is 9"):
        check_ids(paths, 9)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"x": 1}', b"[" * 100_000, b"\xff", None])
def test_a_damaged_record_of_checks(tmp_path, monkeypatch, cache, content):
    """Is ignored: shards are read again, and the record is written again."""
    reads, path = Reads(monkeypatch), tmp_path / "a.bin"
    write_shard(path, np.arange(9))
    check_ids([path], 9)
    record = cache / shard_files.CHECKED
    before = json.loads(record.read_text())
    record.write_bytes(json.dumps({str(path): ["a", 1]}).encode() if content is None else content)
    assert reads.of([path], 9) == ["a.bin"]
    assert json.loads(record.read_text()) == before
    assert reads.of([path], 9) == []


def test_deleted_shards_are_forgotten(tmp_path, cache):
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path in paths:
        write_shard(path, np.arange(9))
        check_ids([path], 9)
    paths[0].unlink()
    write_shard(tmp_path / "c.bin", np.arange(9))
    check_ids([tmp_path / "c.bin"], 9)
    assert list(json.loads((cache / shard_files.CHECKED).read_text())) == [str(paths[1]), str(tmp_path / "c.bin")]


def test_a_cache_folder_that_is_read_only_only_costs_time(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # chmod does not stop root
    reads, path = Reads(monkeypatch), tmp_path / "a.bin"
    write_shard(path, np.arange(9))
    assert reads.of([path], 9) == reads.of([path], 9) == ["a.bin"]


def test_fingerprint(tmp_path):
    """Depends on the tokens alone; its values are part of every checkpoint."""
    (tmp_path / "moved").mkdir()
    for path in tmp_path / "a.bin", tmp_path / "moved" / "b.bin":
        write_shard(path, np.arange(2_200_000) % 50257)
        assert fingerprint([Span(path, 0, 2_200_000), Span(path, 5, 10)]) == [[2_200_000, 1336475020], [5, 1344227864]]
    write_shard(path, np.arange(1, 2_200_001) % 50257)
    assert fingerprint([Span(path, 0, 2_200_000)])[0][1] != 1336475020


def test_a_shard_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.bin"
    write_shard(path, np.arange(10))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"{path}: .*No space left"):
        write_shard(path, np.arange(20))
    np.testing.assert_array_equal(open_shard(path), np.arange(10))
    assert os.listdir(tmp_path) == ["a.bin"]


# --- finding files


def test_find_files(tmp_path, monkeypatch):
    for name in ("b.txt", "a.md", "deep/er/c.py", ".hidden", ".git/config", "deep/.d/e.txt", "no_suffix"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (tmp_path / "in" / "empty.txt").touch()
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\0")
    os.symlink(tmp_path / "in" / "nowhere", tmp_path / "in" / "broken")
    monkeypatch.chdir(tmp_path)

    def found(*patterns):
        return [str(path.relative_to(tmp_path / "in")) for path in find_files(patterns)]

    assert found("in") == ["a.md", "b.txt", "deep/er/c.py", "no_suffix"]
    assert found(str(tmp_path / "in" / "b.txt")) == ["b.txt"]
    assert found("in/*") == ["a.md", "b.txt", "no_suffix", "picture.png"]  # a glob matches any file
    assert found("in/**/*.py") == ["deep/er/c.py"]
    assert found("in/[ab].*", "in", "in/b.txt", str(tmp_path / "in" / "a.md")) == found("in")
    assert found("in/.hidden") == [".hidden"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("text")
    assert find_files([str(tmp_path / "a[1].txt")]) == [tmp_path / "a[1].txt"]


def test_a_link_keeps_its_name(tmp_path):
    """Hugging Face's cache links x.bin to a file without a suffix."""
    write_shard(tmp_path / "blob", np.arange(3))
    os.symlink(tmp_path / "blob", tmp_path / "x.bin")
    assert find_files([str(tmp_path / "x.bin")]) == [tmp_path / "x.bin"]


def test_a_folder_of_shards(tmp_path):
    for name in ("b.bin", "a.bin"):
        write_shard(tmp_path / name, np.zeros(3))
    assert find_files([str(tmp_path)]) == [tmp_path / "a.bin", tmp_path / "b.bin"]


def test_nothing_found(tmp_path):
    (tmp_path / "empty.txt").touch()
    for value in (tmp_path / "none.txt", tmp_path / "*.md", tmp_path, tmp_path / "*.txt", ""):
        with pytest.raises(UserError) as caught:
            find_files([str(value)], "--val-data")
        assert str(caught.value).startswith(f"--val-data {value}: no text and no .bin shard found")


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="--data .*empty.txt: the file is empty"):
        find_files([str(tmp_path / "empty.txt")])


def test_shards_and_text_together(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(3))
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(UserError, match="--data: found uint16 shards .*a.bin.* and text .*b.txt"):
        find_files([str(tmp_path)])


def test_shards_of_two_types_together(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(3))
    write_shard(tmp_path / "b.bin", np.arange(3), 128256)
    with pytest.raises(UserError, match="--data: found uint16 shards .*a.bin.* and uint32 shards .*b.bin"):
        find_files([str(tmp_path / "*.bin")])
    with pytest.raises(UserError, match="--data and --val-data: found uint16 shards .*a.bin.* and uint32 shards"):
        prepare([str(tmp_path / "a.bin")], [str(tmp_path / "b.bin")], "none", 128256, 0)


def test_standard_library_files():
    files = standard_library_files()
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root).as_posix() for file in files]
    assert {"argparse.py", "json/decoder.py", "pydoc_data/topics.py"} <= set(names)
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    assert 5e6 < sum(file.stat().st_size for file in files) < 20e6
    for file in files:
        assert file.read_text("utf-8")


def test_standard_library_without_sources(monkeypatch, tmp_path):
    (tmp_path / "latin1.py").write_bytes(b"# \xe9\n")
    (tmp_path / "empty.py").touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test.py").write_text("pass")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match="--data"):
        standard_library_files()


# --- text in pieces


@given(
    st.lists(st.tuples(st.text("aé東'1.", min_size=1, max_size=2), st.sampled_from(["\n", " ", "\n\n", "  ", "\n\t"]))),
    st.integers(32, 64),
)
def test_pieces_give_the_tokens_of_the_whole_text(tmp_path_factory, words, size):
    """A word and the white space after it are at most 8 bytes, so every piece has a place to cut."""
    text = "".join(word + space for word, space in words)
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    with mock.patch.object(text_files, "PIECE_BYTES", size):
        pieces = list(next(text_files.documents(path)))
    assert "".join(pieces) == text
    assert sum((BPE.encode_ordinary(piece) for piece in pieces), []) == BPE.encode_ordinary(text)
    assert all(len(piece.encode()) <= 2 * size for piece in pieces)


@pytest.mark.parametrize("text", ["x" * 999, " " * 999, "\n" * 999, "\r\n" * 99, "é" * 500, "a " + "東" * 300])
def test_pieces_without_a_place_to_cut(tmp_path, monkeypatch, text):
    monkeypatch.setattr(text_files, "PIECE_BYTES", 64)
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = list(next(text_files.documents(tmp_path / "a.txt")))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 129


def test_pieces_take_little_memory(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"the cat sat on the mat\n" * 500_000)

    def count():
        assert sum(map(len, next(text_files.documents(tmp_path / "a.txt")))) == 11_500_000

    assert peak_memory(count) < 10 * text_files.PIECE_BYTES  # 2.6e6; the file has 11.5e6


def test_millions_of_white_spaces(tmp_path):
    """More in a row than the regular expressions of the tokenisers can handle."""
    (tmp_path / "a.txt").write_text("a" + " " * 1_600_000 + "b" + "\n" * 1_200_000)
    corpus = prepare([str(tmp_path / "a.txt")], [], "bpe", 258, 0)
    assert corpus.encoding.decode(read(corpus.train)[1:]) == (tmp_path / "a.txt").read_text()


@pytest.mark.parametrize("bad", [b"\xff", b"\xe6\x9d", b"\xc3("], ids=["invalid", "cut off", "no continuation"])
def test_not_utf8_reports_the_byte(tmp_path, monkeypatch, bad):
    """Wherever the bad byte is in or between pieces, and after characters of one to three bytes."""
    monkeypatch.setattr(text_files, "PIECE_BYTES", 8)
    path = tmp_path / "latin1.txt"
    for before in range(20):
        good = ("aé東 " * before)[:before].encode()
        for after in (b"", b"z" * 20):
            path.write_bytes(good + bad + after)
            with pytest.raises(UserError) as caught:
                list(next(text_files.documents(path)))
            assert str(caught.value).startswith(f"{path}: not UTF-8 at byte {len(good)}:")


# --- prepare


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_prepare_text(text, monkeypatch, tokenizer):
    monkeypatch.setattr(data, "SHARD_TOKENS", 100)
    monkeypatch.setattr(text_files, "PIECE_BYTES", 50)
    corpus = prepare([str(text)], [], tokenizer, 270, 0.3)
    assert corpus.vocab_size == corpus.encoding.n_vocab == (270 if tokenizer == "bpe" else 257)

    tokens = read(corpus.train + corpus.val)
    documents = corpus.encoding.decode(tokens).split(END_OF_TEXT)
    originals = [path.read_text() for path in sorted(text.iterdir())]
    assert documents[0] == ""  # each document has the token before it
    assert sorted(documents[1:]) == sorted(originals)
    assert documents[1:] != originals  # shuffled

    held_out = read(corpus.val)
    assert len(held_out) == int(0.3 * len(tokens))
    np.testing.assert_array_equal(held_out, tokens[-len(held_out) :])
    paths = {span.path for span in corpus.train + corpus.val}
    assert len(paths) == -(-len(tokens) // 100) > 3
    assert corpus.train[-1].path == corpus.val[0].path  # the cut is inside a shard
    assert corpus.train[-1].stop == corpus.val[0].start


def test_nothing_held_out(text):
    corpus = prepare([str(text)], [], "bytes", 0, 0)
    assert corpus.val == []
    assert len(corpus.train) == 1


def test_a_special_token_in_the_text_is_text(tmp_path):
    (tmp_path / "a.txt").write_text(f"one{END_OF_TEXT}two")
    corpus = prepare([str(tmp_path / "a.txt")], [], "bytes", 0, 0)
    assert list(read(corpus.train)) == [256, *f"one{END_OF_TEXT}two".encode()]


def test_line_ends_are_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    assert bytes(read(prepare([str(tmp_path / "a.txt")], [], "bytes", 0, 0).train)[1:].tolist()) == b"one\r\ntwo\n"


def test_bpe_learns_from_a_bounded_amount(text, monkeypatch):
    monkeypatch.setattr(data, "LEARN_CHARACTERS", 300)
    files = find_files([str(text)])
    learned_from = list(data._text_to_learn_from(files))
    assert sum(map(len, learned_from[:-1])) < 300 <= sum(map(len, learned_from))
    assert "".join(learned_from).startswith(files[0].read_text())


def test_validation_text(text, tmp_path):
    (tmp_path / "val.txt").write_text("the mat sat on the cat")
    corpus = prepare([str(text)], [str(tmp_path / "val.txt")], "bpe", 270, 0.5)
    tokens = read(corpus.val)
    assert tokens[0] == corpus.encoding.eot_token
    assert list(tokens[1:]) == corpus.encoding.encode_ordinary("the mat sat on the cat")
    assert corpus.encoding.decode(read(corpus.train)).count(END_OF_TEXT) == 12  # val_fraction holds nothing out


def test_validation_text_is_tokenised_with_the_tokenizer_of_the_training_text(text, tmp_path):
    """Other training text, the same validation text: its cached tokens must not be used."""
    (tmp_path / "val.txt").write_text("the mat sat on the cat")
    (tmp_path / "other.txt").write_text("zebras zigzag, zebras zigzag. mat at, sat cat. " * 9)
    for source in (text, tmp_path / "other.txt"):
        corpus = prepare([str(source)], [str(tmp_path / "val.txt")], "bpe", 265, 0.5)
        assert corpus.encoding.decode(read(corpus.val)[1:]) == "the mat sat on the cat"


def test_json_lines_are_documents(tmp_path, monkeypatch):
    """In order: one longer than a piece, one with a special token's name; an empty text is left out."""
    monkeypatch.setattr(text_files, "PIECE_BYTES", 50)
    texts = ["A café.", "the cat sat " * 20, "", f"{END_OF_TEXT} as text", "x" * 120]
    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines[:2] + [""] + lines[2:]))
    corpus = prepare([str(path)], [], "bytes", 0, 0)
    assert list(read(corpus.train)) == [t for text in texts if text for t in (256, *text.encode())]
    learned = prepare([str(path)], [], "bpe", 262, 0).encoding._mergeable_ranks
    assert all(len(token) == 1 or token in "\n".join(texts).encode() for token in learned) and len(learned) == 261


@pytest.mark.parametrize("bad", ["{", "[]", '{"text": 1}', '{"story": "x"}', b"\xff"], ids=str)
@pytest.mark.parametrize("line", [1, 3])
def test_a_bad_json_line_is_reported(tmp_path, bad, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' * (line // 2) + (bad if isinstance(bad, bytes) else bad.encode()))
    with pytest.raises(UserError, match=rf'{path}: line {line}: expected a JSON object with a string under .* "text"'):
        prepare([str(path)], [], "bytes", 0, 0)


def test_json_lines_without_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n \n")
    for _ in range(2):
        assert prepare([str(tmp_path / "a.jsonl")], [], "bytes", 0, 0).train == []


def test_other_json_is_text(tmp_path):
    text = '{"text": "y"}\n'
    (tmp_path / "a.json").write_text(text)
    assert list(read(prepare([str(tmp_path / "a.json")], [], "bytes", 0, 0).train)) == [256, *text.encode()]


def no_work(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("tokenised or learned again")

    monkeypatch.setattr(data, "load_tokenizer", fail)
    monkeypatch.setattr(data, "_encode", fail)


def test_text_is_tokenised_once(text, monkeypatch):
    first = prepare([str(text)], [str(text / "03.txt")], "bpe", 270, 0.1)
    no_work(monkeypatch)
    second = prepare([str(text)], [str(text / "03.txt")], "bpe", 270, 0.1)
    assert second._replace(encoding=None) == first._replace(encoding=None)
    assert second.encoding.encode_ordinary("the cat") == first.encoding.encode_ordinary("the cat")


@pytest.mark.parametrize("change", ["time", "size", "name", "vocab_size", "format"])
def test_changed_text_is_tokenised_again(text, monkeypatch, change):
    prepare([str(text)], [], "bpe", 270, 0.1)
    vocab_size, path = 270, text / "03.txt"
    if change == "time":
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    elif change == "size":
        stat = path.stat()
        path.write_text("new")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "name":
        path.rename(text / "03b.txt")
    elif change == "vocab_size":
        vocab_size = 271
    else:
        monkeypatch.setattr(data, "CACHE_FORMAT", -1)
    no_work(monkeypatch)
    with pytest.raises(AssertionError, match="again"):
        prepare([str(text)], [], "bpe", vocab_size, 0.1)


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe"])
def test_another_tokenizer_tokenises_again(text, monkeypatch, tokenizer):
    prepare([str(text)], [], "bytes", 257, 0.1)
    no_work(monkeypatch)
    with pytest.raises(AssertionError, match="again"):
        prepare([str(text)], [], tokenizer, 257, 0.1)


@pytest.mark.parametrize(("characters", "lengths"), [(98, [99]), (99, [100]), (100, [100, 1]), (200, [100, 100, 1])])
def test_shards_are_full_but_the_last(tmp_path, monkeypatch, characters, lengths):
    monkeypatch.setattr(data, "SHARD_TOKENS", 100)
    (tmp_path / "a.txt").write_text("x" * characters)
    train = prepare([str(tmp_path / "a.txt")], [], "bytes", 0, 0).train
    assert [len(open_shard(span.path)) for span in train] == lengths
    assert list(read(train)) == [256, *b"x" * characters]


def test_interrupted_tokenising_leaves_nothing(text, monkeypatch, cache):
    monkeypatch.setattr(data, "SHARD_TOKENS", 100)
    with monkeypatch.context() as patch:

        def interrupt(path, *arguments):
            write_shard(path, *arguments)
            if path.name == "000003.bin":
                raise KeyboardInterrupt

        patch.setattr(data, "write_shard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([str(text)], [], "bytes", 0, 0.1)
        assert names_in(cache) == {"tokenising.lock"}
    assert prepare([str(text)], [], "bytes", 0, 0.1).train


def names_in(cache):
    return {path.name.split("-")[0] for path in cache.iterdir()}


@pytest.fixture
def stalled(tmp_path, cache):
    """A process that has begun to tokenise `tmp_path / "fifo.txt"`, and waits for the rest of it."""
    fifo = tmp_path / "fifo.txt"
    fifo.write_text("the cat")
    script = (
        "import sys; from pathlib import Path; from llm_numba.data import corpus; "
        "corpus.documents = lambda path: iter([iter(sys.stdin.readline, '')]); "
        f"corpus.prepare([{str(fifo)!r}], [], 'bytes', None, 0)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as process:
        while not (cache / "unfinished").is_dir():
            assert process.poll() is None
        yield process
        process.kill()


def test_what_a_killed_process_left_is_removed(text, tmp_path, cache, stalled):
    """When text is tokenised next."""
    stalled.kill()
    stalled.wait()
    assert "unfinished" in names_in(cache)
    prepare([str(text)], [], "bytes", 0, 0.1)
    assert names_in(cache) == {"tokens", "tokenising.lock", "checked"}


def test_two_processes_at_once(tmp_path, monkeypatch, capfd, cache, stalled):
    """The second waits, and takes the tokens of the first."""

    acquire, calls = data.FileLock.acquire, []

    def finish_the_other(lock, *arguments, **options):
        calls.append(options)
        if calls[-1] == {}:  # the one that waits
            stalled.communicate(b"the cat\n")
        return acquire(lock, *arguments, **options)

    monkeypatch.setattr(data.FileLock, "acquire", finish_the_other)
    no_work(monkeypatch)
    corpus = prepare([str(tmp_path / "fifo.txt")], [], "bytes", 0, 0)
    assert corpus.encoding.decode(read(corpus.train)[1:]) == "the cat\n"
    assert capfd.readouterr().err.startswith("waiting for another process")
    assert names_in(cache) == {"tokens", "tokenising.lock", "checked"}


@pytest.mark.parametrize("name", ["000000.bin", "corpus.json", "tokenizer.tiktoken"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{}")])
def test_a_damaged_cache_is_reported(text, cache, name, damage):
    prepare([str(text)], [], "bytes", 0, 0.1)
    (folder,) = cache.glob("tokens-*")
    damage(folder / name)
    with pytest.raises(UserError, match=f"{folder}: .*damaged: delete the folder"):
        prepare([str(text)], [], "bytes", 0, 0.1)


def test_the_default_text(monkeypatch, tmp_path):
    """Without --data: the standard library, tokenised again for another version of Python."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "module.py").write_text("pass\n" * 20)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library))
    corpus = prepare([], [], "bytes", 0, 0)
    assert corpus.encoding.decode(read(corpus.train)[1:]) == "pass\n" * 20
    monkeypatch.setattr(data.platform, "python_version", lambda: "3.99")
    no_work(monkeypatch)
    with pytest.raises(AssertionError, match="again"):
        prepare([], [], "bytes", 0, 0)


def test_the_second_start_imports_neither_the_learner_nor_the_progress_bar(text):
    script = (
        "import sys; from llm_numba.data.corpus import prepare; "
        f"prepare([{str(text)!r}], [], 'bpe', 270, 0.1); print({{'rustbpe', 'tqdm', 'numba'}} & set(sys.modules))"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert "rustbpe" in outputs[0]
    assert outputs[1] == "set()\n"


def test_text_that_is_not_utf8(tmp_path, cache):
    (tmp_path / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    for tokenizer in ("bytes", "bpe"):
        with pytest.raises(UserError, match="latin1.txt: not UTF-8 at byte 3"):
            prepare([str(tmp_path / "latin1.txt")], [], tokenizer, 257, 0)
    assert names_in(cache) == {"tokenising.lock"}


def test_prepare_shards(tmp_path, cache):
    for name, count in (("a", 30), ("b", 70)):
        write_shard(tmp_path / f"{name}.bin", np.arange(count))
    a, b = (tmp_path / f"{name}.bin" for name in "ab")
    corpus = prepare([str(tmp_path / "*.bin")], [], "none", 70, 0.25)
    assert corpus == ([Span(a, 0, 30), Span(b, 0, 45)], [Span(b, 45, 70)], None, 70)
    corpus = prepare([str(a)], [str(b)], "bytes", None, 0.25)
    assert corpus[:2] == ([Span(a, 0, 30)], [Span(b, 0, 70)])
    assert corpus.encoding.n_vocab == corpus.vocab_size == 257
    for arguments in ([str(b)], []), ([str(a)], [str(b)]):
        with pytest.raises(UserError, match="b.bin: token 69 is 69"):
            prepare(*arguments, "none", 69, 0.25)


def test_shards_with_validation_text(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(30))
    (tmp_path / "val.txt").write_text("text")
    corpus = prepare([str(tmp_path / "a.bin")], [str(tmp_path / "val.txt")], "bytes", 0, 0.1)
    assert list(read(corpus.val)) == [256, *b"text"]


# --- vocabularies above 65,536


def test_text_in_a_large_vocabulary(tmp_path):
    """All pairs of bytes are tokens; their ids go up to 65,791."""
    tokens = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    ranks = {token: id for id, token in enumerate(tokens)}
    encoding = checked_encoding("pairs", ranks, {END_OF_TEXT: len(ranks)})
    (tmp_path / "a.txt").write_text("東京タワー the cat " * 9)
    corpus = prepare([str(tmp_path / "a.txt")], [], encoding, 0, 0.2)
    tokens = read(corpus.train + corpus.val)
    assert corpus.vocab_size == 65_793 and tokens.dtype == np.uint32 and tokens[0] == tokens.max() == 65_792
    assert encoding.decode(tokens[1:]) == (tmp_path / "a.txt").read_text()


@pytest.mark.slow
@pytest.mark.compiled
def test_training_on_uint32_shards(tmp_path, capfd):
    """Only rows of wte above 65,535 get large gradients; the run can be evaluated and resumed."""
    ids = np.array([69_999, 65_536, 68_000, 67_001])
    write_shard(tmp_path / "a.bin", ids[np.random.default_rng(0).integers(0, 4, 5000)], 70_000)
    shard = ("--data", tmp_path / "a.bin")
    sizes = ("--tokenizer", "none", "--vocab-size", 70_000)
    run_here(*QUICK, *shard, *sizes, "--steps", 2, "--out", tmp_path / "run")
    losses = losses_of(tmp_path / "run")
    assert losses[0] == pytest.approx(np.log(70_000), abs=0.1) and losses[1] < losses[0]
    tensors, _, _ = checkpoint.load(checkpoint.newest(tmp_path / "run"))
    assert sorted(np.abs(tensors["m.wte"]).sum(1).argsort()[-4:]) == sorted(ids)
    run_here("--resume", tmp_path / "run", "--steps", 3)
    run_here(tmp_path / "run", *shard, program=evaluation)
    write_shard(tmp_path / "b.bin", np.full(99, 70_000), 70_001)
    line = refused(capfd, tmp_path / "run", "--data", tmp_path / "b.bin", program=evaluation)
    assert "b.bin: token 0 is 70000, but the vocabulary has 70000" in line


@pytest.mark.parametrize(
    ("train", "val", "tokenizer", "vocab_size", "message"),
    [
        ("a.bin", None, "bpe", 300, "--tokenizer bpe: .*shards"),
        ("a.txt", "a.bin", "bpe", 300, "--tokenizer bpe: .*shards"),
        ("a.txt", None, "none", 300, "--tokenizer none: is for .bin shards only"),
        ("a.bin", "a.txt", "none", 300, "--tokenizer none: is for .bin shards only"),
        ("a.txt", None, "bpe", 65537, "--vocab-size 65537: the text gives only"),
        ("a.txt", None, "bpe", 300, "--vocab-size 300: the text gives only"),
        ("a.txt", None, "bpe", 256, "--vocab-size 256"),
        ("a.txt", None, "words", 0, "--tokenizer words: choose"),
        ("a.bin", None, "words", 0, "--tokenizer words: choose"),
    ],
)
def test_a_tokenizer_that_does_not_fit(tmp_path, train, val, tokenizer, vocab_size, message):
    write_shard(tmp_path / "a.bin", np.arange(30))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=message):
        prepare([str(tmp_path / train)], [str(tmp_path / val)] if val else [], tokenizer, vocab_size, 0.1)


# --- the loader


def shards(folder, counts):
    """Shards of `counts` tokens, all different, and their spans, which skip the first two tokens of each."""
    spans, first = [], 0
    for i, count in enumerate(counts):
        path = folder / f"{i}.bin"
        write_shard(path, np.arange(first, first + count + 2))
        spans.append(Span(path, 2, 2 + count))
        first += count + 2
    return spans


def windows(spans, T):
    """All windows in order, each as its T + 1 tokens: the specification of the loader."""
    found = []
    for span in spans:
        tokens = open_shard(span.path)[span.start : span.stop].tolist()
        found += [tuple(tokens[i : i + T + 1]) for i in range(0, len(tokens) - T, T)]
    return found


def deal(loader, batches):
    """The next windows, each as its T + 1 tokens; checks that targets are inputs shifted by one."""
    dealt = []
    for _ in range(batches):
        tokens, targets = np.full((2, loader.B, loader.T), -1, np.int32)
        loader.next_batch(tokens, targets)
        np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
        dealt += [(*row, last) for row, last in zip(tokens.tolist(), targets[:, -1].tolist(), strict=True)]
    return dealt


COUNTS = [11, 4, 1, 26, 5]  # with T = 4: 2, 0, 0, 6 and 1 windows


def test_windows_in_order(tmp_path):
    spans = shards(tmp_path, COUNTS)
    loader = Loader(spans, 2, 4, 0, False)
    expected = windows(spans, 4)
    assert loader.windows_per_epoch == len(expected) == 9
    assert deal(loader, 18) == expected * 4


@pytest.mark.parametrize("T", [1, 3, 4, 25])
def test_shuffled_windows_come_once_an_epoch(tmp_path, T):
    spans = shards(tmp_path, COUNTS)
    loader = Loader(spans, 1, T, 7, True)
    epochs = [deal(loader, loader.windows_per_epoch) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == windows(spans, T)
    if T < 25:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert epochs[0] != windows(spans, T)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    B=st.integers(1, 7),
    T=st.integers(1, 9),
    seed=st.integers(0, 2**64),
    shuffle=st.booleans(),
)
def test_every_epoch_is_complete(tmp_path_factory, counts, B, T, seed, shuffle):
    spans = shards(tmp_path_factory.getbasetemp(), counts)
    expected = windows(spans, T)
    if not expected:
        with pytest.raises(UserError):
            Loader(spans, B, T, seed, shuffle)
        return
    n = len(expected)
    dealt = deal(Loader(spans, B, T, seed, shuffle), -(-3 * n // B))
    for epoch in range(3):
        assert sorted(dealt[epoch * n : (epoch + 1) * n]) == sorted(expected)


def test_the_order_is_decided_by_the_seed(tmp_path):
    spans = shards(tmp_path, [400, 300])
    first = deal(Loader(spans, 1, 4, 1, True), 174)
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    assert deal(Loader(spans, 3, 4, 1, True), 58) == first  # nor by B
    assert deal(Loader(spans, 1, 4, 2, True), 174) != first
    assert np.random.get_state()[1].tolist() == before


def test_spans_are_shuffled_too(tmp_path):
    spans = shards(tmp_path, [5] * 40)
    loader = Loader(spans, 40, 4, 1, True)
    first, second = deal(loader, 1), deal(loader, 1)
    assert windows(spans, 4) != first != second


def test_each_span_has_its_own_order(tmp_path):
    """Two spans of the same size get different permutations."""
    spans = shards(tmp_path, [201] * 2)
    dealt = deal(Loader(spans, 1, 4, 1, True), 100)
    assert [window[0] % 203 for window in dealt[:50]] != [window[0] % 203 for window in dealt[50:]]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("B", [1, 2, 4, 9, 20])
def test_restored_exactly_at_every_position(tmp_path, shuffle, B):
    """Through three epochs of 9 windows; a loader stopped anywhere continues as if it had not stopped."""
    spans = shards(tmp_path, COUNTS)
    loader = Loader(spans, B, 4, 5, shuffle)
    states, rows = [], []
    for _ in range(-(-27 // B)):
        states.append(json.loads(json.dumps(loader.state())))
        rows += deal(loader, 1)
    ahead = deal(loader, 3)
    for i, state in enumerate(states):
        assert state == {"epoch": i * B // 9, "window": i * B % 9}
        again = Loader(spans, B, 4, 5, shuffle)
        again.restore(state)
        assert again.state() == state
        assert deal(again, 3) == (rows + ahead)[i * B : (i + 3) * B]
    loader.restore(states[0])
    assert deal(loader, len(states)) == rows


@pytest.mark.parametrize(
    "state",
    [
        {"epoch": 0, "window": 9},
        {"epoch": 0, "window": -1},
        {"epoch": -1, "window": 0},
        {"epoch": 0},
        {"epoch": 0, "window": 1.0},
        {"epoch": None, "window": 0},
        {},
    ],
)
def test_a_position_out_of_range(tmp_path, state):
    loader = Loader(shards(tmp_path, COUNTS), 2, 4, 0, True)
    with pytest.raises(UserError, match="9 windows: .*--sequence-length"):
        loader.restore(state)


def test_fewer_windows_than_a_batch(tmp_path):
    spans = shards(tmp_path, [9])
    assert deal(Loader(spans, 5, 4, 0, False), 1) == (windows(spans, 4) * 3)[:5]


@pytest.mark.parametrize(("counts", "longest"), [([], 0), ([4], 4), ([3, 4, 2], 4)])
def test_too_few_tokens(tmp_path, counts, longest):
    with pytest.raises(UserError, match=rf"--val-fraction: {longest} tokens .* needs 5 .*--sequence-length"):
        Loader(shards(tmp_path, counts), 1, 4, 0, False, "--val-fraction")
    assert Loader(shards(tmp_path, [5]), 1, 4, 0, False).windows_per_epoch == 1


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_large_shard_is_not_read_completely(tmp_path, shuffle):
    """400 MB of tokens: only the permutation of 48828 windows (8 bytes each) may be in memory."""
    path = sparse_shard(tmp_path / "a.bin", 200_000_000)
    tokens, targets = np.empty((2, 8, 4096), np.int32)

    def some_batches():
        loader = Loader([Span(path, 0, 200_000_000)], 8, 4096, 0, shuffle)
        for _ in range(20):
            loader.next_batch(tokens, targets)

    assert peak_memory(some_batches) < 2e6


def test_only_the_current_span_is_in_memory(tmp_path):
    """Ten spans of 10^5 windows: one order of 0.8 MB (two while it is computed), not ten."""
    path = sparse_shard(tmp_path / "a.bin", 1_000_001)
    spans = [Span(path, i * 100_000, (i + 1) * 100_000 + 1) for i in range(10)]
    loader = Loader(spans, 1, 1, 0, True)

    def visit_all():
        for i in range(10):
            loader.restore({"epoch": 0, "window": i * 100_000})

    assert peak_memory(visit_all) < 3e6
