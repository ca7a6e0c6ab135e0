"""Evaluate a trained model: llm-numba eval RUN --task val (or hellaswag)"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llm_numba.arena import DTYPES, Arena, Groups, layout
from llm_numba.data import corpus as data
from llm_numba.data import hellaswag
from llm_numba.data.loader import Loader
from llm_numba.data.shards import fingerprint
from llm_numba.models import Model
from llm_numba.ops import Ops, choose_device, device_flags, get_ops
from llm_numba.training.checkpoint import Checkpoint, open_checkpoint
from llm_numba.training.memory_plan import complete, training_groups
from llm_numba.training.run_data import data_of
from llm_numba.training.step import forward_and_loss, scorer, set_parameter
from llm_numba.util.cli import Parser, UserError, exit_with, note
from llm_numba.util.files import format_bytes

BATCH_TOKENS = 4096  # in a batch, unless --batch-size is given or memory is short
UNUSED = ("gradients", "m", "v", "activation gradients")  # groups of training that a forward pass does not need


def forward_groups(model: Model, B: int, T: int, ops: Ops, dtype: str = "float32") -> Groups:
    """What a forward pass and its losses need; all layers share one set of activations."""
    groups = {name: specs for name, specs in training_groups(model, B, T).items() if name not in UNUSED}
    groups["activations"] = [s._replace(shares=s.name) if s.per_layer else s for s in groups["activations"]]
    names = (*groups, "scratch")
    return complete(groups, model, ops, dtype, lambda ops, arena: forward_and_loss(ops, model, arena.namespace(*names)))


def batch_size(model: Model, T: int, most: int, ops: Ops, dtype: str, wanted: int = 0) -> int:
    """B: as wanted, or (0) about BATCH_TOKENS / T and at most `most`, fewer if memory is short. Errors: none fits."""
    B, available = wanted or max(1, min(most, BATCH_TOKENS // T)), ops.available_memory()
    while (needed := layout(forward_groups(model, B, T, ops, dtype), model.num_layers, "reuse")[1]) > available:
        if B == 1 or wanted:
            free = format_bytes(available)
            raise UserError(f"--batch-size {B}: {format_bytes(needed)} needed, but {free} of memory are available")
        B //= 2
    return B


def on_device(stored: Checkpoint, B: int, T: int, ops: Ops, dtype: str) -> Callable:
    """The model in memory: a function of (tokens, targets), both (B, T), that returns the loss of each."""
    groups = forward_groups(stored.model, B, T, ops, dtype)
    arena = Arena(groups, stored.model, "reuse", ops)
    for name, values in stored.parameters():
        set_parameter(ops, arena, name, values)
    return scorer(ops, stored.model, arena.namespace(*groups))


def mean_loss(loader: Loader, losses: Callable, windows: int) -> float:
    """The mean loss of all tokens in the loader's next windows."""
    total, tokens = 0.0, np.empty((2, loader.B, loader.T), np.int32)
    for start in tqdm(range(0, windows, loader.B), desc="val", unit="batch", leave=False, disable=None):
        loader.next_batch(*tokens)
        rows = losses(*tokens)[: windows - start]  # the last batch is filled up with earlier windows
        total += float(rows.sum(dtype=np.float64))
    if not math.isfinite(total):
        raise UserError("the model's losses are not finite: its training went wrong; use an earlier checkpoint")
    return total / (windows * loader.T)


def evaluate_val(stored: Checkpoint, T: int, ops: Ops, args) -> tuple[dict, str]:
    """(results, the same in words): loss and perplexity over all windows, in order, of --data in the model's tokenizer,
    or of what the run held out."""
    if args.data:
        spans = data.spans_of(args.data, stored.encoding, stored.model.vocab_size)
    else:
        corpus = data_of(stored)
        if fingerprint(corpus.train) != stored.record["data"]:
            raise UserError(f"{stored.path}: the run's data is no longer what it was trained on: give some with --data")
        spans = corpus.val
    windows = sum((span.stop - span.start - 1) // T for span in spans)
    B = batch_size(stored.model, T, max(1, windows), ops, DTYPES[args.dtype], args.batch_size)
    loader = Loader(spans, B, T, 0, False, "--data" if args.data else "the run's validation data")
    windows = min(windows, args.limit or windows)
    loss = mean_loss(loader, on_device(stored, B, T, ops, DTYPES[args.dtype]), windows)
    perplexity = math.exp(loss) if loss < 700 else None  # larger: a float overflows
    results = {"loss": loss, "perplexity": perplexity, "windows": windows, "sequence_length": T}
    in_words = f"perplexity {perplexity:.4g}" if perplexity else "perplexity too large for a float"
    return results, f"loss {loss:.4f}, {in_words} over {windows:,} windows of {T} tokens"


def evaluate_hellaswag(stored: Checkpoint, T: int, ops: Ops, args) -> tuple[dict, str]:
    """(results, the same in words): the share of examples whose correct ending scores best."""
    if len(args.data) > 1:
        raise UserError(f"--data {' '.join(args.data)}: --task hellaswag takes one file")
    file = args.data[0] if args.data else ""
    examples, cut = hellaswag.read_examples(file, stored.encoding, T, args.limit, "--data")
    if cut:
        note(f"note: {cut}")
    T = min(T, max(len(tokens) for tokens, _ in examples.rows) - 1)
    B = batch_size(stored.model, T, len(examples.rows), ops, DTYPES[args.dtype], args.batch_size)
    losses = on_device(stored, B, T, ops, DTYPES[args.dtype])
    found = hellaswag.score(*hellaswag.losses_of(examples, losses, B, T), examples.labels)
    return found._asdict(), str(found)


TASKS = {"val": evaluate_val, "hellaswag": evaluate_hellaswag}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="llm-numba eval",
        description="Evaluate a trained model. val: the mean loss of a token, and the perplexity, over all windows of "
        "held-out text. hellaswag: the share of examples in which the model rates the correct one of four endings "
        "highest, by mean log-likelihood of a token (acc_norm) or of the whole ending (acc). Windows are as long as in "
        "training; longer examples are cut on the left.",
    )
    val = "val: text files, folders, globs or token shards (default: what the run held out)"
    swag = "hellaswag: its .jsonl file (default: what llm-numba data hellaswag downloads)"
    parser.add_argument("run", type=Path, help="a run folder (its newest checkpoint is used), or a checkpoint")
    parser.add_argument("--task", choices=TASKS, default="val", help="default: val")
    parser.add_argument("--data", nargs="+", default=[], metavar="PATH", help=f"{val}; {swag}")
    parser.number("--limit", 0, "only the first N windows or examples; 0: all", metavar="N")
    parser.number("--batch-size", 0, f"rows at a time; 0: about {BATCH_TOKENS} tokens", metavar="B")
    device_flags(parser, "dtype", "threads")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args(argv)
    stored = open_checkpoint(args.run)
    ops = get_ops(choose_device(args.device), args.dtype)
    ops.set_threads(args.threads)
    T = stored.settings.sequence_length or stored.model.max_seq_len
    results, line = TASKS[args.task](stored, T, ops, args)
    step = stored.record["step"]
    if args.json:
        print(json.dumps({"task": args.task, "checkpoint": str(stored.path), "step": step, **results}))
    else:
        print(f"{args.task} of {stored.path} (step {step}): {line}")


if __name__ == "__main__":
    exit_with(main)
