"""The settings of a training run: one table for the command line, `--help`, the run's record and the resume check.

This module does not import Numba: the command line is read before Numba is loaded.
"""

import argparse
import difflib
import math
import shlex
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llm_numba.data.shards import MAX_VOCAB_SIZE
from llm_numba.models import Model, preset, presets
from llm_numba.ops import CONTRACT, DEVICES, WRITES
from llm_numba.training.log import COLUMNS
from llm_numba.training.outliers import WINDOW
from llm_numba.training.override import split
from llm_numba.training.schedule import SCHEDULES, WSD_DECAY
from llm_numba.util.cli import Parser, UserError
from llm_numba.util.host import usable_cpus

# preset -> the settings whose default differs from that of Settings
PRESET_DEFAULTS = {
    "nano": {"sequence_length": 16, "batch_size": 1, "steps": 1000, "learning_rate": 3e-3},
    "tiny": {"batch_size": 16, "steps": 600, "learning_rate": 3e-3, "warmup": 40, "val_every": 100},
}
INIT_DEFAULTS = {"preset": "", "learning_rate": 3e-5}  # with --init: the sizes are known, and the weights are trained
AUTO_TOKENIZER = {"nano": "bytes", "tiny": "bpe"}  # other presets: gpt2; with --init: the tokenizer of the weights
FIXED_VOCABULARIES = {"gpt2": 50257, "bytes": 257}
VOCAB_SIZES = {"bpe": (257, MAX_VOCAB_SIZE), "none": (1, MAX_VOCAB_SIZE)}  # 257: the bytes and the end of a text
SIZES = {"layers": "num_layers", "heads": "num_heads", "channels": "channels"}  # flag -> the size of the model it sets
LARGEST = 2**31 - 1  # of an integer setting: what an int32 can hold

RANGES = {
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "above 0": lambda x: x > 0,
    "at least 0 and at most 1": lambda x: 0 <= x <= 1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "above 0 and below 1": lambda x: 0 < x < 1,
}

KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", tuple: "a list of strings"}


