"""How good a trained model is: python -m llm_numba.eval RUN --task val (or hellaswag)"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import tiktoken

from llm_numba.arena import DTYPES, Arena, Groups, layout, training_groups
from llm_numba.data import corpus as data
from llm_numba.data import hellaswag
from llm_numba.data.loader import Loader
from llm_numba.data.shards import Span, fingerprint
from llm_numba.formats.pretrained import Weights, of_checkpoint
from llm_numba.models import gpt2 as model
from llm_numba.models.config import GPT2Config
from llm_numba.ops import DEVICES, choose_device, get_ops
from llm_numba.training import checkpoint, settings
from llm_numba.training.settings import Settings
from llm_numba.util.cli import Parser, UserError, exit_with
from llm_numba.util.files import format_bytes

BATCH_TOKENS = 4096  # of a batch, unless --batch-size says otherwise or memory is short
UNUSED = ("master", "gradients", "m", "v", "activation gradients")  # groups of training, by a forward pass


class Trained(NamedTuple):
    """A checkpoint: what it holds, and how the run was set."""

    path: Path
    weights: Weights
    config: GPT2Config
    settings: Settings
    encoding: tiktoken.Encoding | None
    tensors: dict[str, np.ndarray]
    record: dict


def read(path: Path) -> Trained:
    """A run folder's newest checkpoint, or a checkpoint file. Errors: UserError as of `checkpoint.load`."""
    path = checkpoint.newest(path) if path.is_dir() else path
    tensors, record, tokenizer = checkpoint.load(path)
    checkpoint.sizes_of(path, tensors, record)
    s = settings.from_record(record["settings"], path)
    weights = of_checkpoint(tensors, record, tokenizer)
    return Trained(path, weights, weights.config, s, weights.tokenizer(), tensors, record)


def forward_groups(config: GPT2Config, B: int, T: int, ops, dtype: str = "float32") -> Groups:
    """What a forward pass and its losses need; all layers share one set of activations."""
    groups = training_groups(config, B, T, ops, "reuse", dtype)
    shared = [spec._replace(shares=spec.name) if spec.per_layer else spec for spec in groups["activations"]]
    return {group: specs for group, specs in groups.items() if group not in UNUSED} | {"activations": shared}


