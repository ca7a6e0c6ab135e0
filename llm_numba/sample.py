"""Text from a trained model: python -m llm_numba.sample RUN --prompt "def "

The prompt goes through the model a chunk at a time, then each new token by itself. What earlier tokens left in the
attention layers, their keys and values, is kept in a cache, so that a new token costs one row of work.
"""

import argparse
import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from llm_numba.arena import Arena, Groups, TensorSpec, activation_specs, in_precision, parameter_specs
from llm_numba.data.tokenizer import tokenizer_from_state
from llm_numba.models import gpt2 as model
from llm_numba.models.config import GPT2Config
from llm_numba.ops import DEVICES, choose_device, get_ops
from llm_numba.training.checkpoint import load, newest, sizes_of
from llm_numba.training.settings import Settings, check
from llm_numba.util.cli import Parser, UserError, exit_with

CHUNK = 16  # tokens of a prompt that go through the model together


def sampling_groups(config: GPT2Config, ops, dtype: str = "float32") -> Groups:
    """What sampling needs beside the parameters: the cache, and activations for a chunk and for one token."""
    cache = TensorSpec("att", (1, config.max_seq_len, 2, config.channels), per_layer=True)

    def activations(T):
        specs = activation_specs(config, 1, T, [])
        return [spec._replace(shares=f"{spec.name} of {T}") if spec.per_layer else spec for spec in specs] + [
            TensorSpec("tokens", (1, T), "int32"),
            TensorSpec("position", (1,), "int32"),
            TensorSpec("wpe", (T, config.channels)),  # the rows of the parameter for these positions
            TensorSpec("scratch", (ops.scratch_size(config, 1, T),), "float32"),
        ]

    return in_precision({"cache": [cache], "chunk": activations(CHUNK), "token": activations(1)}, dtype)


def standalone_groups(config: GPT2Config, ops, dtype: str = "float32") -> Groups:
    """A model that only writes."""
    return in_precision({"parameters": parameter_specs(config)}, dtype) | sampling_groups(config, ops, dtype)


def generate(ops, arena: Arena, prompt: list[int], settings: SimpleNamespace, rng) -> Iterator[int]:
    """Tokens that continue `prompt` (at least one token), one by one, without end; the arena has `sampling_groups`.

    settings: temperature (0: always the likeliest token), top_k (0: all) and top_p (1: all), as in `choose`.
    When the context is full, the last half of what was said becomes the prompt of a new one.
    """
    maxT, V = arena.config.max_seq_len, arena.config.vocab_size
    chunk, token = (stepper(ops, arena, group) for group in ("chunk", "token"))
    said = list(prompt[-maxT:])
    waiting, position = said[:], 0
    while True:
        while waiting:
            T, step = (CHUNK, chunk) if len(waiting) >= CHUNK else (1, token)
            logits = step(waiting[:T], position)
            waiting, position = waiting[T:], position + T
        new = choose(ops.to_host(logits)[0, -1, :V], settings, rng)
        yield new
        said.append(new)
        waiting = [new]
        if position == maxT:
            said = said[-max(1, maxT // 2) :]
            waiting, position = said[:], 0


def stepper(ops, arena: Arena, group: str) -> Callable:
    """A function (tokens, position) that returns the logits of what follows these tokens, which stand at `position`;
    the cache gets their keys and values. group: "chunk" or "token", which says how many tokens they are."""
    m = arena.namespace("parameters", "cache", group)
    wpe = arena.tensors["parameters", "wpe"]

    def attention(out, cache, qkv, num_heads, scratch):
        ops.attention_cached_forward(out, cache, qkv, m.position, num_heads)

    writing = SimpleNamespace(**{**vars(ops), "attention_forward": attention})

    def forward():
        model.forward(writing, m)
        model.logits(ops, m, m)

    forward = ops.capture(forward)

    def step(tokens, position):
        ops.to_device(m.tokens, np.array([tokens], np.int32))
        ops.to_device(m.position, position)
        ops.copy(m.wpe, wpe[position : position + len(tokens)])
        forward()
        return m.logits

    return step


def choose(logits: np.ndarray, settings: SimpleNamespace, rng) -> int:
    """A token drawn from softmax(logits (V,) / temperature), cut to the top_k likeliest tokens, and of these to the
    fewest whose probabilities reach top_p (Holtzman et al. 2019, arXiv:1904.09751)."""
    if not np.isfinite(logits).all():
        raise UserError("the model's logits are not finite: its training went wrong; use an earlier checkpoint")
    logits = logits.astype(np.float64)
    if settings.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if settings.top_k:
        order = order[: settings.top_k]
    p = np.exp((logits[order] - logits[order[0]]) / settings.temperature)
    p /= p.sum()
    if settings.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(p), settings.top_p)) + 1
        order, p = order[:kept], p[:kept] / p[:kept].sum()
    return int(rng.choice(order, p=p))


def text_of(tokens: Iterator[int], encoding, length: int) -> Iterator[str]:
    """The text of the first `length` tokens, or of those before the end of the text, in pieces as they come."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for _, token in zip(range(length), tokens, strict=False):
        if token == encoding.eot_token:
            break
        yield decoder.decode(encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def encode_prompt(encoding, prompt: str) -> list[int]:
    """The prompt's tokens, behind the end-of-text token that every document of the training data starts with."""
    return [encoding.eot_token, *encoding.encode_ordinary(prompt)]


def load_model(path: Path, ops):
    """(arena with the parameters of a run's newest checkpoint, or of a checkpoint file; its tokenizer or None)."""
    checkpoint = newest(path) if path.is_dir() else path
    tensors, state, tokenizer = load(checkpoint)
    config = sizes_of(checkpoint, tensors, state)
    arena = Arena(standalone_groups(config, ops), config, "reuse", ops)
    for name, tensor in arena.named("parameters").items():
        ops.to_device(tensor, tensors[name])
    return arena, tokenizer and tokenizer_from_state(*tokenizer)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="llm-numba sample",
        description="Print text that a trained model writes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run folder, of which the newest checkpoint is taken, or a checkpoint")
    parser.add_argument("--prompt", default="", help="the text to go on with; none: the start of a new text")
    parser.add_argument("--length", type=int, default=200, metavar="TOKENS", help="tokens to write, at most")
    parser.add_argument("--number", type=int, default=1, metavar="N", help="how many texts")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1 more likely, 0 always the likeliest")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only among the K likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="only among those that sum to P; 1: all")
    parser.add_argument("--seed", type=int, default=42, help="the same seed gives the same texts")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: a CUDA card, or else the CPU")
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
    ops = get_ops(choose_device(args.device))
    ops.set_threads(args.threads)
    arena, encoding = load_model(args.run, ops)
    if encoding is None:
        raise UserError(f"{args.run}: trained on token shards with --tokenizer none, so its tokens have no text")
    for i in range(args.number):
        if args.number > 1:
            print(f"--- {i + 1} of {args.number}")
        print(args.prompt, end="", flush=True)
        tokens = generate(ops, arena, encode_prompt(encoding, args.prompt), args, np.random.default_rng([args.seed, i]))
        for piece in text_of(tokens, encoding, args.length):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    exit_with(main)
