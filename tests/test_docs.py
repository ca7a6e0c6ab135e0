"""The documentation: links lead somewhere, commands and flags exist, and the op table is the contract's."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm_numba.ops import WRITES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "lessons/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
COMMAND = re.compile(r"(?:python -m llm_numba\.|(?:llm-numba|python -m llm_numba) )([a-z][\w.-]*)([^`#\n&|]*)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page):
    """The page with continued lines joined; of the tables in the CHANGELOG only the last column, which is valid now."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.sub(r"^\|.*\|(.*)\|$", r"\1", text, flags=re.MULTILINE) if page.name == "CHANGELOG.md" else text


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@functools.cache
def help_of(*command):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def can_be_run(module):
    """Whether python -m finds the module, or the package's __main__."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    return bool(spec and (not spec.submodule_search_locations or can_be_run(f"{module}.__main__")))


@each_page
def test_links(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if ":" in path:  # another site
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


@each_page
def test_commands_and_their_flags(page):
    names = set(re.findall(r"^  ([a-z-]+) ", help_of("llm_numba", "--help"), flags=re.MULTILINE))
    for match in COMMAND.finditer(text_of(page)):
        name, rest = match[1].rstrip("."), match[2]
        module = "python -m llm_numba." in match[0]
        if module:
            assert can_be_run(f"llm_numba.{name}"), f"{match[0]}: no such module"
        else:
            assert name in names, f"{match[0]}: no such command"
        unknown = set(FLAG.findall(rest))
        if unknown:
            command = (f"llm_numba.{name}",) if module else ("llm_numba", name)
            unknown -= set(FLAG.findall(help_of(*command, "--help-all" if name == "train" else "--help")))
        assert not unknown, f"{match[0]}: no flag {', '.join(unknown)}"


def test_the_op_table_is_the_contract():
    """Every op, with all that it changes, in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, flags=re.MULTILINE)
    table = {op: {name for cell in cells.split("|") for name in re.findall(r"\w+", cell)} for op, cells in rows}
    assert len(rows) == len(table)
    assert table == {op: set(names) for op, names in WRITES.items()}
