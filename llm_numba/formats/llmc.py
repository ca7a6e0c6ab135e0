"""llm.c's model files, tokenizers and debug states.

Each starts with 256 int32. A model: magic, version (3: float32, 5: bf16), context, V, L, NH, C, Vp; then the parameters
in the order of `parameter_specs`. A debug state: magic, version, B, T; then tokens and targets (B, T) int32, logits
(B, T, V), the loss, and the gradients in the order of the parameters, all float32. wte has Vp rows, however many they
pad V to. A tokenizer: magic, version, V, the id of the end of a text (version 1: GPT-2's); then of each token its
length, one byte, and its bytes. Little-endian.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import tiktoken

from llm_numba.data.tokenizer import END_OF_TEXT, PATTERN, checked_encoding
from llm_numba.models.gpt2 import GPT2
from llm_numba.util.cli import UserError
from llm_numba.util.files import write_whole

HEADER = 256  # int32
MODEL, STATE, TOKENIZER = 20240326, 20240327, 20240328  # magics
VERSIONS = {3: "<f4", 5: ml_dtypes.bfloat16}  # of a model -> its dtype
STATE_VERSION = 2
GPT2_SIZE, GPT2_END = 50257, 50256  # what a tokenizer of version 1 has
LONGEST = 255  # bytes of a token


def read_model(path: Path) -> tuple[GPT2, int, dict[str, np.ndarray]]:
    """(config, Vp of the file, parameters by name as float32 (wte with its Vp rows)) of a model file; what is float32
    there is read from the disk when it is used."""
    header = read_header(path, MODEL, "model", VERSIONS)
    maxT, V, L, NH, C, Vp = (int(x) for x in header[2:8])
    try:
        config = GPT2(maxT, V, L, NH, C)
    except UserError as error:
        raise UserError(f"{path}: not a model that can be: {error}") from error
    if Vp < V:
        raise UserError(f"{path}: not a model that can be: a vocabulary of {V} padded to {Vp}")
    shapes = shapes_of(config, Vp)
    numbers = read_numbers(path, VERSIONS[int(header[1])], sum(map(math.prod, shapes.values())), 4 * HEADER)
    return config, Vp, {name: x.astype(np.float32, copy=False) for name, x in split(numbers, shapes).items()}


def write_model(path: Path, config: GPT2, parameters: dict[str, np.ndarray], version: int = 3) -> None:
    """A model file: parameters by name, wte with its padded rows; version 3 is float32, 5 is bf16."""
    header = np.zeros(HEADER, "<i4")
    Vp = len(parameters["wte"])
    header[:8] = (
        MODEL,
        version,
        config.max_seq_len,
        config.vocab_size,
        config.num_layers,
        config.num_heads,
        config.channels,
        Vp,
    )
    parts = [np.ascontiguousarray(parameters[name], VERSIONS[version]) for name in shapes_of(config, Vp)]
    write_whole(path, header.tobytes(), *(part.reshape(-1).view(np.uint8) for part in parts))


def read_state(path: Path, config: GPT2, Vp: int) -> SimpleNamespace:
    """tokens, targets (B, T), logits (B, T, V), loss and gradients (by parameter) of the debug state of a model."""
    header = read_header(path, STATE, "debug state", [STATE_VERSION])
    B, T = int(header[2]), int(header[3])
    if B < 1 or not 1 <= T <= config.max_seq_len:
        raise UserError(f"{path}: {B} x {T} tokens do not fit the model, whose context is {config.max_seq_len}")
    tokens = read_numbers(path, "<i4", 2 * B * T, 4 * HEADER, whole=False).reshape(2, B, T)
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise UserError(
            f"{path}: holds tokens beyond the model's vocabulary of {config.vocab_size}: another model's state?"
        )
    shapes = {"logits": (B, T, config.vocab_size), "loss": (1,)} | shapes_of(config, Vp)
    numbers = read_numbers(path, "<f4", sum(map(math.prod, shapes.values())), 4 * (HEADER + 2 * B * T))
    found = split(numbers, shapes)
    logits, loss = found.pop("logits"), float(found.pop("loss")[0])
    return SimpleNamespace(tokens=tokens[0], targets=tokens[1], logits=logits, loss=loss, gradients=found)


def read_tokenizer(path: Path) -> tiktoken.Encoding:
    """The encoding of a tokenizer file. How text is cut into words is not in it, and is taken to be GPT-2's way."""
    header = read_header(path, TOKENIZER, "tokenizer", [1, 2])
    version, V, end = (int(x) for x in header[1:4])
    if version == 1:
        if V != GPT2_SIZE:
            raise UserError(f"{path}: a tokenizer of version 1 with {V} tokens, expected GPT-2's {GPT2_SIZE}")
        end = GPT2_END
    data = memoryview(path.read_bytes())[4 * HEADER :]
    tokens = []
    while data and len(tokens) < V:
        tokens.append(bytes(data[1 : 1 + data[0]]))
        if len(tokens[-1]) < max(1, data[0]):
            raise UserError(f"{path}: token {len(tokens) - 1} is empty or cut off")
        data = data[1 + data[0] :]
    if len(tokens) != V or data:
        raise UserError(
            f"{path}: {len(tokens)} tokens and {len(data)} bytes behind them, but its header says {V} tokens"
        )
    if not 0 <= end < V:
        raise UserError(f"{path}: the end of a text is token {end}, but there are {V}")
    try:
        ranks = {token: id for id, token in enumerate(tokens) if id != end}
        return checked_encoding("bpe", ranks, {END_OF_TEXT: end})
    except ValueError as error:
        raise UserError(f"{path}: not a tokenizer that can be: a token is there twice, or {error}") from error


