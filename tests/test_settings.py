"""The command line, its help, the record and the resume check all say what the dataclass says."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from llm_numba.models import presets
from llm_numba.training import settings as module
from llm_numba.training.settings import (
    FIELDS,
    PRESET_DEFAULTS,
    RANGES,
    Settings,
    check,
    check_lengths,
    from_record,
    parse,
    preset_model,
    resume_with,
    to_record,
    tokenizer_kind,
)
from llm_numba.util.cli import UserError

FLAGS = {name: "--" + name.replace("_", "-") for name in FIELDS}
# a command line that gives every setting, none its default
EVERYTHING = (
    "--out a/b --resume old --seed 7 --threads 1 --plan-memory --preset nano --init gpt2 --sequence-length 16 --data "
    "x.txt y --val-data z --tokenizer bpe --vocab-size 300 --val-fraction 0.1 --no-shuffle --batch-size 3 "
    "--tokens-per-step 96 --steps 97 --epochs 2.5 --overfit --learning-rate 1e-2 --schedule wsd --warmup 3 "
    "--final-fraction 0 --beta1 0.8 --beta2 0.99 --eps 1e-6 --weight-decay 0 --grad-clip 0 --skip-loss-z 5 "
    "--skip-norm-z 6 --val-every 1 --val-batches 3 --eval-every 2 --eval-data h --sample-every 4 --sample-tokens 5 "
    "--checkpoint-every 6 --keep 7 --keep-every 8 --no-jit --interpret layernorm matmul_backward --use "
    "gelu_forward=a:b --check-finite --track wandb --device cpu --dtype bf16 --stochastic-rounding --recompute gelu "
    "--no-graph --variant matmul=simt --layers 3 --heads 4 --channels 32"
).split()


def error_of(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.fixture
def help_of(capsys, monkeypatch):
    """flag -> what --help-all says about it, on one line."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as left:
        parse(["--help-all"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    entries = re.split(r"\n  (?=--)", text)[1:]
    flags = [re.match(r"--[\w-]+", entry)[0] for entry in entries]
    assert sorted(flags) == sorted(set(flags)), "a flag is told twice"
    return dict(zip(flags, (" ".join(entry.split()) for entry in entries), strict=True))


def test_help_tells_each_flag_once_with_its_default(help_of):
    examples = {"--preset nano --steps", "--data book.txt", "--resume runs"}  # the description's lines start otherwise
    assert not examples & help_of.keys()
    assert set(help_of) == {*FLAGS.values(), "--help-all"}
    for name, flag in FLAGS.items():
        default, text = FIELDS[name].default, help_of[flag]
        if isinstance(default, bool):
            default = "on" if default else "off"
        shown = re.search(r"\(default: ([^,;)]+)([^;)]*)(; may change on resume)?\)", text)
        assert shown and shown[1] == str(default if default not in ("", ()) else "none"), text
        assert bool(shown[3]) == (FIELDS[name].metadata["free"] and not FIELDS[name].metadata["once"]), text
        for preset, defaults in PRESET_DEFAULTS.items():
            assert (f", {preset} {defaults.get(name)}" in shown[2]) == (name in defaults), text
        for choice in FIELDS[name].metadata["choices"]:
            assert choice in text


def test_help_leaves_out_the_rare_flags(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for name, flag in FLAGS.items():
        assert bool(re.search(rf"^  {flag}\b", text, re.MULTILINE)) != FIELDS[name].metadata["rare"], name
    assert "--help-all" in text


def test_every_setting_is_described():
    for name, f in FIELDS.items():
        meta = f.metadata
        assert len(meta["help"]) > 10, name
        assert type(f.default) is f.type, name
        if not (f.type is bool or meta["choices"]):
            assert meta["unit"], f"{name} has no unit"
        if f.type in (int, float):
            assert meta["must"] in RANGES and RANGES[meta["must"]](f.default), name


def test_presets_have_known_defaults():
    assert PRESET_DEFAULTS.keys() <= presets().keys()
    for preset in presets():
        assert PRESET_DEFAULTS.get(preset, {}).keys() <= FIELDS.keys()
        check(parse(["--preset", preset])[0])


def test_without_flags_the_dataclass_defaults():
    assert parse([]) == (Settings(**PRESET_DEFAULTS["tiny"]), set())
    assert parse(["--preset", "d12"]) == (Settings(preset="d12", **PRESET_DEFAULTS.get("d12", {})), {"preset"})


def test_every_flag_reaches_its_field():
    settings, explicit = parse(EVERYTHING)
    assert explicit == FIELDS.keys()
    assert all(getattr(settings, name) != FIELDS[name].default for name in explicit)
    assert settings.data == ("x.txt", "y") and settings.interpret == ("layernorm", "matmul_backward")
    assert (settings.learning_rate, settings.epochs, settings.shuffle, settings.out) == (1e-2, 2.5, False, "a/b")
    # bf16 does not go with --no-jit, nor --init with --preset
    check(replace(settings, dtype="fp32", stochastic_rounding=False, init=""))
    with pytest.raises(UserError, match="leave --preset out"):
        check(settings)


def test_a_flag_with_its_default_is_explicit():
    assert parse(["--seed", "42", "--shuffle"])[1] == {"seed", "shuffle"}
    assert parse(["--data", "a", "--data", "b", "c"])[0].data == ("a", "b", "c")


def test_preset_defaults_give_way_to_flags(monkeypatch):
    monkeypatch.setitem(module.PRESET_DEFAULTS, "nano", {"batch_size": 5, "steps": 300})
    nano = ["--preset", "nano"]
    assert (parse(nano)[0].batch_size, parse(nano)[0].steps) == (5, 300)
    assert parse(["--preset", "d12"])[0].batch_size == FIELDS["batch_size"].default
    assert parse([*nano, "--batch-size", "8"])[0].batch_size == 8
    # whoever asks for epochs gets epochs, and does not get the preset's steps
    assert parse([*nano, "--epochs", "3"])[0].steps == 0
    assert parse([*nano, "--epochs", "3", "--steps", "7"])[0].steps == 7


@pytest.mark.parametrize(
    "line, words",
    [
        ("--batchsize 3", ["--batchsize", "--batch-size", "--help"]),
        ("--batch-siz=3", ["--batch-siz", "--batch-size"]),  # no abbreviations
        ("book.txt", ["book.txt"]),
        ("--batch-size eight", ["--batch-size", "'eight'", "int"]),
        ("--batch-size 8.0", ["--batch-size", "'8.0'", "int"]),
        ("--learning-rate fast", ["--learning-rate", "'fast'", "float"]),
        ("--batch-size", ["--batch-size", "expected one argument"]),
        ("--data", ["--data", "expected at least one"]),
        ("--preset tny", ["--preset", "'tny'", *presets()]),
        ("--schedule step", ["--schedule", "'step'", "cosine", "linear", "constant", "wsd"]),
        ("--device tpu", ["--device", "'tpu'", "auto", "cpu", "cuda", "cudasim"]),
        ("--dtype fp16", ["--dtype", "'fp16'", "fp32", "bf16"]),
        ("--overfit=yes", ["--overfit", "'yes'"]),
    ],
)
def test_parse_errors(line, words):
    message = error_of(parse, line.split())
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "line, words",
    [
        ("--seed -1", ["--seed -1", "at least 0"]),
        ("--threads 100000", ["--threads 100000", "cores", "or 0"]),
        ("--threads -1", ["--threads -1", "at least 0"]),
        ("--sequence-length 129", ["--sequence-length 129", "tiny", "1 to 128"]),
        ("--batch-size 0", ["--batch-size 0", "at least 1"]),
        ("--tokens-per-step 1000 --batch-size 8", ["--tokens-per-step 1000", "8 x 128 = 1024", "such as 1024"]),
        ("--tokens-per-step 5000 --batch-size 8", ["--tokens-per-step 5000", "such as 4096 or 5120"]),
        (
            "--tokens-per-step 100 --batch-size 3 --sequence-length 32",
            ["--tokens-per-step 100", "3 x 32 = 96", "such as 96 or 192"],
        ),
        ("--steps -3", ["--steps -3"]),
        ("--epochs 0", ["--epochs 0.0", "above 0"]),
        ("--epochs inf", ["--epochs inf", "finite"]),
        ("--learning-rate nan", ["--learning-rate nan", "finite"]),
        ("--learning-rate -1", ["--learning-rate -1.0", "at least 0"]),
        ("--batch-size 99999999999999999999", ["--batch-size 99999999999999999999", "at most 2147483647"]),
        ("--layers -1", ["--layers -1", "at least 0"]),
        ("--channels 100", ["channels (100)", "num_heads (3)"]),
        ("--init gpt2 --heads 4", ["--heads 4", "--init gpt2", "leave --heads out"]),
        ("--warmup 11 --steps 10", ["--warmup 11", "--steps", "10"]),
        ("--final-fraction 1.5", ["--final-fraction 1.5", "at most 1"]),
        ("--beta1 1", ["--beta1 1.0", "below 1"]),
        ("--val-fraction 0", ["--val-fraction 0.0", "above 0"]),
        ("--keep 0", ["--keep 0", "at least 1"]),
        ("--vocab-size 300 --preset nano", ["--vocab-size 300", "bytes"]),
        ("--vocab-size 300 --tokenizer gpt2", ["--vocab-size 300", "gpt2", "bpe"]),
        ("--vocab-size 256", ["--vocab-size 256", "bpe", "257 to 2147483520"]),
        ("--vocab-size 2147483600 --tokenizer none", ["--vocab-size 2147483600", "none", "1 to 2147483520"]),
        ("--device cuda --no-jit", ["--no-jit", "--device cpu", "cudasim"]),
        ("--device cudasim --interpret gelu", ["--interpret", "--device cpu", "cudasim"]),
        ("--device cpu --dtype bf16", ["--dtype bf16", "float32", "--device cuda"]),
        ("--stochastic-rounding", ["--stochastic-rounding", "--dtype bf16"]),
        ("--init gpt2 --preset d12", ["--preset d12", "--init gpt2", "leave --preset out"]),
        ("--init gpt2 --vocab-size 300", ["--vocab-size 300", "gpt2"]),
        ("--init x.bin --tokenizer bpe", ["--tokenizer bpe", "--init x.bin"]),
        ("--interpret matmul layernrm", ["--interpret layernrm", "encoder", "adamw", "such as layernorm"]),
    ],
)
def test_check_errors(line, words):
    message = error_of(check, parse(line.split())[0])
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "line",
    [
        "--tokens-per-step 5120 --batch-size 8",
        "--tokens-per-step 96 --batch-size 3 --sequence-length 32",
        "--sequence-length 128",
        "--warmup 10 --steps 10",
        "--warmup 10",
        "--threads 1",
        "--vocab-size 257",
        "--vocab-size 128256 --tokenizer none",
        "--final-fraction 1 --beta1 0 --epochs 0.01",
        "--interpret encoder attention_cached_forward",
    ],
)
def test_check_lets_the_bounds_pass(line):
    check(parse(line.split())[0])


def test_check_sees_a_choice_that_no_command_line_let_through():
    assert "unknown preset 'big': choose one of nano" in error_of(check, replace(Settings(), preset="big"))
    assert "--device tpu: choose one of auto" in error_of(check, replace(Settings(), device="tpu"))


def test_auto_tokenizer():
    kinds = {preset: tokenizer_kind(Settings(preset=preset)) for preset in presets()}
    assert kinds == dict(nano="bytes", tiny="bpe", d12="gpt2", d24="gpt2", d36="gpt2", d48="gpt2")
    assert tokenizer_kind(Settings(preset="d12", tokenizer="bpe")) == "bpe"
    assert tokenizer_kind(Settings(preset="", init="x")) == "init"


def test_init_takes_the_place_of_the_preset():
    settings, explicit = parse("--init gpt2 --steps 20".split())
    check(settings)
    assert (settings.preset, settings.learning_rate, settings.warmup, explicit) == ("", 3e-5, 0, {"init", "steps"})
    assert settings.batch_size == FIELDS["batch_size"].default  # tiny's is another
    assert parse("--init gpt2 --learning-rate 1e-4".split())[0].learning_rate == 1e-4
    assert from_record(to_record(settings), "settings.json") == settings


@pytest.mark.parametrize(
    "line, words",
    [
        ("--init x --sequence-length 65", ["--sequence-length 65", "--init x", "1 to 64"]),
        ("--init x --tokens-per-step 1000", ["--tokens-per-step 1000", "8 x 64 = 512", "512 or 1024"]),
    ],
)
def test_lengths_are_those_of_the_source(line, words):
    settings = parse(line.split())[0]
    check(settings)
    message = error_of(check_lengths, settings, 64)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "line, vocab_size",
    [("", 2048), ("--vocab-size 300", 300), ("--tokenizer bytes", 257), ("--preset d12 --tokenizer none", 50257)],
)
def test_the_config_of_a_preset(line, vocab_size):
    settings = parse(line.split())[0]
    assert preset_model(settings) == replace(presets()[settings.preset], vocab_size=vocab_size)


