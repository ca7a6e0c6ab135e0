"""The training loop: steps, validation, samples, checkpoints."""

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from llm_numba.arena import DTYPES, Arena
from llm_numba.data import corpus as data
from llm_numba.data import hellaswag
from llm_numba.data.loader import Loader
from llm_numba.data.shards import fingerprint
from llm_numba.data.tokenizer import tokenizer_state
from llm_numba.models import Model
from llm_numba.ops import Ops
from llm_numba.training import checkpoint, outliers, override, settings
from llm_numba.training.expected_curve import Reference
from llm_numba.training.generate import Choice, encode_prompt, generator, text_of
from llm_numba.training.log import RunLog, share_of_peak
from llm_numba.training.memory_plan import micro_batches
from llm_numba.training.nan_check import NotFinite, checked, save_bad_step, without_graphs
from llm_numba.training.schedule import learning_rate
from llm_numba.training.settings import Settings
from llm_numba.training.step import exact_parameters, gradients, scorer, set_parameter, training_step
from llm_numba.util.cli import UserError, command
from llm_numba.util.files import format_bytes

MOMENTS = ("m", "v")  # groups of the arena that a checkpoint holds beside the parameters; they prefix the names there
START = {"epoch": 0, "window": 0}  # a loader's first position


@dataclass
class State:
    """What changes from step to step, beside the arena and the loader's position."""

    step: int = 0  # updates made
    loss_history: list[float] = field(default_factory=list)  # of the last steps, for z-scores
    norm_history: list[float] = field(default_factory=list)


