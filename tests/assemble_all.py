"""Compile and assemble every kernel, without a card: python tests/assemble_all.py [FILE ...]

FILE is the name of a file of llm_numba/cuda, such as layernorm, whose cases are in kernel_cases/, or the path of a file
with cases of its own; all of them if none is given. A file of cases has a function `cases` that returns a list of dict:

    kernel, signature (its arguments' Numba types), bf16 (whether only a card from 8.0 on runs it),
    wide (True where 64-bit floating-point numbers are meant), contains (machine instructions that must be there)

Prints a line of JSON for each case and capability: file, what, registers, shared, problems (a list of str), seconds (of
the processor); and one for each kernel that has no case.
"""

import ast
import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

from assembling import assemble, missing_packages

CAPABILITIES = {False: [(7, 5), (8, 0), (9, 0)], True: [(8, 0), (9, 0)]}  # by whether bf16 is in it
CUDA = Path(__file__).parents[1] / "llm_numba" / "cuda"
CASES = Path(__file__).parent / "kernel_cases"


def all_files() -> list[str]:
    return sorted({path.stem for path in (*CUDA.glob("*.py"), *CASES.glob("*.py"))} - {"__init__"})


@functools.cache
def cases_of(file: str) -> list[dict]:
    """The cases of a file by its name or its path; none where nobody has written any."""
    path = Path(file) if file.endswith(".py") else CASES / f"{file}.py"
    if not path.exists():
        return []
    spec = importlib.util.spec_from_file_location(f"cases_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cases()


def problems_of(case: dict, found) -> list[str]:
    """What is wrong with an assembled kernel."""
    checks = {
        f"{found.stack} bytes of stack": found.stack,
        f"{found.spills} bytes of spills": found.spills,
        f"{found.wide} instructions on 64-bit floating-point numbers": found.wide and not case.get("wide"),
    }
    wanted = case.get("contains", ())
    checks |= {f"no {word}": word not in found.sass for word in ((wanted,) if isinstance(wanted, str) else wanted)}
    return [problem for problem, is_there in checks.items() if is_there]


def run_case(task: tuple[str, int, tuple[int, int]]) -> dict:
    file, index, capability = task
    case, start = cases_of(file)[index], processor_seconds()
    types = ", ".join(map(str, case["signature"]))
    line = {"file": file, "what": f"{case['kernel'].py_func.__name__}({types}) for {capability[0]}.{capability[1]}"}
    try:
        found = assemble(case["kernel"], case["signature"], capability)
        line |= {"registers": found.registers, "shared": found.shared, "problems": problems_of(case, found)}
    except Exception as error:
        line |= {"problems": [f"{type(error).__name__}: {error}"]}
    return line | {"seconds": round(processor_seconds() - start, 2)}


def processor_seconds() -> float:
    """Of this process and the programs that it has run."""
    return sum(os.times()[:4])


@functools.cache
def all_cases() -> list[dict]:
    """The cases of every file that can be imported; one that cannot is a problem of its own."""
    found = []
    for path in CASES.glob("*.py"):
        with contextlib.suppress(Exception):
            found += cases_of(path.stem)
    return found


def forgotten(file: str) -> set[str]:
    """The names of the file's kernels that no case is about.

    Kernels that exist, however they were made, are told apart by identity; those that a function makes when it is
    called by their name in the source.
    """
    from numba.cuda.dispatcher import CUDADispatcher

    by_path = file.endswith(".py")
    module = f"cases_of_{Path(file).stem}" if by_path else f"llm_numba.cuda.{file}"
    source = (Path(file) if by_path else CUDA / f"{file}.py").read_text()
    cased = [case["kernel"] for case in cases_of(file) + all_cases()]
    names = {kernel.py_func.__name__ for kernel in cased if kernel.py_func.__module__ == module}
    kernels = [x for x in gc.get_objects() if isinstance(x, CUDADispatcher) and not x.targetoptions.get("device")]
    mine = [kernel for kernel in kernels if kernel.py_func.__module__ == module]
    found = {kernel.py_func.__name__ for kernel in mine if all(kernel is not one for one in cased)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name not in names:
            decorators = {ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list}
            found |= {node.name} if "kernel" in decorators else set()
    return found


def check_file(file: str) -> list[dict]:
    """Import a file of llm_numba/cuda and its cases: what is wrong before anything is compiled."""
    try:
        if not file.endswith(".py"):
            importlib.import_module(f"llm_numba.cuda.{file}")
        cases_of(file)
        return [{"file": file, "what": name, "problems": ["no case"]} for name in sorted(forgotten(file))]
    except Exception:
        return [{"file": file, "what": "import", "problems": [traceback.format_exc()]}]


def main(files: list[str]) -> int:
    missing = missing_packages()
    if missing:
        print(f"error: not installed: {', '.join(missing)}: pip install -e '.[test]'", file=sys.stderr)
        return 1
    lines = {file: check_file(file) for file in files or all_files()}
    for line in sum(lines.values(), []):
        print(json.dumps(line))
    tasks = [
        (file, index, capability)
        for file in lines
        if not any(line["what"] == "import" for line in lines[file])
        for index, case in enumerate(cases_of(file))
        for capability in CAPABILITIES[case["bf16"]]
    ]
    with multiprocessing.Pool(2, gc.disable) as pool:  # the compiler makes so many objects that it takes a third longer
        for line in pool.imap_unordered(run_case, tasks):
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
