"""The register tile fits the vector registers of the machine, and a narrower tile computes the same."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from llm_numba.cpu import vectors
from llm_numba.cpu.tile import transpose

pytestmark = pytest.mark.compiled
HERE = Path(__file__).parent
AVX2 = {"NUMBA_CPU_NAME": "haswell"}
X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="for x86 processors")


def assembly(tmp_path, *machine, **changes):
    """(vector bits, the lines from the first to the last multiply-add) of a product on the tile, in assembly."""
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(HERE.parent), **changes}
    command = [sys.executable, HERE / "tile_assembly.py", *machine]
    bits, *lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    where = [i for i, line in enumerate(lines) if re.search(r"\t(vfmadd\w*|fmla)\t", line)]
    return int(bits), lines[where[0] : where[-1] + 1]


@X86
@pytest.mark.parametrize(
    "cpu, bits, sums, register",
    [("haswell", 256, 12, "ymm"), ("skylake-avx512", 512, 24, "zmm"), ("znver4", 512, 24, "zmm")],
)
def test_the_tile_stays_in_registers(tmp_path, cpu, bits, sums, register):
    """One multiply-add per register of the tile, all of full width, and no access to the stack."""
    found, loop = assembly(tmp_path, NUMBA_CPU_NAME=cpu)
    fused = [line for line in loop if "vfmadd" in line]
    assert found == bits and len(fused) == sums and all(register in line for line in fused)
    assert not any("rsp" in line or "rbp" in line for line in loop)


@X86
def test_the_tile_stays_in_arm_registers(tmp_path):
    """The narrow tile, compiled for a processor with NEON: 24 registers of four floats."""
    _, loop = assembly(tmp_path, "aarch64-unknown-linux-gnu", "neoverse-n1", **AVX2)
    assert sum("fmla" in line for line in loop) == 24
    assert not any("[sp" in line for line in loop)


@pytest.mark.parametrize(
    "name, here, chosen",
    [
        (None, "+avx2,+avx512f", "+avx2,+avx512f,-prefer-256-bit"),
        (None, "+neon", "+neon"),  # LLVM has no such preference here
        ("haswell", "+avx2,+avx512f", ""),
    ],
)
def test_loops_may_use_full_registers(monkeypatch, name, here, chosen):
    monkeypatch.setattr(vectors, "get_host_cpu_features", lambda: here)
    monkeypatch.setattr(vectors.config, "CPU_NAME", name)
    monkeypatch.setattr(vectors.config, "CPU_FEATURES", None)
    vectors.choose_features()
    assert vectors.config.CPU_FEATURES == chosen


@pytest.mark.parametrize("R, C", [(1, 1), (3, 97), (16, 16), (33, 50), (96, 64), (97, 257)])
def test_transpose(R, C):
    """On views of larger arrays, whose rows are not contiguous with each other; nothing outside of `to` changes."""
    rows = np.random.default_rng(0).standard_normal((R, C + 3), dtype=np.float32)[:, :C]
    whole = np.full((C + 1, R + 5), 7, np.float32)
    transpose(whole[:C, :R], rows)
    assert (whole[:C, :R] == rows.T).all()
    assert (whole[C] == 7).all() and (whole[:, R:] == 7).all()


@X86
def test_avx2_computes_the_same():
    """The tests of the ops that use the tile, with the tile of AVX2."""
    folder = Path(numba.config.CACHE_DIR).parent / (Path(numba.config.CACHE_DIR).name + "-avx2")
    command = [sys.executable, "-m", "pytest", "--device", "cpu", "-q", "-p", "no:cacheprovider"]
    files = [HERE / f"test_{name}.py" for name in ("matmul", "attention")]
    env = os.environ | AVX2 | {"NUMBA_CACHE_DIR": str(folder)}
    done = subprocess.run([*command, *files], env=env, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
