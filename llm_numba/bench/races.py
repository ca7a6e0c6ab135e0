"""The measurements of the benchmark: ours and PyTorch's runs of one piece of work, taken in turn, round after round."""

import gc
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from llm_numba import sample
from llm_numba.arena import DTYPES, Arena, training_groups
from llm_numba.bench import op_cases, tables
from llm_numba.bench.measuring import by_the_clock, measure, peak_memory, resident
from llm_numba.bench.worker import Build, WorkerFailed, torch_worker
from llm_numba.models import gpt2 as model
from llm_numba.models.config import GPT2Config
from llm_numba.train import flops_per_token, update
from llm_numba.training.settings import Settings

OP_SECONDS, STEP_SECONDS = 0.3, 2.0  # of one turn
GREEDY = SimpleNamespace(temperature=0, top_k=0, top_p=1.0)


def run_ops(ops, config: GPT2Config, cases, rounds: int, builds: dict[str, Build], results: dict) -> None:
    """A row for each (op, sizes) of `cases`, but for one with wrong results, of which results["wrong"] tells."""
    builds = {name: build for name, build in builds.items() if build.precision != "autocast"}  # casts, then the same op
    with workers(builds, results) as asks:
        for op, sizes in cases:
            try:
                case = op_cases.build(ops, op, sizes, config, DTYPES[results["dtype"]])
            except AssertionError as error:
                refuse(error, results)
                continue
            row = new_row(op, " ".join(f"{name}={size}" for name, size in sizes.items() if name != "bias"))
            row |= {"flops": case.flops, "bytes": case.nbytes, "pattern": case.pattern}
            row["vocabulary"] = sizes.get("OC") == config.padded_vocab_size
            prepare = partial(tell, "prepare_op", op=op, sizes=sizes)
            new_run = partial(lambda run: {"ours": ops.capture(run)}, case.run)
            compete(row, new_run, ops, results, asks, prepare, ["eager"], rounds, OP_SECONDS, True)
            finish(row, ops, results)
            del case, new_run  # their memory, before the next take as much


def run_step(ops, config: GPT2Config, B: int, T: int, rounds: int, builds: dict[str, Build], results: dict) -> None:
    """The row of a training step; on a card as one recorded graph and, in a column of its own, launch by launch."""
    row = new_row("step", f"{B} x {T}", flops=flops_per_token(config, T) * B * T)
    prepare = partial(tell, "prepare_step", config=sizes_of(config), B=B, T=T)
    new_runs = partial(new_steps, ops, config, B, T, results["dtype"], results["device"] == "cuda")
    with workers(builds, results) as asks:
        try:
            compete(row, new_runs, ops, results, asks, prepare, tables.MODES, rounds, STEP_SECONDS)
        except AssertionError as error:
            return refuse(error, results)
    finish(row, ops, results)


def run_sampling(ops, config: GPT2Config, tokens: int, rounds: int, builds: dict[str, Build], results: dict) -> None:
    """The row of `tokens` tokens written after one; a token reads every weight of the matmuls once."""
    weights = 12 * config.num_layers * config.channels**2 + config.padded_vocab_size * config.channels
    dtype = DTYPES[results["dtype"]]
    nbytes = np.dtype(dtype).itemsize * weights * tokens
    row = new_row("sampling", f"{tokens} tokens", nbytes=nbytes, pattern="read")
    prepare = partial(tell, "prepare_sampling", config=sizes_of(config), tokens=tokens)
    with workers(builds, results) as asks:
        new_runs = lambda: {"ours": new_sampling(ops, config, tokens, dtype)}  # noqa: E731
        compete(row, new_runs, ops, results, asks, prepare, tables.MODES, rounds, STEP_SECONDS)
    finish(row, ops, results)


def run_scaling(ops, config: GPT2Config, B: int, T: int, rounds: int, results: dict) -> None:
    """A step's times on 1, 2, 4, ... threads and on all of them, taken in turn."""
    most, step = results["threads"], new_steps(ops, config, B, T, results["dtype"])["ours"]
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
    measure_flops(ops, results)
    for name, rate in ops.peak_bandwidth().items():
        results["bandwidth"][name] = max(results["bandwidth"].get(name, 0.0), rate)


def measure_flops(ops, results: dict) -> None:
    results["peak_flops"] = max(results["peak_flops"], ops.peak_flops(DTYPES[results["dtype"]]) or 0.0)


def new_row(name: str, shape: str, flops: float = 0, nbytes: int = 0, pattern: str = "") -> dict:
    return {
        "name": name, "shape": shape, "flops": flops, "bytes": nbytes, "pattern": pattern, "vocabulary": False,
        "times": {}, "absent": {}, "memory": {},
    }  # fmt: skip