@pytest.mark.parametrize("argv", [[], EVERYTHING])
def test_record_round_trip(argv):
    settings = parse(argv)[0]
    record = json.loads(json.dumps(to_record(settings)))
    assert from_record(record, "settings.json") == settings
    assert list(record) == list(FIELDS)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"colour": 1}, ["unknown", "colour"]),
        ({"batch_size": None}, ["batch_size", "None", "integer"]),
        ({"batch_size": 8.0}, ["batch_size", "8.0", "integer"]),
        ({"batch_size": True}, ["batch_size", "True", "integer"]),
        ({"shuffle": 1}, ["shuffle", "1", "true or false"]),
        ({"preset": 3}, ["preset", "3", "string"]),
        ({"data": "x"}, ["data", "'x'", "list"]),
        ({"data": [1]}, ["data", "[1]", "list"]),
        ({"eps": "1e-8"}, ["eps", "number"]),
    ],
)
def test_record_errors(change, words):
    message = error_of(from_record, to_record(Settings()) | change, "runs/x/settings.json")
    assert all(word in message for word in ["runs/x/settings.json", *words]), message


def test_record_without_a_key_or_no_record():
    record = to_record(Settings())
    del record["seed"], record["keep"]  # as if an older version had written it
    assert from_record(record | {"steps": 7}, "settings.json") == Settings(steps=7)
    assert "settings.json: expected" in error_of(from_record, [1], "settings.json")
    assert from_record(to_record(Settings()) | {"epochs": 2}, "settings.json") == Settings(epochs=2.0)


