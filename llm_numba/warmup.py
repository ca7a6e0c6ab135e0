"""Compile every op before the first step, and say so: a step that takes 20 seconds would look like a hang."""

import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from llm_numba import model, sample
from llm_numba.arena import Arena, training_groups
from llm_numba.config import preset
from llm_numba.ops import CONTRACT, WRITES, get_ops


def warm_up(ops) -> float:
    """Run a training step and a sampled token of a very small model; returns the seconds that it took.

    Numba compiles a function for types, not for sizes, so that this is all the compiling that a run of any size needs;
    it keeps the results on disk, and the next start only reads them. Where there is nothing to read yet, a second
    process compiles attention, the largest part of the work, at the same time.
    """
    start = time.perf_counter()
    with tqdm(total=len(WRITES), desc="compiling (once for this machine)", leave=False, disable=None) as progress:
        told = SimpleNamespace(**{**vars(ops), **{name: _announced(ops, name, progress) for name in WRITES}})
        if ops.nothing_compiled():
            command = [sys.executable, "-m", "llm_numba.warmup"]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
                try:
                    run_everything(only(told, WRITES.keys() - CONTRACT["attention"].keys()))
                    other.wait()
                finally:
                    other.kill()
        run_everything(told)
    return time.perf_counter() - start


def only(ops, names) -> SimpleNamespace:
    """The same ops, but for those that are not among `names`: these do nothing."""
    skipped = {name: lambda *_: None for name in WRITES if name not in names}
    return SimpleNamespace(**{**vars(ops), **skipped})


def run_everything(ops) -> None:
    """Call every op at least once, with the types that training and sampling use."""
    config, T = preset("nano", max_seq_len=sample.CHUNK + 1), sample.CHUNK
    arena = Arena(
        training_groups(config, 1, T, ops, "reuse") | sample.sampling_groups(config, ops), config, "reuse", ops
    )
    m = arena.namespace("parameters", "gradients", "activations", "activation gradients", "inputs", "scratch")
    ops.to_device(m.step, 1)
    model.forward(ops, m)
    model.loss(ops, m, config.vocab_size, 1.0)
    model.backward(ops, m)
    ops.residual_backward(m.dencoded, m.lnf)  # the plan made it needless above
    ops.global_norm_squared(m.grad_norm_squared, arena.flat("gradients"), m.scratch)
    model.update(ops, m, model.parameter_sets(arena), 0.9, 0.95, 1e-8, 0.1)
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
