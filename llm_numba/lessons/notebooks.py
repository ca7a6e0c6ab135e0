"""Each lesson is a script (py:percent). Its notebook has the same cells, with their outputs."""

from pathlib import Path

from llm_numba.lessons import FOLDER
from llm_numba.util.cli import UserError, command
from llm_numba.util.files import write_whole

TIMEOUT = 900  # seconds for one cell
# a notebook's metadata, without traces of the machine that ran it
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def scripts() -> list[Path]:
    """The lessons in order."""
    if not FOLDER.is_dir():
        raise UserError(f"{FOLDER}: no lessons found; run this in a checkout of llm_numba")
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def script_of(number: str) -> Path:
    """A lesson's script, by number (1 or 01) or by name."""
    found = [s for s in scripts() if number in (s.stem, s.name, s.stem[:2]) or number.zfill(2) == s.stem[:2]]
    if not found:
        raise UserError(f"{number}: there is no such lesson; there are: {', '.join(s.stem for s in scripts())}")
    return found[0]


def title_of(script: Path) -> str:
    """The heading of the first cell."""
    lines = script.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix("# # ") for line in lines if line.startswith("# # ")), script.stem)


def cells(path: Path) -> list[tuple[str, str]]:
    """(type, source) of every cell of a script or a notebook."""
    import jupytext

    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def build(script: Path) -> Path:
    """Run a script's cells in a new kernel, in the lessons' folder, and write the notebook beside the script."""
    import jupytext
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = jupytext.read(script)
    notebook.metadata = nbformat.from_dict(KERNEL)
    try:
        NotebookClient(
            notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(FOLDER)}}, coalesce_streams=True
        ).execute()
    except CellExecutionError as error:
        raise UserError(
            f"{script.name}: a cell raised {error.ename}: {error.evalue}; run the script to see the traceback"
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
    """What is wrong with a lesson's notebook: it is missing, its cells differ from the script's, or it did not run to
    the end."""
    target = script.with_suffix(".ipynb")
    rebuild = f"run {command('lessons', 'build', script.stem[:2])}"
    if not target.exists():
        return [f"{target.name} is missing: {rebuild}"]
    import nbformat

    if cells(script) != cells(target):
        return [f"{target.name} and {script.name} have different cells: {rebuild}"]
    found, count = [], 0
    for cell in nbformat.read(target, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        count += 1
        if cell.execution_count != count:
            found.append(f"{target.name}: cell {count} was not run, or not in order: {rebuild}")
        found += [f"{target.name}: cell {count} raised {o.ename}" for o in cell.outputs if o.output_type == "error"]
    return found
