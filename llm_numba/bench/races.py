"""The measurements of the benchmark: ours and PyTorch's runs of one piece of work, taken in turn, round after round."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from llm_numba import model, sample
from llm_numba.arena import Arena, parameter_specs, training_groups
from llm_numba.bench import op_cases, tables
from llm_numba.bench.measuring import measure, peak_memory, resident
from llm_numba.bench.worker import WorkerFailed, torch_worker
from llm_numba.config import GPT2Config
from llm_numba.train import flops_per_token

OP_SECONDS, STEP_SECONDS = 0.3, 2.0  # of one turn
GREEDY = SimpleNamespace(temperature=0, top_k=0, top_p=1.0)


def run_ops(ops, config: GPT2Config, cases, rounds: int, builds: dict, results: dict) -> None:
    """A row for each (op, sizes) of `cases`; builds: of each build of PyTorch the library to preload, or None."""
    with workers(builds, results["threads"]) as asks:
        for op, sizes in cases:
            case = op_cases.build(ops, op, sizes, config)
            row = new_row(op, " ".join(f"{name}={size}" for name, size in sizes.items() if name != "bias"))
            row |= {"flops": case.flops, "bytes": case.nbytes, "pattern": case.pattern}
            row["vocabulary"] = sizes.get("OC") == config.padded_vocab_size
            prepare = partial(tell, "prepare_op", op=op, sizes=sizes)
            compete(row, lambda case=case: case.run, asks, prepare, ["eager"], rounds, OP_SECONDS)
            finish(row, ops, results)
            del case  # its memory, before the next takes as much


def run_step(ops, config: GPT2Config, B: int, T: int, rounds: int, builds: dict, results: dict) -> None:
    """The row of a training step."""
    row = new_row("step", f"{B} x {T}", flops=flops_per_token(config, T) * B * T)
    prepare = partial(tell, "prepare_step", config=sizes_of(config), B=B, T=T)
    with workers(builds, results["threads"]) as asks:
        compete(row, lambda: new_step(ops, config, B, T), asks, prepare, tables.MODES, rounds, STEP_SECONDS)
    finish(row, ops, results)


def run_sampling(ops, config: GPT2Config, tokens: int, rounds: int, builds: dict, results: dict) -> None:
    """The row of `tokens` tokens written after one; a token reads every weight of the matmuls once."""
    weights = 12 * config.num_layers * config.channels**2 + config.padded_vocab_size * config.channels
    row = new_row("sampling", f"{tokens} tokens", nbytes=4 * weights * tokens, pattern="read")
    prepare = partial(tell, "prepare_sampling", config=sizes_of(config), tokens=tokens)
    with workers(builds, results["threads"]) as asks:
        compete(row, lambda: new_sampling(ops, config, tokens), asks, prepare, tables.MODES, rounds, STEP_SECONDS)
    finish(row, ops, results)


def run_scaling(ops, config: GPT2Config, B: int, T: int, rounds: int, results: dict) -> None:
    """A step's times on 1, 2, 4, ... threads and on all of them, taken in turn."""
    most, step = results["threads"], new_step(ops, config, B, T)
    counts = sorted({2**i for i in range(most.bit_length())} | {most})

    def on(threads, seconds):
        ops.set_threads(threads)
        return measure(step, seconds)

    step()
    try:
        times, _ = race(f"scaling {B} x {T}", {n: partial(on, n) for n in counts}, rounds, STEP_SECONDS)
    finally:
        ops.set_threads(most)
    results["scaling"] = [{"shape": f"{B} x {T}", "threads": n, "times": times[n]} for n in counts]


def measure_machine(ops, results: dict) -> None:
    """The best that was ever seen: what others do on the machine can only slow it down."""
    results["peak_flops"] = max(results["peak_flops"], ops.peak_flops())
    for name, rate in ops.peak_bandwidth().items():
        results["bandwidth"][name] = max(results["bandwidth"].get(name, 0.0), rate)


def new_row(name: str, shape: str, flops: float = 0, nbytes: int = 0, pattern: str = "") -> dict:
    return {
        "name": name, "shape": shape, "flops": flops, "bytes": nbytes, "pattern": pattern, "vocabulary": False,
        "times": {}, "absent": {}, "memory": {},
    }  # fmt: skip


