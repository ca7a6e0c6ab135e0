"""Checkpoints: one safetensors file each, written whole or not at all, with a checksum that detects a flipped bit."""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llm_numba.data.tokenizer import tokenizer_from_state
from llm_numba.models import Model, model_of
from llm_numba.training import settings
from llm_numba.training.outliers import WINDOW
from llm_numba.training.settings import Settings
from llm_numba.util.cli import UserError, note

FORMAT = "llm_numba checkpoint 1"
RANKS = "tokenizer.ranks"
NAME = re.compile(r"step_(\d+)\.safetensors")
TEMPORARY = ("*.safetensors.tmp", ".tmp*")  # ours; those of the safetensors library, which it renames to ours

Tokenizer = tuple[dict, bytes]
Stored = tuple[dict[str, np.ndarray], dict, Tokenizer | None]  # (tensors, state, tokenizer) as `save` takes them


class Checkpoint(NamedTuple):
    """What a run's checkpoint holds: the tensors by name, and the record of everything else."""

    path: Path
    tensors: dict[str, np.ndarray]
    record: dict
    encoding: tiktoken.Encoding | None
    model: Model
    settings: Settings

    def parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, values), all layers together."""
        return ((spec.name, self.tensors[spec.name]) for spec in self.model.parameters())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint file, or the newest whole one of a run folder; damaged newer ones are reported on stderr.

    Errors: UserError if there is none, or if no run wrote it.
    """
    path = Path(path)
    path, (tensors, record, tokenizer) = _load_newest(path) if path.is_dir() else (path, load(path))
    model = check_record(path, tensors, record)
    recorded = settings.from_record(record["settings"], path)
    return Checkpoint(path, tensors, record, tokenizer and tokenizer_from_state(*tokenizer), model, recorded)


def _load_newest(run_folder: Path) -> tuple[Path, Stored]:
    newest(run_folder)
    problems = []
    for path in reversed(_checkpoints(run_folder / "checkpoints")):
        try:
            stored = _read(path)
        except UserError as error:
            problems.append(str(error))
        else:
            for problem in problems:
                note(f"note: {problem}; using {path}")
            return path, stored
    raise UserError(f"{problems[0]}; {run_folder} has no whole checkpoint")


def save(path: str | Path, tensors: dict[str, np.ndarray], state: dict, tokenizer: Tokenizer | None = None) -> None:
    """Write a checkpoint. After a crash or a power cut, `path` holds either its old content or all of the new one.

    tensors: any shapes and dtypes, restored bit for bit; state: JSON types, floats restored exactly, nan and inf too;
    tokenizer: a dict of JSON types and the bytes of the ranks.
    Errors: UserError if the file cannot be written (disk full, folder not writable ...); no temporary file stays.
    """
    path = Path(path)
    texts = {"format": FORMAT, "state": json.dumps(state), "tokenizer": json.dumps(tokenizer and tokenizer[0])}
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}  # safetensors ignores strides
    if tokenizer:
        tensors[RANKS] = np.frombuffer(tokenizer[1], np.uint8)
    texts["sha256"] = _sha256(texts, tensors)

    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, texts)
        temporary.chmod(mode)  # safetensors creates files that only the owner can read
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
        if os.name != "nt":  # Windows cannot open a folder
            _sync(path.parent, os.O_RDONLY)
    except (OSError, SafetensorError) as error:
        reason = str(error).rpartition("I/O error: ")[2]
        raise UserError(f"cannot write the checkpoint {path}: {reason}; earlier checkpoints are untouched") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load(path: str | Path) -> Stored:
    """What `save` wrote. Errors: UserError for a file that is missing, damaged or no checkpoint, which names the last
    whole checkpoint before it in the same run."""
    path = Path(path)
    try:
        return _read(path)
    except UserError as error:
        message = str(error)
    for other in reversed([p for p in _checkpoints(path.parent) if _step(p) < _step(path)]):
        with contextlib.suppress(UserError):
            _read(other)
            message += f"; use the last whole one before it: {other}"
            break
    raise UserError(message)