@dataclass
class Trainer:
    """One process of a training run: its settings, its model in memory, its data and its log."""

    settings: Settings
    model: Model
    ops: Ops
    production: Ops  # the ops without those of --use
    arena: Arena
    corpus: data.Corpus
    train_loader: Loader
    val_loader: Loader
    folder: Path
    log: RunLog
    steps: int  # of the whole run
    peak: float | None  # FLOP/s that the device was measured to reach
    examples: hellaswag.Examples | None
    state: State = field(default_factory=State)
    rank: int = 0  # of this process among `world` processes
    world: int = 1

    def __post_init__(self):
        s = self.settings
        self.m = self.arena.training(s.recompute)
        self.ops.to_device(self.m.seed, s.seed % 2**31)
        self.unchecked = self.ops
        if s.check_finite:
            self.ops = checked(self.ops, self.production, self.m, self.arena, self.state)
        elif not s.graph:
            self.ops = without_graphs(self.ops)
        self.device_step = self.ops.capture(lambda: training_step(self.ops, self.model, self.m, s))
        self.generate = generator(self.ops, self.arena)
        self.losses = scorer(self.ops, self.model, self.m)
        self.inputs = self.arena.block("inputs", "batches", "limits")
        self.results = self.arena.block("inputs", "loss", "grad_scale")
        self.batches = self.inputs.tensors["batches"]
        self.flops_per_token = self.model.flops_per_token(self.batches.shape[-1])
        self.fingerprint = fingerprint(self.corpus.train)
        self.expected = Reference(s, self.log)
        self.times: list[float] = []  # seconds of the last steps

    def run(self, stop: list[int]) -> int:
        """Train to the last step, or until a signal, whose number `stop` then holds (`finish_step_on_signals`).

        Returns the exit status: 0, or 128 + the number of the signal.
        """
        s, state, log = self.settings, self.state, self.log
        if s.use:
            self.compare_overrides()
        while state.step < self.steps and not stop and not log.unwritable:
            self.step()
            last = state.step == self.steps
            if last or is_time(state.step, s.val_every):
                self.validate()
            if self.examples and (last or is_time(state.step, s.eval_every)):
                self.test_on_hellaswag(self.examples, stop)
            if s.sample_tokens and (last or is_time(state.step, s.sample_every)):
                self.show_sample()
            if is_time(state.step, s.checkpoint_every):
                self.save()
        if not checkpoint.checkpoint_path(self.folder, state.step).exists():  # the end, or a signal
            self.save()
        log.picture(self.expected.curve)
        if stop:
            cause = signal.Signals(stop[0]).name
        elif log.unwritable:
            cause = f"an error of its output ({log.unwritable.strerror})"
        else:
            self.say_what_next()
            return 0
        log.say(f"stopped by {cause} after step {state.step}; the checkpoint is saved")
        log.say(f"resume it with:  {command('train', '--resume', self.folder)}")
        if log.unwritable and not stop:
            raise log.unwritable
        return 128 + stop[0]

    def step(self) -> None:
        """Forward and backward over the micro-batches, then the update; one line in the log."""
        s, ops, state = self.settings, self.ops, self.state
        start = time.perf_counter()
        if s.overfit:
            self.train_loader.restore(START)
        windows = [window for batch in self.batches for window in self.train_loader.next_batch(*batch)]
        rate = learning_rate(state.step, self.steps, s.learning_rate, s.schedule, s.warmup, s.final_fraction)
        limits = [outliers.limit(state.loss_history, s.skip_loss_z), outliers.limit(state.norm_history, s.skip_norm_z)]
        inputs = dict(batches=self.batches, learning_rate=rate, step=state.step + 1, limits=limits)
        for name, value in inputs.items():
            self.inputs.tensors[name][...] = value
        ops.to_device(self.inputs.device, self.inputs.host)
        if s.check_finite:
            self.checked_step(inputs)
        else:
            self.device_step()
        self.results.host[...] = ops.to_host(self.results.device)  # waits
        loss, norm_squared, scale = (float(x[0]) for x in self.results.tensors.values())
        norm, skipped = math.sqrt(norm_squared), scale < 0

        loss_z = outliers.z_score(state.loss_history, loss)
        norm_z = outliers.z_score(state.norm_history, norm)
        expected_skip = (s.skip_loss_z and loss_z > s.skip_loss_z) or (s.skip_norm_z and norm_z > s.skip_norm_z)
        if not (math.isfinite(loss) and math.isfinite(norm)) and not expected_skip:
            resumable = any(self.folder.glob("checkpoints/*.safetensors"))
            resume = command("train", "--resume", self.folder)
            again = resume if resumable else "the same command with another --out and"
            raise UserError(
                f"step {state.step + 1}: the loss is {loss}, the norm of the gradients {norm}: the run cannot go on. "
                f"To see where it starts: {again} --check-finite; a smaller --learning-rate may avoid it"
            )
        state.step += 1

        remarkable = skipped or loss_z > outliers.REMARKABLE or norm_z > outliers.REMARKABLE
        outlier = {"windows": data.describe_windows(windows)} if remarkable else {}
        seconds = time.perf_counter() - start
        self.times = [*self.times[-19:], seconds]
        tokens_per_second = self.batches[:, 0].size / seconds
        flops = tokens_per_second * self.flops_per_token
        share, self.peak = share_of_peak(flops, self.peak, lambda: ops.peak_flops(DTYPES[s.dtype]))
        left = (self.steps - state.step) * sum(self.times) / len(self.times)
        self.log.step(
            state.step, self.steps, left, loss=loss, loss_z=loss_z, norm=norm, norm_z=norm_z, learning_rate=rate,
            ms=seconds * 1e3, tokens_per_second=tokens_per_second, share_of_peak=share, skipped=skipped, **outlier,
        )  # fmt: skip
        self.expected.compare(state.step, loss)

    def checked_step(self, inputs: dict) -> None:
        """The device's part of a step with --check-finite. Errors: a value that is not finite; the step is saved."""
        tensors, record = self.contents()
        before = {name: np.array(tensor) for name, tensor in tensors.items()}
        try:
            self.device_step()
        except NotFinite as error:
            save_bad_step(self.folder, inputs, before, record)
            raise UserError(f"{error}; to run the saved step again: {command('replay', self.folder)}") from error

    def compare_overrides(self) -> None:
        """Print the ops of --use beside the production ops, over the first batch, which the first step reads again."""
        position = self.train_loader.state()
        for batch in self.batches:
            self.train_loader.next_batch(*batch)
        self.train_loader.restore(position)
        self.ops.to_device(self.m.batches, self.batches)
        override.compare(
            self.production,
            self.unchecked,
            self.settings.use,
            lambda ops: gradients(ops, self.model, self.m),
            self.log.say,
        )

    def validate(self) -> None:
        """The mean loss over the same batches of held-out text each time."""
        ops, m, model = self.ops, self.m, self.model
        self.val_loader.restore(START)
        batches = max(1, min(self.settings.val_batches, self.val_loader.windows_per_epoch // self.val_loader.B))
        tokens, targets = self.batches[0]
        ops.zero(m.loss)
        for _ in range(batches):
            self.val_loader.next_batch(tokens, targets)
            ops.to_device(m.tokens, tokens)
            ops.to_device(m.targets, targets)
            model.forward(ops, m)
            model.loss(ops, m, 1.0 / batches, write_dlogits=False)
        loss, step = float(ops.to_host(m.loss)[0]), self.state.step
        self.log.event(f"validation at step {step}: loss {loss:.4f}", step=step, val_loss=loss)

    def test_on_hellaswag(self, examples: hellaswag.Examples, stop: list[int]) -> None:
        """All examples, in rows of the training's batches; a signal ends it early, without a score."""
        B, T = self.m.tokens.shape
        found = hellaswag.losses_of(examples, self.losses, B, T, stop)
        if not stop:
            score, step = hellaswag.score(*found, examples.labels), self.state.step
            row = {f"hellaswag_{name}": value for name, value in score._asdict().items()}
            self.log.event(f"hellaswag at step {step}: {score}", step=step, **row)

    def show_sample(self) -> None:
        """A text that the model writes now; its random numbers depend only on (seed, step)."""
        if encoding := self.corpus.encoding:
            step = self.state.step
            rng = np.random.default_rng([self.settings.seed, step])
            tokens = self.generate(encode_prompt(encoding, ""), self.settings.sample_tokens, Choice(), rng)
            text = "".join(text_of(tokens, encoding))
            self.log.event(f"--- sample at step {step} ---\n{text}\n---", step=step, sample=text)

    def contents(self) -> tuple[dict, dict]:
        """(tensors, record) of a checkpoint: everything that the next step depends on. Random numbers have no state:
        those of the data order and of samples follow from the seed and the epoch or step."""
        on_device = exact_parameters(self.arena)
        for group in MOMENTS:
            on_device |= {f"{group}.{name}": tensor for name, tensor in self.arena.named(group).items()}
        record = {
            **vars(self.state), "loader": self.train_loader.state(), "model": self.model.name,
            "config": asdict(self.model), "settings": settings.to_record(self.settings), "data": self.fingerprint,
        }  # fmt: skip
        return {name: self.ops.to_host(tensor) for name, tensor in on_device.items()}, record

    def save(self) -> None:
        """Write a checkpoint and remove the oldest."""
        encoding = self.corpus.encoding
        path = checkpoint.checkpoint_path(self.folder, self.state.step)
        checkpoint.save(path, *self.contents(), tokenizer_state(encoding) if encoding else None)
        checkpoint.prune(self.folder, self.settings.keep, self.settings.keep_every)
        self.log.say(f"checkpoint {path}")

    def describe(self) -> str:
        """The size of the model, the data and the run, in one line."""
        parameters = sum(math.prod(p.shape) for p in self.arena.places if p.group == "parameters")
        sizes = ", ".join(f"{name} {value:,}" for name, value in asdict(self.model).items())
        tokens, held_out = (sum(span.stop - span.start for span in x) for x in (self.corpus.train, self.corpus.val))
        accumulate, _, B, T = self.batches.shape
        return (
            f"{self.model.name}, {parameters:,} parameters ({sizes}); {tokens:,} tokens to train on, {held_out:,} held "
            f"out; {self.steps} steps of {accumulate * B} x {T} tokens; arena {format_bytes(self.arena.nbytes)}"
        )

    def say_what_next(self) -> None:
        folder, say = self.folder, self.log.say
        say(f"done: log.jsonl, train.log, loss.png and checkpoints/ are in {folder}. What to try next:")
        if self.corpus.encoding:
            prompt = "Once" if self.settings.data else "def "
            say(f"  more text    {command('sample', folder, '--prompt', prompt)}")
        say(f"  train on     {command('train', '--resume', folder, '--steps', 2 * self.steps)}")
        say("  your text    llm-numba train --data FILE_OR_FOLDER")
        say(f"  look inside  {command('inspect', folder)}")


@contextmanager
def finish_step_on_signals() -> Iterator[list[int]]:
    """A list that gets the number of the first SIGINT, SIGTERM or SIGHUP; a second signal raises KeyboardInterrupt."""
    received = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        numbers.append(signal.SIGHUP)

    def receive(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        with suppress(OSError):  # the terminal may be gone
            print(f"\n{signal.Signals(number).name}: stopping after this step; again to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def restore(ops: Ops, arena: Arena, state: State, tensors: dict, record: dict) -> None:
    """Arena and state = as they were when the checkpoint was saved."""
    for name in arena.named("parameters"):
        set_parameter(ops, arena, name, tensors[name])
    for group in MOMENTS:
        for name, tensor in arena.named(group).items():
            ops.to_device(tensor, tensors[f"{group}.{name}"])
    for name in vars(state):
        setattr(state, name, record[name])


def steps_of(s: Settings, T: int, windows: int) -> int:
    """The steps of the whole run, over data of this many windows. Errors: fewer than the warm-up."""
    steps = s.steps or max(1, round(s.epochs * windows / (micro_batches(s, T) * s.batch_size)))
    if s.warmup > steps:
        raise UserError(f"--warmup {s.warmup}: the run has only {steps} steps; give fewer, or more --steps or --epochs")
    return steps


def is_time(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
