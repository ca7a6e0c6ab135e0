"""How long the rungs of a ladder take, beside what the machine can do and what others' kernels do.

The rungs of a CPU's ladder are timed here. A CUDA ladder's are timed by a process of its own, this file run as a
program, as this one runs kernels in the simulator.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from ml_dtypes import bfloat16

from llm_numba.bench.machine import describe_machine
from llm_numba.bench.measuring import measure
from llm_numba.bench.tables import flops_rate, table
from llm_numba.bench.worker import Build, WorkerFailed, torch_worker
from llm_numba.lessons import FAST, FOLDER
from llm_numba.lessons.ladder import Ladder, Wrong, file_of, in_words, ladders, title
from llm_numba.lessons.problem import arguments, difference, right_answer
from llm_numba.util.cli import UserError

ROUNDS, SECONDS = 3, 0.2  # of each rung, in turn
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # of llm_numba.bench.torch_side
MOST_CHECKED = 1 << 24  # numbers of an argument: a larger problem is timed without another look at its result


def times(ladder: Ladder, sizes: dict | None = None) -> dict | None:
    """What a ladder's rungs take here: {"machine", "sizes", "limit" (flops or bytes a second), "work", "unit", "rows":
    name -> seconds}, by name of rung and vendor. None for a CUDA ladder where there is no card, and in the tests, which
    leave cards alone.

    Errors: Wrong, where a rung does not compute what it should at these sizes.
    """
    sizes = sizes or (ladder.quick if FAST else ladder.timed)
    if ladder.problem.device == "cpu":
        return times_here(ladder, sizes)
    from llm_numba.cuda.gpu import available

    return None if FAST or not available() else times_on_card(ladder, sizes)


def times_on_card(ladder: Ladder, sizes: dict) -> dict:
    """By another process, without the simulator."""
    run = subprocess.run(
        [sys.executable, "-m", "llm_numba.lessons.timing", file_of(ladder), ladder.name, json.dumps(sizes)],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "0"},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{ladder.name}: cannot be timed on the card ({last})")
    return json.loads(run.stdout)


def times_here(ladder: Ladder, sizes: dict) -> dict:
    """The rungs in this process, in turn, and each vendor's kernel; see `times`."""
    ops, device = device_ops(ladder.problem.device)
    given = arguments(ladder.problem, sizes)
    small = max(x.size for x in given.values() if isinstance(x, np.ndarray)) <= MOST_CHECKED
    expected = right_answer(ladder.problem, given) if small else {}
    placed = [ops.place(x) for x in given.values()]
    runs: dict[str, Callable] = {}
    for rung in (*ladder.rungs, *ladder.vendors):
        for name, x in zip(given, placed, strict=True):
            if name in ladder.problem.writes:
                ops.to_device(x, numbers(given[name]))
        rung(*placed)
        after = dict(zip(given, placed, strict=True))
        for name, right in expected.items():
            words = difference(name, ops.to_host(after[name]), right, 10 * ladder.problem.tolerance, None)
            if words and rung in ladder.rungs:
                raise Wrong(f"{title(rung)}: with {in_words(sizes)}: {words}")
        runs[title(rung)] = functools.partial(rung, *placed)
    peaks(device, ladder.dtype)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 if FAST else ROUNDS):
        for name, run in runs.items():
            seconds[name] += measure(run, 0.01 if FAST else SECONDS, ops.timed)
    if ladder.torch and not FAST:
        seconds |= torch_times(ladder, sizes, device)
    limit = peaks(device, ladder.dtype, again=True)["flops" if ladder.flops else ladder.pattern]
    return {
        "machine": machine(device),
        "device": device,
        "sizes": sizes,
        "work": (ladder.flops or ladder.nbytes)(**sizes),
        "unit": "flops" if ladder.flops else "bytes",
        "limit": limit,
        "rows": {name: median(taken) for name, taken in seconds.items()},
    }


def numbers(x: np.ndarray) -> np.ndarray:
    """An argument as the device's ops take it from the host: bf16 as such, not as the bits that a kernel sees."""
    return x.view(bfloat16) if x.dtype == np.uint16 else x


