"""A lesson's script (py:percent) and the notebook made from it: the same cells, the notebook's with what they gave."""

from pathlib import Path

from llm_numba.lessons import FOLDER
from llm_numba.util.cli import UserError, install
from llm_numba.util.files import write_whole

MISSING = f"the packages for notebooks are not installed: {install('lessons')}"
TIMEOUT = 900  # seconds of a cell
# what a notebook says of itself: nothing of the machine that ran it
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def scripts() -> list[Path]:
    """The lessons in their order."""
    if not FOLDER.is_dir():
        raise UserError(f"{FOLDER}: there are no lessons here: run this in a checkout of llm_numba")
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def script_of(number: str) -> Path:
    """A lesson's script by its number, such as 01, or its name."""
    found = [s for s in scripts() if number in (s.stem, s.name, s.stem[:2]) or number.zfill(2) == s.stem[:2]]
    if not found:
        raise UserError(f"{number}: there is no such lesson; there are: {', '.join(s.stem for s in scripts())}")
    return found[0]


def title_of(script: Path) -> str:
    """The heading of a lesson's first cell."""
    lines = script.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix("# # ") for line in lines if line.startswith("# # ")), script.stem)


def cells(path: Path) -> list[tuple[str, str]]:
    """(kind, source) of every cell of a script or a notebook."""
    try:
        import jupytext
    except ImportError as error:
        raise UserError(MISSING) from error
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def build(script: Path) -> Path:
    """Run a script's cells in a new kernel, in the folder of the lessons, and write the notebook beside it."""
    try:
        import jupytext
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
    except ImportError as error:
        raise UserError(MISSING) from error
    notebook = jupytext.read(script)
    notebook.metadata = nbformat.from_dict(KERNEL)
    try:
        NotebookClient(
            notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(FOLDER)}}, coalesce_streams=True
        ).execute()
    except CellExecutionError as error:
        raise UserError(
            f"{script.name}: {error.ename} in a cell: {error.evalue}; run it as a script to see where"
        ) from error
    notebook.metadata = nbformat.from_dict(KERNEL)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if output.get("metadata"):
                output.metadata = {}
    target = script.with_suffix(".ipynb")
    write_whole(target, nbformat.writes(notebook).encode() + b"\n")
    return target


def complaints(script: Path) -> list[str]:
    """What is wrong with a lesson's notebook: it is not there, its cells are others, or it was not run to its end."""
    target = script.with_suffix(".ipynb")
    again = f"run python -m llm_numba.lessons build {script.stem[:2]}"
    if not target.exists():
        return [f"{target.name} is missing: {again}"]
    import nbformat

    if cells(script) != cells(target):
        return [f"{target.name} has other cells than {script.name}: {again}"]
    found, count = [], 0
    for cell in nbformat.read(target, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        count += 1
        if cell.execution_count != count:
            found.append(f"{target.name}: cell {count} was not run in its order: {again}")
        found += [f"{target.name}: cell {count} ended with {o.ename}" for o in cell.outputs if o.output_type == "error"]
    return found
