"""Train a GPT-2: python -m llm_numba.train (--help lists the settings)."""

from llm_numba.util.cli import UserError, ctrl_c_at_once, exit_with, quiet_ctrl_c

if __name__ == "__main__":
    quiet_ctrl_c()  # the imports take half a second

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiktoken

from llm_numba import sample
from llm_numba.arena import DTYPES, Arena
from llm_numba.data import corpus as data
from llm_numba.data import hellaswag, shards
from llm_numba.data.loader import Loader
from llm_numba.data.tokenizer import tokenizer_state
from llm_numba.eval import scorer
from llm_numba.formats.pretrained import Weights, of_checkpoint, open_weights, set_parameters
from llm_numba.models import gpt2 as model
from llm_numba.models.config import GPT2Config
from llm_numba.ops import choose_device, get_ops
from llm_numba.training import checkpoint, outliers, settings, trackers
from llm_numba.training.expected_curve import Reference
from llm_numba.training.log import RunLog
from llm_numba.training.memory_plan import all_groups, check_memory, micro_batches, plan_memory, plan_of
from llm_numba.training.nan_check import NotFinite, checked, keep, without_graphs
from llm_numba.training.override import beside, borrow
from llm_numba.training.precompile import warm_up
from llm_numba.training.schedule import learning_rate
from llm_numba.training.settings import Settings
from llm_numba.util.files import format_bytes

MOMENTS = ("m", "v")  # groups of the arena that a checkpoint holds beside the parameters; they prefix the names there
FIRST = {"epoch": 0, "window": 0}  # a loader's first position
SAMPLING = SimpleNamespace(temperature=0.8, top_k=0, top_p=0.95)


def main(argv: list[str] | None = None) -> int | None:
    started = time.perf_counter()
    given, explicit = settings.parse(sys.argv[1:] if argv is None else argv)
    stored = None
    if given.resume:
        path, stored = read_checkpoint(Path(given.resume))
        recorded = settings.from_record(stored[1]["settings"], path)
        given = settings.resume_with(recorded, given, explicit)
    settings.check(given)
    trackers.check(given.track)
    weights = of_checkpoint(*stored) if stored else open_weights(given.init) if given.init else None
    config = weights.config if weights else settings.preset_config(given)
    settings.check_lengths(given, config.max_seq_len)
    device = "cpu" if given.no_jit or given.interpret else choose_device(given.device)
    with ctrl_c_at_once():
        ops = get_ops(device, given.dtype, given.interpret, given.no_jit)
    ops.set_threads(given.threads)
    if given.plan_memory:
        return plan_memory(given, config, ops)
    folder = path.parent.parent if stored else Path(given.out) if given.out else next_folder(given.preset or "init")
    return train(given, ops, folder, config, weights, stored, started)


def read_checkpoint(path: Path) -> tuple[Path, tuple]:
    """(path, content) of a checkpoint file, or of a run's newest that is whole; what is wrong with newer ones is told.

    Errors: UserError where there is none.
    """
    if path.is_dir():
        path, stored, problems = checkpoint.load_newest(path)
        for problem in problems:
            print(f"note: {problem}; going on from {path}", file=sys.stderr)
    elif path.parent.name != "checkpoints":
        raise UserError(f"--resume {path}: expected a run folder, or RUN/checkpoints/step_NNNNNN.safetensors")
    else:
        stored = checkpoint.load(path)
    checkpoint.sizes_of(path, *stored[:2])
    return path, stored


