"""Generate text with a trained model: llm-numba sample RUN --prompt "def " """

import argparse
from pathlib import Path

import numpy as np

from llm_numba.arena import Arena
from llm_numba.ops import DEVICES, choose_device, get_ops
from llm_numba.training.checkpoint import Checkpoint, open_checkpoint
from llm_numba.training.generate import Choice, encode_prompt, generate, generation_groups, generation_step, text_of
from llm_numba.training.memory_plan import complete
from llm_numba.training.precompile import precompile_generation
from llm_numba.training.settings import Settings, check
from llm_numba.util.cli import Parser, UserError, exit_with


def load(stored: Checkpoint, ops) -> Arena:
    """The checkpoint's parameters in memory, with what generating text needs."""
    model = stored.model
    groups = {"parameters": model.parameters()} | generation_groups(model)
    arena = Arena(complete(groups, model, ops, "float32", generation_step), model, "reuse", ops)
    for name, values in stored.parameters():
        ops.to_device(arena.tensors["parameters", name], values)
    return arena


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="llm-numba sample",
        description="Print text that a trained model generates.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run folder (its newest checkpoint is used), or a checkpoint")
    parser.add_argument("--prompt", default="", help="the text to continue; empty: start a new text")
    parser.add_argument("--length", type=int, default=200, metavar="TOKENS", help="tokens to generate, at most")
    parser.add_argument("--number", type=int, default=1, metavar="N", help="how many texts")
    parser.add_argument("--temperature", type=float, default=0.8, help="lower is more predictable; 0: most likely only")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="only tokens that sum to P; 1: all")
    parser.add_argument("--seed", type=int, default=42, help="the same seed gives the same texts")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: a GPU if there is one, else the CPU")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: one for each physical core")
    args = parser.parse_args(argv)
    for flag, value, lowest, highest in (
        ("--length", args.length, 1, None),
        ("--number", args.number, 1, None),
        ("--temperature", args.temperature, 0, None),
        ("--top-k", args.top_k, 0, None),
        ("--top-p", args.top_p, 0, 1),
        ("--seed", args.seed, 0, None),
        ("--threads", args.threads, 0, None),
    ):
        if not (value >= lowest and (highest is None or value <= highest)):
            bounds = f"at least {lowest}" if highest is None else f"{lowest} to {highest}"
            raise UserError(f"{flag} {value}: must be {bounds}")
    check(Settings(threads=args.threads))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    stored = open_checkpoint(args.run)
    encoding = stored.encoding
    if encoding is None:
        raise UserError(f"{args.run}: trained on token shards with --tokenizer none, so its tokens have no text")
    ops = get_ops(choose_device(args.device))
    ops.set_threads(args.threads)
    arena = load(stored, ops)
    if ops.is_compiled():
        precompile_generation(ops, stored.model, "float32")
    choice = Choice(args.temperature, args.top_k, args.top_p)
    for i in range(args.number):
        if args.number > 1:
            print(f"--- {i + 1} of {args.number}")
        print(args.prompt, end="", flush=True)
        rng = np.random.default_rng([args.seed, i])
        tokens = generate(ops, arena, encode_prompt(encoding, args.prompt), choice, rng)
        for piece in text_of(tokens, encoding, args.length):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    exit_with(main)
