"""Compile every op before the first step, and say so: a step that takes 20 seconds would look like a hang."""

import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from llm_numba import sample
from llm_numba.arena import Arena
from llm_numba.models import gpt2 as model
from llm_numba.models.config import GPT2Config, preset
from llm_numba.ops import CONTRACT, WRITES, get_ops
from llm_numba.training.memory_plan import all_groups
from llm_numba.training.settings import Settings

SMALL = Settings(preset="nano")


def warm_up(ops, config: GPT2Config, s: Settings) -> float:
    """Run a training step and a sampled token of a very small model; returns the seconds that it took.

    Numba compiles a function for types, and for a head's size on a GPU, so that this is all the compiling that a run of
    any size needs; it keeps the results on disk, and the next start only reads them. Where there is nothing to read
    yet, a second process compiles attention, the largest part of the work on a CPU, at the same time.
    """
    start = time.perf_counter()
    with tqdm(total=len(WRITES), desc="compiling (once for this machine)", leave=False, disable=None) as progress:
        told = SimpleNamespace(**{**vars(ops), **{name: _announced(ops, name, progress) for name in WRITES}})
        if ops.nothing_compiled():
            command = [sys.executable, "-m", "llm_numba.training.precompile"]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
                try:
                    run_everything(only(told, WRITES.keys() - CONTRACT["attention"].keys()))
                    other.wait()
                finally:
                    other.kill()
        run_everything(told, config.head_size, s)
    return time.perf_counter() - start


def only(ops, names) -> SimpleNamespace:
    """The same ops, but for those that are not among `names`: these do nothing."""
    skipped = {name: lambda *_: None for name in WRITES if name not in names}
    return SimpleNamespace(**{**vars(ops), **skipped})


def run_everything(ops, head_size: int = 16, s: Settings = SMALL) -> None:
    """Call every op at least once, with the types that training and sampling use."""
    T = sample.CHUNK
    config = preset("nano", max_seq_len=T + 1, num_layers=1, num_heads=1, channels=head_size)
    arena = Arena(all_groups(replace(s, batch_size=1, tokens_per_step=0), config, T, ops), config, "reuse", ops)
    m = arena.training(s.recompute)
    ops.to_device(m.step, 1)
    model.gradients(ops, m, config.vocab_size)
    ops.residual_backward(m.dencoded, m.lnf)  # the plan made it needless above
    model.update(ops, m, s)
    tokens = sample.generate(
        ops, arena, [0] * T, SimpleNamespace(temperature=1.0, top_k=0, top_p=1.0), np.random.default_rng(0)
    )
    next(tokens), next(tokens)


def _announced(ops, name: str, progress: tqdm):
    seen = []

    def call(*arguments):
        if not seen:
            progress.set_postfix_str(name)
        getattr(ops, name)(*arguments)
        if not seen:
            progress.update()
            seen.append(True)

    return call


if __name__ == "__main__":
    run_everything(only(get_ops("cpu"), CONTRACT["attention"]))
