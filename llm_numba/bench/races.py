"""Time llm_numba and PyTorch on the same work, in turn, round after round."""

import gc
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial

import numpy as np
from tqdm import tqdm

from llm_numba.arena import DTYPES, Arena, Groups
from llm_numba.bench import op_cases, tables
from llm_numba.bench.breakdown import break_down
from llm_numba.bench.measuring import measure, peak_memory, resident_memory, wall_time
from llm_numba.bench.worker import Build, WorkerFailed, torch_worker
from llm_numba.models.gpt2 import GPT2
from llm_numba.training.generate import Choice, generation_groups, generation_step, generator
from llm_numba.training.memory_plan import complete, training_groups
from llm_numba.training.settings import Settings
from llm_numba.training.step import initialise, training_step

OP_SECONDS, STEP_SECONDS = 0.3, 2.0  # per turn
GREEDY = Choice(temperature=0, top_p=1.0)


def run_ops(ops, model: GPT2, cases, rounds: int, builds: dict[str, Build], results: dict) -> None:
    """Add a row for each (op, sizes) in `cases`. Ops with wrong results go into results["wrong"] and are not timed."""
    # autocast casts the inputs and then runs the bf16 op
    builds = {name: build for name, build in builds.items() if build.precision != "autocast"}
    with start_workers(builds, results, ["eager"]) as workers:
        for op, sizes in cases:
            try:
                case = op_cases.build(ops, op, sizes, DTYPES[results["dtype"]])
            except AssertionError as error:
                report_wrong(error, results)
                continue
            row = new_row(op, " ".join(f"{name}={size}" for name, size in sizes.items() if name != "bias"))
            row |= {"flops": case.flops, "bytes": case.nbytes, "pattern": case.pattern}
            row["vocabulary"] = sizes.get("OC") == model.padded_vocab_size
            prepare = "prepare_op", dict(op=op, sizes=sizes)
            new_run = partial(lambda run: {"ours": ops.capture(run)}, case.run)
            fill_row(row, new_run, ops, results, workers, prepare, rounds, OP_SECONDS, True)
            add_row(row, ops, results)
            del case, new_run  # frees their memory before the next case allocates


def run_step(ops, model: GPT2, B: int, T: int, rounds: int, builds: dict[str, Build], results: dict) -> None:
    """Add the row of a training step; on a GPU as a CUDA graph and, in the column "no graph", launch by launch."""
    row = new_row("step", f"{B} x {T}", flops=model.flops_per_token(T) * B * T)
    prepare = "prepare_step", dict(config=sizes_of(model), B=B, T=T)
    new_runs = partial(new_steps, ops, model, B, T, results["dtype"], results["device"] == "cuda")
    with start_workers(builds, results, tables.MODES) as workers:
        try:
            fill_row(row, new_runs, ops, results, workers, prepare, rounds, STEP_SECONDS)
        except AssertionError as error:
            return report_wrong(error, results)
    add_row(row, ops, results)
    gc.collect()  # as above
    m = new_training(ops, model, B, T, results["dtype"])
    results["breakdown"][f"{B} x {T}"] = break_down(ops, model, m, results["device"], rounds)


def run_sampling(ops, model: GPT2, tokens: int, rounds: int, builds: dict[str, Build], results: dict) -> None:
    """Add the row of generating `tokens` tokens; each token reads every matmul weight once."""
    weights = model.flops_per_token(0) / 6  # of the matmuls
    dtype = DTYPES[results["dtype"]]
    nbytes = np.dtype(dtype).itemsize * weights * tokens
    row = new_row("sampling", f"{tokens} tokens", nbytes=nbytes, pattern="read")
    prepare = "prepare_sampling", dict(config=sizes_of(model), tokens=tokens)
    builds = {name: build for name, build in builds.items() if not build.attention}  # a query has one token
    with start_workers(builds, results, tables.MODES) as workers:
        new_runs = lambda: {"ours": new_sampling(ops, model, tokens, dtype)}  # noqa: E731
        fill_row(row, new_runs, ops, results, workers, prepare, rounds, STEP_SECONDS)
    add_row(row, ops, results)


def run_scaling(ops, model: GPT2, B: int, T: int, rounds: int, results: dict) -> None:
    """Time a step on 1, 2, 4, ... threads and on all of them, in turn."""
    most, step = results["threads"], new_steps(ops, model, B, T, results["dtype"])["ours"]
    counts = sorted({2**i for i in range(most.bit_length())} | {most})

    def measure_on(threads, seconds):
        ops.set_threads(threads)
        return measure(step, seconds)

    step()
    try:
        times, _ = take_turns(f"scaling {B} x {T}", {n: partial(measure_on, n) for n in counts}, rounds, STEP_SECONDS)
    finally:
        ops.set_threads(most)
    results["scaling"] = [{"shape": f"{B} x {T}", "threads": n, "times": times[n]} for n in counts]


def measure_machine(ops, results: dict) -> None:
    """Measure peak FLOP/s and bandwidth, and keep the best values seen: other programs only slow the machine down."""
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


def report_wrong(error: AssertionError, results: dict) -> None:
    print(f"WRONG RESULT, not timed: {error}", file=sys.stderr)
    results["wrong"].append(str(error))


