"""Hugging Face model folders: config.json, model.safetensors (or shards of it), and tokenizer.json (or vocab.json with
merges.txt)."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llm_numba.data.tokenizer import END_OF_TEXT, PATTERN, checked_encoding
from llm_numba.models import MODELS, Model
from llm_numba.util.cli import UserError
from llm_numba.util.download import from_hub
from llm_numba.util.files import write_whole

CONFIG, WEIGHTS, SHARDS = "config.json", "model.safetensors", "model-*-of-*.safetensors"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # --dtype -> config.json's
READABLE = ("F32", "F16", "BF16")
PUBLISHED = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}

# Accepted values of a tokenizer's settings; the first is the default
BPE = {"type": ("BPE",), "dropout": (None, 0)}
BPE |= dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), ("", None))
BPE |= dict.fromkeys(("byte_fallback", "ignore_merges"), (False,))
BYTE_LEVEL = {"type": ("ByteLevel",), "add_prefix_space": (False,), "use_regex": (True,)}

# Each byte is written as a printable character: itself if printable, or else one from 256 on
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHARACTERS = {byte: chr(byte) for byte in VISIBLE}
CHARACTERS |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(VISIBLE)))}
BYTES = {character: byte for byte, character in CHARACTERS.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The model


def open_published(name: str) -> tuple[Model, Callable, Iterator[tuple[str, np.ndarray]]]:
    """(model, tokenizer, parameters) of OpenAI's GPT-2. Config and tokenizer are downloaded at once, the weights when
    they are used. Errors: UserError if a download fails."""
    from_hub(PUBLISHED[name], TOKENIZER)
    folder = from_hub(PUBLISHED[name], CONFIG).parent
    model = read_config(folder)

    def parameters():
        from_hub(PUBLISHED[name], WEIGHTS, revision=folder.name)
        yield from read_parameters(folder, model)

    return model, lambda: read_tokenizer(folder), parameters()


def read_config(folder: Path) -> Model:
    """The model in config.json. Errors: an unsupported architecture; impossible sizes."""
    path = folder / CONFIG
    found = read_json(path)
    kinds = [kind for kind in MODELS.values() if hasattr(kind, "huggingface")]
    known = {kind.huggingface.accepted["model_type"][0]: kind for kind in kinds}
    check_values(path, found, {"model_type": tuple(known)})
    kind = known[found.get("model_type", "gpt2")]
    sizes = {field: found.get(key) for field, key in kind.huggingface.sizes.items()}
    check_values(path, found, kind.huggingface.accepted)
    for field, key in kind.huggingface.sizes.items():
        if type(sizes[field]) is not int or sizes[field] >= 2**31:
            raise UserError(f"{path}: {key} is {short(sizes[field])}, expected an integer below 2**31")
    try:
        model = kind(**sizes)
    except UserError as error:
        raise UserError(f"{path}: impossible sizes: {error}") from error
    check_values(path, found, kind.huggingface.accepted_for(model))
    return model


def read_parameters(folder: Path, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values as float32, all layers together) of each parameter, read one at a time; padded ones have V rows.

    The headers of all files are checked before this returns. Errors: pickled weights; tensors that are missing,
    unknown, of another shape or dtype; a tied tensor that differs.
    """
    names, tensors = model.huggingface, {}  # name without its prefix -> (path, name, shape, dtype)
    for path in weight_files(folder):
        try:
            with safe_open(path, "numpy", backend="pread") as file:
                for name in file.keys():
                    if (key := name.removeprefix(names.prefix)) in tensors:
                        raise UserError(f"{path}: {short(name)} appears twice")
                    header = file.get_slice(name)
                    tensors[key] = path, name, tuple(header.get_shape()), header.get_dtype()
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())  # it may quote names from the file, of any characters
            raise UserError(f"{path}: truncated, damaged or not a safetensors file ({reason})") from error
    check_tensors(folder, model, tensors)

    def read(key: str) -> np.ndarray:
        path, name, _, _ = tensors[key]
        with safe_open(path, "numpy", backend="pread") as file:
            return file.get_tensor(name).astype(np.float32, copy=False)

    def parameters():
        for copy, original in names.tied.items():
            if copy in tensors and not np.array_equal(read(copy), read(original)):
                raise UserError(f"{folder}: {copy} differs from {original}, expected the same tensor")
        for spec in model.parameters():
            layers = range(model.num_layers if spec.per_layer else 1)
            values = [read(names.tensors[spec.name].format(l)) for l in layers]
            values = [x.T if spec.name in names.transposed else x for x in values]
            yield spec.name, np.stack(values) if spec.per_layer else values[0]

    return parameters()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with a folder's weights."""
    if files := [path for path in [folder / WEIGHTS] if path.exists()] or sorted(folder.glob(SHARDS)):
        return files
    if any(folder.glob("pytorch_model*")):
        raise UserError(
            f"{folder}: its weights are a pickle, which can execute code: convert it first, with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER)"
        )
    raise UserError(f"{folder}: has no {WEIGHTS}")


