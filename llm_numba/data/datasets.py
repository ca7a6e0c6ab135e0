"""Known data sets, fetched and made ready: python -m llm_numba.data NAME"""

import argparse
import codecs
import glob
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from llm_numba.data import download
from llm_numba.data.download import Remote
from llm_numba.data.tokenizer import END_OF_TEXT
from llm_numba.util.cache import cache_folder
from llm_numba.util.cli import Parser, UserError
from llm_numba.util.files import writing_whole

GITHUB = "https://raw.githubusercontent.com"
HELLASWAG = "hellaswag_val.jsonl"
BLOCK = 1 << 20  # characters


class OnTheHub(NamedTuple):
    """A file of a data set's repository on the Hugging Face hub, which knows its size and checksum."""

    repository: str
    name: str


class Dataset(NamedTuple):
    """What there is to fetch and to say. `files`: name here -> where from; of the shards `train` is one of `count`."""

    what: str
    size: str
    licence: str
    source: str
    files: dict[str, Remote | OnTheHub]
    use: str  # the command; {folder} as a glob, {path} as a path
    shards: tuple[str, int] | None = None  # the name of a training shard, by its number from 1, and how many there are


def _shards(repository: str, prefix: str, count: int, what: str, source: str) -> Dataset:
    """llm.c's token shards of GPT-2's tokenizer, 100 million tokens each, as a repository of the hub has them."""
    val = f"{prefix}_val_000000.bin"
    return Dataset(
        what,
        f"{count} x 200 MB",
        "ODC-By 1.0, and Common Crawl's terms of use",
        source,
        {val: OnTheHub(repository, val)},
        f"train --preset d12 --data {{folder}}/{prefix}_train_*.bin --val-data {{path}}/{val}",
        (f"{prefix}_train_{{:06d}}.bin", count),
    )


DATASETS = {
    "tinyshakespeare": Dataset(
        "40,000 lines of Shakespeare's plays, as one text",
        "1.1 MB",
        "the plays are in the public domain; the repository is under MIT",
        "https://github.com/karpathy/char-rnn",
        {
            "tinyshakespeare.txt": Remote(
                f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                1_115_394,
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            )
        },
        "train --data {path}/tinyshakespeare.txt",
    ),
    "tinystories": Dataset(
        "2.7 million stories for children, written by GPT-4 (arXiv:2305.07759)",
        "2.2 GB",
        "CDLA-Sharing 1.0",
        "https://huggingface.co/datasets/roneneldan/TinyStories",
        {
            f"{split}.txt": OnTheHub("roneneldan/TinyStories", f"TinyStoriesV2-GPT4-{split}.txt")
            for split in ("valid", "train")
        },
        "train --data {path}/train.jsonl --val-data {path}/valid.jsonl --steps 5000",
    ),
    "fineweb": _shards(
        "kjj0/fineweb10B-gpt2",
        "fineweb",
        103,
        "10 billion tokens of web pages, as GPT-2's tokens (arXiv:2406.17557)",
        "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2",
    ),
    "fineweb-edu": _shards(
        "kjj0/finewebedu10B-gpt2",
        "finewebedu",
        99,
        "the same of those web pages that teach something",
        "https://huggingface.co/datasets/kjj0/finewebedu10B-gpt2",
    ),
    "hellaswag": Dataset(
        "for eval: 10,042 beginnings, each with four endings (arXiv:1905.07830)",
        "12 MB",
        "MIT",
        "https://github.com/rowanz/hellaswag",
        {
            HELLASWAG: Remote(
                f"{GITHUB}/rowanz/hellaswag/master/data/{HELLASWAG}",
                12_246_618,
                "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
            )
        },
        "eval RUN --task hellaswag --data {path}/" + HELLASWAG,
    ),
}


def folder_of(name: str) -> Path:
    """Where a data set lies unless --out says another place."""
    return cache_folder() / "datasets" / name


def get(name: str, folder: Path, shards: int) -> None:
    """The files of a data set in `folder`, whole and checked; those that are there already are only checked.

    Errors: UserError for a file that cannot be had, or is there but damaged; all others stay.
    """
    dataset = DATASETS[name]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            for file, source in files_of(dataset, shards).items():
                get_file(folder / file, source)
                if name == "tinystories":
                    make_ready(folder / file)
    except Timeout as error:
        raise UserError(f"{folder}: another download into this folder is under way: wait for it") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be used ({error.strerror}): choose another --out") from error


