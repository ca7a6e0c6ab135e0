"""llm.c's model files, tokenizers and debug states: a header of 256 int32, then the content. Little-endian.

model         magic, version (3: float32, 5: bf16), the sizes, Vp; then the parameters in their order here
debug state   magic, version, B, T; then tokens and targets (B, T) int32, logits (B, T, V), the loss, and the gradients
              in the order of the parameters, all float32
tokenizer     magic, version, V, the end-of-text token (version 1: GPT-2's); then the length of each token, one byte,
              and its bytes
"""

import math
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import tiktoken

from llm_numba.data.tokenizer import END_OF_TEXT, PATTERN, checked_encoding
from llm_numba.models import MODELS, Model
from llm_numba.util.cli import UserError
from llm_numba.util.files import write_whole

HEADER = 256  # int32
VERSIONS = {3: "<f4", 5: ml_dtypes.bfloat16}  # of a model -> its dtype
STATE_VERSION = 2
TOKENIZER = 20240328  # magic
GPT2_SIZE = 50257  # of a tokenizer of version 1; its last token is the end of text
LONGEST = 255  # bytes of a token


def read_model(path: Path, versions=VERSIONS) -> tuple[Model, int, dict[str, np.ndarray]]:
    """(model, Vp of the file, parameters by name, float32) of a model file; float32 files are memory-mapped."""
    known = {kind.llmc.model: kind for kind in MODELS.values() if hasattr(kind, "llmc")}
    header = read_header(path, known, "model", versions)
    kind, V, Vp = known[int(header[0])], int(header[3]), int(header[7])
    try:
        model = kind(**dict(zip(kind.llmc.sizes, map(int, header[2:7]), strict=True)))
    except UserError as error:
        raise UserError(f"{path}: impossible sizes: {error}") from error
    if Vp < V:
        raise UserError(f"{path}: impossible sizes: a vocabulary of {V} padded to {Vp}")
    shapes = shapes_of(model, Vp)
    found = read_arrays(path, VERSIONS[int(header[1])], shapes, 4 * HEADER)
    return model, Vp, {name: x.astype(np.float32, copy=False) for name, x in found.items()}


def write_model(path: Path, model: Model, parameters: dict[str, np.ndarray], version: int = 3) -> None:
    """Write a model file. parameters: by name, padded ones with their padding; version: 3 (float32) or 5 (bf16)."""
    Vp = next(len(parameters[name]) for name in model.vocab_parameters)
    header = np.zeros(HEADER, "<i4")
    header[:8] = model.llmc.model, version, *(getattr(model, size) for size in model.llmc.sizes), Vp
    parts = [np.ascontiguousarray(parameters[name], VERSIONS[version]) for name in shapes_of(model, Vp)]
    write_whole(path, header.tobytes(), *(part.reshape(-1).view(np.uint8) for part in parts))


def read_state(path: Path, model: Model, Vp: int) -> SimpleNamespace:
    """tokens, targets (B, T), logits (B, T, V), loss and gradients (by parameter) of a model's debug state."""
    header = read_header(path, [model.llmc.state], "debug state", [STATE_VERSION])
    B, T = int(header[2]), int(header[3])
    if B < 1 or not 1 <= T <= model.max_seq_len:
        raise UserError(f"{path}: a batch of {B} x {T} tokens, but the model's context is {model.max_seq_len}")
    tokens = read_array(path, "<i4", 2 * B * T, 4 * HEADER).reshape(2, B, T)
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise UserError(f"{path}: has tokens outside the model's vocabulary of {model.vocab_size}: of another model?")
    shapes = {"logits": (B, T, model.vocab_size), "loss": (1,)} | shapes_of(model, Vp)
    found = read_arrays(path, "<f4", shapes, 4 * (HEADER + 2 * B * T))
    logits, loss = found.pop("logits"), float(found.pop("loss")[0])
    return SimpleNamespace(tokens=tokens[0], targets=tokens[1], logits=logits, loss=loss, gradients=found)


