"""Compile every op before the first step, with a progress bar: a step that takes 20 seconds would look like a hang."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
from tqdm import tqdm

from llm_numba.arena import Arena
from llm_numba.models import Model, model_of
from llm_numba.ops import CONTRACT, WRITES, Ops, get_ops
from llm_numba.training.generate import CHUNK, Choice, generate, generation_groups, generation_step
from llm_numba.training.memory_plan import complete, run_groups
from llm_numba.training.settings import Settings
from llm_numba.training.step import training_step

SLOWEST = CONTRACT["attention"].keys()  # to compile, on a CPU


def precompile(ops: Ops, model: Model, s: Settings) -> float:
    """Run a training step and generate a token with the smallest model of the kind; returns the seconds it took.

    Numba compiles a function for types, and on a GPU for a head size, so this compiles everything that a run of any
    size calls. Numba stores the result on disk; the next start only loads it. If nothing is stored yet, a second
    process compiles attention, on a CPU the largest part of the work, at the same time.
    """
    start = time.perf_counter()
    with progress_bar(len(WRITES)) as bar:
        announced = ops.wrap(lambda name, op: announce(name, op, bar))
        if ops.nothing_compiled():
            record = json.dumps({"model": model.name, "config": asdict(model)})
            command = [sys.executable, "-m", "llm_numba.training.precompile", record]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
                try:
                    run_everything(only(announced, WRITES.keys() - SLOWEST), model, s)
                    other.wait()
                finally:
                    other.kill()
        run_everything(announced, model, s)
    return time.perf_counter() - start


def precompile_generation(ops: Ops, model: Model, dtype: str) -> None:
    """Compile what generating text calls."""
    small = model.miniature(CHUNK + 1)
    with progress_bar(None) as bar:
        announced = ops.wrap(lambda name, op: announce(name, op, bar))
        groups = {"parameters": small.parameters()} | generation_groups(small)
        arena = Arena(complete(groups, small, ops, dtype, generation_step), small, "reuse", ops)
        generation_step(announced, arena)


def progress_bar(total: int | None):
    return tqdm(total=total, desc="compiling (once on this machine)", unit="op", leave=False, disable=None)


def only(ops: Ops, names) -> Ops:
    """The same ops, but those that are not among `names` do nothing."""
    return ops.replace(**{name: lambda *_: None for name in WRITES if name not in names})


def run_everything(ops: Ops, model: Model, s: Settings) -> None:
    """Call every op that training and generation call, with the types that they use."""
    small, T = model.miniature(CHUNK + 1), CHUNK
    s = replace(s, batch_size=1, tokens_per_step=0)
    arena = Arena(run_groups(s, small, T, ops), small, "reuse", ops)
    m = arena.training(s.recompute)
    ops.to_device(m.step, 1)
    training_step(ops, small, m, s)
    list(islice(generate(ops, arena, [0] * T, Choice(temperature=1.0, top_p=1.0), np.random.default_rng(0)), 2))


def announce(name: str, op, bar):
    """The op; its first call names it in the progress bar."""
    seen = []

    def call(*arguments):
        if not seen:
            bar.set_postfix_str(name)
        op(*arguments)
        if not seen:
            bar.update()
            seen.append(True)

    return call


if __name__ == "__main__":
    run_everything(only(get_ops("cpu"), SLOWEST), model_of(json.loads(sys.argv[1])), Settings())