def train(s: Settings, ops, folder: Path, config: GPT2Config, weights: Weights | None, stored, started: float) -> int:
    """Run the whole training, from data to the last checkpoint.

    weights: those to start from, or None for random ones; stored: a checkpoint's content to go on from, or None.
    Returns the exit status: 0, or 128 + a signal's number when that signal ended the run early.
    """
    production, ops = ops, borrow(ops, s.use, s.interpret)
    T = s.sequence_length or config.max_seq_len
    corpus = read_data(s, config, weights)
    train_loader = Loader(corpus.train, s.batch_size, T, s.seed, s.shuffle)
    val_loader = Loader(corpus.val, s.batch_size, T, s.seed, True, "--val-data or --val-fraction")
    windows_per_step = micro_batches(s, T) * s.batch_size
    steps = s.steps or max(1, round(s.epochs * train_loader.windows_per_epoch / windows_per_step))
    if s.warmup > steps:
        raise UserError(f"--warmup {s.warmup}: the run has only {steps} steps; give fewer, or more --steps or --epochs")

    examples, note = None, None
    if s.eval_every:
        examples, note = hellaswag.read_examples(s.eval_data, corpus.encoding, T, 0, "--eval-data")

    groups = all_groups(s, config, T, ops)
    check_memory(groups, s, config, ops)
    fingerprint = shards.fingerprint(corpus.train)
    if stored and stored[1]["data"] != fingerprint:
        pairs = zip(corpus.train, fingerprint, stored[1]["data"], strict=False)
        changed = next((span.path for span, now, then in pairs if now != then), "how many files there are")
        raise UserError(
            f"--resume {s.resume}: the data is no longer what the run was started on; give it back: {changed} changed"
        )
    if stored and stored[1]["step"] >= steps:
        raise UserError(f"--resume {s.resume}: all {steps} steps are done; give more with --steps or --epochs")
    arena = Arena(groups, config, plan_of(s), ops)
    m = arena.training(s.recompute)
    state = SimpleNamespace(step=0, loss_history=[], norm_history=[])
    if stored:
        restore(ops, arena, state, stored)
        train_loader.restore(stored[1]["loader"])
    elif weights:
        set_parameters(ops, arena, weights.parameters)
    else:
        model.initialise(ops, arena, s.seed)

    with ctrl_c_at_once():
        seconds = warm_up(ops, config, s) if ops.is_compiled() and not s.interpret else 0.0
        peak = None if s.interpret else ops.peak_flops(DTYPES[s.dtype])
    ops.to_device(m.seed, s.seed % 2**31)

    record, since = settings.to_record(s), state.step if stored else None
    with RunLog(folder, record, since, s.track) as log, stop_signals() as stop:
        if stored:
            for other in checkpoint.set_aside(checkpoint.checkpoint_path(folder, state.step)):
                log.say(f"set aside, because this run goes on from an earlier one: {other}")
        log.say(f"run folder {folder}: {describe(config, arena, corpus, steps)}")
        log.say(ops.describe_device())
        log.say(f"ops ready in {seconds:.1f} s (compiled, or read from what an earlier start compiled)")
        run = SimpleNamespace(
            s=s, ops=ops, arena=arena, m=m, config=config, corpus=corpus, state=state, log=log, steps=steps,
            train_loader=train_loader, val_loader=val_loader, folder=folder, peak=peak, fingerprint=fingerprint,
            flops=flops_per_token(config, T), times=[], reference=Reference(s, log),
            batches=np.empty(m.batches.shape, np.int32), examples=examples, stop=stop,
        )  # fmt: skip
        if note:
            log.say(note)
        if s.check_finite:
            run.ops = checked(ops, m, arena, state)
        elif not s.graph:
            run.ops = without_graphs(ops)
        run.update = run.ops.capture(partial(update, run.ops, m, config.vocab_size, s))
        run.losses = scorer(run.ops, m, config.vocab_size)
        if s.use:
            compare_borrowed(run, production)
        log.say(f"first step {time.perf_counter() - started:.1f} s after the start")
        while state.step < steps and not stop and not log.unread:
            one_step(run)
            if state.step == steps or is_time(state.step, s.val_every):
                validate(run)
            if s.eval_every and (state.step == steps or is_time(state.step, s.eval_every)):
                test_on_hellaswag(run)
            if state.step == steps or is_time(state.step, s.sample_every):
                show_sample(run)
            if is_time(state.step, s.checkpoint_every):
                save(run)
        if not checkpoint.checkpoint_path(folder, state.step).exists():  # the end, or a signal
            save(run)
        log.picture(run.reference.curve)
        if stop or log.unread:
            why = signal.Signals(stop[0]).name if stop else f"the loss of its output ({log.unread})"
            log.say(f"stopped by {why} after step {state.step}; nothing is lost")
            log.say(f"go on with:  python -m llm_numba.train --resume {folder}")
            return 128 + (stop[0] if stop else 13)
        farewell(run)
        return 0


def update(ops, m, vocab_size: int, s: Settings) -> None:
    """All that the device does in a step: the same calls with the same arrays, step after step."""
    model.gradients(ops, m, vocab_size)
    model.update(ops, m, s)