def read_tokenizer(path: Path) -> tiktoken.Encoding:
    """The encoding of a tokenizer file, with GPT-2's rule for splitting words, which is not in the file."""
    header = read_header(path, [TOKENIZER], "tokenizer", [1, 2])
    version, V, end = (int(x) for x in header[1:4])
    if version == 1 and V != GPT2_SIZE:
        raise UserError(f"{path}: a tokenizer of version 1 with {V} tokens, expected GPT-2's {GPT2_SIZE}")
    end = V - 1 if version == 1 else end
    data = memoryview(path.read_bytes())[4 * HEADER :]
    tokens = []
    while data and len(tokens) < V:
        tokens.append(bytes(data[1 : 1 + data[0]]))
        if len(tokens[-1]) < max(1, data[0]):
            raise UserError(f"{path}: token {len(tokens) - 1} is empty or truncated")
        data = data[1 + data[0] :]
    if len(tokens) != V or data:
        raise UserError(f"{path}: {len(tokens)} tokens and {len(data)} more bytes, but its header says {V} tokens")
    if not 0 <= end < V:
        raise UserError(f"{path}: the end-of-text token is {end}, but there are {V} tokens")
    try:
        ranks = {token: id for id, token in enumerate(tokens) if id != end}
        return checked_encoding("bpe", ranks, {END_OF_TEXT: end})
    except ValueError as error:
        raise UserError(f"{path}: impossible tokenizer: a token appears twice, or {error}") from error


def write_tokenizer(path: Path, encoding: tiktoken.Encoding) -> None:
    """Write a tokenizer file, version 2. Errors: an encoding that the format cannot represent."""
    if encoding._pat_str != PATTERN or [*encoding._special_tokens] != [END_OF_TEXT]:
        only = f"split words as GPT-2's does and have {END_OF_TEXT} as their only special token"
        raise UserError(f"{path}: llm.c's format supports only tokenizers that {only}")
    tokens = [encoding.decode_single_token_bytes(id) for id in range(encoding.n_vocab)]
    longest = max(tokens, key=len)
    if len(longest) > LONGEST:
        raise UserError(f"{path}: llm.c's format holds tokens of at most {LONGEST} bytes, not {longest[:20]}...")
    header = np.zeros(HEADER, "<i4")
    header[:4] = TOKENIZER, 2, len(tokens), encoding.eot_token
    write_whole(path, header.tobytes(), *(bytes([len(token)]) + token for token in tokens))


def read_header(path: Path, magics, what: str, versions) -> np.ndarray:
    header = read_array(path, "<i4", HEADER, 0)
    if header[0] not in magics:
        expected = " or ".join(map(str, magics))
        raise UserError(f"{path}: not a {what} of llm.c: starts with {header[0]}, expected {expected}")
    if header[1] not in versions:
        raise UserError(f"{path}: a {what} of version {header[1]}, expected {' or '.join(map(str, versions))}")
    return header


def read_array(path: Path, dtype, count: int, offset: int, whole: bool = False) -> np.ndarray:
    """`count` elements from byte `offset` on, memory-mapped; whole: the file must end with them."""
    try:
        size, nbytes = path.stat().st_size, count * np.dtype(dtype).itemsize
        if size < offset + nbytes or (whole and size > offset + nbytes):
            raise UserError(f"{path}: {size:,} bytes, expected {offset + nbytes:,}: truncated, or of another model")
        return np.memmap(path, np.uint8, "r", offset, (nbytes,)).view(dtype)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def read_arrays(path: Path, dtype, shapes: dict[str, tuple[int, ...]], offset: int) -> dict[str, np.ndarray]:
    """Arrays of these shapes, one after the other from byte `offset` to the end of the file."""
    counts = [math.prod(shape) for shape in shapes.values()]
    elements = read_array(path, dtype, sum(counts), offset, whole=True)
    parts = (elements[end - count : end] for end, count in zip(accumulate(counts), counts, strict=True))
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def shapes_of(model: Model, Vp: int) -> dict[str, tuple[int, ...]]:
    """parameter -> its shape in a file, all layers together, in the file's order."""
    shapes = {s.name: (model.num_layers, *s.shape) if s.per_layer else s.shape for s in model.parameters()}
    return shapes | {name: (Vp, *shapes[name][1:]) for name in model.vocab_parameters}
