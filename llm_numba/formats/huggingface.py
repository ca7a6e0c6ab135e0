"""Hugging Face's model folders: config.json, model.safetensors or shards of it with an index, and tokenizer.json, or
vocab.json with merges.txt.

Tensors have GPT-2's first names, a layer each, with or without `transformer.` in front; their matrices are (in, out),
ours (out, in). wte has V rows, and is the classifier too.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llm_numba.data.tokenizer import END_OF_TEXT, PATTERN, checked_encoding
from llm_numba.models.gpt2 import GPT2
from llm_numba.util.cli import UserError
from llm_numba.util.files import write_whole

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
NAMES = {
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "ln1w": "h.{}.ln_1.weight",
    "ln1b": "h.{}.ln_1.bias",
    "qkvw": "h.{}.attn.c_attn.weight",
    "qkvb": "h.{}.attn.c_attn.bias",
    "attprojw": "h.{}.attn.c_proj.weight",
    "attprojb": "h.{}.attn.c_proj.bias",
    "ln2w": "h.{}.ln_2.weight",
    "ln2b": "h.{}.ln_2.bias",
    "fcw": "h.{}.mlp.c_fc.weight",
    "fcb": "h.{}.mlp.c_fc.bias",
    "fcprojw": "h.{}.mlp.c_proj.weight",
    "fcprojb": "h.{}.mlp.c_proj.bias",
    "lnfw": "ln_f.weight",
    "lnfb": "ln_f.bias",
}
TRANSPOSED = {"qkvw", "attprojw", "fcw", "fcprojw"}
NO_PARAMETER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # attention's mask, which older versions wrote too
SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
CLASSIFIER = "lm_head.weight"
SIZES = {"max_seq_len": "n_positions", "vocab_size": "vocab_size", "num_layers": "n_layer", "num_heads": "n_head",
         "channels": "n_embd"}  # fmt: skip
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # ours -> config.json's
READ = ("F32", "F16", "BF16")
MOST = 2**31

# what a model or a tokenizer must be for ours to do the same; the first value is what a missing key means
ARCHITECTURE = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
BPE = {
    "type": ("BPE",),
    "dropout": (None, 0),
    "continuing_subword_prefix": ("", None),
    "end_of_word_suffix": ("", None),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}
BYTE_LEVEL = {"type": ("ByteLevel",), "add_prefix_space": (False,), "use_regex": (True,)}

# they write a byte as a character that can be seen: itself where it is one, the others from 256 on
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHARACTERS = {byte: chr(byte) for byte in VISIBLE}
CHARACTERS |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(VISIBLE)))}
BYTES = {character: byte for byte, character in CHARACTERS.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The model


def read_config(folder: Path) -> GPT2:
    """The sizes that config.json gives. Errors: an architecture that is not GPT-2's; sizes that cannot be."""
    path = folder / CONFIG
    found = read_json(path)
    check_values(path, found, ARCHITECTURE)
    for name in SIZES.values():
        if type(found.get(name)) is not int or found[name] >= MOST:
            raise UserError(f"{path}: {name} is {short(found.get(name))}, expected a whole number below 2**31")
    C = found["n_embd"]
    check_values(path, found, {"n_inner": (None, 4 * C)})
    try:
        return GPT2(**{ours: found[theirs] for ours, theirs in SIZES.items()})
    except UserError as error:
        raise UserError(f"{path}: not a model that can be: {error}") from error


