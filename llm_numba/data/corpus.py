"""Text or token shards on disk -> spans of tokens to train and to validate on.

`prepare` finds the files, tokenises text once into shards in the cache folder, and says which tokens are for training
and which are held out; loader.py makes batches of them. The command line, python -m llm_numba.data, is datasets.py's.
"""

import codecs
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import sysconfig
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from filelock import FileLock

from llm_numba.data.shards import Span, open_shard, write_shard
from llm_numba.data.tokenizer import load_tokenizer, tokenizer_from_state, tokenizer_state
from llm_numba.util.cache import cache_folder
from llm_numba.util.cli import UserError
from llm_numba.util.files import write_whole

CACHE_FORMAT = 3  # raise it when the same text must be tokenised anew
SHARD_TOKENS = 100_000_000
DOCUMENTS = "documents.json"  # beside the shards: which files, and before each, how many tokens
LEARN_CHARACTERS = 64_000_000
PIECE_BYTES = 1 << 18  # a few pieces in a row must stay below 10^6 white spaces, where tiktoken and rustbpe panic


class Corpus(NamedTuple):
    """What a run trains and validates on; `encoding` is None where the shards' own is not known."""

    train: list[Span]
    val: list[Span]
    encoding: tiktoken.Encoding | None
    vocab_size: int


def prepare(
    data: Sequence[str],
    val_data: Sequence[str],
    tokenizer: str | tiktoken.Encoding,
    vocab_size: int | None,
    val_fraction: float,
) -> Corpus:
    """Find the data, tokenise it if it is text and this was not done before, hold out the validation part.

    data          files, folders and globs (see `find_files`); none of them: Python's own standard library
    val_data      likewise, for validation; none of them: the last `val_fraction` of all tokens of `data`
    tokenizer     gpt2, bytes, bpe (learned from `data`), or none for shards whose tokens cannot be turned into text; or
                  an encoding itself
    vocab_size    for bpe and none, 65536 at most, which is what a shard's uint16 holds; the others have their own

    A text file is a document, and so is each line of JSON lines that have a "text" (.jsonl). Files come in a fixed
    shuffled order, so that the held-out end is like the rest; each document stands behind an end-of-text token. Special
    tokens' names inside a text are plain text. bpe learns from the first 64 million characters in that order. The
    shards lie in `cache_folder()`, under a name that changes with the files' paths, sizes and times, the tokenizer and
    its size; the tokenizer is kept beside them.
    Errors: a file that is missing, empty, not UTF-8 or a damaged shard; a tokenizer that does not fit the data.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: it must be at least 0 and below 1")
    files = find_files(data) if data else standard_library_files()
    val_files = find_files(val_data, "--val-data") if val_data else []
    _check_tokenizer(tokenizer, vocab_size, [*files, *val_files])

    given = isinstance(tokenizer, tiktoken.Encoding)
    identity = [_fingerprint(tokenizer) if given else tokenizer, platform.python_version() if not data else None]
    if tokenizer == "bpe":  # then validation text too is tokenised with what these files taught
        identity += [vocab_size, _stamps(files)]

    def load(texts=()):
        return tokenizer if given else load_tokenizer(tokenizer, texts, vocab_size)

    if _is_shard(files[0]):
        encoding = None if tokenizer == "none" else load()
        vocab_size = encoding.n_vocab if encoding else vocab_size
        train = [_whole(path, vocab_size) for path in files]
    else:
        files = _shuffled(files)
        encoding, train = _tokenised(files, identity, lambda: load(_text_to_learn_from(files)))
        vocab_size = encoding.n_vocab

    if not val_files:
        return Corpus(*_split(train, val_fraction), encoding, vocab_size)
    if _is_shard(val_files[0]):
        val = [_whole(path, vocab_size) for path in val_files]
    else:
        _, val = _tokenised(_shuffled(val_files), identity, lambda: encoding)
    return Corpus(train, val, encoding, vocab_size)


def spans_of(patterns: Sequence[str], encoding: tiktoken.Encoding | None, vocab_size: int) -> list[Span]:
    """All tokens of the files that `patterns` mean, in a tokenizer that is there already. Errors: as of `prepare`; text
    where `encoding` is None."""
    files = find_files(patterns)
    if _is_shard(files[0]):
        return [_whole(path, vocab_size) for path in files]
    if encoding is None:
        raise UserError(f"--data {files[0]}: a model trained with --tokenizer none takes .bin shards only")
    state, ranks = tokenizer_state(encoding)
    return _tokenised(_shuffled(files), [state, hashlib.sha256(ranks).hexdigest()], lambda: encoding)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def find_files(patterns: Sequence[str], flag: str = "--data") -> list[Path]:
    """The files that `patterns` mean, sorted, each once: either all of them token shards (`*.bin`) or none.

    A file is taken as it is. A folder stands for all files in and below it that are not hidden (no name on the way
    begins with a dot) and are shards or text; as for git, a file without a zero byte in its first 8000 is text. A glob
    (`*`, `?`, `[...]`; `**` for any folders) stands for the files that it matches. Empty files in folders and globs are
    left out. Errors name `flag` and the value: nothing found, an empty file, shards and text together.
    """
    found = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        try:
            if path.is_file():
                files = [path]
                if not path.stat().st_size:
                    raise UserError(f"{flag} {pattern}: the file is empty")
            elif pattern and path.is_dir():  # "" is not the working folder
                visible = _walk(path, lambda name: not name.startswith("."))
                files = [file for file in visible if _is_shard(file) or b"\0" not in _first_bytes(file)]
            else:
                files = [Path(name) for name in glob.iglob(str(path), recursive=True) if os.path.isfile(name)]
                files = [file for file in files if file.stat().st_size]
        except OSError as error:
            raise UserError(f"{flag} {pattern}: {error.filename}: {error.strerror}") from error
        if not files:
            raise UserError(f"{flag} {pattern}: no text and no .bin shard there: give a file, a folder or a glob")
        for file in files:
            found.setdefault(file.resolve(), file.absolute())
    files = sorted(found.values())
    shards = [file for file in files if _is_shard(file)]
    if shards and len(shards) < len(files):
        text = next(file for file in files if not _is_shard(file))
        raise UserError(f"{flag}: both shards ({shards[0]}) and text ({text}): give one kind, by a glob like *.bin")
    return files


def standard_library_files() -> list[Path]:
    """The sources of the running Python's standard library, sorted: about 10 MB of text that is always there.

    Left out: tests, installed packages, and what is empty or not UTF-8.
    """
    root = Path(sysconfig.get_path("stdlib"))
    others = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    sources = [file for file in _walk(root, lambda name: name not in others) if file.suffix == ".py"]
    files = [file for file in sources if _is_utf8(file)]
    if not files:
        raise UserError(f"{root}: this Python has no sources of its standard library there: give text with --data")
    return files


def _walk(folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """The non-empty files in and below `folder`, sorted; `wanted` judges the name of each file and each folder."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = filter(wanted, folders)
        paths = (Path(parent, name) for name in filter(wanted, names))
        files += [path for path in paths if path.is_file() and path.stat().st_size]
    return sorted(files)


