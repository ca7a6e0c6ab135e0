"""Files, shards, tokenised text and the loader."""

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

from llm_numba.data import corpus as data
from llm_numba.data.corpus import find_files, prepare
from llm_numba.data.loader import Loader
from llm_numba.data.shards import Span, open_shard, write_shard
from llm_numba.data.tokenizer import END_OF_TEXT, load_tokenizer
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
    """A shard of `count` zeros that takes next to no place on the disk."""
    write_shard(path, np.zeros(1, np.uint16))
    with path.open("r+b") as file:
        file.seek(8)
        file.write(count.to_bytes(4, "little"))
        file.truncate(1024 + 2 * count)
    return path


def peak_memory(action):
    """Bytes that Python and NumPy allocated at most while `action` ran; mapped files do not count."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- the cache folder


def test_cache_folder_is_made(cache):
    assert data.cache_folder() == cache
    assert cache.is_dir()


def test_cache_folder_by_default_is_the_platforms(monkeypatch, tmp_path):
    monkeypatch.delenv("LLM_NUMBA_CACHE")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "user" / name)
    assert data.cache_folder() == tmp_path / "user" / "llm_numba"


def test_cache_folder_under_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLM_NUMBA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="file/cache: .*set LLM_NUMBA_CACHE"):
        data.cache_folder()


def test_cache_folder_that_is_read_only(monkeypatch, cache):
    monkeypatch.setattr(os, "access", lambda *_: False)  # chmod does not stop root
    with pytest.raises(UserError, match=f"{cache}: .*Permission denied.*LLM_NUMBA_CACHE"):
        data.cache_folder()


# --- shards


@pytest.mark.parametrize("count", [1, 3, 97, 257])
def test_shard_round_trip(tmp_path, count):
    tokens = np.random.default_rng(count).integers(0, 65536, count)
    write_shard(tmp_path / "a.bin", tokens)
    shard = open_shard(tmp_path / "a.bin")
    assert isinstance(shard, np.memmap)
    assert shard.dtype == np.uint16
    np.testing.assert_array_equal(shard, tokens)


def test_shard_is_llm_cs_format(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([1, 2, 50256]))
    content = (tmp_path / "a.bin").read_bytes()
    assert content[:12] == b"".join(n.to_bytes(4, "little") for n in (20240520, 1, 3))
    assert content[12:1024] == bytes(1012)
    assert content[1024:] == b"\x01\x00\x02\x00\x50\xc4"


def change_header(index, value):
    def change(path):
        header = np.memmap(path, "<i4", "r+", shape=256)
        header[index] = value
        header.flush()

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b"short"), "20240520"),
        (change_header(0, 20240326), "20240520"),
        (change_header(1, 2), "version 2: expected version 1"),
        (change_header(2, 0), "empty"),
        (change_header(2, -1), "empty"),
        (change_header(2, 11), "1044 bytes long.* 11 tokens, 1046 bytes"),
        (change_header(2, 9), "1044 bytes long.* 9 tokens, 1042 bytes"),
        (lambda path: os.truncate(path, 1043), "1043 bytes long.* 10 tokens, 1044 bytes"),
    ],
)
def test_damaged_shard(tmp_path, damage, message):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(10))
    open_shard(path)
    damage(path)
    with pytest.raises(UserError, match=f"{path}: .*{message}"):
        open_shard(path)


@pytest.mark.parametrize("at", [0, 7, 8, 20])
def test_token_outside_the_vocabulary(tmp_path, monkeypatch, at):
    monkeypatch.setattr("llm_numba.data.shards.BLOCK_TOKENS", 8)
    tokens = np.full(21, 256)
    tokens[at:] = 257  # the first one is named
    write_shard(tmp_path / "a.bin", tokens)
    assert len(open_shard(tmp_path / "a.bin", 258)) == 21
    with pytest.raises(UserError, match=f"a.bin: token {at} is 257, but the vocabulary has 257: .*--vocab-size"):
        open_shard(tmp_path / "a.bin", 257)


def test_checking_tokens_remembers_little(tmp_path):
    path = sparse_shard(tmp_path / "a.bin", 20_000_000)

    def check():
        open_shard(path, 1)
        with pytest.raises(UserError):
            open_shard(path, 0)

    assert peak_memory(check) < 4e6  # bytes; the shard has 40e6


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
    assert found("in/*") == ["a.md", "b.txt", "no_suffix", "picture.png"]  # a glob means what it says
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
        assert str(caught.value).startswith(f"--val-data {value}: no text and no .bin shard there")


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="--data .*empty.txt: the file is empty"):
        find_files([str(tmp_path / "empty.txt")])


def test_shards_and_text_together(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(3))
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(UserError, match="--data: both shards .*a.bin.* and text .*b.txt"):
        find_files([str(tmp_path)])


def test_standard_library_files():
    files = data.standard_library_files()
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
        data.standard_library_files()


# --- text in pieces


@given(
    st.lists(st.tuples(st.text("aé東'1.", min_size=1, max_size=2), st.sampled_from(["\n", " ", "\n\n", "  ", "\n\t"]))),
    st.integers(32, 64),
)
def test_pieces_give_the_tokens_of_the_whole_text(tmp_path_factory, words, size):
    """A word and the white space behind it are 8 bytes at most, so every piece has a place to cut."""
    text = "".join(word + space for word, space in words)
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    with mock.patch.object(data, "PIECE_BYTES", size):
        pieces = list(data._pieces(path))
    assert "".join(pieces) == text
    assert sum((BPE.encode_ordinary(piece) for piece in pieces), []) == BPE.encode_ordinary(text)
    assert all(len(piece.encode()) <= 2 * size for piece in pieces)


@pytest.mark.parametrize("text", ["x" * 999, " " * 999, "\n" * 999, "\r\n" * 99, "é" * 500, "a " + "東" * 300])
def test_pieces_without_a_place_to_cut(tmp_path, monkeypatch, text):
    monkeypatch.setattr(data, "PIECE_BYTES", 64)
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = list(data._pieces(tmp_path / "a.txt"))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 129


def test_pieces_remember_little(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"the cat sat on the mat\n" * 500_000)

    def count():
        assert sum(map(len, data._pieces(tmp_path / "a.txt"))) == 11_500_000

    assert peak_memory(count) < 10 * data.PIECE_BYTES  # 2.6e6; the file has 11.5e6


def test_millions_of_white_spaces(tmp_path):
    """More in a row than the tokenisers' regular expressions bear."""
    (tmp_path / "a.txt").write_text("a" + " " * 1_600_000 + "b" + "\n" * 1_200_000)
    corpus = prepare([str(tmp_path / "a.txt")], [], "bpe", 258, 0)
    assert corpus.encoding.decode(read(corpus.train)[1:]) == (tmp_path / "a.txt").read_text()


