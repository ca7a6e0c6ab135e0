"""The tokenizers: their tokens, deterministic learning, and storing."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import requests
import tiktoken
import tiktoken.load
import tiktoken.registry
from hypothesis import given
from hypothesis import strategies as st

from llm_numba.data.tokenizer import END_OF_TEXT, PATTERN, load_tokenizer, tokenizer_from_state, tokenizer_state
from llm_numba.util.cli import UserError

TEXTS = ["the cat sat on the mat, the cat's hat\n\n  and 1234 hats;\n" * 9, "naïve façade – 東京タワー 🙂\r\n" * 5]
BYTES = load_tokenizer("bytes", (), None)
BPE = load_tokenizer("bpe", TEXTS, 290)


def test_the_id_of_a_byte_is_its_value():
    assert BYTES.n_vocab == 257
    assert BYTES.eot_token == 256
    assert BYTES.encode_ordinary("aé\n") == list("aé\n".encode())


@pytest.mark.parametrize("vocab_size", [257, 258, 290])
def test_bpe_has_exactly_the_requested_size(vocab_size):
    encoding = load_tokenizer("bpe", TEXTS, vocab_size)
    assert encoding.n_vocab == vocab_size
    assert encoding.eot_token == vocab_size - 1
    assert encoding.decode([vocab_size - 1]) == END_OF_TEXT


def test_bpe_merges_the_most_frequent_pair_first():
    encoding = load_tokenizer("bpe", ["xyxyxy xyz"], 258)
    assert encoding.encode_ordinary("xyz") == [256, ord("z")]


def test_bpe_is_learned_with_gpt2s_pattern():
    """GPT-4's pattern, rustbpe's default, would make '.two' one word and split the number after three digits."""
    merged = [token for token in load_tokenizer("bpe", ["one.two12345\n" * 9], 265)._mergeable_ranks if len(token) > 1]
    assert {b"one", b"two", b"12345"} < set(merged)
    assert all(token in b"one" or token in b"two" or token in b"12345" for token in merged)


def test_bpe_learns_the_same_in_every_process():
    """Neither the hash seed nor the number of threads matters. A real text has many ties between pairs."""
    script = (
        "import argparse, hashlib, inspect, textwrap\n"
        "from llm_numba.data.tokenizer import load_tokenizer, tokenizer_state\n"
        "texts = [inspect.getsource(argparse), inspect.getsource(textwrap)] * 2\n"
        "for _ in range(2):\n"
        "    print(hashlib.sha256(tokenizer_state(load_tokenizer('bpe', texts, 600))[1]).hexdigest())\n"
    )
    hashes = []
    for seed, threads in (("1", "1"), ("2", "3")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        hashes += run.stdout.split()
    assert len(hashes) == 4
    assert len(set(hashes)) == 1


@pytest.mark.parametrize("vocab_size", [None, 0, 256])
def test_bpe_needs_room_for_the_bytes(vocab_size):
    with pytest.raises(UserError, match=f"--vocab-size {vocab_size}: .*257"):
        load_tokenizer("bpe", TEXTS, vocab_size)


@pytest.mark.parametrize(("texts", "most"), [([], 257), (["ab"], 258), (["abab ab"], 260)])
def test_bpe_reports_how_many_tokens_a_small_text_gives(texts, most):
    """'abab ab' gives ab, abab and ' ab' besides the bytes and the end of text."""
    assert load_tokenizer("bpe", texts, most).n_vocab == most
    with pytest.raises(UserError, match=rf"--vocab-size {most + 1}: .* only {most} tokens"):
        load_tokenizer("bpe", texts, most + 1)


def test_unknown_name():
    with pytest.raises(UserError, match="--tokenizer gpt4: choose gpt2, bpe or bytes"):
        load_tokenizer("gpt4", (), None)


def test_gpt2():
    try:
        encoding = load_tokenizer("gpt2", (), None)
    except UserError:
        pytest.skip("GPT-2's vocabulary is neither cached nor can it be downloaded")
    assert encoding.n_vocab == 50257
    assert encoding.eot_token == 50256
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    assert encoding._pat_str == PATTERN


def test_gpt2_without_a_network(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise requests.ConnectionError("no\nnetwork")

    monkeypatch.setattr(requests, "get", no_network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="--tokenizer gpt2: .*TIKTOKEN_CACHE_DIR.* bpe or bytes") as caught:
        load_tokenizer("gpt2", (), None)
    assert "\n" not in str(caught.value)


@given(st.text())
def test_text_round_trip(text):
    for encoding in (BYTES, BPE):
        tokens = encoding.encode_ordinary(text)
        assert encoding.decode_bytes(tokens) == text.encode()
        assert all(token < encoding.eot_token for token in tokens)


@pytest.mark.parametrize("encoding", [BYTES, BPE], ids=["bytes", "bpe"])
def test_state_round_trip(encoding):
    state, ranks = tokenizer_state(encoding)
    again = tokenizer_from_state(json.loads(json.dumps(state)), ranks)
    assert tokenizer_state(again) == (state, ranks)
    assert again.name == encoding.name
    assert again.n_vocab == encoding.n_vocab
    assert again.eot_token == encoding.eot_token
    text = "".join(TEXTS) + END_OF_TEXT
    assert again.encode_ordinary(text) == encoding.encode_ordinary(text)


def test_ranks_are_in_tiktokens_format(tmp_path):
    path = tmp_path / "bpe.tiktoken"
    path.write_bytes(tokenizer_state(BPE)[1])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert tiktoken.load.load_tiktoken_bpe(str(path), digest) == BPE._mergeable_ranks


def test_damaged_state():
    state, ranks = tokenizer_state(BPE)
    lines = ranks.splitlines(keepends=True)
    damaged_ranks = {
        "nothing": b"",
        "not base64": b"!" + ranks,
        "no rank": ranks + b"YWJj\n",
        "rank not a number": ranks + b"YWJj x\n",
        "a gap": b"".join(lines[:270] + lines[271:]),
        "an id twice": ranks + b"YWJjZGVm 270\n",
        "truncated": ranks[:-20],
        "a byte missing": b"YWJjZGVm 0\n" + b"".join(lines[1:]),
        "a token twice": ranks + lines[0].replace(b" 0", b" 290"),
        "negative": ranks.replace(b" 270\n", b" -1\n"),
    }
    damaged_states = {
        "empty": {},
        "not a dict": [],
        "no special tokens": {**state, "special_tokens": {}},
        "an id in use": {**state, "special_tokens": {END_OF_TEXT: 3}},
        "an id that is text": {**state, "special_tokens": {END_OF_TEXT: "289"}},
        "a float": {**state, "special_tokens": {END_OF_TEXT: 289.0}},
        "another special token": {**state, "special_tokens": {"<|end|>": 289}},
        "special tokens not a dict": {**state, "special_tokens": [1]},
        "an invalid pattern": {**state, "pat_str": "("},
        "a pattern of a wrong type": {**state, "pat_str": 3},
        "no name": {key: value for key, value in state.items() if key != "name"},
    }
    cases = [(name, state, bad) for name, bad in damaged_ranks.items()]
    cases += [(name, bad, ranks) for name, bad in damaged_states.items()]
    for name, bad_state, bad_ranks in cases:
        try:
            tokenizer_from_state(bad_state, bad_ranks)
        except UserError as error:
            assert "stored tokenizer is damaged" in str(error)
            assert "\n" not in str(error)
        else:
            pytest.fail(f"accepted: {name}")