def option(group, default, help, unit="", choices=(), must="", free=False, once=False, rare=False):
    """One setting: a field whose metadata says all that the command line, its help and the checks need.

    unit: what the value counts or names; must: a key of RANGES, for numbers "at least 0" by default; free: a resumed
    run may change it, as it may all of "logging"; once: it holds for one start only and a resumed run does not inherit
    it, which is so for all of "debugging"; rare: only --help-all shows it.
    """
    must = must or ("at least 0" if type(default) in (int, float) else "")
    once = once or group == "debugging"
    free = free or once or group == "logging"
    names = dict(group=group, help=help, unit=unit, choices=tuple(choices), must=must, free=free, once=once, rare=rare)
    return field(default=default, metadata=names)


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run. A field `batch_size` is the flag `--batch-size`."""

    # fmt: off
    out: str = option("run", "", "the run's folder; default: the next free runs/PRESET-NNN", "FOLDER")
    resume: str = option("run", "", "continue a run: its folder, or one of its checkpoints", "PATH", once=True)
    seed: int = option("run", 42, "seed of the initial weights, the data order and samples", "N")
    threads: int = option("run", 0, "CPU threads; 0: one for each physical core", "THREADS", free=True)
    plan_memory: bool = option("run", False, "print how much memory these settings need, and stop", once=True)
    device: str = option(
        "run", "auto", "where to train: auto is a CUDA GPU if there is one, else the CPU; cudasim runs the CUDA "
        "kernels in Numba's simulator, slowly, for a debugger", choices=DEVICES, free=True)
    dtype: str = option(
        "run", "fp32", "precision of parameters and activations; bf16 needs a CUDA GPU, and is several times faster",
        choices=("fp32", "bf16"), free=True)
    stochastic_rounding: bool = option(
        "run", False, "with bf16: round updates stochastically, without float32 master weights", free=True, rare=True)
    recompute: str = option(
        "run", "none", "what the backward pass computes again instead of storing it: slower, with less memory",
        choices=("none", "gelu", "gelu+layernorm"), free=True, rare=True)
    graph: bool = option(
        "run", True, "replay each step as one CUDA graph; --no-graph is for debugging", free=True, rare=True)
    variant: tuple = option(
        "run", (), "force a variant of an op family, such as matmul=simt; llm-numba doctor lists them", "FAMILY=NAME",
        once=True, rare=True)

    preset: str = option("model", "tiny", "the model's sizes", "NAME")
    layers: int = option("model", 0, "L, the number of layers; 0: that of the preset", "N")
    heads: int = option("model", 0, "NH, the attention heads of a layer; 0: those of the preset", "N")
    channels: int = option("model", 0, "C, the width of the model; 0: that of the preset", "N")
    init: str = option(
        "model", "", "start from trained weights, with their sizes and tokenizer, instead of a --preset and random "
        "weights: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded), a Hugging Face folder, an llm.c .bin, a run "
        "or a checkpoint", "SOURCE")
    sequence_length: int = option("model", 0, "T, the tokens of a sequence; 0: the model's context", "TOKENS")

    data: tuple = option(
        "data", (), "text files, folders, globs or token shards to train on; default: the Python standard library's "
        "sources; a resumed run takes the same data from another place", "PATH", free=True)
    val_data: tuple = option(
        "data", (), "files to validate on, as for --data; default: a part of the training data", "PATH", free=True)
    tokenizer: str = option(
        "data", "auto", "how text becomes tokens: bpe is trained on your data, gpt2 is GPT-2's, bytes makes each byte "
        "a token, none is for token shards; auto: bytes for nano, bpe for tiny, gpt2 for d12 and larger, with --init "
        "that of the weights", choices=("auto", "bpe", "gpt2", "bytes", "none"))
    vocab_size: int = option("data", 0, "V, for a bpe tokenizer or token shards; 0: the model's", "TOKENS")
    val_fraction: float = option(
        "data", 0.05, "the part of the training data to validate on if there is no --val-data, from 0 to 1", "FRACTION",
        must="above 0 and below 1", rare=True)
    shuffle: bool = option("data", True, "read training and validation data in random order, a new one each epoch")

    batch_size: int = option("batch", 8, "B, the sequences of a micro-batch", "SEQUENCES", must="at least 1")
    tokens_per_step: int = option(
        "batch", 0, "tokens of an update: gradients accumulate over TOKENS / (B T) micro-batches; 0: B T", "TOKENS")
    steps: int = option("batch", 0, "the number of updates; 0: as many as --epochs needs", "STEPS", free=True)
    epochs: float = option("batch", 1.0, "passes over the data, if --steps is 0", "EPOCHS", must="above 0", free=True)
    overfit: bool = option("batch", False, "train on the first batch only: its loss must approach 0")

    learning_rate: float = option("optimiser", 3e-4, "the peak learning rate", "RATE")
    schedule: str = option(
        "optimiser", "cosine", "how the learning rate falls after the warm-up: cosine, linear, constant (not at all), "
        f"or wsd (only over the last {WSD_DECAY:.0%} of the steps)", choices=SCHEDULES)
    warmup: int = option("optimiser", 0, "steps over which the learning rate first rises to its peak", "STEPS")
    final_fraction: float = option(
        "optimiser", 0.1, "the last learning rate, relative to the peak", "FRACTION", must="at least 0 and at most 1")
    beta1: float = option(
        "optimiser", 0.9, "AdamW: decay of the mean of the gradients", "BETA", must="at least 0 and below 1", rare=True)
    beta2: float = option(
        "optimiser", 0.95, "AdamW: decay of the mean of squares", "BETA", must="at least 0 and below 1", rare=True)
    eps: float = option("optimiser", 1e-8, "AdamW: added to the denominator", "EPS", must="above 0", rare=True)
    weight_decay: float = option("optimiser", 0.1, "AdamW: weight decay of matrices, not of biases", "RATE")
    grad_clip: float = option("optimiser", 1.0, "scale larger gradients down to this norm; 0: never", "NORM")
    skip_loss_z: float = option(
        "optimiser", 0.0, "skip an update whose loss is more than Z standard deviations above the mean of the last "
        f"{WINDOW} steps; 0: never", "Z", rare=True)
    skip_norm_z: float = option("optimiser", 0.0, "the same for the norm of the gradients; 0: never", "Z", rare=True)

    val_every: int = option("logging", 50, "steps between validations; 0: only at the end", "STEPS")
    val_batches: int = option("logging", 20, "batches of a validation", "BATCHES", must="at least 1")
    eval_every: int = option("logging", 0, "steps between tests on all of HellaSwag; 0: no test", "STEPS")
    eval_data: str = option(
        "logging", "", "HellaSwag as JSON lines; default: what llm-numba data hellaswag downloads", "FILE", rare=True)
    sample_every: int = option("logging", 0, "steps between samples of text; 0: only at the end", "STEPS")
    sample_tokens: int = option("logging", 64, "length of a sample; 0: no samples", "TOKENS")
    checkpoint_every: int = option("logging", 100, "steps between checkpoints; 0: only at the end", "STEPS")
    keep: int = option("logging", 3, "how many of the last checkpoints to keep", "N", must="at least 1")
    keep_every: int = option("logging", 0, "keep each STEPS-th step's checkpoint permanently", "STEPS", rare=True)
    track: str = option(
        "logging", "none", "send the log to a tracker too: tensorboard (into the run folder), wandb or trackio",
        choices=("none", "tensorboard", "wandb", "trackio"))

    no_jit: bool = option("debugging", False, "run every op as plain Python, for a debugger; slow: use --preset nano")
    interpret: tuple = option(
        "debugging", (), "run these layers (layernorm) or ops (layernorm_backward) as plain Python", "NAME")
    use: tuple = option(
        "debugging", (), "replace ops with functions of yours: OP=MODULE:NAME, such as "
        "matmul_forward=llm_numba.cpu.naive:matmul_forward, or a .py file as MODULE; on the first batch the run prints "
        "both timings and the error", "OP=MODULE:NAME")
    check_finite: bool = option(
        "debugging", False, "stop at the first nan or infinity, name its layer, tensor, index and step, and save that "
        "step for llm-numba replay (slow)")
    # fmt: on


FIELDS = {f.name: f for f in fields(Settings)}


def parse(argv: list[str]) -> tuple[Settings, set[str]]:
    """The settings that a command line asks for, and the names of those that it gives explicitly. Errors: UserError for
    an unknown flag, or a value of the wrong type or choice. `check` comes later: a resumed run may bring other values.
    """
    typed, unknown = _parser("--help-all" in argv).parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], map(_flag, FIELDS), 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown argument {shlex.quote(unknown[0])}{hint} (--help-all lists them all)")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(typed).items()}
    defaults = INIT_DEFAULTS if given.get("init") else PRESET_DEFAULTS.get(given.get("preset", Settings.preset), {})
    asked = _change(Settings(**defaults), given)
    if "warmup" not in given and asked.steps:  # a run shorter than the preset's has a shorter warm-up
        asked = replace(asked, warmup=min(asked.warmup, asked.steps // 10))
    return asked, set(given)


def check(settings: Settings) -> None:
    """Raise a UserError that names the flag, its value and what was expected, unless every value makes sense."""
    s = settings
    for name in ("preset", *SIZES) if s.init else ():
        if value := getattr(s, name):
            problem = f"the model's sizes come with --init {s.init}; leave {_flag(name)} out"
            raise UserError(f"{_typed(name, value)}: {problem}")
    for name, value in asdict(s).items():
        choices, must = FIELDS[name].metadata["choices"], FIELDS[name].metadata["must"]
        problem = None
        if isinstance(value, float) and not math.isfinite(value):
            problem = "must be a finite number"
        elif must and not RANGES[must](value):
            problem = f"must be {must}"
        elif type(value) is int and value > LARGEST and name != "tokens_per_step":
            problem = f"must be at most {LARGEST}"
        elif choices and value not in choices:
            problem = f"choose one of {', '.join(choices)}"
        if problem:
            raise UserError(f"{_typed(name, value)}: {problem}")
    if not s.init:
        check_lengths(s, preset_model(s).max_seq_len)

    kind, cores = tokenizer_kind(s), len(usable_cpus())
    low, high = VOCAB_SIZES.get(kind, (0, 0))
    interpreted = next((name for name in s.interpret if name not in {*CONTRACT, *WRITES}), None)
    near = (difflib.get_close_matches(interpreted or "", [*CONTRACT, *WRITES], 1) or ["layernorm_backward"])[0]
    # fmt: off
    for wrong, message in (
        (s.threads > cores, f"--threads {s.threads}: this process may use {cores} cores; give 1 to {cores}, or 0"),
        (s.device.startswith("cuda") and (s.no_jit or s.interpret),
         f"--{'no-jit' if s.no_jit else 'interpret'}: is for --device cpu; to step into a CUDA kernel use --device "
         "cudasim"),
        (s.dtype == "bf16" and s.device == "cpu",
         "--dtype bf16: the CPU computes in float32 only; use --dtype fp32, or --device cuda"),
        (s.stochastic_rounding and s.dtype != "bf16",
         "--stochastic-rounding: is for --dtype bf16; fp32 parameters need no rounding"),
        (s.steps and s.warmup > s.steps, f"--warmup {s.warmup}: must be at most --steps, which is {s.steps}"),
        (s.init and kind == "bpe",
         f"--tokenizer bpe: would train a tokenizer that the weights of --init {s.init} do not know; leave it out"),
        (s.vocab_size and kind not in VOCAB_SIZES,
         f"--vocab-size {s.vocab_size}: is for --tokenizer bpe or none; the vocabulary of {s.init or kind} is fixed"),
        (s.vocab_size and not low <= s.vocab_size <= high,
         f"--vocab-size {s.vocab_size}: with --tokenizer {kind} it must be {low} to {high}"),
        (s.eval_every and kind == "none",
         f"--eval-every {s.eval_every}: HellaSwag is text, which --tokenizer none cannot encode"),
        (interpreted is not None,
         f"--interpret {shlex.quote(interpreted or '')}: choose layers ({', '.join(CONTRACT)}) or ops, such as {near}"),
    ):
        if wrong:
            raise UserError(message)
    # fmt: on
    for value in s.use:
        split(value)


def check_lengths(settings: Settings, context: int) -> None:
    """The part of `check` that depends on the model's context; with `--init` that is known once the source is open."""
    s = settings
    if s.sequence_length > context:
        source = f"--init {s.init}" if s.init else f"--preset {s.preset}"
        problem = f"the context of {source} is {context}; give 1 to {context}"
        raise UserError(f"--sequence-length {s.sequence_length}: {problem}")
    T = s.sequence_length or context
    micro_batch = s.batch_size * T
    if s.tokens_per_step % micro_batch:
        below = s.tokens_per_step // micro_batch * micro_batch
        nearest = f"{below} or {below + micro_batch}" if below else micro_batch
        raise UserError(
            f"--tokens-per-step {s.tokens_per_step}: must be a multiple of B T, batch size times sequence length "
            f"({s.batch_size} x {T} = {micro_batch}), such as {nearest}"
        )


