"""Checkpoints: one safetensors file each, whole or not there, in which a flipped bit is found."""

import contextlib
import hashlib
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llm_numba.arena import parameter_specs
from llm_numba.models.config import GPT2Config
from llm_numba.training.outliers import WINDOW
from llm_numba.util.cli import UserError

FORMAT = "llm_numba checkpoint 1"
RANKS = "tokenizer.ranks"
NAME = re.compile(r"step_(\d+)\.safetensors")
TEMPORARY = ("*.safetensors.tmp", ".tmp*")  # ours; the safetensors library's own, which it renames to ours

Tokenizer = tuple[dict, bytes]


def save(path: str | Path, tensors: dict[str, np.ndarray], state: dict, tokenizer: Tokenizer | None = None) -> None:
    """Write a checkpoint: after a crash, or a power cut, `path` holds either what it held before or all of this.

    tensors:   any shapes; float32, uint8, int64 ... come back bit for bit
    state:     JSON types; floats come back exactly, nan and inf included
    tokenizer: a dict of JSON types and the ranks' bytes
    Errors: UserError where the file cannot be written (disk full, folder not writable ...); no temporary file stays.
    """
    path = Path(path)
    texts = {"format": FORMAT, "state": json.dumps(state), "tokenizer": json.dumps(tokenizer and tokenizer[0])}
    # safetensors writes the memory as it lies
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    if tokenizer:
        tensors[RANKS] = np.frombuffer(tokenizer[1], np.uint8)
    texts["sha256"] = _sha256(texts, tensors)

    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, texts)
        temporary.chmod(mode)  # safetensors gives its files to the owner alone
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
        if os.name != "nt":  # Windows opens no folder
            _sync(path.parent, os.O_RDONLY)
    except (OSError, SafetensorError) as error:
        reason = str(error).rpartition("I/O error: ")[2]
        raise UserError(f"cannot write the checkpoint {path}: {reason}; earlier checkpoints are untouched") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load(path: str | Path) -> tuple[dict[str, np.ndarray], dict, Tokenizer | None]:
    """What `save` was given: (tensors, state, tokenizer). Each tensor is read once, into memory of its own.

    Errors: UserError for a file that is missing, truncated, damaged or no checkpoint; it names the checkpoint of the
    same run that can be used instead: the last one before it that is whole.
    """
    path = Path(path)
    try:
        return _read(path)
    except UserError as error:
        message = str(error)
    step = _step(path)
    for other in reversed([p for p in _checkpoints(path.parent) if step is not None and _step(p) < step]):
        with contextlib.suppress(UserError):
            _read(other)
            message += f"; the one before it is whole: {other}"
            break
    raise UserError(message)


def load_newest(run_folder: str | Path) -> tuple[Path, tuple, list[str]]:
    """(path, what `load` returns, what is wrong with each newer one) of the run's newest checkpoint that is whole.

    Errors: UserError where there is none.
    """
    newest(run_folder)
    problems = []
    for path in reversed(_checkpoints(Path(run_folder) / "checkpoints")):
        try:
            return path, _read(path), problems
        except UserError as error:
            problems.append(str(error))
    raise UserError(f"{problems[0]}; nor is any other of {run_folder} whole")