def batch_size(config: GPT2Config, T: int, most: int, ops, dtype: str, wanted: int = 0) -> int:
    """B: as wanted, or (0) about BATCH_TOKENS / T and at most `most`, fewer where memory is short. Errors: UserError
    where not even that fits."""
    B, available = wanted or max(1, min(most, BATCH_TOKENS // T)), ops.available_memory()

    def needed():
        return layout(forward_groups(config, B, T, ops, dtype), config.num_layers, "reuse")[1]

    while needed() > available and B > 1 and not wanted:
        B //= 2
    if needed() > available:
        raise UserError(
            f"--batch-size {B}: {format_bytes(needed())} needed, but {format_bytes(available)} of memory are available"
        )
    return B


def on_device(trained: Trained, B: int, T: int, ops, dtype: str) -> Callable:
    """The model in memory of its own: a function of (tokens, targets), both (B, T), that returns the loss of each."""
    groups = forward_groups(trained.config, B, T, ops, dtype)
    arena = Arena(groups, trained.config, "reuse", ops)
    for name in arena.named("parameters"):
        model.set_parameter(ops, arena, name, trained.tensors[name])
    return scorer(ops, arena.namespace(*groups), trained.config.vocab_size)


def scorer(ops, m: SimpleNamespace, vocab_size: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function of (tokens, targets), both (B, T) int32, that returns the loss of each, (B, T); it writes to
    m.loss too."""
    step = ops.capture(partial(forward_and_loss, ops, m, vocab_size))

    def losses(tokens, targets):
        ops.to_device(m.tokens, tokens)
        ops.to_device(m.targets, targets)
        step()
        return ops.to_host(m.losses)

    return losses


def forward_and_loss(ops, m, vocab_size: int) -> None:
    model.forward(ops, m)
    model.loss(ops, m, vocab_size, write_dlogits=False)


def mean_loss(loader: Loader, losses: Callable, windows: int) -> float:
    """The mean loss of the loader's next windows, each token's counting the same."""
    from tqdm import tqdm

    total, tokens = 0.0, np.empty((2, loader.B, loader.T), np.int32)
    with tqdm(total=windows, desc="val", unit="window", leave=False, disable=None) as progress:
        for start in range(0, windows, loader.B):
            loader.next_batch(*tokens)
            rows = min(loader.B, windows - start)  # the last batch is filled up with earlier windows
            total += losses(*tokens)[:rows].sum(dtype=np.float64)
            progress.update(rows)
    loss = float(total) / (windows * loader.T)
    if not math.isfinite(loss):
        raise UserError("the model's losses are not finite: its training went wrong; use an earlier checkpoint")
    return loss


def held_out(trained: Trained, paths: list[str]) -> list[Span]:
    """The tokens to validate on: those of `paths`, in the model's own tokenizer, or what the run held out."""
    if paths:
        return data.spans_of(paths, trained.encoding, trained.config.vocab_size)
    from llm_numba.train import read_data

    corpus = read_data(trained.settings, trained.config, trained.weights)
    if fingerprint(corpus.train) != trained.record["data"]:
        raise UserError(f"{trained.path}: the run's data is no longer what it was trained on: give some with --data")
    return corpus.val


def evaluate_val(trained: Trained, ops, args) -> tuple[dict, str]:
    """(results, a line that says them): loss and perplexity over all windows of the held-out tokens, in their order."""
    T, dtype = trained.settings.sequence_length or trained.config.max_seq_len, DTYPES[args.dtype]
    spans = held_out(trained, args.data)
    windows = sum((span.stop - span.start - 1) // T for span in spans)
    B = batch_size(trained.config, T, max(1, windows), ops, dtype, args.batch_size)
    loader = Loader(spans, B, T, 0, False, "--data" if args.data else "the run's validation data")
    windows = min(windows, args.limit or windows)
    loss = mean_loss(loader, on_device(trained, B, T, ops, dtype), windows)
    perplexity = math.exp(loss) if loss < 700 else None  # beyond what a float holds
    results = {"loss": loss, "perplexity": perplexity, "windows": windows, "sequence_length": T}
    said = f"perplexity {perplexity:.4g}" if perplexity else "perplexity beyond measure"
    return results, f"loss {loss:.4f}, {said} over {windows:,} windows of {T} tokens"


def evaluate_hellaswag(trained: Trained, ops, args) -> tuple[dict, str]:
    """(results, a line that says them): the share of examples whose right ending was found."""
    if len(args.data) > 1:
        raise UserError(f"--data {' '.join(args.data)}: --task hellaswag takes one file")
    T, dtype = trained.settings.sequence_length or trained.config.max_seq_len, DTYPES[args.dtype]
    file = args.data[0] if args.data else ""
    examples, note = hellaswag.read_examples(file, trained.encoding, T, args.limit, "--data")
    if note:
        print(f"note: {note}", file=sys.stderr)
    T = min(T, examples.longest())
    B = batch_size(trained.config, T, len(examples.rows), ops, dtype, args.batch_size)
    losses = on_device(trained, B, T, ops, dtype)
    found = hellaswag.score(*hellaswag.losses_of(examples, losses, B, T), examples.labels)
    return found._asdict(), str(found)


TASKS = {"val": evaluate_val, "hellaswag": evaluate_hellaswag}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m llm_numba.eval",
        description="Say how good a trained model is. val: the mean loss of a token, and the perplexity, over all "
        "windows of held-out text, one behind the other. hellaswag: the share of beginnings to which the model finds "
        "the right one of four endings: the one that is the likeliest a token (acc_norm), or as a whole (acc). Windows "
        "are as long as in training; an example that is longer is cut from the left.",
    )
    parser.add_argument("run", type=Path, help="a run folder, of which the newest checkpoint is taken, or a checkpoint")
    parser.add_argument("--task", choices=TASKS, default="val", help="default: val")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="val: text files, folders, globs or token shards (default: what the run held out); hellaswag: its .jsonl "
        "file (default: what python -m llm_numba.data hellaswag fetches)",
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="only the first N windows or examples; 0: all"
    )
    parser.add_argument(
        "--batch-size", type=int, default=0, metavar="B", help=f"rows at a time; 0: about {BATCH_TOKENS} tokens"
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="auto: a CUDA card, or else the CPU (default)"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="bf16 needs a CUDA card (default: fp32)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: one for each physical core")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a text")
    args = parser.parse_args(argv)
    for flag, value in ("--limit", args.limit), ("--batch-size", args.batch_size), ("--threads", args.threads):
        if value < 0:
            raise UserError(f"{flag} {value}: must be at least 0")
    settings.check(Settings(threads=args.threads))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    trained = read(args.run)
    ops = get_ops(choose_device(args.device), args.dtype)
    ops.set_threads(args.threads)
    results, line = TASKS[args.task](trained, ops, args)
    step = trained.record["step"]
    if args.json:
        print(json.dumps({"task": args.task, "checkpoint": str(trained.path), "step": step, **results}))
    else:
        print(f"{args.task} of {trained.path} (step {step}): {line}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    exit_with(main)