def one_step(run) -> None:
    """Forward and backward over the micro-batches, then the update; one line in the log."""
    s, ops, m, state = run.s, run.ops, run.m, run.state
    start = time.perf_counter()
    if s.overfit:
        run.train_loader.restore(FIRST)
    windows = [window for batch in run.batches for window in run.train_loader.next_batch(*batch)]
    rate = learning_rate(state.step, run.steps, s.learning_rate, s.schedule, s.warmup, s.final_fraction)
    loss_limit = outliers.limit(state.loss_history, s.skip_loss_z)
    norm_limit = outliers.limit(state.norm_history, s.skip_norm_z)
    inputs = dict(batches=run.batches, learning_rate=rate, step=state.step + 1, limits=[loss_limit, norm_limit])
    set_inputs(ops, m, inputs)
    if s.check_finite:
        tensors, record = contents(run)
        before = {name: np.array(tensor) for name, tensor in tensors.items()}
    try:
        run.update()
    except NotFinite as error:
        keep(run.folder, inputs, before, record)
        again = f"python -m llm_numba.debug.replay {run.folder}"
        raise UserError(f"{error}; the step is kept, to run it again: {again}") from error
    loss, norm = float(ops.to_host(m.loss)[0]), math.sqrt(ops.to_host(m.grad_norm_squared)[0])
    skipped = bool(ops.to_host(m.grad_scale)[0] < 0)

    loss_z = outliers.z_score(state.loss_history, loss)
    norm_z = outliers.z_score(state.norm_history, norm)
    wanted = (s.skip_loss_z and loss_z > s.skip_loss_z) or (s.skip_norm_z and norm_z > s.skip_norm_z)
    if not (math.isfinite(loss) and math.isfinite(norm)) and not wanted:
        resumable = any(run.folder.glob("checkpoints/*.safetensors"))
        again = f"python -m llm_numba.train --resume {run.folder}" if resumable else "the same command, another --out,"
        raise UserError(
            f"step {state.step + 1}: the loss is {loss}, the gradient's norm {norm}: the run cannot go on. "
            f"To see where it starts: {again} --check-finite; "
            "a smaller --learning-rate may avoid it"
        )
    state.step += 1

    outlier = {}
    if skipped or loss_z > outliers.REMARKABLE or norm_z > outliers.REMARKABLE:
        outlier = {"windows": data.describe_windows(windows)}

    seconds = time.perf_counter() - start
    run.times = [*run.times[-19:], seconds]
    tokens_per_second = run.batches[:, 0].size / seconds
    share = tokens_per_second * run.flops / run.peak if run.peak else None
    left = (run.steps - state.step) * sum(run.times) / len(run.times)
    run.log.step(
        state.step, run.steps, left, loss=loss, loss_z=loss_z, norm=norm, norm_z=norm_z, learning_rate=rate,
        ms=seconds * 1e3, tokens_per_second=tokens_per_second, share_of_peak=share, skipped=skipped,
        **outlier,
    )  # fmt: skip
    run.reference.compare(state.step, loss)


def compare_borrowed(run, production) -> None:
    """What --use brought beside the ops of `production`, over the first batch, which the first step gets again."""
    position = run.train_loader.state()
    for batch in run.batches:
        run.train_loader.next_batch(*batch)
    run.train_loader.restore(position)
    run.ops.to_device(run.m.batches, run.batches)

    def step(ops):
        model.gradients(ops, run.m, run.config.vocab_size)

    for line in beside(production, run.ops, run.s.use, step):
        run.log.say(line)


def set_inputs(ops, m, inputs: dict) -> None:
    """What a step gets from the host: batches, learning rate, number, limits of outliers."""
    for name, value in inputs.items():
        ops.to_device(getattr(m, name), value)