@pytest.mark.parametrize("bad", [b"\xff", b"\xe6\x9d", b"\xc3("], ids=["invalid", "cut off", "no continuation"])
def test_not_utf8_names_the_byte(tmp_path, monkeypatch, bad):
    """Wherever the bad byte lies within or between pieces, and after characters of one to three bytes."""
    monkeypatch.setattr(data, "PIECE_BYTES", 8)
    path = tmp_path / "latin1.txt"
    for before in range(20):
        good = ("aé東 " * before)[:before].encode()
        for after in (b"", b"z" * 20):
            path.write_bytes(good + bad + after)
            with pytest.raises(UserError) as caught:
                list(data._pieces(path))
            assert str(caught.value).startswith(f"{path}: not UTF-8 at byte {len(good)}:")


# --- prepare


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_prepare_text(text, monkeypatch, tokenizer):
    monkeypatch.setattr(data, "SHARD_TOKENS", 100)
    monkeypatch.setattr(data, "PIECE_BYTES", 50)
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
    corpus = prepare([str(text)], [], "bytes", None, 0)
    assert corpus.val == []
    assert len(corpus.train) == 1


@pytest.mark.parametrize("val_fraction", [-0.1, 1, 1.5, float("nan")])
def test_val_fraction_out_of_range(text, val_fraction):
    with pytest.raises(UserError, match=f"--val-fraction {val_fraction}"):
        prepare([str(text)], [], "bytes", None, val_fraction)


def test_a_special_token_in_the_text_is_text(tmp_path):
    (tmp_path / "a.txt").write_text(f"one{END_OF_TEXT}two")
    corpus = prepare([str(tmp_path / "a.txt")], [], "bytes", None, 0)
    assert list(read(corpus.train)) == [256, *f"one{END_OF_TEXT}two".encode()]


def test_line_ends_are_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    assert bytes(read(prepare([str(tmp_path / "a.txt")], [], "bytes", None, 0).train)[1:].tolist()) == b"one\r\ntwo\n"


def test_bpe_learns_from_a_bounded_amount(text, monkeypatch):
    monkeypatch.setattr(data, "LEARN_CHARACTERS", 300)
    files = data._shuffled(find_files([str(text)]))
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


def test_validation_text_is_tokenised_with_what_the_training_text_taught(text, tmp_path):
    """Other training text, the same validation text: its cached tokens must not be taken."""
    (tmp_path / "val.txt").write_text("the mat sat on the cat")
    (tmp_path / "other.txt").write_text("zebras zigzag, zebras zigzag. mat at, sat cat. " * 9)
    for source in (text, tmp_path / "other.txt"):
        corpus = prepare([str(source)], [str(tmp_path / "val.txt")], "bpe", 265, 0.5)
        assert corpus.encoding.decode(read(corpus.val)[1:]) == "the mat sat on the cat"