def write_tokenizer(path: Path, encoding: tiktoken.Encoding) -> None:
    """A tokenizer file, version 2. Errors: an encoding that the format cannot carry."""
    if encoding._pat_str != PATTERN or [*encoding._special_tokens] != [END_OF_TEXT]:
        raise UserError(
            f"{path}: llm.c's format has room for GPT-2's way of cutting words and {END_OF_TEXT} only; "
            "this tokenizer has others"
        )
    tokens = [encoding.decode_single_token_bytes(id) for id in range(encoding.n_vocab)]
    longest = max(tokens, key=len)
    if len(longest) > LONGEST:
        raise UserError(f"{path}: llm.c's format holds tokens of {LONGEST} bytes at most, not {bytes(longest[:20])}...")
    header = np.zeros(HEADER, "<i4")
    header[:4] = TOKENIZER, 2, len(tokens), encoding.eot_token
    write_whole(path, header.tobytes(), *(bytes([len(token)]) + token for token in tokens))


def read_header(path: Path, magic: int, what: str, versions) -> np.ndarray:
    header = read_numbers(path, "<i4", HEADER, 0, whole=False)
    if header[0] != magic:
        raise UserError(f"{path}: not a {what} of llm.c: it starts with {header[0]}, expected {magic}")
    if header[1] not in versions:
        raise UserError(f"{path}: a {what} of version {header[1]}, expected {' or '.join(map(str, versions))}")
    return header


def read_numbers(path: Path, dtype, count: int, offset: int, whole: bool = True) -> np.ndarray:
    """`count` numbers from the offset (bytes) on, by memory map; whole: the file must end with them."""
    dtype = np.dtype(dtype)
    try:
        size = path.stat().st_size
        needed = offset + count * dtype.itemsize
        if size < needed or (whole and size > needed):
            raise UserError(f"{path}: {size:,} bytes, expected {needed:,}: cut off, or another model's")
        return np.memmap(path, np.uint8, "r", offset, (count * dtype.itemsize,)).view(dtype)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def shapes_of(config: GPT2, Vp: int) -> dict[str, tuple[int, ...]]:
    """parameter -> its shape in a file, in the file's order."""
    shapes = {s.name: (config.num_layers, *s.shape) if s.per_layer else s.shape for s in config.parameters()}
    return shapes | {"wte": (Vp, config.channels)}


def split(numbers: np.ndarray, shapes: dict) -> dict[str, np.ndarray]:
    found, start = {}, 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        found[name] = numbers[start : start + count].reshape(shape)
        start += count
    return found