def check_record(path: str | Path, tensors: dict[str, np.ndarray], record: dict) -> Model:
    """The model of a checkpoint's tensors and record. Errors: UserError if something that a run reads is missing or
    does not fit, as in a whole file that no run wrote."""
    try:
        model = model_of(record)
        for spec in model.parameters():
            shape = (model.num_layers, *spec.shape) if spec.per_layer else spec.shape
            for name in (spec.name, f"m.{spec.name}", f"v.{spec.name}"):
                if tensors[name].shape != shape or tensors[name].dtype != np.float32:
                    raise ValueError(f"{name} does not fit the model's sizes")
        if type(record["step"]) is not int or record["step"] < 0:
            raise ValueError(f"step is {record['step']!r:.20}")
        for name in "loss_history", "norm_history":
            if len(record[name]) > WINDOW or any(type(x) is not float for x in record[name]):
                raise ValueError(f"{name} is not a list of floats")
        for name, kind in ("loader", dict), ("settings", dict), ("data", list):
            if type(record[name]) is not kind:
                raise TypeError(f"{name} is {record[name]!r:.20}")
    except (KeyError, TypeError, ValueError, UserError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is not a run's checkpoint, or another version wrote it: {problem}") from error
    return model


def checkpoint_path(run_folder: str | Path, step: int) -> Path:
    """The path of the checkpoint after `step` updates."""
    return Path(run_folder) / "checkpoints" / f"step_{step:06d}.safetensors"


def newest(run_folder: str | Path) -> Path:
    """The run's checkpoint with the most steps. Errors: UserError if there is none."""
    folder = Path(run_folder) / "checkpoints"
    if checkpoints := _checkpoints(folder):
        return checkpoints[-1]
    raise UserError(f"no checkpoint in {folder}: is {run_folder} a run folder?")


def set_aside(path: str | Path) -> list[Path]:
    """Rename the run's checkpoints with more steps than this one, from which it continues, to NAME.aside, NAME.aside2
    and so on. Returns their new paths."""
    renamed = []
    for newer in _checkpoints(Path(path).parent):
        if _step(newer) > _step(Path(path)):
            names = (newer.with_name(f"{newer.name}.aside{i if i > 1 else ''}") for i in itertools.count(1))
            renamed.append(newer.rename(next(name for name in names if not name.exists())))
    return renamed


def prune(run_folder: str | Path, keep: int, keep_every: int) -> None:
    """Remove the run's checkpoints except the last `keep` (at least 1) and every `keep_every`-th step (0: none), and
    the temporary files of killed writers. Errors: UserError if a file cannot be removed."""
    folder = Path(run_folder) / "checkpoints"
    old = [p for p in _checkpoints(folder)[:-keep] if not keep_every or _step(p) % keep_every]
    for path in [*old, *(p for pattern in TEMPORARY for p in folder.glob(pattern))]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot remove the old checkpoint {path}: {error.strerror}") from error


def _read(path: Path) -> Stored:
    try:
        open(path, "rb").close()  # its error messages are clearer than those of safetensors
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    try:
        with safe_open(path, "numpy", backend="pread") as file:
            texts = file.metadata() or {}
            sha256 = texts.pop("sha256", None)
            if texts.get("format") != FORMAT or texts.keys() != {"format", "state", "tokenizer"}:
                raise UserError(f"{path} is not a checkpoint that this version of llm_numba can read, or it is damaged")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is truncated, damaged or not a safetensors file ({error})") from error
    if sha256 != _sha256(texts, tensors):
        raise UserError(f"{path} is damaged: its checksum does not match its content")
    try:
        state, tokenizer = json.loads(texts["state"]), json.loads(texts["tokenizer"])
        return tensors, state, None if tokenizer is None else (tokenizer, tensors.pop(RANKS).tobytes())
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path} holds no readable state of a run ({error})") from error


def _sha256(texts: dict[str, str], tensors: dict[str, np.ndarray]) -> str:
    """The checksum of a checkpoint; the first line that is hashed says how to divide the bytes after it."""
    outline = [sorted(texts.items()), [(name, t.dtype.name, t.shape) for name, t in sorted(tensors.items())]]
    digest = hashlib.sha256(json.dumps(outline).encode() + b"\n")
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by step, without temporary files."""
    return sorted((p for p in folder.glob("step_*.safetensors") if _step(p) >= 0), key=_step)


def _step(path: Path) -> int:
    """The step in the name of a checkpoint, -1 for another name."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _sync(path: Path, flags: int) -> None:
    """Wait until a file, or a folder's list of files, is on disk."""
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