def finish(row: dict, ops, results: dict) -> None:
    """Say how it went, and look at the machine's peak again."""
    results["rows"].append(row)
    results["peak_flops"] = max(results["peak_flops"], ops.peak_flops())
    medians = ", ".join(f"{column} {tables.spread(times)} ms" for column, times in row["times"].items())
    print(f"{row['name']} {row['shape']}: {medians}", file=sys.stderr)
    for column, why in row["absent"].items():
        print(f"  {column} failed: {why}", file=sys.stderr)


@contextmanager
def workers(builds: dict[str, Path | None], threads: int) -> Iterator[dict[str, Callable]]:
    """For each build of PyTorch the `ask` of a new process."""
    with ExitStack() as stack:
        asks = {build: stack.enter_context(torch_worker(preload)) for build, preload in builds.items()}
        for ask in asks.values():
            ask("start", threads=threads)
        yield asks


def tell(name: str, ask: Callable, **arguments) -> None:
    ask(name, **arguments)


def compete(row: dict, new_run: Callable, asks: dict, prepare: Callable, modes, rounds: int, seconds: float) -> None:
    """row's times, absent and memory = those of ours, which `new_run` builds, and of each build of PyTorch, which
    `prepare` builds there, in each mode."""
    before = resident()
    run = new_run()
    row["memory"]["ours"] = peak_memory(run, before)
    turns: dict[str, Callable] = {"ours": partial(measure, run)}
    for build, ask in asks.items():
        for mode in modes:
            column = f"{build} {mode}"
            try:
                if mode == modes[0]:
                    prepare(ask)
                row["memory"][column] = ask("first", mode=mode)
                turns[column] = lambda seconds, ask=ask, mode=mode: ask("measure", mode=mode, seconds=seconds)
            except WorkerFailed as error:
                row["absent"][column] = str(error)
    row["times"], lost = race(f"{row['name']} {row['shape']}", turns, rounds, seconds)
    row["absent"] |= lost


def race(label: str, turns: dict, rounds: int, seconds: float) -> tuple[dict, dict]:
    """(the times of each, why another has none): every round gives each in turn about `seconds`."""
    times, absent = {name: [] for name in turns}, {}
    with tqdm(total=rounds * len(turns), desc=label, leave=False, disable=None) as progress:
        for _ in range(rounds):
            for name, turn in turns.items():
                progress.set_postfix_str(name)
                if name not in absent:
                    try:
                        times[name] += turn(seconds)
                    except WorkerFailed as error:
                        absent[name] = str(error)
                progress.update()
    return {name: taken for name, taken in times.items() if name not in absent}, absent


def sizes_of(config: GPT2Config) -> dict:
    return {**asdict(config), "padded_vocab_size": config.padded_vocab_size}


def new_step(ops, config: GPT2Config, B: int, T: int) -> Callable:
    """A whole training step on one batch, as train.one_step takes it; it returns the loss."""
    arena = Arena(training_groups(config, B, T, ops, "reuse"), config, "reuse", ops)
    m = arena.namespace("parameters", "gradients", "activations", "activation gradients", "inputs", "scratch")
    sets, gradients = model.parameter_sets(arena), arena.flat("gradients")
    model.initialise(ops, arena, 0)
    stream = np.random.default_rng(0).integers(0, config.vocab_size, (B, T + 1), np.int32)
    ops.to_device(m.tokens, stream[:, :-1])
    ops.to_device(m.targets, stream[:, 1:])
    ops.to_device(m.learning_rate, 1e-4)
    steps = 0

    def step():
        nonlocal steps
        steps += 1
        ops.zero(gradients)
        model.forward(ops, m)
        loss = model.loss(ops, m, config.vocab_size, 1.0 / (B * T))
        model.backward(ops, m)
        ops.global_norm_squared(m.grad_norm_squared, gradients, m.scratch)
        norm = math.sqrt(ops.to_host(m.grad_norm_squared)[0])
        ops.to_device(m.step, steps)
        ops.to_device(m.grad_scale, min(1.0, 1.0 / norm))
        model.update(ops, m, sets, 0.9, 0.95, 1e-8, 0.1)
        return loss

    return step


def new_sampling(ops, config: GPT2Config, tokens: int) -> Callable:
    """`tokens` tokens after one, by sample.generate, always the likeliest; it returns them."""
    groups = {"parameters": parameter_specs(config), **sample.sampling_groups(config, ops)}
    arena = Arena(groups, config, "reuse", ops)
    model.initialise(ops, arena, 0)
    return lambda: list(islice(sample.generate(ops, arena, [0], GREEDY, None), tokens))
