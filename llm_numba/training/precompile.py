"""Compile every op before the first step, with a progress bar: a step that takes 20 seconds would look like a hang."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

from tqdm import tqdm

from llm_numba.arena import Arena
from llm_numba.models import Model, model_of
from llm_numba.ops import CONTRACT, WRITES, Ops, choose_device, get_ops
from llm_numba.training.generate import CHUNK, generation_groups, generation_step
from llm_numba.training.memory_plan import complete, run_groups
from llm_numba.training.settings import Settings, from_record, to_record
from llm_numba.training.step import training_step


def precompile(ops: Ops, model: Model, s: Settings) -> float:
    """Run a training step, and one of generating text, with the smallest model of the kind; returns the seconds.

    Numba compiles for types, and on a GPU for a head size, so this compiles nearly all that a run of any size calls,
    and stores it on disk. If nothing is stored yet, other processes compile the slowest ops at the same time.
    """
    start = time.perf_counter()
    with announced(ops, len(WRITES)) as shown:
        if shares := [ops_in(share) for share in ops.shares()]:
            about = json.dumps(dict(model=model.name, config=asdict(model), settings=to_record(s)))
            command = [sys.executable, "-m", "llm_numba.training.precompile", about]
            quiet = subprocess.DEVNULL
            others = [subprocess.Popen([*command, *share], stdout=quiet, stderr=quiet) for share in shares]
            try:
                run_everything(only(shown, WRITES.keys() - set().union(*shares)), model, s)
                for other in others:
                    other.wait()
            finally:
                for other in others:
                    other.kill()
                    other.wait()
        run_everything(shown, model, s)
    return time.perf_counter() - start


def ops_in(share: set[str]) -> list[str]:
    """The ops among these layers and ops."""
    return [op for file, names in CONTRACT.items() for op in names if {file, op} & share]


def compile_share(about: str, *names: str) -> None:
    """What the other processes do."""
    given = json.loads(about)
    s = from_record(given["settings"], "the settings")
    ops = get_ops(choose_device(s.device), s.dtype, variant=s.variant)
    run_everything(only(ops, names), model_of(given), s)


def precompile_generation(ops: Ops, model: Model, dtype: str) -> None:
    """Compile what generating text calls."""
    small = model.miniature(CHUNK + 1)
    groups = {"parameters": small.parameters()} | generation_groups(small)
    arena = Arena(complete(groups, small, ops, dtype, generation_step), small, "reuse", ops)
    with announced(ops, None) as shown:
        generation_step(shown, arena)


@contextmanager
def announced(ops: Ops, total: int | None) -> Iterator[Ops]:
    """The same ops; the first call of each names it in a progress bar."""
    called = set()

    def announce(name, op):
        def call(*arguments):
            if name not in called:
                bar.set_postfix_str(name)
            op(*arguments)
            if name not in called:
                called.add(name)
                bar.update()

        return call

    with tqdm(total=total, desc="compiling (once on this machine)", unit="op", leave=False, disable=None) as bar:
        yield ops.wrap(announce)


def only(ops: Ops, names) -> Ops:
    """The same ops, but those that are not among `names` do nothing."""
    return ops.replace(**{name: lambda *_: None for name in WRITES if name not in names})


def run_everything(ops: Ops, model: Model, s: Settings) -> None:
    """Call every op that training and generation call, with the types that they use. Training has more rows than text
    generation, for which a GPU has other kernels, unless the run's own batch has not."""
    T = min(2 * CHUNK, s.batch_size * (s.sequence_length or model.max_seq_len))
    small = model.miniature(2 * CHUNK + 1)
    s = replace(s, batch_size=1, tokens_per_step=0)
    arena = Arena(run_groups(s, small, T, ops), small, "reuse", ops)
    m = arena.training(s.recompute)
    ops.to_device(m.step, 1)
    training_step(ops, small, m, s)
    generation_step(ops, arena)


if __name__ == "__main__":
    compile_share(*sys.argv[1:])
