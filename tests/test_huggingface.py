"""Hugging Face's folders, against transformers: it loads what we write, we load what it writes, and both compute the
same logits and the same tokens."""

import argparse
import inspect
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from training import logits_of, new_run, random_parameters

from llm_numba import export
from llm_numba.data.tokenizer import END_OF_TEXT, checked_encoding, load_tokenizer
from llm_numba.formats import huggingface
from llm_numba.models.gpt2 import GPT2
from llm_numba.ops import get_ops
from llm_numba.training.weights import Weights, open_weights, set_parameters
from llm_numba.util.cli import UserError

torch = pytest.importorskip("torch", reason="transformers needs PyTorch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.compiled
SIZES = [  # context, V, L, NH, C: a head of 5 channels, one layer, a vocabulary that is padded and one that is not
    GPT2(11, 97, 3, 3, 15),
    GPT2(7, 259, 1, 1, 5),
    GPT2(16, 128, 2, 4, 32),
]
NAMES = ["three_layers", "one_layer", "not_padded"]
TOLERANCE = 1e-4  # |ours - theirs| / |theirs|; float32 reaches 1e-6
TEXT = inspect.getsource(argparse)
BPE = load_tokenizer("bpe", [TEXT, "naïve façade – 東京タワー 🙂\r\n" * 9], 700)
BYTES = load_tokenizer("bytes", (), None)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def ops():
    return get_ops("cpu")


def distance(ours, theirs):
    return np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs)


def our_logits(ops, weights, tokens):
    run = new_run(ops, weights.model, *tokens.shape, "reuse")
    set_parameters(ops, run.arena, weights.parameters)
    return logits_of(run, (tokens, tokens))


def their_logits(network, tokens):
    with torch.no_grad():
        return network.eval()(torch.tensor(tokens, dtype=torch.long)).logits.double().numpy()


def random_tokens(model):
    return np.random.default_rng(3).integers(0, model.vocab_size, (2, model.max_seq_len), dtype=np.int32)


def random_weights(model, encoding=None, seed=0):
    parameters = random_parameters(model, np.random.default_rng(seed))
    return Weights(model, lambda: encoding, iter(parameters.items()))


def random_network(model, **changes):
    """A network of transformers with random weights, norms and biases."""
    torch.manual_seed(1)
    sizes = {theirs: getattr(model, ours) for ours, theirs in GPT2.huggingface.sizes.items()}
    network = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.3, **changes)
    )
    for name, x in network.named_parameters():
        if x.ndim == 1:
            torch.nn.init.normal_(x, mean=float("ln" in name and "weight" in name), std=0.3)
    return network


# ---------------------------------------------------------------------------------------------------------------------
# Logits


