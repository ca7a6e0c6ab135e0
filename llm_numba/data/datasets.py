"""Known data sets, downloaded and ready to use: llm-numba data NAME"""

import argparse
import glob
import json
import shlex
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from llm_numba.data.text import PIECE_BYTES, blocks
from llm_numba.data.tokenizer import END_OF_TEXT
from llm_numba.util.cache import cache_folder
from llm_numba.util.cli import Parser, UserError
from llm_numba.util.download import from_hub, from_url
from llm_numba.util.files import writing_whole

GITHUB, HUB = "https://raw.githubusercontent.com", "https://huggingface.co/datasets/"
HELLASWAG, STORIES = "hellaswag_val.jsonl", "roneneldan/TinyStories"


class Dataset(NamedTuple):
    """A file at a URL, or files of a data set on the Hugging Face hub."""

    what: str
    size: str
    licence: str
    source: str  # its page
    use: str  # the command; {glob} is the folder as part of a glob, {path} as a path
    files: tuple[str, ...]
    shards: int = 0  # how many training shards there are, in llm.c's format, of 100 million tokens each
    url: str = ""  # of the file, if it is not on the hub
    sha256: str = ""


def _fineweb(what: str, prefix: str, shards: int) -> Dataset:
    size, licence, val = f"{shards} x 200 MB", "ODC-By 1.0, and Common Crawl's terms of use", f"{prefix}_val_000000.bin"
    use = f"train --preset d12 --data {{glob}}/{prefix}_train_*.bin --val-data {{path}}/{val}"
    return Dataset(what, size, licence, f"{HUB}kjj0/{prefix}10B-gpt2", use, (val,), shards)


# fmt: off
DATASETS = {
    "tinyshakespeare": Dataset(
        "40,000 lines of Shakespeare's plays, as one text", "1.1 MB",
        "the plays are in the public domain; the repository is under MIT", "https://github.com/karpathy/char-rnn",
        "train --data {path}/tinyshakespeare.txt", ("tinyshakespeare.txt",),
        url=f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "tinystories": Dataset(
        "2.7 million stories for children, written by GPT-4 (arXiv:2305.07759)", "2.2 GB",
        "CDLA-Sharing 1.0", HUB + STORIES,
        "train --data {path}/train.jsonl --val-data {path}/valid.jsonl --steps 5000",
        ("TinyStoriesV2-GPT4-valid.txt", "TinyStoriesV2-GPT4-train.txt")),
    "fineweb": _fineweb("10 billion tokens of web pages, as GPT-2's tokens (arXiv:2406.17557)", "fineweb", 103),
    "fineweb-edu": _fineweb("the same, of educational web pages only", "finewebedu", 99),
    "hellaswag": Dataset(
        "for eval: 10,042 contexts, each with four endings (arXiv:1905.07830)", "12 MB",
        "MIT", "https://github.com/rowanz/hellaswag",
        "eval RUN --task hellaswag --data {path}/" + HELLASWAG, (HELLASWAG,),
        url=f"{GITHUB}/rowanz/hellaswag/master/data/{HELLASWAG}",
        sha256="0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
}
# fmt: on


def folder_of(name: str) -> Path:
    """Where a data set is kept without --out."""
    return cache_folder() / "datasets" / name


def get(name: str, folder: Path, shards: int) -> None:
    """Download what is missing or has changed of a data set, with its first `shards` training shards, if it has any.

    Errors: UserError for a file that cannot be downloaded, or a folder that cannot be used.
    """
    dataset = DATASETS[name]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be used ({error.strerror}): choose another --out") from error
    numbers = range(1, shards + 1) if dataset.shards else ()
    training = [dataset.files[0].replace("val_000000", f"train_{number:06d}") for number in numbers]
    for file in [*dataset.files, *training]:
        if dataset.url:
            from_url(dataset.url, folder / file, dataset.sha256)
        elif name == "tinystories":
            _get_stories(file, folder)
        else:
            from_hub(dataset.source.removeprefix(HUB), file, repo_type="dataset", local_dir=folder)
        print(f"{file}: complete")


def _get_stories(file: str, folder: Path) -> None:
    """Download a text of stories, and replace it by JSON lines, one story each: what is between end-of-text marks."""
    from tqdm import tqdm

    ready = folder / f"{Path(file).stem.rpartition('-')[2]}.jsonl"
    if ready.exists():
        return
    text = from_hub(STORIES, file, repo_type="dataset", local_dir=folder)
    progress = tqdm(blocks(text), file, text.stat().st_size // PIECE_BYTES, unit="block", disable=None)
    with writing_whole(ready) as output:
        rest = ""
        for block in chain(progress, [END_OF_TEXT]):  # the last story has no mark
            *stories, rest = (rest + block).split(END_OF_TEXT)
            for story in filter(None, map(str.strip, stories)):
                output.write(json.dumps({"text": story}, ensure_ascii=False).encode() + b"\n")
    text.unlink()


def command(name: str, folder: Path) -> str:
    """The command that uses a data set in `folder`, quoted for the shell."""
    words = DATASETS[name].use.split()
    return "llm-numba " + shlex.join(word.format(glob=glob.escape(str(folder)), path=folder) for word in words)


def main(argv: list[str] | None = None) -> None:
    table = "\n".join(f"{name:<16} {d.size:<14} {d.what}" for name, d in DATASETS.items())
    parser = Parser(
        prog="llm-numba data",
        description="Download a data set and print the command that uses it. Files that are already there\n"
        "are checked, and downloaded again only if they differ.\n\n" + table,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the data set; without it, print the table above")
    parser.add_argument("--shards", type=int, metavar="N", help="fineweb, fineweb-edu: number of training shards (1)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: datasets/NAME in the cache folder")
    args = parser.parse_args(argv)
    if args.name is None:
        print(f"{table}\n\nDownload one:  llm-numba data NAME")
        return
    if args.name not in DATASETS:
        raise UserError(f"{args.name}: no such data set: choose one of {', '.join(DATASETS)}")
    dataset = DATASETS[args.name]
    if args.shards is not None and not 1 <= args.shards <= dataset.shards:
        has = f"{dataset.shards}; give 1 to {dataset.shards}" if dataset.shards else "no shards; leave it out"
        raise UserError(f"--shards {args.shards}: {args.name} has {has}")
    folder = (args.out.expanduser() if args.out else folder_of(args.name)).absolute()
    print(f"{args.name}: {dataset.what}\nsource:  {dataset.source}\nlicence: {dataset.licence}\nfolder:  {folder}")
    get(args.name, folder, args.shards or 1)
    print(f"use it:  {command(args.name, folder)}")
