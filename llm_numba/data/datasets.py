"""Known data sets, downloaded and ready to use: python -m llm_numba.data NAME"""

import argparse
import codecs
import glob
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llm_numba.data.tokenizer import END_OF_TEXT
from llm_numba.util.cache import cache_folder
from llm_numba.util.cli import Parser, UserError
from llm_numba.util.download import from_hub, from_url
from llm_numba.util.files import writing_whole

GITHUB, HUB = "https://raw.githubusercontent.com", "https://huggingface.co/datasets"
HELLASWAG = "hellaswag_val.jsonl"
BLOCK = 1 << 20  # characters


class Dataset(NamedTuple):
    """`files` of the Hugging Face hub's `repository`, or `urls`: name here -> (URL, SHA-256)."""

    what: str
    size: str
    licence: str
    source: str
    use: str  # the command; {glob} is the folder as part of a glob, {path} as a path
    urls: dict[str, tuple[str, str]]
    repository: str = ""
    files: tuple[str, ...] = ()
    train_shards: tuple[str, int] = ("", 0)  # the name of a training shard, by its number from 1; how many there are


def _fineweb(what: str, repository: str, prefix: str, count: int) -> Dataset:
    """Token shards in llm.c's format and GPT-2's tokens, 100 million each."""
    size, licence = f"{count} x 200 MB", "ODC-By 1.0, and Common Crawl's terms of use"
    train, val = f"{prefix}_train_{{:06d}}.bin", f"{prefix}_val_000000.bin"
    use = f"train --preset d12 --data {{glob}}/{prefix}_train_*.bin --val-data {{path}}/{val}"
    return Dataset(what, size, licence, f"{HUB}/{repository}", use, {}, repository, (val,), (train, count))


SHAKESPEARE = (
    f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
HELLASWAG_VAL = (
    f"{GITHUB}/rowanz/hellaswag/master/data/{HELLASWAG}",
    "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
)
TINYSTORIES = "roneneldan/TinyStories"
DATASETS = {
    "tinyshakespeare": Dataset(
        "40,000 lines of Shakespeare's plays, as one text",
        "1.1 MB",
        "the plays are in the public domain; the repository is under MIT",
        "https://github.com/karpathy/char-rnn",
        "train --data {path}/tinyshakespeare.txt",
        {"tinyshakespeare.txt": SHAKESPEARE},
    ),
    "tinystories": Dataset(
        "2.7 million stories for children, written by GPT-4 (arXiv:2305.07759)",
        "2.2 GB",
        "CDLA-Sharing 1.0",
        f"{HUB}/{TINYSTORIES}",
        "train --data {path}/train.jsonl --val-data {path}/valid.jsonl --steps 5000",
        {},
        TINYSTORIES,
        ("TinyStoriesV2-GPT4-valid.txt", "TinyStoriesV2-GPT4-train.txt"),
    ),
    "fineweb": _fineweb(
        "10 billion tokens of web pages, as GPT-2's tokens (arXiv:2406.17557)", "kjj0/fineweb10B-gpt2", "fineweb", 103
    ),
    "fineweb-edu": _fineweb("the same, of educational web pages only", "kjj0/finewebedu10B-gpt2", "finewebedu", 99),
    "hellaswag": Dataset(
        "for eval: 10,042 contexts, each with four endings (arXiv:1905.07830)",
        "12 MB",
        "MIT",
        "https://github.com/rowanz/hellaswag",
        "eval RUN --task hellaswag --data {path}/" + HELLASWAG,
        {HELLASWAG: HELLASWAG_VAL},
    ),
}


def folder_of(name: str) -> Path:
    """Where a data set is kept without --out."""
    return cache_folder() / "datasets" / name


def get(name: str, folder: Path, shards: int) -> None:
    """Download what is missing or has changed of a data set, with its first `shards` training shards.

    Errors: UserError for a file that cannot be downloaded, or a folder that cannot be used.
    """
    dataset = DATASETS[name]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be used ({error.strerror}): choose another --out") from error
    for file, (url, sha256) in dataset.urls.items():
        from_url(url, folder / file, sha256)
        print(f"{file}: complete")
    pattern, _ = dataset.train_shards
    for file in [*dataset.files, *(pattern.format(number) for number in range(1, shards + 1) if pattern)]:
        if name == "tinystories":
            _get_stories(dataset.repository, file, folder)
        else:
            from_hub(dataset.repository, file, repo_type="dataset", local_dir=folder)
        print(f"{file}: complete")


def _get_stories(repository: str, file: str, folder: Path) -> None:
    """Download a text of stories, and replace it by JSON lines, one story each."""
    ready = folder / f"{Path(file).stem.rpartition('-')[2]}.jsonl"
    if ready.exists():
        return
    text = from_hub(repository, file, repo_type="dataset", local_dir=folder)
    with writing_whole(ready) as output:
        for story in stories(text):
            output.write(json.dumps({"text": story}, ensure_ascii=False).encode() + b"\n")
    text.unlink()


def stories(path: Path) -> Iterator[str]:
    """The texts between the end-of-text marks of a UTF-8 file, without surrounding white space."""
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
    """All data sets: name, size, description."""
    return "\n".join(f"{name:<16} {d.size:<14} {d.what}" for name, d in DATASETS.items())


def command(name: str, folder: Path) -> str:
    """The command that uses a data set in `folder`, quoted for the shell."""
    places = {"glob": glob.escape(str(folder)), "path": str(folder)}
    return "llm-numba " + shlex.join(part.format(**places) for part in DATASETS[name].use.split())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="llm-numba data",
        description="Download a data set and print the command that uses it. Files that are already there\n"
        "are checked, and downloaded again only if they differ.\n\n" + table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the data set; without it, print the table above")
    parser.add_argument("--list", action="store_true", help="print the table above")
    parser.add_argument("--shards", type=int, metavar="N", help="fineweb, fineweb-edu: number of training shards (1)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: datasets/NAME in the cache folder")
    args = parser.parse_args(argv)
    if args.name is None or args.list:
        return args
    if args.name not in DATASETS:
        raise UserError(f"{args.name}: no such data set: choose one of {', '.join(DATASETS)}")
    _, count = DATASETS[args.name].train_shards
    if args.shards is not None and not count:
        raise UserError(f"--shards {args.shards}: {args.name} has no shards; leave it out")
    if args.shards is not None and not 1 <= args.shards <= count:
        raise UserError(f"--shards {args.shards}: {args.name} has {count}; give 1 to {count}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.name is None or args.list:
        print(f"{table()}\n\nDownload one:  llm-numba data NAME")
        return
    dataset = DATASETS[args.name]
    folder = (args.out.expanduser() if args.out else folder_of(args.name)).absolute()
    print(f"{args.name}: {dataset.what}\nsource:  {dataset.source}\nlicence: {dataset.licence}\nfolder:  {folder}")
    get(args.name, folder, args.shards or 1)
    print(f"use it:  {command(args.name, folder)}")
