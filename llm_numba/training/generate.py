"""Text from a model, token by token.

The prompt goes through the model a chunk at a time, then each new token by itself. The model keeps what it needs of
earlier tokens in a cache, so a new token costs one row of work. A step runs the model and draws the next token, which
is the input of the next step, so the device never waits for the host: while the host reads a token, the next step runs.
"""

import codecs
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from llm_numba.arena import Arena, Groups, TensorSpec
from llm_numba.models import Model
from llm_numba.ops import Ops
from llm_numba.util.cli import UserError

CHUNK = 16  # tokens of a prompt that go through the model together


class Choice(NamedTuple):
    """How a token is drawn. temperature 0: always the most likely; top_k 0: all tokens; top_p 1: all tokens."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95


def generation_groups(model: Model) -> Groups:
    """What generating text needs beside parameters and scratch: the cache, activations for a chunk and for a token, and
    what `sample_token` reads."""
    chunk, token = (model.generation_activations(T) for T in (CHUNK, 1))
    sampler = [
        TensorSpec("position", (1,), "int32"),
        TensorSpec("uniforms", (model.max_seq_len,), "float64"),
        TensorSpec("choice", (3,), "float64"),
    ]
    return {"cache": model.generation_cache(), "sampler": sampler, "chunk": chunk, "token": token}


def generation_step(ops: Ops, arena: Arena) -> None:
    """Every op that generating text calls."""
    for group in "chunk", "token":
        stepper(ops, arena, group)()


def stepper(ops: Ops, arena: Arena, group: str) -> Callable[[], None]:
    """A function that runs the model on the tokens of a group, "chunk" or "token", at m.position and after it, and
    draws the next token, which becomes that of the group "token"."""
    m = arena.namespace("parameters", "cache", "sampler", group, "scratch")
    token = arena.tensors["token", "tokens"]

    def step():
        arena.model.next_logits(ops, m)
        ops.sample_token(token, m.position, m.logits, m.uniforms, m.choice, arena.model.vocab_size, m.scratch)

    return step


def generator(ops: Ops, arena: Arena) -> Callable[..., Iterator[int]]:
    """The function `generate` for an arena that has `generation_groups`."""
    maxT = arena.model.max_seq_len
    sampler, token = arena.named("sampler"), arena.tensors["token", "tokens"]
    inputs = {CHUNK: arena.tensors["chunk", "tokens"], 1: token}
    steps = {T: ops.capture(stepper(ops, arena, group)) for T, group in ((CHUNK, "chunk"), (1, "token"))}
    read = ops.reader(token)

    def generate(prompt: list[int], length: int, choice: Choice, rng: np.random.Generator) -> Iterator[int]:
        """`length` tokens that continue `prompt` (at least one token), one by one. When the context is full, the last
        half of the text becomes the prompt of a new one. Errors: UserError if the logits are not finite."""
        text = list(prompt[-maxT:])
        ops.to_device(sampler["choice"], choice)
        while length:
            count = min(length, maxT - len(text) + 1)  # tokens until the context is full
            ops.to_device(sampler["position"], 0)
            ops.to_device(sampler["uniforms"][len(text) - 1 :][:count], rng.random(count))
            waiting = text[:]
            while waiting:
                T = CHUNK if len(waiting) >= CHUNK else 1
                ops.to_device(inputs[T], [waiting[:T]])
                steps[T]()
                waiting = waiting[T:]
            reading = [read()]
            for left in reversed(range(count)):
                if left:
                    steps[1]()
                    reading.append(read())
                new = int(reading.pop(0)()[0, 0])
                if new < 0:
                    raise UserError(
                        "the model's logits are not finite: its training went wrong; use an earlier checkpoint"
                    )
                yield new
                text.append(new)
            text = text[-max(1, maxT // 2) :]
            length -= count

    return generate


def text_of(tokens: Iterator[int], encoding) -> Iterator[str]:
    """The text of the tokens before the end-of-text token, in pieces as they come."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if token == encoding.eot_token:
            break
        yield decoder.decode(encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def encode_prompt(encoding, prompt: str) -> list[int]:
    """The prompt's tokens after the end-of-text token, with which every document of the training data starts."""
    return [encoding.eot_token, *encoding.encode_ordinary(prompt)]
