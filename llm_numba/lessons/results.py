"""Time all ladders on this machine, and write the tables of all machines into lessons/results/README.md."""

import json
import re
import sys
from datetime import date
from pathlib import Path

from llm_numba.bench.machine import describe_versions
from llm_numba.bench.tables import split_at_marker, table, write_tables
from llm_numba.lessons import FOLDER
from llm_numba.lessons.ladder import Ladder, format_sizes, ladders, rung_files
from llm_numba.lessons.timing import COLUMNS, cells, times
from llm_numba.util.files import write_whole

MARKER = "lessons"
PAGE = FOLDER / "results" / "README.md"


def all_ladders(device: str) -> list[Ladder]:
    return [ladder for file in rung_files() for ladder in ladders(file) if ladder.problem.device == device]


def write(device: str) -> Path | None:
    """Time every ladder of a device, write the machine's JSON file and update PAGE. None if the device is missing."""
    split_at_marker(PAGE, MARKER)
    found = {}
    for ladder in all_ladders(device):
        measured = times(ladder)
        if measured is None:
            return None
        found[ladder.name] = measured
        print(
            f"{ladder.name}: {', '.join(f'{n} {1e3 * s:.4g} ms' for n, s in measured['rows'].items())}", file=sys.stderr
        )
    if not found:
        return None
    machine = next(iter(found.values()))["machine"]
    results = {
        "machine": machine,
        "device": device,
        "date": date.today().isoformat(),
        "versions": describe_versions(device),
        "ladders": found,
    }
    path = FOLDER / "results" / f"{slug(machine)}.json"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(results, indent=1).encode() + b"\n")
    write_tables(PAGE, MARKER, page_tables())
    return path


def slug(machine: str) -> str:
    """The file name of a machine: its model, without driver and clocks."""
    name = re.split(r", (?:driver|\d+-bit)", machine)[0]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def page_tables() -> str:
    """The tables of all recorded machines: one line per rung."""
    parts = []
    for path in sorted((FOLDER / "results").glob("*.json")):
        results = json.loads(path.read_text())
        lines = []
        for name, found in results["ladders"].items():
            labels = [f"{name}, {format_sizes(found['sizes'])}", *[""] * (len(found["rows"]) - 1)]
            lines += [[label, *line] for label, line in zip(labels, cells(found), strict=True)]
        head = f"{results['date']}, {results['machine']}; {results['versions']}."
        parts.append("\n".join([head, "", *table(["ladder", "rung", *COLUMNS], lines)]))
    return "\n\n".join(parts) or "Nothing has been measured yet."
