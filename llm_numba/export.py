"""Write a model for other programs: llm-numba export RUN --format hf --out FOLDER"""

import os
import tempfile
from pathlib import Path

from tqdm import tqdm

from llm_numba.formats import huggingface, llmc
from llm_numba.training.weights import LLMC_MODEL, LLMC_TOKENIZER, Weights, open_weights, padded
from llm_numba.util.cli import Parser, UserError, exit_with

FILES = {huggingface.CONFIG, huggingface.WEIGHTS, huggingface.TOKENIZER, huggingface.TOKENIZER_CONFIG, LLMC_MODEL,
         LLMC_TOKENIZER}  # fmt: skip
LLMC_VERSIONS = {"fp32": 3, "bf16": 5}


def export(weights: Weights, format: str, dtype: str, folder: Path) -> None:
    """Write the files of a format into an existing folder; format: "hf" or "llmc"; dtype: "fp32" or "bf16"."""
    model, encoding = weights.model, weights.tokenizer()
    if encoding and encoding.n_vocab != (V := model.vocab_size):
        raise UserError(
            f"the model's vocabulary has {V} tokens, its tokenizer {encoding.n_vocab}: other programs need the same"
        )
    parameters = tqdm(weights.parameters, desc="weights", leave=False, disable=None)
    if format == "hf":
        if encoding:
            huggingface.write_tokenizer(folder, encoding, model.max_seq_len)
        huggingface.write_model(folder, model, dict(parameters), dtype, encoding and encoding.eot_token)
    else:
        if encoding:
            llmc.write_tokenizer(folder / LLMC_TOKENIZER, encoding)
        parameters = {name: padded(name, values, model) for name, values in parameters}
        llmc.write_model(folder / LLMC_MODEL, model, parameters, LLMC_VERSIONS[dtype])


def write_folder(out: Path, overwrite: bool, write) -> None:
    """The folder `out` = what write(folder) puts into one, all of it or nothing.

    Errors: UserError if `out` exists and `overwrite` is False, if it holds anything but an export, or if it cannot be
    written.
    """
    if os.path.lexists(out) and not overwrite:
        raise UserError(f"--out {out}: exists: choose another folder, or replace it with --overwrite")
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or {p.name for p in out.iterdir()} - FILES):
        raise UserError(f"--out {out}: is or holds something other than an export: choose another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.unfinished-", dir=out.parent) as temporary:
            whole, before = Path(temporary, "whole"), Path(temporary, "before")
            whole.mkdir()
            write(whole)
            try:
                if out.exists():
                    out.rename(before)
                whole.rename(out)
            finally:
                if not out.exists() and before.exists():  # interrupted in between
                    before.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="llm-numba export", description="Write a model in another program's format.")
    source = "a run folder (its newest checkpoint) or a checkpoint; or any other source of --init: "
    source += f"{', '.join(huggingface.PUBLISHED)}, a Hugging Face folder, an llm.c .bin"
    formats = f"hf: Hugging Face's {huggingface.CONFIG}, {huggingface.WEIGHTS} and {huggingface.TOKENIZER}; "
    formats += f"llmc: llm.c's {LLMC_MODEL} and {LLMC_TOKENIZER}"
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help=source)
    parser.add_argument("--format", choices=("hf", "llmc"), required=True, help=formats)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to create")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER if it holds an export")
    args = parser.parse_args(argv)
    weights = open_weights(args.source)
    write_folder(args.out, args.overwrite, lambda folder: export(weights, args.format, args.dtype, folder))
    print(f"{args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")


if __name__ == "__main__":
    exit_with(main)