def _is_shard(path: Path) -> bool:
    return path.suffix == ".bin"


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8000)


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _whole(path: Path, vocab_size: int) -> Span:
    return Span(path, 0, len(open_shard(path, vocab_size)))


def _split(spans: list[Span], val_fraction: float) -> tuple[list[Span], list[Span]]:
    """The spans without the last `val_fraction` of their tokens, and these."""
    left = sum(span.stop - span.start for span in spans)
    left -= int(left * val_fraction)
    train, val = [], []
    for span in spans:
        cut = min(span.start + left, span.stop)
        left -= cut - span.start
        if cut > span.start:
            train.append(span._replace(stop=cut))
        if cut < span.stop:
            val.append(span._replace(start=cut))
    return train, val


# ---------------------------------------------------------------------------------------------------------------------
# Text -> shards


def _fingerprint(encoding: tiktoken.Encoding) -> str:
    """Changes when the tokens do."""
    state, ranks = tokenizer_state(encoding)
    return hashlib.sha256(json.dumps([state["pat_str"], state["special_tokens"]]).encode() + ranks).hexdigest()


def _check_tokenizer(tokenizer: str | tiktoken.Encoding, vocab_size: int | None, files: list[Path]) -> None:
    """Errors: a tokenizer that cannot be used with these files, or a vocabulary that a shard cannot hold."""
    if tokenizer == "bpe" and any(map(_is_shard, files)):
        raise UserError("--tokenizer bpe: it is learned from text, not from .bin shards: use gpt2, bytes or none")
    if tokenizer == "none" and not all(map(_is_shard, files)):
        raise UserError("--tokenizer none: only for .bin shards; text needs gpt2, bpe or bytes")
    if tokenizer == "none" and vocab_size is None:
        raise UserError("--tokenizer none: give --vocab-size too: the ids in the shards must be below it")
    if tokenizer in ("bpe", "none") and vocab_size is not None and not 1 <= vocab_size <= 65536:
        raise UserError(f"--vocab-size {vocab_size}: it must be 1 to 65536, what the uint16 of a token shard holds")


