"""Text <-> token ids: GPT-2's vocabulary, a byte pair encoding learned from your text, or bytes.

All three are a `tiktoken.Encoding`, with `encode_ordinary(text)`, `decode(tokens)`, `n_vocab` and `eot_token`.
"""

import base64
from collections.abc import Iterable

import tiktoken

from llm_numba.util.cli import UserError

END_OF_TEXT = "<|endoftext|>"

# How GPT-2 splits text into words, which merges never cross (Radford et al. 2019), as tiktoken writes it
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def load_tokenizer(name: str, texts: Iterable[str], vocab_size: int | None) -> tiktoken.Encoding:
    """The encoding `name`; its last id is `<|endoftext|>`.

    gpt2   GPT-2's 50257 tokens; tiktoken downloads them once, or finds them in TIKTOKEN_CACHE_DIR
    bytes  the 256 bytes and `<|endoftext|>`
    bpe    exactly `vocab_size` tokens, learned from `texts` deterministically

    Only bpe uses `texts` and `vocab_size`.
    Errors: an unknown name; gpt2 cannot be downloaded; a vocab_size below 257 or larger than `texts` can give.
    """
    if name == "gpt2":
        try:
            return tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise UserError(
                f"--tokenizer gpt2: cannot download its vocabulary ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to "
                "a folder that has it, or use --tokenizer bpe or bytes, or for shards none with --vocab-size 50257"
            ) from error
    if name not in ("bytes", "bpe"):
        raise UserError(f"--tokenizer {name}: choose gpt2, bpe or bytes (or none, for token shards without samples)")
    tokens = [bytes([byte]) for byte in range(256)] if name == "bytes" else _learn(texts, vocab_size)
    return checked_encoding(name, {token: rank for rank, token in enumerate(tokens)}, {END_OF_TEXT: len(tokens)})


def tokenizer_state(encoding: tiktoken.Encoding) -> tuple[dict, bytes]:
    """Everything that rebuilds `encoding`: a dict of JSON types, and the ranks as a `.tiktoken` file.

    A line of the ranks is the token in base64, a space and its rank, which is its id and the priority of its merge.
    """
    state = {"name": encoding.name, "pat_str": encoding._pat_str, "special_tokens": dict(encoding._special_tokens)}
    ranked = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    return state, b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranked)


def tokenizer_from_state(state: dict, ranks: bytes) -> tiktoken.Encoding:
    """The encoding from `tokenizer_state`. Errors: a damaged state or ranks."""
    try:
        lines = (line.split() for line in ranks.splitlines())
        tokens = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        return checked_encoding(state["name"], tokens, state["special_tokens"], state["pat_str"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the stored tokenizer is damaged ({error}): restore it from a good copy") from error


def checked_encoding(
    name: str, tokens: dict[bytes, int], special: dict[str, int], pattern: str = PATTERN
) -> tiktoken.Encoding:
    """The encoding with these ids; a token's id is also the priority of its merge.

    Errors: ValueError or TypeError if an id is missing or appears twice, or a byte or `<|endoftext|>` has none.
    """
    ids = [*tokens.values(), *special.values()]
    if sorted(ids) != list(range(len(ids))):
        raise ValueError("the ids are not 0, 1, 2, ... without a gap")
    if END_OF_TEXT not in special or b"" in tokens or any(bytes([byte]) not in tokens for byte in range(256)):
        raise ValueError(f"a byte or {END_OF_TEXT} has no id, or the empty token has one")
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=tokens, special_tokens=special)


def _learn(texts: Iterable[str], vocab_size: int | None) -> list[bytes]:
    """The `vocab_size - 1` tokens of a byte pair encoding (Sennrich et al. 2016, arXiv:1508.07909), by rank."""
    import rustbpe

    if vocab_size is None or vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size}: --tokenizer bpe needs 257 or more: the bytes and {END_OF_TEXT}")
    learner = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]  (it has no types)
    learner.train_from_iterator(iter(texts), vocab_size - 1, pattern=PATTERN)
    tokens = [bytes(token) for token, _ in sorted(learner.get_mergeable_ranks(), key=lambda pair: pair[1])]
    if len(tokens) < vocab_size - 1:
        only = f"the text gives only {len(tokens) + 1} tokens: give more text or a smaller size"
        raise UserError(f"--vocab-size {vocab_size}: {only}")
    return tokens