def tokenizer_kind(settings: Settings) -> str:
    """The tokenizer that `--tokenizer` means: bpe, gpt2, bytes or none. auto depends on the preset; with `--init` it is
    "init", the tokenizer of the weights."""
    auto = "init" if settings.init else AUTO_TOKENIZER.get(settings.preset, "gpt2")
    return auto if settings.tokenizer == "auto" else settings.tokenizer


def preset_model(settings: Settings) -> Model:
    """The model that `--preset`, its sizes, `--tokenizer` and `--vocab-size` ask for, if there is no `--init`."""
    changes = {size: getattr(settings, flag) for flag, size in SIZES.items() if getattr(settings, flag)}
    vocab_size = FIXED_VOCABULARIES.get(tokenizer_kind(settings)) or settings.vocab_size
    return preset(settings.preset, **changes, **({"vocab_size": vocab_size} if vocab_size else {}))


def resume_with(recorded: Settings, given: Settings, explicit: set[str]) -> Settings:
    """The settings of a resumed run: those it was started with, changed by what `parse` returned (given, explicit).
    Errors: UserError for an explicit setting that differs and is not free. The result is not checked yet."""
    once = {name: getattr(given, name) for name, f in FIELDS.items() if f.metadata["once"]}
    if "dtype" in explicit and given.dtype == "fp32":  # which has nothing to round
        recorded = replace(recorded, stochastic_rounding=False)
    changes = {name: getattr(given, name) for name in FIELDS if name in explicit}
    for name, value in changes.items():
        before = getattr(recorded, name)
        if value != before and not FIELDS[name].metadata["free"]:
            raise UserError(
                f"{_typed(name, value)}: the run was started {_typed(name, before, prefix='with ')}, which cannot "
                f"change on resume; leave {_flag(name)} out, or start a new run without --resume"
            )
    return _change(recorded, {**once, **changes})