def resumed(started, then):
    return resume_with(parse(started.split())[0], *parse(then.split()))


def test_resume_takes_over_what_was_recorded():
    recorded = parse(EVERYTHING)[0]
    settings = resume_with(recorded, *parse(["--resume", "runs/a"]))
    # what holds for one start only is back at its default
    assert settings == replace(
        recorded, resume="runs/a", plan_memory=False, no_jit=False, interpret=(), use=(), check_finite=False, variant=()
    )
    assert resume_with(recorded, *parse(EVERYTHING)) == recorded


def test_resume_changes_what_is_free():
    settings = resumed("--steps 10 --seed 3", "--resume x --steps 20 --val-every 7 --no-jit --threads 1")
    assert (settings.steps, settings.val_every, settings.no_jit, settings.threads) == (20, 7, True, 1)
    assert settings.seed == 3
    # longer by epochs: the recorded steps would hide them
    assert (resumed("--steps 10", "--epochs 3").steps, resumed("--steps 10", "--epochs 3").epochs) == (0, 3.0)


def test_which_settings_are_free():
    free = {name for name, f in FIELDS.items() if f.metadata["free"]}
    groups = {name for name, f in FIELDS.items() if f.metadata["group"] in ("logging", "debugging")}
    assert free == groups | {
        "resume", "threads", "plan_memory", "steps", "epochs", "data", "val_data", "variant",
        "device", "dtype", "stochastic_rounding", "recompute", "graph",
    }  # fmt: skip