def files_of(dataset: Dataset, shards: int) -> dict[str, Remote | OnTheHub]:
    """What to fetch: the data set's files and its first training shards."""
    files = dict(dataset.files)
    if dataset.shards:
        (val,) = dataset.files.values()
        names = (dataset.shards[0].format(number) for number in range(1, shards + 1))
        files |= {name: OnTheHub(val.repository, name) for name in names}
    return files


def get_file(path: Path, source: Remote | OnTheHub) -> None:
    """Fetch a file, or check the one that is there: with no network where its checksum is known."""
    expected = download.recorded(path.parent).get(path.name) or getattr(source, "sha256", None)
    if expected and download.is_there(path, expected):
        print(f"{path.name}: here already, and whole")
    else:
        remote = source if isinstance(source, Remote) else download.on_the_hub(*source)
        expected = remote.sha256
        if not download.is_there(path, expected):
            download.fetch(path, remote)
            print(f"{path.name}: {remote.size:,} bytes, checksum right")
    download.record(path, expected)


def make_ready(path: Path) -> None:
    """TinyStories' text, whose stories stand between end-of-text lines -> JSON lines, a story each, beside it."""
    ready = path.with_suffix(".jsonl")
    if download.is_there(ready, download.recorded(path.parent).get(ready.name)):
        return
    with writing_whole(ready) as file:
        for story in stories(path):
            file.write(json.dumps({"text": story}, ensure_ascii=False).encode() + b"\n")
    download.record(ready, download.sha256_of(ready))
    print(f"{ready.name}: a story a line")


def stories(path: Path) -> Iterator[str]:
    """What stands between the end-of-text marks of a UTF-8 text, without the white space around it."""
    from tqdm import tqdm

    decoder = codecs.getincrementaldecoder("utf-8")()
    size, rest = path.stat().st_size, ""
    with path.open("rb") as file, tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None) as progress:
        while block := file.read(BLOCK):
            *whole, rest = (rest + decoder.decode(block)).split(END_OF_TEXT)
            yield from filter(None, map(str.strip, whole))
            progress.update(len(block))
    if rest.strip():
        yield rest.strip()


def table() -> str:
    """All data sets: name, size, what it is."""
    return "\n".join(f"{name:<16} {d.size:<14} {d.what}" for name, d in DATASETS.items())


def command(name: str, folder: Path) -> str:
    """How to use a data set that lies in `folder`, as one types it."""
    places = {"folder": glob.escape(str(folder)), "path": str(folder)}
    return "python -m llm_numba." + shlex.join(part.format(**places) for part in DATASETS[name].use.split())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="llm-numba data",
        description="Fetch a data set, check it, and say how to use it. What is there already is checked, not fetched\n"
        "again; a download that broke off goes on where it stopped.\n\n" + table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="which one; without it the table above is printed")
    parser.add_argument("--list", action="store_true", help="print the table above")
    parser.add_argument("--shards", type=int, metavar="N", help="fineweb, fineweb-edu: how many training shards (1)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to; without it: datasets/NAME in the cache folder"
    )
    args = parser.parse_args(argv)
    if args.name is None or args.list:
        return args
    if args.name not in DATASETS:
        raise UserError(f"{args.name}: no such data set: choose one of {', '.join(DATASETS)}")
    count = DATASETS[args.name].shards and DATASETS[args.name].shards[1]
    if args.shards is not None and not count:
        raise UserError(f"--shards {args.shards}: {args.name} is not in shards; leave it out")
    if args.shards is not None and not 1 <= args.shards <= count:
        raise UserError(f"--shards {args.shards}: {args.name} has {count}; give 1 to {count}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.name is None or args.list:
        print(f"{table()}\n\nfetch one:  python -m llm_numba.data NAME")
        return
    dataset = DATASETS[args.name]
    folder = (args.out.expanduser() if args.out else folder_of(args.name)).absolute()
    print(f"{args.name}: {dataset.what}\nsource:  {dataset.source}\nlicence: {dataset.licence}\nfolder:  {folder}")
    get(args.name, folder, args.shards or 1)
    print(f"use it:  {command(args.name, folder)}")