@functools.cache
def device_ops(device: str):
    """(the device's ops, with `place` to put an argument there, and the device's name)."""
    from llm_numba.ops import get_ops

    ops = get_ops(device)
    if device == "cpu":
        ops.set_threads(0)

    def place(x):
        if not isinstance(x, np.ndarray):
            return x
        tensor = ops.view(ops.allocate(x.nbytes), 0, x.shape, x.dtype.name)
        ops.to_device(tensor, numbers(x))
        return tensor

    ops.place = place
    return ops, device


_peaks: dict[str, float | None] = {}


def peaks(device: str, dtype: str = "float32", again: bool = False) -> dict[str, float | None]:
    """The most that this machine does: flops a second of a dtype, and bytes a second by pattern. The best that was ever
    seen, as what others do can only slow it down. In the tests it is not measured: a share would say nothing."""
    if FAST:
        return dict.fromkeys(("flops", "read", "copy", "add", "update"))
    if again or dtype not in _peaks:
        ops, _ = device_ops(device)
        for name, rate in {dtype: ops.peak_flops(dtype), **ops.peak_bandwidth()}.items():
            _peaks[name] = max(rate, _peaks.get(name, 0.0))
    return {**_peaks, "flops": _peaks[dtype]}


@functools.cache
def machine(device: str) -> str:
    from numba import get_num_threads

    ops, _ = device_ops(device)
    return describe_machine(device, get_num_threads(), ops)


def torch_times(ladder: Ladder, sizes: dict, device: str) -> dict[str, list[float]]:
    """PyTorch's seconds, by a process of its own; nothing where it is not installed or fails."""
    from importlib.util import find_spec

    from numba import get_num_threads

    if find_spec("torch") is None:
        return {}
    try:
        with torch_worker(Build(device)) as ask:
            ask("start", threads=get_num_threads(), device=device, precision=PRECISIONS[ladder.dtype])
            ask("prepare_op", op=ladder.torch, sizes=sizes)
            ask("first", mode="eager")
            return {"PyTorch": ask("measure", mode="eager", seconds=ROUNDS * SECONDS, launches_only=device != "cpu")}
    except WorkerFailed as error:
        print(f"note: PyTorch is not timed: {error}", file=sys.stderr)
        return {}


def show_times(ladder: Ladder) -> dict | None:
    """Time the ladder and print the table; where it is CUDA's and there is no card, that of the cards in
    lessons/results. Returns what is shown."""
    found = times(ladder)
    if found is None:
        found = recorded(ladder)
        print("No card here" + ("; measured before, on another machine:" if found else ", and no times on record."))
    if found:
        print("\n".join(time_table(found)))
    return found


def recorded(ladder: Ladder) -> dict | None:
    """The times of a ladder on a card, from lessons/results."""
    for path in sorted((FOLDER / "results").glob("*.json")):
        results = json.loads(path.read_text())
        if ladder.name in results["ladders"] and results["device"] == ladder.problem.device:
            return results["ladders"][ladder.name]
    return None


COLUMNS = ["ms", "rate", "of the machine's limit", "of PyTorch's speed"]


def cells(found: dict) -> list[list[str]]:
    """For each rung its name and COLUMNS, as text; empty where nothing is known."""
    lines, torch = [], found["rows"].get("PyTorch")
    for name, seconds in found["rows"].items():
        rate = found["work"] / seconds
        speed = flops_rate(rate) if found["unit"] == "flops" else f"{1e-9 * rate:.1f} GB/s"
        of_limit = f"{rate / found['limit']:.0%}" if found["limit"] else ""
        lines.append([name, f"{1e3 * seconds:.4g}", speed, of_limit, f"{torch / seconds:.0%}" if torch else ""])
    return lines


def time_table(found: dict) -> list[str]:
    """The machine and a Markdown table of the rungs."""
    lines, headers = cells(found), ["", *COLUMNS]
    kept = [i for i in range(len(headers)) if any(line[i] for line in lines)]
    rows = table([headers[i] for i in kept], [[line[i] for i in kept] for line in lines])
    return [f"{found['machine']}; {in_words(found['sizes'])}", "", *rows]


def main() -> None:
    """The card's side: times of a ladder of a file, as JSON."""
    file, name, sizes = sys.argv[1:]
    ladder = next(ladder for ladder in ladders(Path(file)) if ladder.name == name)
    print(json.dumps(times_here(ladder, json.loads(sizes))))


if __name__ == "__main__":
    main()