def to_record(settings: Settings) -> dict:
    """The settings as JSON types, for the run folder's settings.json and for checkpoints."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}


def from_record(record: dict, source: str | Path) -> Settings:
    """The settings that `to_record` made into `record`; one that is missing, as in older versions, has its default.
    Errors: UserError, which names the file `source`, for an unknown key or a value of another type."""
    if not isinstance(record, dict):
        raise UserError(f"{source}: expected a JSON object of settings, found {record!r:.40}")
    if unknown := sorted(record.keys() - FIELDS.keys()):
        raise UserError(f"{source}: unknown settings {', '.join(unknown)}: another version wrote them, or an edit")
    values = {}
    for name, value in record.items():
        kind = FIELDS[name].type
        if kind is float and type(value) is int and abs(value) <= LARGEST:
            value = float(value)
        elif kind is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = tuple(value)
        if type(value) is not kind:
            raise UserError(f"{source}: {name} is {value!r:.40}, expected {KINDS[kind]}")
        values[name] = value
    return Settings(**values)


def _change(settings: Settings, changes: dict) -> Settings:
    """`settings` with `changes`; epochs without steps replace a number of steps."""
    if "epochs" in changes and "steps" not in changes:
        changes = {**changes, "steps": 0}
    return replace(settings, **changes)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _typed(name: str, value, prefix: str = "") -> str:
    """A setting as typed: `--batch-size 8`, `--no-shuffle`, `without --overfit`."""
    flag = _flag(name)
    if value is False and FIELDS[name].default is True:
        return f"{prefix}--no-{name.replace('_', '-')}"
    if value is False or value in ("", ()):
        return f"without {flag}"
    if value is True:
        return prefix + flag
    return f"{prefix}{flag} {shlex.join(value) if isinstance(value, tuple) else shlex.quote(str(value))}"


def _parser(all_flags: bool) -> argparse.ArgumentParser:
    parser = Parser(
        prog="llm-numba train",
        usage="%(prog)s [options]",
        description="Train a language model. Without options: a small GPT-2 on the Python standard library's sources.\n"
        "\n"
        "  %(prog)s --preset nano\n"
        "  %(prog)s --data book.txt --batch-size 16\n"
        "  %(prog)s --resume runs/tiny-000 --epochs 2",
        epilog=COLUMNS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # only what is given explicitly shows up in the result
        allow_abbrev=False,
    )
    parser.add_argument("--help-all", action="help", help="show all settings, the rare ones too")
    groups = {}
    for name, f in FIELDS.items():
        meta = f.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction if f.default else "store_true")
        elif f.type is tuple:
            kind = dict(action="extend", nargs="+", metavar=meta["unit"])
        elif meta["choices"] or name == "preset":
            kind = dict(choices=meta["choices"] or tuple(presets()))
        else:
            kind = dict(type=f.type, metavar=meta["unit"])
        shown = all_flags or not meta["rare"]
        help = _help(name).replace("%", "%%") if shown else argparse.SUPPRESS
        groups[meta["group"]].add_argument(_flag(name), help=help, **kind)
    return parser


def _help(name: str) -> str:
    """The help of a setting, with its default, those of the presets, and whether a resumed run may change it."""
    f = FIELDS[name]
    words = {"True": "on", "False": "off", "": "none", "()": "none"}
    defaults = [words.get(str(f.default), str(f.default))]
    defaults += [f"{preset} {d[name]}" for preset, d in PRESET_DEFAULTS.items() if name in d]
    defaults += [f"--init {INIT_DEFAULTS[name] or 'none'}"] if name in INIT_DEFAULTS else []
    free = "; may change on resume" if f.metadata["free"] and not f.metadata["once"] else ""
    return f"{f.metadata['help']} (default: {', '.join(defaults)}{free})"
