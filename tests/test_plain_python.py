"""Without the compiler the ops compute the same, so a debugger can step through them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_numba.ops import CONTRACT


@pytest.mark.compiled
def test_ops_in_plain_python():
    """The small cases of the ops' tests (conftest.py selects them), with NUMBA_DISABLE_JIT=1."""
    here = Path(__file__).parent
    files = [path for path in (here / f"test_{layer}.py" for layer in (*CONTRACT, "naive")) if path.exists()]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--device", "cpu", "-q", "-p", "no:cacheprovider", *files],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