def add_row(row: dict, ops, results: dict) -> None:
    """Store and print a row, and measure the peak again."""
    results["rows"].append(row)
    measure_flops(ops, results)
    medians = ", ".join(f"{column} {tables.spread(times)} ms" for column, times in row["times"].items())
    print(f"{row['name']} {row['shape']}: {medians}", file=sys.stderr)
    for column, why in row["absent"].items():
        print(f"  {column} failed: {why}", file=sys.stderr)


@contextmanager
def start_workers(builds: dict[str, Build], results: dict, modes) -> Iterator[dict[str, tuple[Callable, list[str]]]]:
    """Start a process per PyTorch build that has some of these modes; yields build -> (its `ask`, those modes)."""
    workers = {}
    with ExitStack() as stack:
        for name, build in builds.items():
            if own := [mode for mode in modes if mode in (build.modes or modes)]:
                ask = stack.enter_context(torch_worker(build))
                about = dict(device=build.device, precision=build.precision, attention=build.attention)
                ask("start", threads=results["threads"], **about)
                workers[name] = ask, own
        yield workers


def fill_row(
    row: dict, new_runs: Callable, ops, results: dict, workers: dict, prepare: tuple[str, dict], rounds: int,
    seconds: float, launches_only: bool = False,
) -> None:  # fmt: skip
    """Fill in row's times, absent and memory.

    new_runs() -> column -> function to time. prepare: the function of torch_side that builds the same work there, and
    its arguments; it is timed in each mode of the workers. launches_only: the work is asynchronous, so GPU events time
    it.
    """
    gc.collect()  # a captured graph and its tensors form a reference cycle
    before = ops.available_memory() if results["device"] == "cuda" else resident_memory()
    runs = new_runs()
    if results["device"] == "cuda":  # all memory is allocated with the arena
        for _ in range(2):  # compile, then capture
            runs["ours"]()
        row["memory"]["ours"] = before - ops.available_memory()
    else:
        row["memory"]["ours"] = peak_memory(runs["ours"], before)
    timed = ops.timed if launches_only else wall_time
    turns: dict[str, Callable] = {column: partial(measure, run, timed=timed) for column, run in runs.items()}
    for build, (ask, modes) in workers.items():
        for mode in modes:
            column = f"{build} {mode}"
            try:
                if mode == modes[0]:
                    ask(prepare[0], **prepare[1])
                row["memory"][column] = ask("first", mode=mode)
                turns[column] = partial(ask_seconds, ask, mode, launches_only)
            except WorkerFailed as error:
                row["absent"][column] = str(error)
    row["times"], failed = take_turns(f"{row['name']} {row['shape']}", turns, rounds, seconds)
    row["absent"] |= failed


def ask_seconds(ask: Callable, mode: str, launches_only: bool, seconds: float) -> list[float]:
    return ask("measure", mode=mode, seconds=seconds, launches_only=launches_only)


def take_turns(label: str, turns: dict, rounds: int, seconds: float) -> tuple[dict, dict]:
    """(times by name, reason of failure by name). In every round each turn runs for about `seconds`."""
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
    return {name: seconds for name, seconds in times.items() if name not in absent}, absent


def sizes_of(model: GPT2) -> dict:
    return {**asdict(model), "padded_vocab_size": model.padded_vocab_size}


def step_groups(ops, model: GPT2, B: int, T: int, dtype: str) -> Groups:
    """What a training step puts into the arena."""

    def program(ops, arena):
        training_step(ops, model, arena.training(), Settings())

    return complete(training_groups(model, B, T, master=dtype == "bf16"), model, ops, DTYPES[dtype], program)


def new_training(ops, model: GPT2, B: int, T: int, dtype: str = "fp32"):
    """The namespace of a training step on one fixed batch, with random parameters."""
    arena = Arena(step_groups(ops, model, B, T, dtype), model, "reuse", ops)
    m = arena.training()
    initialise(ops, arena, 0)
    stream = np.random.default_rng(0).integers(0, model.vocab_size, (B, T + 1), np.int32)
    ops.to_device(m.batches, np.stack([stream[:, :-1], stream[:, 1:]])[None])
    ops.to_device(m.learning_rate, 1e-4)
    ops.to_device(m.limits, np.inf)
    ops.to_device(m.step, 1)
    return m


def new_steps(ops, model: GPT2, B: int, T: int, dtype: str = "fp32", graph: bool = False) -> dict[str, Callable]:
    """A training step on one fixed batch, as the trainer runs it; it returns the loss. Columns: "ours" and, if
    `graph`, "no graph": the same without a CUDA graph."""
    m, steps = new_training(ops, model, B, T, dtype), 0

    def step(update):
        nonlocal steps
        steps += 1
        ops.to_device(m.step, steps)
        update()
        loss = float(ops.to_host(m.loss)[0])
        assert math.isfinite(loss), f"step {steps} of {B} x {T}: the loss is {loss}"
        return loss

    launches = partial(training_step, ops, model, m, Settings())
    runs = {"ours": partial(step, ops.capture(launches))}
    return runs | {"no graph": partial(step, launches)} if graph else runs


def new_sampling(ops, model: GPT2, tokens: int, dtype: str = "float32") -> Callable:
    """A function that generates `tokens` tokens greedily and returns them."""
    groups = {"parameters": model.parameters()} | generation_groups(model)
    arena = Arena(complete(groups, model, ops, dtype, generation_step), model, "reuse", ops)
    initialise(ops, arena, 0)
    generate, rng = generator(ops, arena), np.random.default_rng(0)
    return lambda: list(generate([0], tokens, GREEDY, rng))