def _stamps(files: list[Path]) -> list:
    """What changes when a file does."""
    stats = [(str(file), file.stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _shuffled(files: list[Path]) -> list[Path]:
    return [files[i] for i in np.random.default_rng(0).permutation(len(files))]


def _tokenised(
    files: list[Path], identity: list, load: Callable[[], tiktoken.Encoding]
) -> tuple[tiktoken.Encoding, list[Span]]:
    """The encoding and the shards of `files`, from the cache folder if they were tokenised before.

    `identity` is what else the tokens depend on; `load` gives the encoding where there is work to do.
    """
    key = json.dumps([CACHE_FORMAT, identity, _stamps(files)])
    folder = cache_folder() / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    if not folder.is_dir():
        _tokenise(folder, files, load())
    try:
        corpus = json.loads((folder / "corpus.json").read_text())
        encoding = tokenizer_from_state(corpus["tokenizer"], (folder / "tokenizer.tiktoken").read_bytes())
        return encoding, [_whole(folder / name, encoding.n_vocab) for name in corpus["shards"]]
    except (KeyError, OSError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{folder}: this tokenised text is damaged: delete the folder and start again") from error


def _tokenise(folder: Path, files: list[Path], encoding: tiktoken.Encoding) -> None:
    """Write the shards of `files` and their tokenizer; `folder` appears when all is done. Several may do it at once."""
    with _unfinished(folder.parent) as temporary:
        unfinished = temporary / "tokens"
        unfinished.mkdir()
        starts = {}
        shards = _write_shards(unfinished, _encode(files, encoding, starts))
        files, starts = list(map(str, starts)), list(starts.values())
        documents = {"shard_tokens": SHARD_TOKENS, "starts": starts, "files": files}
        write_whole(unfinished / DOCUMENTS, json.dumps(documents).encode())
        state, ranks = tokenizer_state(encoding)
        write_whole(unfinished / "tokenizer.tiktoken", ranks)
        write_whole(unfinished / "corpus.json", json.dumps({"tokenizer": state, "shards": shards}).encode())
        try:
            os.rename(unfinished, folder)
        except OSError as error:
            if not folder.is_dir():  # else another process was first, with the same tokens
                raise UserError(f"{folder}: cannot be written ({error.strerror})") from error


@contextmanager
def _unfinished(cache: Path) -> Iterator[Path]:
    """A new folder in the cache folder, gone with the block; those that killed processes have left behind go too.

    As long as a process lives, it holds the lock in its folder.
    """
    for left in cache.glob("unfinished-*"):
        with suppress(OSError), FileLock(left / "lock", timeout=0):
            shutil.rmtree(left, ignore_errors=True)
    with ExitStack() as stack:
        lock = None
        while not (lock and lock.exists()):  # before it was locked, another process may have taken it for left behind
            options = dict(prefix="unfinished-", dir=cache, ignore_cleanup_errors=True)
            lock = Path(stack.enter_context(tempfile.TemporaryDirectory(**options)), "lock")
            with suppress(FileNotFoundError):
                stack.enter_context(FileLock(lock))
        yield lock.parent


def describe_windows(windows: list[Span]) -> list[dict]:
    """Where the windows of a batch come from, as JSON types: shard, tokens, and the files of text where these are known
    (`prepare` has tokenised them)."""
    indices = {folder: _documents_in(folder) for folder in {window.path.parent for window in windows}}

    def files_of(window):
        index = indices[window.path.parent]
        before = int(window.path.stem) * index["shard_tokens"]
        first, last = (bisect_right(index["starts"], before + at) for at in (window.start, window.stop - 1))
        return index["files"][first - 1 : last]

    return [
        {"shard": str(w.path), "start": w.start, "stop": w.stop, "files": files_of(w) if indices[w.path.parent] else []}
        for w in windows
    ]


def _documents_in(folder: Path) -> dict | None:
    """What `_tokenise` wrote of the documents in its folder of shards; None for any other folder, or a damaged file."""
    try:
        index = json.loads((folder / DOCUMENTS).read_text())
        kinds = [{type(x) for x in part} for part in ([index["shard_tokens"]], index["starts"], index["files"])]
    except (KeyError, OSError, TypeError, ValueError, RecursionError):
        return None
    return index if kinds == [{int}, {int}, {str}] else None


def _write_shards(folder: Path, arrays: Iterable[np.ndarray]) -> list[str]:
    """Write the concatenated `arrays` as shards of SHARD_TOKENS each, the last one shorter; returns their names."""
    names = []
    shard = np.empty(SHARD_TOKENS, np.uint16)
    used = 0

    def flush():
        names.append(f"{len(names):06d}.bin")
        write_shard(folder / names[-1], shard[:used])

    for array in arrays:
        while len(array):
            taken, array = np.split(array, [SHARD_TOKENS - used])
            shard[used : used + len(taken)] = taken
            used += len(taken)
            if used == SHARD_TOKENS:
                flush()
                used = 0
    if used:
        flush()
    return names


def _encode(files: list[Path], encoding: tiktoken.Encoding, starts: dict[Path, int]) -> Iterator[np.ndarray]:
    """The tokens of all files, an end-of-text token before each document; bounded memory, one thread a core.

    starts[file] = how many tokens are before it, of each file that has any.
    """
    from tqdm import tqdm

    def encode(piece: tuple[Path, bool, str]) -> np.ndarray:
        _, first, text = piece
        tokens = encoding.encode_to_numpy(text, disallowed_special=())
        return np.concatenate(([encoding.eot_token], tokens)) if first else tokens

    count, pieces = 0, _labelled(files)
    size = sum(file.stat().st_size for file in files)
    with (
        tqdm(total=size, desc="tokenising", unit="B", unit_scale=True, disable=None) as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        while batch := list(islice(pieces, 32)):
            for (file, _, _), tokens in zip(batch, pool.map(encode, batch), strict=True):
                starts.setdefault(file, count)
                count += len(tokens)
                yield tokens
            progress.update(sum(len(text.encode()) for _, _, text in batch))


def _labelled(files: list[Path]) -> Iterator[tuple[Path, bool, str]]:
    """(file, whether a document begins, text) of each piece."""
    for file in files:
        for document in _documents(file):
            for number, text in enumerate(document):
                yield file, number == 0, text


def _text_to_learn_from(files: list[Path]) -> Iterator[str]:
    size = 0
    for text in chain.from_iterable(chain.from_iterable(map(_documents, files))):
        yield text
        size += len(text)
        if size >= LEARN_CHARACTERS:
            return


def _documents(path: Path) -> Iterator[Iterator[str]]:
    """The documents of a file, each in pieces: every line of JSON lines, or the whole text.

    JSON lines are a .jsonl file whose first line is an object with a "text", which is what counts of each line.
    """
    if not _is_json_lines(path):
        yield _pieces(path)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                text = _text_of(line)
                if text is None:
                    raise UserError(
                        f'{path}: line {number}: expected a JSON object with a "text": mend or leave it out'
                    )
                yield _cut(text[start : start + PIECE_BYTES] for start in range(0, len(text), PIECE_BYTES))


def _is_json_lines(path: Path) -> bool:
    if path.suffix != ".jsonl":
        return False
    with path.open("rb") as file:
        return _text_of(file.readline()) is not None


def _text_of(line: bytes) -> str | None:
    try:
        text = json.loads(line)["text"]
    except (KeyError, TypeError, ValueError):
        return None
    return text if isinstance(text, str) else None


def _pieces(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces whose tokens, one after the other, are the tokens of the whole text."""
    return _cut(_decoded(path))


def _decoded(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, block after block."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with path.open("rb") as file:
            while block := file.read(PIECE_BYTES):
                offset -= len(decoder.getstate()[0])
                yield decoder.decode(block)
                offset = file.tell()
            offset -= len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte {offset + error.start}: convert it, or leave the file out"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


# the last white space behind something else: GPT-2's pattern never puts both into one word
LAST_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def _cut(blocks: Iterable[str]) -> Iterator[str]:
    """The same text, cut where no word is cut in two. A block without such a place is cut where it ends: there a word
    may fall in two."""
    rest = ""
    for block in blocks:
        text = rest + block
        cut = LAST_CUT.match(text)
        end = cut.end() if cut else len(text)
        yield text[:end]
        rest = text[end:]
    if rest:
        yield rest


def fingerprint(spans: list[Span]) -> list:
    """Changes when the tokens do: each span's length, and a checksum of its beginning and its end."""
    import zlib

    from llm_numba.data.shards import BLOCK_TOKENS

    found = []
    for span in spans:
        tokens = open_shard(span.path)[span.start : span.stop]
        found.append([len(tokens), zlib.crc32(tokens[-BLOCK_TOKENS:], zlib.crc32(tokens[:BLOCK_TOKENS]))])
    return found
