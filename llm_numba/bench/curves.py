"""Compare loss curves with PyTorch's: python -m llm_numba.bench.curves --preset d12 --steps 200

Trains the same model on the same batches from the same weights with llm_numba and with PyTorch, in float32 and in bf16
(PyTorch: autocast with float32 parameters; llm_numba: bf16 parameters with float32 master weights).
Correct programs differ only by rounding, but the difference grows during training. The distance between PyTorch's own
float32 and bf16 curves shows how much is normal.
"""

import json
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llm_numba.arena import Arena
from llm_numba.bench.races import sizes_of
from llm_numba.bench.tables import table
from llm_numba.bench.worker import Build, WorkerFailed, require_torch, torch_worker
from llm_numba.data import corpus as data
from llm_numba.data.loader import Loader
from llm_numba.models import Model, preset
from llm_numba.ops import DEVICES, choose_device, get_ops
from llm_numba.training import settings
from llm_numba.training.memory_plan import check_memory, run_groups
from llm_numba.training.schedule import learning_rate
from llm_numba.training.settings import Settings
from llm_numba.training.step import exact_parameters, initialise, training_step
from llm_numba.util.cli import Parser, UserError, exit_with

AVERAGED = 20  # steps per line of the table


def our_step(ops, model: Model, s: Settings, T: int):
    """(a function (batch, learning rate, step) that trains and returns the loss, the initial weights)."""
    groups = run_groups(s, model, T, ops)
    check_memory(groups, s, model, ops)
    arena = Arena(groups, model, "reuse", ops)
    m = arena.training(s.recompute)
    initialise(ops, arena, s.seed)
    ops.to_device(m.limits, np.inf)
    run = ops.capture(partial(training_step, ops, model, m, s))

    def step(batch, rate, number):
        ops.to_device(m.batches, batch[None])
        ops.to_device(m.learning_rate, rate)
        ops.to_device(m.step, number)
        run()
        return float(ops.to_host(m.loss)[0])

    return step, {name: ops.to_host(x) for name, x in exact_parameters(arena).items()}


def curves(device: str, model: Model, s: Settings, dtypes: list[str], corpus, folder: Path) -> dict:
    """ "ours fp32", "PyTorch fp32", ... -> the loss of every step."""
    T, found = s.sequence_length or model.max_seq_len, {}
    for dtype in dtypes:
        ops = get_ops(device, dtype)
        step, weights = our_step(ops, model, replace(s, dtype=dtype), T)
        np.savez(folder / "weights.npz", **weights)
        build = Build("cpu" if device == "cpu" else "cuda", "autocast" if dtype == "bf16" else dtype)
        with torch_worker(build) as ask:
            ask("start", threads=s.threads or 2, device=build.device, precision=build.precision)
            ask(
                "prepare_training", config=sizes_of(model), weights=str(folder / "weights.npz"),
                **{name: getattr(s, name) for name in ("beta1", "beta2", "eps", "weight_decay", "grad_clip")},
            )  # fmt: skip
            loader = Loader(corpus.train, s.batch_size, T, s.seed, True)
            batch = np.empty((2, s.batch_size, T), np.int32)
            ours, torch = found.setdefault(f"ours {dtype}", []), found.setdefault(f"PyTorch {dtype}", [])
            for number in tqdm(range(1, s.steps + 1), desc=dtype, leave=False, disable=None):
                loader.next_batch(*batch)
                rate = learning_rate(number - 1, s.steps, s.learning_rate, s.schedule, s.warmup, s.final_fraction)
                np.save(folder / "batch.npy", batch)
                ours.append(step(batch, rate, number))
                torch.append(ask("train", batch=str(folder / "batch.npy"), learning_rate=rate))
    return found


def report(found: dict, device: str) -> str:
    """A Markdown table of mean losses, and the distances between the curves."""
    losses = {name: np.array(values) for name, values in found.items()}
    lines = []
    for last in range(AVERAGED, len(next(iter(losses.values()))) + 1, AVERAGED):
        means = (f"{values[last - AVERAGED : last].mean():.4f}" for values in losses.values())
        lines.append([f"{last - AVERAGED + 1} to {last}", *means])
    text = [f"On {device}; each loss is the mean of {AVERAGED} steps.", "", *table(["steps", *losses], lines), ""]
    for a, b in combinations(losses, 2):
        distance = np.abs(losses[a] - losses[b])
        text.append(f"- {a} and {b}: mean distance per step {distance.mean():.5f}, largest {distance.max():.5f}")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m llm_numba.bench.curves", description="Compare loss curves with PyTorch's.")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: a CUDA GPU if there is one")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32"], help="default: fp32")
    parser.add_argument("--preset", default="nano", help="the model (default: nano)")
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="default: 8")
    parser.add_argument("--sequence-length", type=int, default=0, metavar="T", help="default: the preset's context")
    parser.add_argument("--learning-rate", type=float, default=6e-4, metavar="RATE", help="default: 6e-4")
    parser.add_argument("--out", type=Path, default=Path("runs/curves"), help="folder for curves.json and curves.md")
    args = parser.parse_args(argv)
    require_torch("bench.curves")
    device = choose_device(args.device)
    s = Settings(
        device=device, preset=args.preset, steps=args.steps, batch_size=args.batch_size, seed=1,
        sequence_length=args.sequence_length, learning_rate=args.learning_rate, warmup=args.steps // 10,
    )  # fmt: skip
    settings.check(s)
    args.out.mkdir(parents=True, exist_ok=True)
    model = preset(args.preset)
    kind = "bytes" if args.preset == "nano" else "bpe"
    corpus = data.prepare((), (), kind, model.vocab_size, 0.05)
    model = preset(args.preset, vocab_size=corpus.vocab_size)
    try:
        found = curves(device, model, s, args.dtype, corpus, args.out)
    except WorkerFailed as error:
        raise UserError(f"PyTorch failed: {error}") from error
    text = report(found, get_ops(device).describe_device().removeprefix("on "))
    print(text)
    (args.out / "curves.md").write_text(text + "\n")
    (args.out / "curves.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    exit_with(main)
