"""No module outside models/ and formats/ names a tensor of a model. lint-imports checks the import levels."""

import ast
from pathlib import Path

import pytest
from conftest import FAULT_FILES, SLOW_FILES

PACKAGE = Path(__file__).parents[1] / "llm_numba"
KNOW_MODELS = ("models", "formats")  # formats: the names of tensors in other programs' files
KERNELS = ("cpu", "cuda", "bench", "lessons", "oracle.py")  # name an op's parameters
GPT2 = {  # tensors of GPT-2 whose names mean nothing else
    *("wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb", "ln2w", "ln2b", "fcw", "fcb"),
    *("fcprojw", "fcprojb", "lnfw", "lnfb", "encoded", "qkv", "atty", "attproj", "residual2", "residual3", "fch"),
    *("fch_gelu", "fcproj", "lnf", "dlnf", "dencoded", "dresidual2", "dresidual3"),
}  # fmt: skip
FILES = [
    path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in KNOW_MODELS + KERNELS
]


def names_in(tree):
    """Every identifier and every string of a module, with its line."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "value"):
            if isinstance(name := getattr(node, field, None), str):
                yield name, node.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_tensor_of_gpt2_is_named(file):
    found = {f"{name} (line {line})" for name, line in names_in(ast.parse(file.read_text())) if name in GPT2}
    assert not found, ", ".join(sorted(found))


def test_the_slow_test_files_exist():
    """A file that was renamed would become quick unnoticed."""
    here = Path(__file__).parent
    assert not {name for name in SLOW_FILES | FAULT_FILES if not (here / f"{name}.py").exists()}