def validate(run) -> None:
    """The mean loss over the same batches of held-out text each time."""
    s, ops, m = run.s, run.ops, run.m
    run.val_loader.restore(FIRST)
    batches = max(1, min(s.val_batches, run.val_loader.windows_per_epoch // s.batch_size))
    tokens, targets = run.batches[0]
    ops.zero(m.loss)
    for _ in range(batches):
        run.val_loader.next_batch(tokens, targets)
        ops.to_device(m.tokens, tokens)
        ops.to_device(m.targets, targets)
        model.forward(ops, m)
        model.loss(ops, m, run.config.vocab_size, 1.0 / batches, write_dlogits=False)
    run.log.validation(run.state.step, float(ops.to_host(m.loss)[0]))


def test_on_hellaswag(run) -> None:
    """All examples, in rows of the training's batches; a signal cuts it short."""
    found = hellaswag.losses_of(run.examples, run.losses, *run.m.tokens.shape, run.stop)
    if found:
        run.log.hellaswag(run.state.step, hellaswag.score(*found, run.examples.labels))


def show_sample(run) -> None:
    """A text that the model writes now; only (seed, step) decide the draws."""
    encoding = run.corpus.encoding
    if encoding is None:
        return
    rng = np.random.default_rng([run.s.seed, run.state.step])
    tokens = sample.generate(run.ops, run.arena, [encoding.eot_token], SAMPLING, rng)
    text = "".join(sample.text_of(tokens, encoding, run.s.sample_tokens))
    run.log.sample(run.state.step, text)


def contents(run) -> tuple[dict, dict]:
    """(tensors, state) of a checkpoint: everything that the next step depends on. Random numbers need no state of their
    own: those of the data's order and of samples follow from the seed and the step or the epoch."""
    arena = run.arena
    tensors = {name: run.ops.to_host(tensor) for name, tensor in model.exact_parameters(arena).items()}
    for group in MOMENTS:
        tensors |= {f"{group}.{name}": run.ops.to_host(tensor) for name, tensor in arena.named(group).items()}
    record = {
        **vars(run.state),
        "loader": run.train_loader.state(),
        "config": asdict(run.config),
        "settings": settings.to_record(run.s),
        "data": run.fingerprint,
    }
    return tensors, record


def save(run) -> None:
    encoding = run.corpus.encoding
    path = checkpoint.checkpoint_path(run.folder, run.state.step)
    checkpoint.save(path, *contents(run), tokenizer_state(encoding) if encoding else None)
    checkpoint.prune(run.folder, run.s.keep, run.s.keep_every)
    run.log.say(f"checkpoint {path}")


def restore(ops, arena: Arena, state: SimpleNamespace, stored) -> None:
    """Arena and state = as they were when the checkpoint was saved."""
    tensors, record, _ = stored
    for name in arena.named("parameters"):
        model.set_parameter(ops, arena, name, tensors[name])
    for group in MOMENTS:
        for name, tensor in arena.named(group).items():
            ops.to_device(tensor, tensors[f"{group}.{name}"])
    for name in vars(state):
        setattr(state, name, record[name])


def read_data(s: Settings, config: GPT2Config, weights: Weights | None) -> data.Corpus:
    """The data, as tokens of the model; weights: what the run starts from or goes on from, with their tokenizer.

    Errors: UserError for a tokenizer, or token shards, of another vocabulary than the model's.
    """
    tokenizer = settings.tokenizer_kind(s)
    if tokenizer == "init":
        known = "gpt2" if config.vocab_size == settings.FIXED_VOCABULARIES["gpt2"] else "none"
        tokenizer = weights.tokenizer() or known
    if isinstance(tokenizer, tiktoken.Encoding):
        V, whose = tokenizer.n_vocab, "that of its tokenizer"
    else:
        V = settings.FIXED_VOCABULARIES.get(tokenizer) or s.vocab_size or config.vocab_size
        whose = f"--tokenizer {tokenizer}"
    if V != config.vocab_size:
        raise UserError(
            f"--init {s.init}: the model's vocabulary has {config.vocab_size} tokens, {whose} {V}; they must be the "
            "same: choose another --tokenizer, or none, for token shards of the model's vocabulary"
        )
    return data.prepare(s.data, s.val_data, tokenizer, V, s.val_fraction)


def describe(config: GPT2Config, arena: Arena, corpus: data.Corpus, steps: int) -> str:
    parameters = sum(math.prod(p.shape) for p in arena.places if p.group == "parameters")
    accumulate, _, B, T = arena.tensors["inputs", "batches"].shape
    tokens, held_out = (sum(span.stop - span.start for span in spans) for spans in (corpus.train, corpus.val))
    return (
        f"{parameters:,} parameters, {config.num_layers} layers of {config.channels} channels, "
        f"{config.vocab_size} tokens in the vocabulary; {tokens:,} tokens to train on, {held_out:,} held out; "
        f"{steps} steps of {accumulate * B} x {T} tokens; "
        f"arena {format_bytes(arena.nbytes)}"
    )


def flops_per_token(config: GPT2Config, T: int) -> float:
    """Forward and backward: 6 a parameter of the matmuls, and attention's two products over half of T x T."""
    L, C = config.num_layers, config.channels
    return 6.0 * (12 * L * C * C + config.padded_vocab_size * C) + 6.0 * L * C * T


def next_folder(name: str) -> Path:
    """The first of runs/NAME-000, runs/NAME-001, ... that is not there yet."""
    return next(p for i in range(10**6) if not (p := Path("runs") / f"{name}-{i:03d}").exists())


def is_time(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the number of the first SIGINT, SIGTERM, or SIGHUP (the terminal has gone): the run ends after
    its step, with a checkpoint. A second one ends it at once."""
    received = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        numbers.append(signal.SIGHUP)

    def receive(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        with suppress(OSError):  # where the terminal has gone
            print(
                f"\n{signal.Signals(number).name}: stopping after this step; once more stops at once", file=sys.stderr
            )

    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def farewell(run) -> None:
    folder, say = run.folder, run.log.say
    say(f"done: log.jsonl, train.log, loss.png and checkpoints/ are in {folder}. What to try next:")
    if run.corpus.encoding:
        prompt = "def " if not run.s.data else "Once"
        say(f'  more text    python -m llm_numba.sample {folder} --prompt "{prompt}"')
    say(f"  train on     python -m llm_numba.train --resume {folder} --steps {2 * run.steps}")
    say("  own text     python -m llm_numba.train --data FILE_OR_FOLDER")
    say("  look inside  python -m llm_numba.debug.inspect " + str(folder))


if __name__ == "__main__":
    if sys.stdout:  # none where it was closed, as by >&-
        sys.stdout.reconfigure(errors="replace")
    exit_with(main)
