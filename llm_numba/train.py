"""Train a model: python -m llm_numba.train (--help lists the settings).

The path of a run: settings -> model and weights -> ops of the device -> data -> memory -> Trainer.run.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from llm_numba.arena import DTYPES, Arena
from llm_numba.data import hellaswag
from llm_numba.data.loader import Loader
from llm_numba.data.shards import fingerprint
from llm_numba.ops import Ops, choose_device, get_ops
from llm_numba.training import checkpoint, settings, trackers
from llm_numba.training.checkpoint import Checkpoint
from llm_numba.training.log import RunLog
from llm_numba.training.memory_plan import check_memory, plan_of, print_plan, run_groups
from llm_numba.training.override import override
from llm_numba.training.precompile import precompile
from llm_numba.training.run_data import absolute, check_same, locate, read_data
from llm_numba.training.settings import Settings
from llm_numba.training.trainer import State, Trainer, finish_step_on_signals, restore, steps_of
from llm_numba.training.weights import Weights, open_weights, random_weights, set_parameters, weights_of
from llm_numba.util.ahead import ahead
from llm_numba.util.cli import UserError, exit_with, note

AHEAD = 6  # tensors of the weights that are read or drawn before they are needed


def main(argv: list[str] | None = None) -> int | None:
    started = time.perf_counter()
    s, explicit = settings.parse(sys.argv[1:] if argv is None else argv)
    s, stored = resume(s, explicit) if s.resume else (absolute(s), None)
    settings.check(s)
    trackers.check(s.track)
    weights = weights_of(stored) if stored else open_weights(s.init) if s.init else random_weights(s)
    model = weights.model
    settings.check_lengths(s, model.max_seq_len)
    if not (stored or s.plan_memory):  # read or draw them while Numba is loaded and the GPU gets ready
        weights = weights._replace(parameters=ahead(weights.parameters, AHEAD))
    device = "cpu" if s.no_jit or s.interpret else choose_device(s.device)
    ops = get_ops(device, s.dtype, s.interpret, s.no_jit, s.variant)
    ops.set_threads(s.threads)
    if s.plan_memory:
        return print_plan(s, model, ops)
    folder = stored.path.parent.parent if stored else Path(s.out) if s.out else next_folder(s.preset or "init")
    return train(replace(s, out=str(folder.absolute())), folder, ops, weights, stored, started)


def resume(given: Settings, explicit: set[str]) -> tuple[Settings, Checkpoint]:
    """The settings of a resumed run, and its checkpoint. Errors: UserError if there is none."""
    path = Path(given.resume)
    if path.is_file() and path.parent.name != "checkpoints":
        raise UserError(f"--resume {path}: expected a run folder, or RUN/checkpoints/step_NNNNNN.safetensors")
    stored = checkpoint.open_checkpoint(path)
    folder = stored.path.parent.parent
    note_changes(folder / "settings.json", settings.to_record(stored.settings), stored.path)
    recorded = locate(stored.settings, stored.settings.out, folder)
    return settings.resume_with(recorded, absolute(given), explicit), stored


def note_changes(path: Path, recorded: dict, checkpoint_path: Path) -> None:
    """Report a settings.json that does not say what the checkpoint says, which counts."""
    try:
        found = recorded | json.loads(path.read_text(encoding="utf-8"))
        lasting = [name for name, f in settings.FIELDS.items() if not f.metadata["once"] and name != "out"]
        differing = ", ".join(name for name in lasting if found[name] != recorded[name])
        problem = differing and f"differs in {differing}"
    except (OSError, ValueError, TypeError) as error:
        problem = f"is missing or damaged ({error})"
    if problem:
        note(f"note: {path} {problem}; the settings in {checkpoint_path} are used")


def train(s: Settings, folder: Path, ops: Ops, weights: Weights, stored: Checkpoint | None, started: float) -> int:
    """Run the whole training, from data to the last checkpoint in `folder`.

    weights: those to start from; stored: the checkpoint to continue from, or None.
    Returns the exit status: 0, or 128 + the number of the signal that ended the run early.
    """
    model, production, ops = weights.model, ops, override(ops, s.use, s.interpret)
    T = s.sequence_length or model.max_seq_len
    corpus = read_data(s, model, weights.tokenizer)
    train_loader = Loader(corpus.train, s.batch_size, T, s.seed, s.shuffle)
    val_loader = Loader(corpus.val, s.batch_size, T, s.seed, s.shuffle, "--val-data or --val-fraction")
    steps = steps_of(s, T, train_loader.windows_per_epoch)
    examples = remark = None
    if s.eval_every:
        examples, remark = hellaswag.read_examples(s.eval_data, corpus.encoding, T, 0, "--eval-data")
    groups = run_groups(s, model, T, ops)
    check_memory(groups, s, model, ops)
    if stored:
        check_same(corpus, fingerprint(corpus.train), stored.record["data"], s.resume)
        if stored.record["step"] >= steps:
            raise UserError(f"--resume {s.resume}: all {steps} steps are done; give more with --steps or --epochs")

    arena, state = Arena(groups, model, plan_of(s), ops), State()
    if stored:
        restore(ops, arena, state, stored.tensors, stored.record)
        train_loader.restore(stored.record["loader"])
    else:
        set_parameters(ops, arena, weights.parameters)

    seconds = precompile(ops, model, s) if ops.is_compiled() and not s.interpret else 0.0
    peak = None if s.interpret else ops.peak_flops(DTYPES[s.dtype])
    step = state.step if stored else None
    with RunLog(folder, settings.to_record(s), step, s.track) as log, finish_step_on_signals() as stop:
        trainer = Trainer(
            settings=s, model=model, ops=ops, production=production, arena=arena, corpus=corpus, state=state,
            train_loader=train_loader, val_loader=val_loader, folder=folder, log=log, steps=steps, peak=peak,
            examples=examples,
        )  # fmt: skip
        if stored:
            for other in checkpoint.set_aside(checkpoint.checkpoint_path(folder, state.step)):
                log.say(f"renamed, because this run continues from an earlier checkpoint: {other}")
        log.say(f"run folder {folder}: {trainer.describe()}")
        log.say(ops.describe_device())
        log.say(f"ops ready in {seconds:.1f} s (compiled, or loaded from an earlier start)")
        if remark:
            log.say(remark)
        log.say(f"first step {time.perf_counter() - started:.1f} s after the start")
        return trainer.run(stop)


def next_folder(name: str) -> Path:
    """The first of runs/NAME-000, runs/NAME-001, ... that does not exist."""
    return next(p for i in range(10**6) if not (p := Path("runs") / f"{name}-{i:03d}").exists())


if __name__ == "__main__":
    exit_with(main)
