"""Loss curves beside PyTorch's: python -m llm_numba.bench.curves --preset d12 --steps 200

Trains the same model on the same batches from the same weights, in turn: ours and PyTorch's, in float32 and in bf16
(there autocast, with parameters in float32; ours keeps such a copy too).
Two correct programs then differ by how they round, and that grows as they train; how far it may grow is what PyTorch's
own two precisions show.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llm_numba.arena import Arena
from llm_numba.bench.races import sizes_of
from llm_numba.bench.worker import Build, WorkerFailed, torch_worker
from llm_numba.data import corpus as data
from llm_numba.data.loader import Loader
from llm_numba.models import gpt2 as model
from llm_numba.models.config import GPT2Config, preset
from llm_numba.ops import DEVICES, choose_device, get_ops
from llm_numba.train import update
from llm_numba.training import settings
from llm_numba.training.memory_plan import all_groups, check_memory
from llm_numba.training.schedule import learning_rate
from llm_numba.training.settings import Settings
from llm_numba.util.cli import Parser, UserError, exit_with

SHOWN = 20  # steps from one line of the table to the next, and the steps over which its losses are averaged


def our_step(ops, config: GPT2Config, s: Settings, T: int):
    """A function (batch, learning rate, step) that trains and returns the loss; and the weights that it starts from."""
    groups = all_groups(s, config, T, ops)
    check_memory(groups, s, config, ops)
    arena = Arena(groups, config, "reuse", ops)
    m = arena.training(s.recompute)
    model.initialise(ops, arena, s.seed)
    ops.to_device(m.limits, np.inf)
    run = ops.capture(partial(update, ops, m, config.vocab_size, s))

    def step(batch, rate, number):
        ops.to_device(m.batches, batch[None])
        ops.to_device(m.learning_rate, rate)
        ops.to_device(m.step, number)
        run()
        return float(ops.to_host(m.loss)[0])

    return step, {name: ops.to_host(x) for name, x in model.exact_parameters(arena).items()}


def curves(device: str, config: GPT2Config, s: Settings, dtypes: list[str], corpus, folder: Path) -> dict:
    """ "ours fp32", "PyTorch fp32" and so on -> the losses of all steps."""
    T, found = s.sequence_length or config.max_seq_len, {}
    for dtype in dtypes:
        ops = get_ops(device, dtype)
        step, weights = our_step(ops, config, replace(s, dtype=dtype), T)
        np.savez(folder / "weights.npz", **weights)
        build = Build("cpu" if device == "cpu" else "cuda", "autocast" if dtype == "bf16" else dtype)
        with torch_worker(build) as ask:
            ask("start", threads=s.threads or 2, device=build.device, precision=build.precision)
            ask(
                "prepare_training", config=sizes_of(config), weights=str(folder / "weights.npz"),
                **{name: getattr(s, name) for name in ("beta1", "beta2", "eps", "weight_decay", "grad_clip")},
            )  # fmt: skip
            loader, batch = (
                Loader(corpus.train, s.batch_size, T, s.seed, True),
                np.empty((2, s.batch_size, T), np.int32),
            )
            ours, theirs = found.setdefault(f"ours {dtype}", []), found.setdefault(f"PyTorch {dtype}", [])
            for number in tqdm(range(1, s.steps + 1), desc=dtype, leave=False, disable=None):
                loader.next_batch(*batch)
                rate = learning_rate(number - 1, s.steps, s.learning_rate, s.schedule, s.warmup, s.final_fraction)
                np.save(folder / "batch.npy", batch)
                ours.append(step(batch, rate, number))
                theirs.append(ask("train", batch=str(folder / "batch.npy"), learning_rate=rate))
    return found


def table(found: dict, device: str) -> str:
    """Means over SHOWN steps, in Markdown, and how far the curves are from one another."""
    losses = {name: np.array(values) for name, values in found.items()}
    lines = [f"On {device}; each loss the mean of {SHOWN} steps.", "", "| steps | " + " | ".join(losses) + " |"]
    lines.append("|---" * (len(losses) + 1) + "|")
    for last in range(SHOWN, len(next(iter(losses.values()))) + 1, SHOWN):
        means = (f"{values[last - SHOWN : last].mean():.4f}" for values in losses.values())
        lines.append(f"| {last - SHOWN + 1} to {last} | " + " | ".join(means) + " |")
    names = list(losses)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    lines.append("")
    for a, b in pairs:
        distance = np.abs(losses[a] - losses[b])
        lines.append(
            f"{a} and {b}: mean distance of a step's losses {distance.mean():.5f}, largest {distance.max():.5f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m llm_numba.bench.curves", description="Loss curves of ours beside those of PyTorch.")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: a CUDA card, or else the CPU")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32"], help="default: fp32")
    parser.add_argument("--preset", default="nano", help="the model's sizes (default: nano)")
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="default: 8")
    parser.add_argument("--sequence-length", type=int, default=0, metavar="T", help="default: the preset's context")
    parser.add_argument("--learning-rate", type=float, default=6e-4, metavar="RATE", help="default: 6e-4")
    parser.add_argument("--out", type=Path, default=Path("runs/curves"), help="folder for curves.json and curves.md")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    s = Settings(
        device=device, preset=args.preset, steps=args.steps, batch_size=args.batch_size, seed=1,
        sequence_length=args.sequence_length, learning_rate=args.learning_rate, warmup=args.steps // 10,
    )  # fmt: skip
    settings.check(s)
    args.out.mkdir(parents=True, exist_ok=True)
    config = preset(args.preset)
    kind = "bytes" if args.preset == "nano" else "bpe"
    corpus = data.prepare((), (), kind, config.vocab_size, 0.05)
    config = preset(args.preset, vocab_size=corpus.vocab_size)
    try:
        found = curves(device, config, s, args.dtype, corpus, args.out)
    except WorkerFailed as error:
        raise UserError(f"PyTorch's side: {error}") from error
    text = table(found, get_ops(device).describe_device().removeprefix("on "))
    print(text)
    (args.out / "curves.md").write_text(text + "\n")
    (args.out / "curves.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    exit_with(main)