def test_json_lines_are_documents(tmp_path, monkeypatch):
    """In their order: one longer than a piece, one with a special token's name; one without text is none."""
    monkeypatch.setattr(data, "PIECE_BYTES", 50)
    texts = ["A café.", "the cat sat " * 20, "", f"{END_OF_TEXT} as text", "x" * 120]
    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines[:2] + [""] + lines[2:]))
    corpus = prepare([str(path)], [], "bytes", None, 0)
    assert list(read(corpus.train)) == [t for text in texts if text for t in (256, *text.encode())]
    learned = prepare([str(path)], [], "bpe", 262, 0).encoding._mergeable_ranks
    assert all(len(token) == 1 or token in "\n".join(texts).encode() for token in learned) and len(learned) == 261


@pytest.mark.parametrize("bad", ["{", "[]", '{"text": 1}', '{"story": "x"}', b"\xff"], ids=str)
def test_a_bad_json_line_is_named(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + (bad if isinstance(bad, bytes) else bad.encode()))
    with pytest.raises(UserError, match=rf'{path}: line 3: expected a JSON object with a "text"'):
        prepare([str(path)], [], "bytes", None, 0)


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", '{"story": "x"}\n{"text": "y"}\n'), ("a.json", '{"text": "y"}\n')]
)
def test_other_json_is_text(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert list(read(prepare([str(tmp_path / name)], [], "bytes", None, 0).train)) == [256, *text.encode()]


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
    train = prepare([str(tmp_path / "a.txt")], [], "bytes", None, 0).train
    assert [len(open_shard(span.path)) for span in train] == lengths
    assert list(read(train)) == [256, *b"x" * characters]


def test_interrupted_tokenising_leaves_nothing(text, monkeypatch, cache):
    monkeypatch.setattr(data, "SHARD_TOKENS", 100)
    with monkeypatch.context() as patch:

        def interrupt(path, tokens):
            write_shard(path, tokens)
            if path.name == "000003.bin":
                raise KeyboardInterrupt

        patch.setattr(data, "write_shard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([str(text)], [], "bytes", None, 0.1)
        assert list(cache.iterdir()) == []
    assert prepare([str(text)], [], "bytes", None, 0.1).train


def test_two_processes_at_once(text, monkeypatch, cache):
    """While one is at work, another does all of it: both get the same and nothing is left over."""
    encode, others = data._encode, []

    def meanwhile(*arguments):
        monkeypatch.setattr(data, "_encode", encode)
        others.append(prepare([str(text)], [], "bytes", None, 0.1))
        return encode(*arguments)

    monkeypatch.setattr(data, "_encode", meanwhile)
    corpus = prepare([str(text)], [], "bytes", None, 0.1)
    assert (corpus.train, corpus.val) == (others[0].train, others[0].val)
    assert [path.name.split("-")[0] for path in cache.iterdir()] == ["tokens"]


@pytest.mark.parametrize("name", ["000000.bin", "corpus.json", "tokenizer.tiktoken"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{}")])
def test_a_damaged_cache_is_named(text, cache, name, damage):
    prepare([str(text)], [], "bytes", None, 0.1)
    (folder,) = cache.iterdir()
    damage(folder / name)
    with pytest.raises(UserError, match=f"{folder}: .*damaged: delete the folder"):
        prepare([str(text)], [], "bytes", None, 0.1)


def test_the_default_text(monkeypatch, tmp_path):
    """The standard library stands in for a missing --data; the Python's version is part of what was tokenised."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "module.py").write_text("pass\n" * 20)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library))
    corpus = prepare([], [], "bytes", None, 0)
    assert corpus.encoding.decode(read(corpus.train)[1:]) == "pass\n" * 20
    monkeypatch.setattr(corpus.platform, "python_version", lambda: "3.99")
    no_work(monkeypatch)
    with pytest.raises(AssertionError, match="again"):
        prepare([], [], "bytes", None, 0)


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
    assert list(cache.iterdir()) == []


def test_prepare_shards(tmp_path, cache):
    for name, count in (("a", 30), ("b", 70)):
        write_shard(tmp_path / f"{name}.bin", np.arange(count))
    a, b = (tmp_path / f"{name}.bin" for name in "ab")
    corpus = prepare([str(tmp_path / "*.bin")], [], "none", 70, 0.25)
    assert corpus == ([Span(a, 0, 30), Span(b, 0, 45)], [Span(b, 45, 70)], None, 70)
    corpus = prepare([str(a)], [str(b)], "bytes", None, 0.25)
    assert corpus[:2] == ([Span(a, 0, 30)], [Span(b, 0, 70)])
    assert corpus.encoding.n_vocab == corpus.vocab_size == 257
    assert not cache.exists()
    for arguments in ([str(b)], []), ([str(a)], [str(b)]):
        with pytest.raises(UserError, match="b.bin: token 69 is 69"):
            prepare(*arguments, "none", 69, 0.25)


def test_shards_with_validation_text(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(30))
    (tmp_path / "val.txt").write_text("text")
    corpus = prepare([str(tmp_path / "a.bin")], [str(tmp_path / "val.txt")], "bytes", None, 0.1)
    assert list(read(corpus.val)) == [256, *b"text"]


@pytest.mark.parametrize(
    ("train", "val", "tokenizer", "vocab_size", "message"),
    [
        ("a.bin", None, "bpe", 300, "--tokenizer bpe: .*shards"),
        ("a.txt", "a.bin", "bpe", 300, "--tokenizer bpe: .*shards"),
        ("a.txt", None, "none", 300, "--tokenizer none: only for .bin shards"),
        ("a.bin", "a.txt", "none", 300, "--tokenizer none: only for .bin shards"),
        ("a.bin", None, "none", None, "--tokenizer none: give --vocab-size"),
        ("a.bin", None, "none", 65537, "--vocab-size 65537: .*65536"),
        ("a.bin", None, "none", 0, "--vocab-size 0: "),
        ("a.txt", None, "bpe", 65537, "--vocab-size 65537: .*65536"),
        ("a.txt", None, "bpe", 300, "--vocab-size 300: the text gives only"),
        ("a.txt", None, "bpe", None, "--vocab-size None"),
        ("a.txt", None, "words", None, "--tokenizer words: choose"),
        ("a.bin", None, "words", None, "--tokenizer words: choose"),
    ],
)
def test_a_tokenizer_that_does_not_fit(tmp_path, train, val, tokenizer, vocab_size, message):
    write_shard(tmp_path / "a.bin", np.arange(30))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=message):
        prepare([str(tmp_path / train)], [str(tmp_path / val)] if val else [], tokenizer, vocab_size, 0.1)


# --- the loader


def shards(folder, counts):
    """Shards of `counts` tokens, all different, and their spans, which leave out the first two tokens of each."""
    spans, first = [], 0
    for i, count in enumerate(counts):
        path = folder / f"{i}.bin"
        write_shard(path, np.arange(first, first + count + 2))
        spans.append(Span(path, 2, 2 + count))
        first += count + 2
    return spans


def windows(spans, T):
    """All windows in order, each as its T + 1 tokens: the loader's specification, written plainly."""
    found = []
    for span in spans:
        tokens = open_shard(span.path)[span.start : span.stop].tolist()
        found += [tuple(tokens[i : i + T + 1]) for i in range(0, len(tokens) - T, T)]
    return found


def deal(loader, batches):
    """The next windows, each as its T + 1 tokens; checks that the targets are the inputs one further."""
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
def test_every_epoch_is_complete_whatever_the_sizes(tmp_path_factory, counts, B, T, seed, shuffle):
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


def test_spans_have_orders_of_their_own(tmp_path):
    """Two spans of one size, and the order of 50 spans itself: no two permutations are the same."""
    spans = shards(tmp_path, [201] * 2)
    dealt = deal(Loader(spans, 1, 4, 1, True), 100)
    assert [window[0] % 203 for window in dealt[:50]] != [window[0] % 203 for window in dealt[50:]]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("B", [1, 2, 4, 9, 20])
def test_restored_exactly_at_every_position(tmp_path, shuffle, B):
    """Through three epochs of 9 windows; a loader stopped anywhere goes on as if it had not been."""
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
def test_a_large_shard_is_not_read_whole(tmp_path, shuffle):
    """400 MB of tokens; only the permutation of its 48828 windows (8 bytes each) may be in memory."""
    path = sparse_shard(tmp_path / "a.bin", 200_000_000)
    tokens, targets = np.empty((2, 8, 4096), np.int32)

    def some_batches():
        loader = Loader([Span(path, 0, 200_000_000)], 8, 4096, 0, shuffle)
        for _ in range(20):
            loader.next_batch(tokens, targets)

    assert peak_memory(some_batches) < 2e6


def test_memory_is_that_of_the_current_span(tmp_path):
    """Ten spans of 10^5 windows: one order of 0.8 MB (two while it is made), not ten."""
    path = sparse_shard(tmp_path / "a.bin", 1_000_001)
    spans = [Span(path, i * 100_000, (i + 1) * 100_000 + 1) for i in range(10)]
    loader = Loader(spans, 1, 1, 0, True)

    def visit_all():
        for i in range(10):
            loader.restore({"epoch": 0, "window": i * 100_000})

    assert peak_memory(visit_all) < 3e6