@pytest.mark.parametrize("model", SIZES, ids=NAMES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_they_compute_our_logits(ops, tmp_path, model, dtype):
    export.write_folder(
        tmp_path / "out", False, lambda folder: export.export(random_weights(model), "hf", dtype, folder)
    )
    network, told = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    tokens = random_tokens(model)
    weights = random_weights(model)
    if dtype == "bf16":
        rounded = [(name, torch.tensor(x).bfloat16().float().numpy()) for name, x in weights.parameters]
        weights = weights._replace(parameters=iter(rounded))
    assert distance(our_logits(ops, weights, tokens), their_logits(network, tokens)) < TOLERANCE


@pytest.mark.parametrize("model", SIZES, ids=NAMES)
@pytest.mark.parametrize("form", ["whole", "shards", "no_prefix", "fp16", "bf16", "old"])
def test_we_compute_their_logits(ops, tmp_path, model, form):
    network = random_network(model)
    if form in ("fp16", "bf16"):
        network = network.to(torch.float16 if form == "fp16" else torch.bfloat16)
    saved = network.transformer if form == "no_prefix" else network
    saved.save_pretrained(tmp_path, **({"max_shard_size": 2000} if form == "shards" else {}))
    if form == "shards":
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    if form == "old":  # the tied classifier and the masks, as saved by versions before 4
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
        for l in range(model.num_layers):
            tensors[f"transformer.h.{l}.attn.bias"] = np.tril(np.ones((1, 1, 11, 11), bool))
            tensors[f"transformer.h.{l}.attn.masked_bias"] = np.array(-1e4, np.float32)
        save_file(tensors, tmp_path / "model.safetensors")
    tokens = random_tokens(model)
    weights = open_weights(str(tmp_path))
    assert weights.model == model and weights.tokenizer() is None
    assert distance(our_logits(ops, weights, tokens), their_logits(network.float(), tokens)) < TOLERANCE


def test_round_trip(tmp_path):
    model = SIZES[0]
    export.export(random_weights(model), "hf", "fp32", tmp_path)
    for (name, x), (expected_name, expected) in zip(
        open_weights(str(tmp_path)).parameters, random_weights(model).parameters, strict=True
    ):
        assert name == expected_name and x.dtype == np.float32 and np.array_equal(x, expected), name


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def theirs_of(folder, encoding):
    """Our encoding, loaded by both tokenizer classes of transformers."""
    export.export(random_weights(GPT2(8, encoding.n_vocab, 1, 1, 4), encoding), "hf", "fp32", folder)
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    fast = transformers.GPT2TokenizerFast.from_pretrained(folder)
    assert len(auto) == len(fast) == encoding.n_vocab
    assert auto.eos_token_id == auto.bos_token_id == encoding.eot_token
    assert auto.model_max_length == 8
    return auto, fast


@pytest.fixture(scope="module", params=[BPE, BYTES], ids=["bpe", "bytes"])
def both(request, tmp_path_factory):
    return request.param, theirs_of(tmp_path_factory.mktemp("tokenizer"), request.param)


def test_real_text_gives_the_same_tokens(both):
    encoding, theirs = both
    for text in TEXT, "It's  naïve\t\n\n – 東京タワー 🙂\r\n  1234 ", "\x00\x1c\x85\u180e\u200b\u3000  x ":
        ours = encoding.encode_ordinary(text)
        for one in theirs:
            assert one(text)["input_ids"] == ours
            assert one.decode(ours, clean_up_tokenization_spaces=False) == text


@settings(deadline=None)
@given(
    st.text(
        st.sampled_from(" \n\t'sStTl1é東🙂.,-") | st.characters(max_codepoint=0x2FFF, exclude_categories=["Cs", "Cn"])
    )
)
def test_any_text_gives_the_same_tokens(both, text):
    encoding, (auto, _) = both
    assert auto(text)["input_ids"] == encoding.encode_ordinary(text)


def test_the_end_of_text_is_special(both):
    encoding, theirs = both
    for one in theirs:
        assert one(f"a{END_OF_TEXT}b")["input_ids"] == encoding.encode(f"a{END_OF_TEXT}b", allowed_special="all")


@pytest.mark.parametrize("form", ["tokenizer.json", "merges.txt", "their_save"])
def test_their_tokenizer_gives_the_same_tokens(tmp_path, form):
    """Trained by tokenizers, which gives the special token the first id."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([TEXT], trainer)
    if form == "tokenizer.json":
        theirs.save(str(tmp_path / "tokenizer.json"))
    elif form == "merges.txt":
        theirs.model.save(str(tmp_path))
    else:
        transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, eos_token=END_OF_TEXT).save_pretrained(tmp_path)
    ours = huggingface.read_tokenizer(tmp_path)
    assert (ours.n_vocab, ours.eot_token) == (900, 0)
    for text in TEXT, "It's naïve 東京\n\n  – 🙂":
        assert ours.encode_ordinary(text) == theirs.encode(text).ids


def test_tokenizer_round_trip(tmp_path):
    huggingface.write_tokenizer(tmp_path, BPE, 8)
    again = huggingface.read_tokenizer(tmp_path)
    assert again._mergeable_ranks == BPE._mergeable_ranks and again._special_tokens == BPE._special_tokens


def with_tokens(*tokens, special=None, pattern=None):
    ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + i for i, token in enumerate(tokens)}
    arguments = [pattern] if pattern else []
    return checked_encoding("bpe", ranks, special or {END_OF_TEXT: len(ranks)}, *arguments)


@pytest.mark.parametrize(
    "encoding, words",
    [
        (with_tokens(b"abc"), ["token 256", "pair of earlier tokens"]),
        (with_tokens(b"abcd", b"ab", b"cd"), ["token 256"]),
        (with_tokens(b"ab", pattern=r"\w+|\W"), ["splits words differently"]),
        (with_tokens(b"ab", special={END_OF_TEXT: 257, "ab": 258}), ["special token's text is a token"]),
    ],
)
def test_a_tokenizer_that_the_format_cannot_represent(tmp_path, encoding, words):
    with pytest.raises(UserError) as caught:
        theirs_of(tmp_path, encoding)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in ["cannot represent", *words]), message


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.fixture
def folder(tmp_path):
    """A valid folder, to be damaged."""
    random_network(SIZES[0]).save_pretrained(tmp_path)
    huggingface.write_tokenizer(tmp_path, BPE, 8)
    return tmp_path


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def config_with(**changes):
    return lambda folder: change_json(folder / "config.json", **changes)


def tensors_with(change):
    return lambda folder: change_tensors(folder, change)


def tensor_becomes(name, change):
    return tensors_with(lambda tensors: tensors.update({name: change(tensors[name])}))


def only_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def a_shard_is_missing(folder):
    random_network(SIZES[0]).save_pretrained(folder, max_shard_size=9000)
    next(folder.glob("model-00002*")).unlink()


WTE = "transformer.wte.weight"


@pytest.mark.parametrize(
    "break_it, words",
    [
        (config_with(model_type="llama"), ["model_type", '"llama"', "gpt2"]),
        (config_with(activation_function="relu"), ["activation_function", '"relu"', "gelu_new", "gelu_pytorch_tanh"]),
        (config_with(activation_function="gelu"), ["activation_function", '"gelu"']),
        (config_with(layer_norm_epsilon=1e-6), ["layer_norm_epsilon", "1e-06", "1e-05"]),
        (config_with(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx", "true", "false"]),
        (config_with(scale_attn_weights=False), ["scale_attn_weights"]),
        (config_with(add_cross_attention=True), ["add_cross_attention"]),
        (config_with(tie_word_embeddings=False), ["tie_word_embeddings"]),
        (config_with(n_inner=61), ["n_inner", "61", "60"]),
        (config_with(n_head=4), ["config.json", "channels (15)", "num_heads (4)"]),
        (config_with(n_layer="3"), ["config.json", "n_layer", '"3"', "an integer"]),
        (config_with(n_layer=0), ["config.json", "num_layers is 0"]),
        (config_with(n_layer=2), ["has tensors that", 'such as "h.2.']),
        (config_with(n_layer=4), ["lacks tensors", "such as h.3."]),
        (config_with(n_layer=2**31 - 1), ["lacks tensors"]),
        (config_with(vocab_size=98), [WTE, "97 x 15", "98 x 15"]),
        (config_with(n_positions=12), ["wpe.weight", "11 x 15", "12 x 15"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "damaged"]),
        (lambda f: (f / "config.json").write_text("[" * 100000), ["config.json", "damaged"]),
        (lambda f: (f / "config.json").write_text("[]"), ["config.json", "JSON object"]),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), ["config.json", "UTF-8"]),
        (tensors_with(lambda t: t.pop("transformer.ln_f.bias")), ["lacks tensors", "such as ln_f.bias"]),
        (tensors_with(lambda t: t.update({"score.weight": t[WTE]})), ["has tensors that", "score.weight"]),
        (tensors_with(lambda t: t.update({"wte.weight": t[WTE]})), ["wte.weight", "twice"]),
        (tensors_with(lambda t: t.update({"lm_head.weight": t[WTE] + 1})), ["lm_head.weight differs"]),
        (
            tensor_becomes("transformer.h.1.mlp.c_fc.weight", lambda x: x.T),
            ["h.1.mlp.c_fc.weight", "60 x 15", "15 x 60"],
        ),
        (tensor_becomes(WTE, lambda x: x.astype(np.float64)), [WTE, "F64", "BF16"]),
        (only_a_pickle, ["pickle", "save_pretrained"]),
        (lambda f: (f / "model.safetensors").unlink(), ["has no model.safetensors"]),
        (a_shard_is_missing, ["lacks tensors"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), ["model.safetensors", "truncated"]),
    ],
)
def test_a_model_that_is_rejected(folder, break_it, words):
    if break_it is a_shard_is_missing:
        (folder / "model.safetensors").unlink()
    break_it(folder)
    with pytest.raises(UserError) as caught:
        list(open_weights(str(folder)).parameters)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in [str(folder), *words]), message


def tokenizer_with(part, **changes):
    def change(folder):
        path = folder / "tokenizer.json"
        document = json.loads(path.read_text())
        (document[part] if part else document).update(changes)
        path.write_text(json.dumps(document))

    return change


@pytest.mark.parametrize(
    "break_it, words",
    [
        (tokenizer_with("", normalizer={"type": "NFC"}), ["normalizer"]),
        (tokenizer_with("", pre_tokenizer=None), ["type is null"]),
        (tokenizer_with("pre_tokenizer", add_prefix_space=True), ["add_prefix_space", "true"]),
        (tokenizer_with("pre_tokenizer", use_regex=False), ["use_regex"]),
        (tokenizer_with("model", type="WordPiece"), ["WordPiece"]),
        (tokenizer_with("model", dropout=0.1), ["dropout"]),
        (tokenizer_with("model", merges=[["a", "b"]]), ["merges"]),
        (tokenizer_with("model", merges=None), ["tokenizer.json"]),
        (tokenizer_with("model", vocab={"a": 0}), ["byte"]),
        (tokenizer_with("", added_tokens=[]), ["tokenizer.json"]),
        (tokenizer_with("", added_tokens=[{"id": 699, "content": END_OF_TEXT, "special": False}]), ["is not special"]),
        (tokenizer_with("", added_tokens=[{"id": 700, "content": END_OF_TEXT, "special": True}]), ["gap"]),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer.json"]),
    ],
)
def test_a_tokenizer_that_is_rejected(folder, break_it, words):
    break_it(folder)
    with pytest.raises(UserError) as caught:
        open_weights(str(folder)).tokenizer()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in [str(folder), *words]), message
