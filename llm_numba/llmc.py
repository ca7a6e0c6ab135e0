"""llm.c's model files and debug states.

Each starts with 256 int32. A model: magic, version (3: float32, 5: bf16), context, V, L, NH, C, Vp; then the parameters
in the order of `parameter_specs`. A debug state: magic, version, B, T; then tokens and targets (B, T) int32, logits
(B, T, V), the loss, and the gradients in the order of the parameters, all float32. wte has Vp rows, however many they
pad V to. Little-endian.
"""

from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from llm_numba.arena import parameter_specs
from llm_numba.config import GPT2Config
from llm_numba.errors import UserError
from llm_numba.shards import write_whole

HEADER = 256  # int32
MODEL, STATE = 20240326, 20240327  # magics
VERSIONS = {3: "<f4", 5: ml_dtypes.bfloat16}  # of a model -> its dtype
STATE_VERSION = 2


def read_model(path: Path) -> tuple[GPT2Config, int, dict[str, np.ndarray]]:
    """(config, Vp of the file, parameters by name as float32 (wte with its Vp rows)) of a model file."""
    header = read_header(path, MODEL, "model", VERSIONS)
    maxT, V, L, NH, C, Vp = (int(x) for x in header[2:8])
    try:
        config = GPT2Config(maxT, V, L, NH, C)
    except UserError as error:
        raise UserError(f"{path}: not a model that can be: {error}") from error
    if Vp < V:
        raise UserError(f"{path}: not a model that can be: a vocabulary of {V} padded to {Vp}")
    shapes = shapes_of(config, Vp)
    numbers = read_numbers(path, VERSIONS[int(header[1])], sum(map(np.prod, shapes.values())), 4 * HEADER)
    return config, Vp, {name: x.astype(np.float32) for name, x in split(numbers, shapes).items()}


def write_model(path: Path, config: GPT2Config, parameters: dict[str, np.ndarray], version: int = 3) -> None:
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
    parts = [np.asarray(parameters[name]).astype(VERSIONS[version]).tobytes() for name in shapes_of(config, Vp)]
    write_whole(path, header.tobytes(), *parts)


def read_state(path: Path, config: GPT2Config, Vp: int) -> SimpleNamespace:
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
    numbers = read_numbers(path, "<f4", sum(map(np.prod, shapes.values())), 4 * (HEADER + 2 * B * T))
    found = split(numbers, shapes)
    logits, loss = found.pop("logits"), float(found.pop("loss")[0])
    return SimpleNamespace(tokens=tokens[0], targets=tokens[1], logits=logits, loss=loss, gradients=found)


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
        needed = offset + int(count) * dtype.itemsize
        if size < needed or (whole and size > needed):
            raise UserError(f"{path}: {size:,} bytes, expected {needed:,}: cut off, or another model's")
        return np.memmap(path, np.uint8, "r", offset, (int(count) * dtype.itemsize,)).view(dtype)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def shapes_of(config: GPT2Config, Vp: int) -> dict[str, tuple[int, ...]]:
    """parameter -> its shape in a file, in the file's order."""
    shapes = {s.name: (config.num_layers, *s.shape) if s.per_layer else s.shape for s in parameter_specs(config)}
    return shapes | {"wte": (Vp, config.channels)}


def split(numbers: np.ndarray, shapes: dict) -> dict[str, np.ndarray]:
    found, start = {}, 0
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        found[name] = numbers[start : start + count].reshape(shape)
        start += count
    return found
