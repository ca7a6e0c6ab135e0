"""Times of the rungs of a ladder, compared with the machine's limit and with other libraries' kernels.

CPU ladders are timed in this process. CUDA ladders are timed by a separate process, which runs this file as a program,
because this process runs kernels in the simulator.
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
from llm_numba.lessons.ladder import Ladder, WrongResult, file_of, format_sizes, ladders, title
from llm_numba.lessons.problem import arguments, difference, expected_results
from llm_numba.util.cli import UserError

ROUNDS, SECONDS = 3, 0.2  # per rung; the rungs are interleaved
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # of llm_numba.bench.torch_side
MOST_CHECKED = 1 << 24  # elements of an argument; the results of larger problems are not checked again


def times(ladder: Ladder, sizes: dict | None = None) -> dict | None:
    """Time a ladder: {"machine", "sizes", "limit" (flops or bytes a second), "work", "unit", "rows": name -> seconds},
    by name of rung and library. None for a CUDA ladder if there is no GPU, or under LESSONS_FAST, so that tests do not
    use the GPU.

    Errors: WrongResult if a rung does not compute the expected result at these sizes.
    """
    sizes = sizes or (ladder.quick if FAST else ladder.timed)
    if ladder.problem.device == "cpu":
        return times_here(ladder, sizes)
    from llm_numba.cuda.gpu import available

    return None if FAST or not available() else times_on_gpu(ladder, sizes)


def times_on_gpu(ladder: Ladder, sizes: dict) -> dict:
    """Time a CUDA ladder in another process, without the simulator."""
    run = subprocess.run(
        [sys.executable, "-m", "llm_numba.lessons.timing", file_of(ladder), ladder.name, json.dumps(sizes)],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "0"},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no error message"])[-1]
        raise UserError(f"{ladder.name}: cannot be timed on the GPU ({last})")
    return json.loads(run.stdout)


def times_here(ladder: Ladder, sizes: dict) -> dict:
    """Time the rungs and the other libraries' kernels in this process, interleaved; see `times`."""
    ops, device = device_ops(ladder.problem.device)
    given = arguments(ladder.problem, sizes)
    small = max(x.size for x in given.values() if isinstance(x, np.ndarray)) <= MOST_CHECKED
    expected = expected_results(ladder.problem, given) if small else {}
    placed = [ops.place(x) for x in given.values()]
    runs: dict[str, Callable] = {}
    for rung in (*ladder.rungs, *ladder.vendors):
        for name, x in zip(given, placed, strict=True):
            if name in ladder.problem.writes:
                ops.to_device(x, storage(given[name]))
        rung(*placed)
        after = dict(zip(given, placed, strict=True))
        for name, right in expected.items():
            error = difference(name, ops.to_host(after[name]), right, 10 * ladder.problem.tolerance, None)
            if error and rung in ladder.rungs:
                raise WrongResult(f"{title(rung)}: with {format_sizes(sizes)}: {error}")
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


def storage(x: np.ndarray) -> np.ndarray:
    """An argument as `to_device` takes it: bf16 arrays as bfloat16, not as the uint16 bits that a kernel sees."""
    return x.view(bfloat16) if x.dtype == np.uint16 else x


@functools.cache
def device_ops(device: str):
    """(the device's ops, with `place`, which copies an argument to the device; the device's name)."""
    from llm_numba.ops import get_ops

    ops = get_ops(device)
    if device == "cpu":
        ops.set_threads(0)

    def place(x):
        if not isinstance(x, np.ndarray):
            return x
        tensor = ops.view(ops.allocate(x.nbytes), 0, x.shape, x.dtype.name)
        ops.to_device(tensor, storage(x))
        return tensor

    ops.place = place
    return ops, device


_peaks: dict[str, float | None] = {}


def peaks(device: str, dtype: str = "float32", again: bool = False) -> dict[str, float | None]:
    """The machine's limits: flops a second for a dtype, and bytes a second by access pattern. The highest rate measured
    so far, since other load only lowers it. None under LESSONS_FAST, where nothing is measured."""
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
    """PyTorch's seconds, from a separate process; empty if it is not installed or fails."""
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
        print(f"note: PyTorch could not be timed: {error}", file=sys.stderr)
        return {}


def show_times(ladder: Ladder) -> dict | None:
    """Time the ladder and print the table; for a CUDA ladder without a GPU, the table of a GPU in lessons/results.
    Returns what it printed."""
    found = times(ladder)
    if found is None:
        found = recorded(ladder)
        print("No GPU found; " + ("times measured on another machine:" if found else "no recorded times."))
    if found:
        print("\n".join(time_table(found)))
    return found


def recorded(ladder: Ladder) -> dict | None:
    """The times of a ladder from lessons/results."""
    for path in sorted((FOLDER / "results").glob("*.json")):
        results = json.loads(path.read_text())
        if ladder.name in results["ladders"] and results["device"] == ladder.problem.device:
            return results["ladders"][ladder.name]
    return None


COLUMNS = ["ms", "rate", "of the machine's limit", "of PyTorch's speed"]


def cells(found: dict) -> list[list[str]]:
    """For each rung its name and COLUMNS as text; empty if unknown."""
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
    return [f"{found['machine']}; {format_sizes(found['sizes'])}", "", *rows]


def main() -> None:
    """Print the times of one ladder of a file as JSON."""
    file, name, sizes = sys.argv[1:]
    ladder = next(ladder for ladder in ladders(Path(file)) if ladder.name == name)
    print(json.dumps(times_here(ladder, json.loads(sizes))))


if __name__ == "__main__":
    main()
