"""Text from a model, token by token.

The prompt goes through the model a chunk at a time, then each new token by itself. The model keeps what it needs of
earlier tokens in a cache, so a new token costs one row of work.
"""

import codecs
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from llm_numba.arena import Arena, Groups
from llm_numba.models import Model
from llm_numba.ops import Ops
from llm_numba.util.cli import UserError

CHUNK = 16  # tokens of a prompt that go through the model together


class Choice(NamedTuple):
    """How `choose` draws a token. temperature 0: always the most likely; top_k 0: all tokens; top_p 1: all tokens."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95


def generation_groups(model: Model) -> Groups:
    """What generating text needs beside parameters and scratch: the cache, activations for a chunk and for a token."""
    chunk, token = (model.generation_activations(T) for T in (CHUNK, 1))
    return {"cache": model.generation_cache(), "chunk": chunk, "token": token}


def generation_step(ops: Ops, arena: Arena) -> None:
    """Every op that generating text calls, whatever the logits are."""
    for group in "chunk", "token":
        m = arena.namespace("parameters", "cache", group, "scratch")
        arena.model.seek(ops, m, arena.named("parameters"), 0)
        arena.model.next_logits(ops, m)


def generate(ops: Ops, arena: Arena, prompt: list[int], choice: Choice, rng) -> Iterator[int]:
    """Tokens that continue `prompt` (at least one token), one by one, without end; the arena has `generation_groups`.
    When the context is full, the last half of the text becomes the prompt of a new one."""
    maxT, V = arena.model.max_seq_len, arena.model.vocab_size
    chunk, token = (stepper(ops, arena, group) for group in ("chunk", "token"))
    text = list(prompt[-maxT:])
    waiting, position = text[:], 0
    while True:
        while waiting:
            T, step = (CHUNK, chunk) if len(waiting) >= CHUNK else (1, token)
            logits = step(waiting[:T], position)
            waiting, position = waiting[T:], position + T
        new = choose(ops.to_host(logits)[0, -1, :V], choice, rng)
        yield new
        text.append(new)
        waiting = [new]
        if position == maxT:
            text = text[-max(1, maxT // 2) :]
            waiting, position = text[:], 0


def stepper(ops: Ops, arena: Arena, group: str) -> Callable:
    """A function (tokens, position) that returns the logits after each of these tokens, the first of which stands at
    `position`. group: "chunk" or "token", which says how many tokens they are."""
    m, parameters = arena.namespace("parameters", "cache", group, "scratch"), arena.named("parameters")
    next_logits = ops.capture(lambda: arena.model.next_logits(ops, m))

    def step(tokens, position):
        ops.to_device(m.tokens, np.array([tokens], np.int32))
        arena.model.seek(ops, m, parameters, position)
        next_logits()
        return m.logits

    return step


def choose(logits: np.ndarray, choice: Choice, rng) -> int:
    """A token drawn from softmax(logits (V,) / temperature), cut to the top_k most likely tokens, and of these to the
    fewest whose probabilities reach top_p (Holtzman et al. 2019, arXiv:1904.09751)."""
    if not np.isfinite(logits).all():
        raise UserError("the model's logits are not finite: its training went wrong; use an earlier checkpoint")
    logits = logits.astype(np.float64)
    if choice.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if choice.top_k:
        order = order[: choice.top_k]
    p = np.exp((logits[order] - logits[order[0]]) / choice.temperature)
    p /= p.sum()
    if choice.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(p), choice.top_p)) + 1
        order, p = order[:kept], p[:kept] / p[:kept].sum()
    return int(rng.choice(order, p=p))


def text_of(tokens: Iterator[int], encoding, length: int) -> Iterator[str]:
    """The text of the first `length` tokens, or of those before the end-of-text token, in pieces as they come."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for _, token in zip(range(length), tokens, strict=False):
        if token == encoding.eot_token:
            break
        yield decoder.decode(encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def encode_prompt(encoding, prompt: str) -> list[int]:
    """The prompt's tokens after the end-of-text token, with which every document of the training data starts."""
    return [encoding.eot_token, *encoding.encode_ordinary(prompt)]