def read_parameters(folder: Path, config: GPT2) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values as float32, of all layers) of each parameter, one by one, read when it is asked for; wte (V, C).

    The headers of all files are checked before this returns. Errors: weights as a pickle only; tensors that are
    missing, of another shape or dtype, or that GPT-2 has not; a classifier that is not wte.
    """
    with contextlib.ExitStack() as stack:
        tensors = {}
        for path in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, "numpy", backend="pread"))
                for name in file.keys():
                    short_name = name.removeprefix("transformer.")
                    if short_name in tensors:
                        raise UserError(f"{path}: {short(name)} is there twice")
                    tensors[short_name] = file, name
            except (SafetensorError, OSError) as error:
                reason = " ".join(str(error).split())  # names that a file gives may hold anything
                raise UserError(f"{path}: truncated, damaged or no safetensors file ({reason})") from error
        check_tensors(folder, config, tensors)
        files = stack.pop_all()

    def read(name: str) -> np.ndarray:
        file, full_name = tensors[name]
        return file.get_tensor(full_name).astype(np.float32, copy=False)

    def parameters():
        with files:
            if CLASSIFIER in tensors and not np.array_equal(read(CLASSIFIER), read(NAMES["wte"])):
                raise UserError(
                    f"{folder}: {CLASSIFIER} differs from wte.weight; here GPT-2's classifier is wte itself"
                )
            for spec in config.parameters():
                layers = range(config.num_layers if spec.per_layer else 1)
                values = [read(NAMES[spec.name].format(l)) for l in layers]
                values = [x.T if spec.name in TRANSPOSED else x for x in values]
                yield spec.name, np.stack(values) if spec.per_layer else values[0]

    return parameters()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        map_of = read_json(folder / INDEX).get("weight_map")
        names = list(map_of.values()) if isinstance(map_of, dict) else []
        if not names or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in names):
            raise UserError(f"{folder / INDEX}: its weight_map does not say which files here hold the tensors")
        return [folder / name for name in sorted(set(names))]
    if any(folder.glob("pytorch_model*")):
        raise UserError(
            f"{folder}: its weights are a pickle, which may run any code: convert it first, with transformers: "
            "GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(OTHER)"
        )
    raise UserError(f"{folder}: holds no {WEIGHTS}")


def check_tensors(folder: Path, config: GPT2, tensors: dict) -> None:
    """Raise a UserError unless these are the tensors of a GPT-2 of these sizes, of a dtype that can be read."""
    names = {name for name in tensors if not NO_PARAMETER.fullmatch(name)} - {CLASSIFIER}
    layers = range(min(config.num_layers, len(names) + 1))  # no longer than the files, whatever the config says
    found = {}
    for spec in config.parameters():
        shape = (config.vocab_size, config.channels) if spec.name == "wte" else spec.shape
        shape = shape[::-1] if spec.name in TRANSPOSED else shape
        found |= {NAMES[spec.name].format(l): shape for l in (layers if spec.per_layer else range(1))}
    unknown, missing = names - found.keys(), found.keys() - names
    if missing:
        raise UserError(f"{folder}: lacks tensors that its {CONFIG} asks for, such as {min(missing)}")
    if unknown:
        raise UserError(f"{folder}: holds tensors that a GPT-2 of its {CONFIG} has not, such as {short(min(unknown))}")
    if CLASSIFIER in tensors:
        found[CLASSIFIER] = found[NAMES["wte"]]
    for name, shape in found.items():
        file, full_name = tensors[name]
        header = file.get_slice(full_name)
        if tuple(header.get_shape()) != shape:
            raise UserError(
                f"{folder}: {full_name} is {dimensions(header.get_shape())}, but {CONFIG} makes it {dimensions(shape)}"
            )
        if header.get_dtype() not in READ:
            raise UserError(f"{folder}: {full_name} is {header.get_dtype()}, expected {', '.join(READ)}")


def write_model(folder: Path, config: GPT2, parameters: dict[str, np.ndarray], dtype: str, end: int | None) -> None:
    """config.json and model.safetensors, in a folder that is there.

    parameters: by name, all layers of one together; what pads wte is cut off; dtype: "fp32" or "bf16"; end: the id of
    the end of a text, if any.
    """
    tensors = {}
    for name, values in parameters.items():
        values = np.asarray(values[: config.vocab_size] if name == "wte" else values).astype(DTYPES[dtype], copy=False)
        if "{}" in NAMES[name]:
            parts = {NAMES[name].format(l): x.T if name in TRANSPOSED else x for l, x in enumerate(values)}
        else:
            parts = {NAMES[name]: values}
        tensors |= {f"transformer.{key}": np.ascontiguousarray(x) for key, x in parts.items()}
    path = folder / WEIGHTS
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, {"format": "pt"})
        path.chmod(mode)  # safetensors gives its files to the owner alone
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({str(error).rpartition('I/O error: ')[2]})") from error
    accepted = {key: values[0] for key, values in ARCHITECTURE.items()}
    document = {
        "architectures": ["GPT2LMHeadModel"],
        **accepted,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "n_inner": None,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": DTYPES[dtype],
    }
    write_json(folder / CONFIG, document)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


def read_tokenizer(folder: Path) -> tiktoken.Encoding | None:
    """The encoding of a folder's tokenizer, or None where there is none.

    Errors: one that does not cut words as GPT-2 does, or whose merges tiktoken would not make in the same order.
    """
    path = folder / TOKENIZER
    if path.exists():
        document = read_json(path)
        model, added = document.get("model"), document.get("added_tokens")
        if not isinstance(model, dict) or not isinstance(added, list):
            raise UserError(f"{path}: expected a model and added_tokens")
        check_values(path, document, {"normalizer": (None,)})
        check_values(path, document.get("pre_tokenizer"), BYTE_LEVEL)
        check_values(path, model, BPE)
        vocabulary, merges = model.get("vocab"), model.get("merges")
    elif (path := folder / "vocab.json").exists():
        vocabulary = read_json(path)
        lines = read_text(folder / "merges.txt").splitlines()
        merges = filter(None, lines[1:] if lines and lines[0].startswith("#version") else lines)
        added = [{"content": END_OF_TEXT, "id": vocabulary.get(END_OF_TEXT), "special": True}]
    else:
        return None
    try:
        special = {x["content"]: x["id"] for x in added}
        if not all(x["special"] for x in added):
            raise ValueError("an added token is a word of text")
        ids = [*vocabulary.values(), *special.values()]
        if not all(type(id) is int for id in ids):
            raise ValueError("an id is no whole number")
        tokens = {as_bytes(token): id for token, id in vocabulary.items() if token not in special}
        pairs = [tuple(as_bytes(x) for x in (m.split(" ") if isinstance(m, str) else m)) for m in merges]
        encoding = checked_encoding("bpe", tokens, special)
        if pairs != merges_of(tokens):
            raise ValueError("its merges are not those that its tokens' order gives")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: no byte-level tokenizer like GPT-2's ({str(error)[:100]}); choose another with --tokenizer"
        ) from error
    return encoding


def write_tokenizer(folder: Path, encoding: tiktoken.Encoding, context: int) -> None:
    """tokenizer.json and tokenizer_config.json. Errors: an encoding whose tokens are no merges of two earlier ones, or
    that cuts words otherwise than GPT-2."""
    tokens, special = encoding._mergeable_ranks, encoding._special_tokens
    vocabulary = {as_text(token): id for token, id in sorted(tokens.items(), key=lambda item: item[1])}
    if encoding._pat_str != PATTERN or vocabulary.keys() & special.keys():
        raise UserError(
            f"{folder}: Hugging Face's format cannot carry this tokenizer exactly: it cuts words otherwise than GPT-2, "
            "or a special token's text is a token too"
        )
    try:
        merges = merges_of(tokens)
    except ValueError as error:
        raise UserError(f"{folder}: Hugging Face's format cannot carry this tokenizer exactly: {error}") from error
    added = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": text, **added} for text, id in special.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            **{key: values[0] for key, values in BPE.items()},
            "unk_token": None,
            "fuse_unk": False,
            "vocab": vocabulary | special,
            "merges": [[as_text(a), as_text(b)] for a, b in merges],
        },
    }
    write_json(folder / TOKENIZER, document)
    ends = {f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "unk")}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": context}
    write_json(folder / TOKENIZER_CONFIG, settings | ends)


def merges_of(tokens: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each longer one is made of, in the order of their ids: what is left of its bytes when every
    merge of a smaller id was made. Then tiktoken, which asks for the pair with the smallest id, makes these merges and
    no others. Errors: ValueError for a token of which more than two are left."""
    merges = []
    for token, id in sorted(tokens.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, i = min((tokens.get(a + b, id), i) for i, (a, b) in enumerate(pairwise(parts)))
            if best >= id:
                raise ValueError(f"token {id} is not made of two tokens before it")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def as_text(token: bytes) -> str:
    return "".join(CHARACTERS[byte] for byte in token)


def as_bytes(text: str) -> bytes:
    return bytes(BYTES[character] for character in text)


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from error


def read_json(path: Path) -> dict:
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or no JSON file ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {short(found)}")
    return found


def write_json(path: Path, document: dict) -> None:
    write_whole(path, json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n")


def check_values(path: Path, found, wanted: dict[str, tuple]) -> None:
    """Raise a UserError for a key whose value is none of those wanted."""
    for key, accepted in wanted.items():
        value = found.get(key, accepted[0]) if isinstance(found, dict) else found
        if value not in accepted:
            raise UserError(
                f"{path}: {key} is {short(value)}, expected {' or '.join(map(short, accepted))}: it is not GPT-2's"
            )


def short(value) -> str:
    return "no single value" if isinstance(value, dict | list) else f"{json.dumps(value):.40}"


def dimensions(shape) -> str:
    return " x ".join(map(str, shape))