def sizes_of(path: str | Path, tensors: dict[str, np.ndarray], state: dict) -> GPT2Config:
    """The sizes of the model in a training run's checkpoint, of which `load` returned these.

    Errors: UserError for a whole file that no run has written: all that a run reads is there, and fits.
    """
    try:
        config = GPT2Config(**state["config"])
        if any(type(size) is not int for size in vars(config).values()):
            raise TypeError("a size is not a whole number")
        for spec in parameter_specs(config):
            shape = (config.num_layers, *spec.shape) if spec.per_layer else spec.shape
            for name in (spec.name, f"m.{spec.name}", f"v.{spec.name}"):
                if tensors[name].shape != shape or tensors[name].dtype != np.float32:
                    raise ValueError(f"{name} does not fit the model's sizes")
        if type(state["step"]) is not int or state["step"] < 0:
            raise ValueError(f"step is {state['step']!r:.20}")
        for name in "loss_history", "norm_history":
            if len(state[name]) > WINDOW or any(type(x) is not float for x in state[name]):
                raise ValueError(f"{name} is not a list of numbers")
        for name, kind in ("loader", dict), ("settings", dict), ("data", list):
            if type(state[name]) is not kind:
                raise TypeError(f"{name} is {state[name]!r:.20}")
    except (KeyError, TypeError, ValueError, UserError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is no checkpoint of a run, or another version's: {problem}") from error
    return config


def checkpoint_path(run_folder: str | Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return Path(run_folder) / "checkpoints" / f"step_{step:06d}.safetensors"


def newest(run_folder: str | Path) -> Path:
    """The run's checkpoint with the most steps. Errors: UserError where there is none."""
    folder = Path(run_folder) / "checkpoints"
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        raise UserError(f"no checkpoint to resume from in {folder}: is {run_folder} a run's folder?")
    return checkpoints[-1]


def set_aside(path: str | Path) -> list[Path]:
    """Rename the checkpoints of the same run with more steps than this one, so that going on from it is what counts.

    They keep their content, as step_000200.safetensors.aside, aside2 and so on. Returns their new paths.
    """
    path = Path(path)
    newer = [p for p in _checkpoints(path.parent) if _step(p) > _step(path)]
    return [p.rename(_free(p.with_name(p.name + ".aside"))) for p in newer]


def _free(path: Path) -> Path:
    """The path itself, or the first of path2, path3, ... where there is a file."""
    return next(p for i in itertools.count(1) if not (p := path.with_name(f"{path.name}{i if i > 1 else ''}")).exists())


def prune(run_folder: str | Path, keep: int, keep_every: int) -> None:
    """Remove the run's checkpoints but the last `keep` (at least 1) and those of every `keep_every`-th step (0: none).

    What writers that were killed have left behind goes too; so nothing may be writing a checkpoint meanwhile.
    Errors: UserError where a file cannot be removed.
    """
    folder = Path(run_folder) / "checkpoints"
    old = [p for p in _checkpoints(folder)[:-keep] if not keep_every or _step(p) % keep_every]
    for path in [*old, *(p for pattern in TEMPORARY for p in folder.glob(pattern))]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot remove the old checkpoint {path}: {error.strerror}") from error


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict, Tokenizer | None]:
    try:
        with open(path, "rb"):  # says what is wrong with a path better than safetensors does
            pass
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    try:
        with safe_open(path, "numpy", backend="pread") as file:
            texts = file.metadata() or {}
            sha256 = texts.pop("sha256", None)
            if texts.get("format") != FORMAT or texts.keys() != {"format", "state", "tokenizer"}:
                raise UserError(f"{path} is no checkpoint that this version of llm_numba can read, or is damaged")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is truncated, damaged or no safetensors file ({error})") from error
    if sha256 != _sha256(texts, tensors):
        raise UserError(f"{path} is damaged: its checksum does not match what it holds")
    try:
        state, tokenizer = json.loads(texts["state"]), json.loads(texts["tokenizer"])
        return tensors, state, None if tokenizer is None else (tokenizer, tensors.pop(RANKS).tobytes())
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path} holds no state of a run that can be read ({error})") from error


def _sha256(texts: dict[str, str], tensors: dict[str, np.ndarray]) -> str:
    """The checksum of all that a checkpoint says; the first line tells how to divide what follows it."""
    outline = [sorted(texts.items()), [(name, t.dtype.name, t.shape) for name, t in sorted(tensors.items())]]
    digest = hashlib.sha256(json.dumps(outline).encode() + b"\n")
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by step; temporary files are none."""
    return sorted((p for p in folder.glob("step_*.safetensors") if _step(p) is not None), key=_step)


def _step(path: Path) -> int | None:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def _sync(path: Path, flags: int) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
