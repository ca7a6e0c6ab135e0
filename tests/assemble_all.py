"""Compile and assemble every kernel, without a GPU: python tests/assemble_all.py [FILE ...]

FILE is the name of a file of llm_numba/cuda, such as layernorm, whose cases are in kernel_cases/, or the path of a file
that contains cases; by default all of llm_numba/cuda. A file of cases has a function `cases` that returns a list of
dict:

    kernel, signature (Numba types of the arguments), bf16 (True if it needs compute capability 8.0, "hopper" if 9.0
    and nothing else), wide (True if 64-bit floats are intended), contains (machine instructions that must occur)

Prints a line of JSON for each case and compute capability: file, what, registers, shared, problems (a list of str),
seconds (CPU time); and a line for each kernel without a case.
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

from assembling import HOPPER, assemble, missing_packages

CAPABILITIES = {False: [(7, 5), (8, 0), (9, 0)], True: [(8, 0), (9, 0)], "hopper": [HOPPER]}  # by bf16 of a case
CUDA = Path(__file__).parents[1] / "llm_numba" / "cuda"
CASES = Path(__file__).parent / "kernel_cases"


def all_files() -> list[str]:
    return sorted({path.stem for path in (*CUDA.glob("*.py"), *CASES.glob("*.py"))} - {"__init__"})


@functools.cache
def cases_of(file: str) -> list[dict]:
    """The cases of a file by its name or its path; [] if it has none."""
    path = Path(file) if file.endswith(".py") else CASES / f"{file}.py"
    if not path.exists():
        return []
    spec = importlib.util.spec_from_file_location(f"cases_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cases()


def problems_of(case: dict, found) -> list[str]:
    """What is wrong with an assembled kernel, in words."""
    checks = {
        f"{found.stack} bytes of stack": found.stack,
        f"{found.spills} bytes of spills": found.spills,
        f"{found.wide} 64-bit floating-point instructions": found.wide and not case.get("wide"),
    }
    checks |= {warning: True for warning in found.warnings}
    wanted = case.get("contains", ())
    checks |= {f"no {word}": word not in found.sass for word in ((wanted,) if isinstance(wanted, str) else wanted)}
    return [problem for problem, found_one in checks.items() if found_one]


def run_case(task: tuple[str, int, tuple]) -> dict:
    file, index, capability = task
    case, start = cases_of(file)[index], cpu_seconds()
    types = ", ".join(map(str, case["signature"]))
    line = {
        "file": file,
        "what": f"{case['kernel'].py_func.__name__}({types}) for {capability[0]}.{''.join(map(str, capability[1:]))}",
    }
    try:
        found = assemble(case["kernel"], case["signature"], capability)
        line |= {"registers": found.registers, "shared": found.shared, "problems": problems_of(case, found)}
    except Exception as error:
        line |= {"problems": [f"{type(error).__name__}: {error}"]}
    return line | {"seconds": round(cpu_seconds() - start, 2)}


def cpu_seconds() -> float:
    """CPU time of this process and its children."""
    return sum(os.times()[:4])


@functools.cache
def all_cases() -> list[dict]:
    """The cases of every file that can be imported; check_file reports the others."""
    found = []
    for path in CASES.glob("*.py"):
        with contextlib.suppress(Exception):
            found += cases_of(path.stem)
    return found


def without_case(file: str) -> set[str]:
    """The names of the kernels of a file that have no case.

    Existing kernels are compared by identity, kernels that a function makes when it is called by their name in the
    source.
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
    """Import a file of llm_numba/cuda and its cases, and report problems found before compiling."""
    try:
        if not file.endswith(".py"):
            importlib.import_module(f"llm_numba.cuda.{file}")
        cases_of(file)
        return [{"file": file, "what": name, "problems": ["no case"]} for name in sorted(without_case(file))]
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
    with multiprocessing.Pool(2, gc.disable) as pool:  # garbage collection makes compiling a third slower
        for line in pool.imap_unordered(run_case, tasks):
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