@pytest.mark.parametrize(
    "started, then, words",
    [
        ("--batch-size 4", "--batch-size 16", ["--batch-size 16", "with --batch-size 4", "leave --batch-size out"]),
        ("", "--no-shuffle", ["--no-shuffle", "with --shuffle", "leave --shuffle out"]),
        ("", "--overfit", ["--overfit", "without --overfit"]),
        ("", "--vocab-size 300", ["--vocab-size 300", "with --vocab-size 0"]),
        ("--preset nano", "--preset tiny", ["--preset tiny", "with --preset nano", "new run without --resume"]),
    ],
)
def test_resume_errors(started, then, words):
    message = error_of(resumed, started, then)
    assert all(word in message for word in words), message


def test_numba_is_not_imported():
    code = (
        "import sys, llm_numba.training.settings, llm_numba.training.schedule\n"
        "import llm_numba.training.outliers, llm_numba.training.checkpoint\n"
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_presets_warmup_gives_way_to_a_shorter_run():
    assert parse([])[0].warmup == PRESET_DEFAULTS["tiny"]["warmup"]
    assert parse(["--steps", "20"])[0].warmup == 2
    settings, _ = parse(["--steps", "20", "--warmup", "30"])
    assert settings.warmup == 30
    assert "--warmup 30" in error_of(check, settings)


def test_a_run_with_stochastic_rounding_goes_on_where_there_is_no_bf16():
    recorded = parse("--device cuda --dtype bf16 --stochastic-rounding".split())[0]
    there = resume_with(recorded, *parse("--resume run --device cpu --dtype fp32".split()))
    check(there)
    assert (there.device, there.dtype, there.stochastic_rounding) == ("cpu", "fp32", False)
    here = resume_with(recorded, *parse("--resume run".split()))
    assert (here.dtype, here.stochastic_rounding) == ("bf16", True)
    back = resume_with(there, *parse("--resume run --device cuda --dtype bf16 --stochastic-rounding".split()))
    check(back)
    assert back.stochastic_rounding