def check_tensors(folder: Path, model: Model, tensors: dict) -> None:
    """Raise a UserError unless `tensors` are those of this model, of readable dtypes."""
    names = model.huggingface
    found = {name for name in tensors if not names.ignored.fullmatch(name)} - names.tied.keys()
    layers = range(min(model.num_layers, len(found) + 1))  # bounded by the files, whatever the model says
    expected = {}
    for spec in model.parameters():
        shape = (model.vocab_size, *spec.shape[1:]) if spec.name in model.vocab_parameters else spec.shape
        shape = shape[::-1] if spec.name in names.transposed else shape
        expected |= {names.tensors[spec.name].format(l): shape for l in (layers if spec.per_layer else range(1))}
    if missing := expected.keys() - found:
        raise UserError(f"{folder}: lacks tensors of the model in its {CONFIG}, such as {min(missing)}")
    if unknown := found - expected.keys():
        raise UserError(f"{folder}: has tensors that the model in its {CONFIG} lacks, such as {short(min(unknown))}")
    expected |= {copy: expected[original] for copy, original in names.tied.items() if copy in tensors}
    for name, shape in expected.items():
        _, full_name, found_shape, dtype = tensors[name]
        if found_shape != shape:
            has, wanted = (" x ".join(map(str, sizes)) for sizes in (found_shape, shape))
            raise UserError(f"{folder}: {full_name} is {has}, expected {wanted} from its {CONFIG}")
        if dtype not in READABLE:
            raise UserError(f"{folder}: {full_name} is {dtype}, expected {', '.join(READABLE)}")


def write_model(folder: Path, model: Model, parameters: dict[str, np.ndarray], dtype: str, end: int | None) -> None:
    """Write config.json and model.safetensors into an existing folder.

    parameters: by name, all layers together, with or without padding; dtype: "fp32" or "bf16"; end: the end-of-text
    token, if any.
    """
    names, tensors = model.huggingface, {}
    for name, values in parameters.items():
        values = np.asarray(values[: model.vocab_size] if name in model.vocab_parameters else values)
        values = values.astype(DTYPES[dtype], copy=False)
        for l, x in enumerate(values) if "{}" in names.tensors[name] else [(0, values)]:
            x = np.ascontiguousarray(x.T if name in names.transposed else x)
            tensors[names.prefix + names.tensors[name].format(l)] = x
    path = folder / WEIGHTS
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, {"format": "pt"})
        path.chmod(mode)  # safetensors makes its files readable by their owner only
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({str(error).rpartition('I/O error: ')[2]})") from error
    document = {"architectures": [names.architecture]}
    document |= {key: values[0] for key, values in names.accepted.items()}
    document |= {key: getattr(model, field) for field, key in names.sizes.items()} | names.written
    document |= {"bos_token_id": end, "eos_token_id": end, "torch_dtype": DTYPES[dtype]}
    write_json(folder / CONFIG, document)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


def read_tokenizer(folder: Path) -> tiktoken.Encoding | None:
    """The encoding of a folder's tokenizer, or None if it has none.

    Errors: one that splits words differently from GPT-2's, or whose merges differ from those tiktoken would make.
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
        vocabulary, merges = model.get("vocab", {}), model.get("merges", [])
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
            raise ValueError("an added token is not special")
        ids = [*vocabulary.values(), *special.values()]
        if not all(type(id) is int for id in ids):
            raise ValueError("an id is not an integer")
        tokens = {as_bytes(token): id for token, id in vocabulary.items() if token not in special}
        pairs = [tuple(as_bytes(x) for x in (m.split(" ") if isinstance(m, str) else m)) for m in merges]
        encoding = checked_encoding("bpe", tokens, special)
        if pairs != merges_of(tokens):
            raise ValueError("its merges are not in the order of its tokens")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a byte-level tokenizer like GPT-2's ({str(error)[:100]}): choose another with --tokenizer"
        ) from error
    return encoding


def write_tokenizer(folder: Path, encoding: tiktoken.Encoding, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json. Errors: an encoding that the format cannot represent."""
    tokens, special = encoding._mergeable_ranks, encoding._special_tokens
    vocabulary = {as_text(token): id for token, id in sorted(tokens.items(), key=lambda item: item[1])}
    try:
        if encoding._pat_str != PATTERN:
            raise ValueError("it splits words differently from GPT-2's")
        if vocabulary.keys() & special.keys():
            raise ValueError("a special token's text is a token too")
        merges = merges_of(tokens)
    except ValueError as error:
        raise UserError(f"{folder}: Hugging Face's format cannot represent this tokenizer: {error}") from error
    added = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    document = {"version": "1.0", "truncation": None, "padding": None}
    document["added_tokens"] = [{"id": id, "content": text, **added} for text, id in special.items()]
    document |= {"normalizer": None} | dict.fromkeys(("pre_tokenizer", "post_processor", "decoder"), byte_level)
    document["model"] = {key: values[0] for key, values in BPE.items()} | {"unk_token": None, "fuse_unk": False}
    document["model"] |= {"vocab": vocabulary | special, "merges": [[as_text(a), as_text(b)] for a, b in merges]}
    write_json(folder / TOKENIZER, document)
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": context}
    settings |= {f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "unk")}
    write_json(folder / TOKENIZER_CONFIG, settings)


def merges_of(tokens: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each longer token consists of, in the order of ids: what is left of its bytes after all
    merges of smaller ids. tiktoken, which merges the pair with the smallest id first, then makes exactly these merges.

    Errors: ValueError for a token that is not a pair of earlier tokens.
    """
    merges = []
    for token, id in sorted(tokens.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, i = min((tokens.get(a + b, id), i) for i, (a, b) in enumerate(pairwise(parts)))
            if best >= id:
                raise ValueError(f"token {id} is not a pair of earlier tokens")
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


def read_json(path: Path) -> dict:
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or not a JSON file ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {short(found)}")
    return found


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from error


def write_json(path: Path, document: dict) -> None:
    write_whole(path, json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n")


def check_values(path: Path, found, accepted: dict[str, tuple]) -> None:
    """Raise a UserError for a key whose value is not among those accepted; a missing key has the first."""
    for key, values in accepted.items():
        value = found.get(key, values[0]) if isinstance(found, dict) else found
        if value not in values:
            expected = " or ".join(map(short, values))
            raise UserError(f"{path}: {key} is {short(value)}, expected {expected}")


def short(value) -> str:
    return "not a single value" if isinstance(value, dict | list) else f"{json.dumps(value):.40}"