def refuse(error: AssertionError, results: dict) -> None:
    print(f"WRONG, and not timed: {error}", file=sys.stderr)
    results["wrong"].append(str(error))


def finish(row: dict, ops, results: dict) -> None:
    """Say how it went, and look at the machine's peak again."""
    results["rows"].append(row)
    measure_flops(ops, results)
    medians = ", ".join(f"{column} {tables.spread(times)} ms" for column, times in row["times"].items())
    print(f"{row['name']} {row['shape']}: {medians}", file=sys.stderr)
    for column, why in row["absent"].items():
        print(f"  {column} failed: {why}", file=sys.stderr)


@contextmanager
def workers(builds: dict[str, Build], results: dict) -> Iterator[dict[str, Callable]]:
    """For each build of PyTorch the `ask` of a new process."""
    with ExitStack() as stack:
        asks = {name: stack.enter_context(torch_worker(build)) for name, build in builds.items()}
        for name, ask in asks.items():
            ask("start", threads=results["threads"], device=builds[name].device, precision=builds[name].precision)
        yield asks


def tell(name: str, ask: Callable, **arguments) -> None:
    ask(name, **arguments)


def compete(
    row: dict, new_runs: Callable, ops, results: dict, asks: dict, prepare: Callable, modes, rounds: int,
    seconds: float, launches_only: bool = False,
) -> None:  # fmt: skip
    """row's times, absent and memory = those of ours, which `new_runs` builds, by column, and of each build of PyTorch,
    which `prepare` builds there, in each mode.

    launches_only: what runs does not wait for a card, so that the card is asked for the time.
    """
    gc.collect()  # a recorded graph and what it works on keep each other
    before = ops.available_memory() if results["device"] == "cuda" else resident()
    runs = new_runs()
    if results["device"] == "cuda":  # nothing is allocated after the arena
        for _ in range(2):  # compiled, and recorded
            runs["ours"]()
        row["memory"]["ours"] = before - ops.available_memory()
    else:
        row["memory"]["ours"] = peak_memory(runs["ours"], before)
    timed = ops.timed if launches_only else by_the_clock
    turns: dict[str, Callable] = {column: partial(measure, run, timed=timed) for column, run in runs.items()}
    for build, ask in asks.items():
        for mode in modes:
            column = f"{build} {mode}"
            try:
                if mode == modes[0]:
                    prepare(ask)
                row["memory"][column] = ask("first", mode=mode)
                turns[column] = partial(ask_seconds, ask, mode, launches_only)
            except WorkerFailed as error:
                row["absent"][column] = str(error)
    row["times"], lost = race(f"{row['name']} {row['shape']}", turns, rounds, seconds)
    row["absent"] |= lost


def ask_seconds(ask: Callable, mode: str, launches_only: bool, seconds: float) -> list[float]:
    return ask("measure", mode=mode, seconds=seconds, launches_only=launches_only)


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


def new_steps(ops, config: GPT2Config, B: int, T: int, dtype: str = "fp32", graph: bool = False) -> dict[str, Callable]:
    """A whole training step on one batch, as train.one_step takes it: "ours" and, where that is a recorded graph, the
    same with "no graph". It returns the loss."""
    groups = training_groups(config, B, T, ops, DTYPES[dtype], master=dtype == "bf16")
    arena = Arena(groups, config, "reuse", ops)
    m = arena.training()
    model.initialise(ops, arena, 0)
    stream = np.random.default_rng(0).integers(0, config.vocab_size, (B, T + 1), np.int32)
    ops.to_device(m.batches, np.stack([stream[:, :-1], stream[:, 1:]])[None])
    ops.to_device(m.learning_rate, 1e-4)
    ops.to_device(m.limits, np.inf)
    steps = 0

    def step(update):
        nonlocal steps
        steps += 1
        ops.to_device(m.step, steps)
        update()
        loss = float(ops.to_host(m.loss)[0])
        assert math.isfinite(loss), f"step {steps} of {B} x {T}: the loss is {loss}"
        return loss

    launches = partial(update, ops, m, config.vocab_size, Settings())
    runs = {"ours": partial(step, ops.capture(launches))}
    return runs | {"no graph": partial(step, launches)} if graph else runs


def new_sampling(ops, config: GPT2Config, tokens: int, dtype: str = "float32") -> Callable:
    """`tokens` tokens after one, by sample.generate, always the likeliest; it returns them."""
    arena = Arena(sample.standalone_groups(config, ops, dtype), config, "reuse", ops)
    model.initialise(ops, arena, 0)
    return lambda: list(islice(sample.generate(ops, arena, [0], GREEDY, None), tokens))
