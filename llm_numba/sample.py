"""Generate text with a trained model: llm-numba sample RUN --prompt "def " """

from pathlib import Path

import numpy as np

from llm_numba.arena import Arena
from llm_numba.ops import choose_device, device_flags, get_ops
from llm_numba.training.checkpoint import Checkpoint, open_checkpoint
from llm_numba.training.generate import Choice, encode_prompt, generation_groups, generation_step, generator, text_of
from llm_numba.training.memory_plan import complete
from llm_numba.training.precompile import precompile_generation
from llm_numba.util.cli import Parser, UserError, exit_with


def load(stored: Checkpoint, ops) -> Arena:
    """The checkpoint's parameters in memory, with what generating text needs."""
    model = stored.model
    groups = {"parameters": model.parameters()} | generation_groups(model)
    arena = Arena(complete(groups, model, ops, "float32", generation_step), model, "reuse", ops)
    for name, values in stored.parameters():
        ops.to_device(arena.tensors["parameters", name], values)
    return arena


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="llm-numba sample", description="Print text that a trained model generates.")
    parser.add_argument("run", type=Path, help="a run folder (its newest checkpoint is used), or a checkpoint")
    parser.add_argument("--prompt", default="", help="the text to continue (default: start a new text)")
    parser.number("--length", 200, "tokens to generate, at most", least=1, metavar="TOKENS")
    parser.number("--number", 1, "how many texts", least=1, metavar="N")
    parser.number("--temperature", 0.8, "lower is more predictable; 0: most likely only")
    parser.number("--top-k", 0, "only the K most likely tokens; 0: all", metavar="K")
    parser.number("--top-p", 0.95, "only tokens that sum to P; 1: all", most=1, metavar="P")
    parser.number("--seed", 42, "the same seed gives the same texts")
    device_flags(parser, "threads")
    args = parser.parse_args(argv)
    stored = open_checkpoint(args.run)
    encoding = stored.encoding
    if encoding is None:
        raise UserError(f"{args.run}: trained on token shards with --tokenizer none, so its tokens have no text")
    ops = get_ops(choose_device(args.device))
    ops.set_threads(args.threads)
    arena = load(stored, ops)
    if ops.is_compiled():
        precompile_generation(ops, stored.model, "float32")
    generate, prompt = generator(ops, arena), encode_prompt(encoding, args.prompt)
    choice = Choice(args.temperature, args.top_k, args.top_p)
    for i in range(args.number):
        if args.number > 1:
            print(f"--- {i + 1} of {args.number}")
        print(args.prompt, end="", flush=True)
        rng = np.random.default_rng([args.seed, i])
        for piece in text_of(generate(prompt, args.length, choice, rng), encoding):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    exit_with(main)
