"""Write a model for other programs: python -m llm_numba.export RUN --format hf --out FOLDER"""

import argparse
import os
import tempfile
from pathlib import Path

from tqdm import tqdm

from llm_numba.formats import huggingface, llmc
from llm_numba.formats.pretrained import LLMC_MODEL, LLMC_TOKENIZER, PUBLISHED, Weights, open_weights, pad
from llm_numba.util.cli import Parser, UserError, exit_with

FILES = {huggingface.CONFIG, huggingface.WEIGHTS, huggingface.TOKENIZER, huggingface.TOKENIZER_CONFIG, LLMC_MODEL,
         LLMC_TOKENIZER}  # fmt: skip
LLMC_VERSIONS = {"fp32": 3, "bf16": 5}


def export(weights: Weights, format: str, dtype: str, folder: Path) -> None:
    """Write the files of a format into a folder that is there; format: "hf" or "llmc"; dtype: "fp32" or "bf16"."""
    config, encoding = weights.config, weights.tokenizer()
    if encoding and encoding.n_vocab != config.vocab_size:
        raise UserError(
            f"the model's vocabulary has {config.vocab_size} tokens, its tokenizer {encoding.n_vocab}: other programs "
            "would not know what to do with them"
        )
    if encoding and format == "hf":
        huggingface.write_tokenizer(folder, encoding, config.max_seq_len)
    elif encoding:
        llmc.write_tokenizer(folder / LLMC_TOKENIZER, encoding)
    parameters = dict(tqdm(weights.parameters, desc="weights", leave=False, disable=None))
    if format == "hf":
        huggingface.write_model(folder, config, parameters, dtype, encoding and encoding.eot_token)
    else:
        parameters["wte"] = pad(parameters["wte"], config)
        llmc.write_model(folder / LLMC_MODEL, config, parameters, LLMC_VERSIONS[dtype])


def write_folder(out: Path, overwrite: bool, write) -> None:
    """The folder `out` = what write(folder) puts into one, all of it or nothing.

    Errors: UserError where `out` is there and `overwrite` does not say so, where it holds anything but an export, or
    where it cannot be written.
    """
    if os.path.lexists(out) and not overwrite:
        raise UserError(f"--out {out}: is there already; choose another, or replace it with --overwrite")
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or {p.name for p in out.iterdir()} - FILES):
        raise UserError(
            f"--out {out}: is or holds something other than an export, which is not replaced; choose another"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.unfinished-", dir=out.parent) as temporary:
            whole, before = Path(temporary, "whole"), Path(temporary, "before")
            whole.mkdir()
            write(whole)
            if out.exists():
                out.rename(before)
            try:
                whole.rename(out)
            except BaseException:
                if before.exists():
                    before.rename(out)
                raise
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="llm-numba export", description="Write a model in a format that other programs read.")
    parser.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        help=f"a run folder, of which the newest checkpoint is taken, or a checkpoint; or any other SOURCE of --init: "
        f"{', '.join(PUBLISHED)}, a folder of Hugging Face's, an llm.c .bin",
    )
    parser.add_argument(
        "--format",
        choices=("hf", "llmc"),
        required=True,
        help=f"hf: Hugging Face's {huggingface.CONFIG}, {huggingface.WEIGHTS} and {huggingface.TOKENIZER}; "
        f"llmc: llm.c's {LLMC_MODEL} and {LLMC_TOKENIZER}",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to make for these files")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--overwrite", action="store_true", help="replace the export that FOLDER holds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    weights = open_weights(args.source)
    write_folder(args.out, args.overwrite, lambda folder: export(weights, args.format, args.dtype, folder))
    print(f"{args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")


if __name__ == "__main__":
    exit_with(main)
