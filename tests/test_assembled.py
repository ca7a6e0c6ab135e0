"""Every CUDA kernel compiles for every supported GPU, without stack, spills or unintended 64-bit floats.

The other tests run in the simulator, which has no types. So assemble_all.py compiles in a process without the
simulator; this needs no GPU.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from assemble_all import all_files

PROGRAM = Path(__file__).with_name("assemble_all.py")
FILES = all_files()
EXAMPLES = """
import numpy as np
from assembling import array
from numba import cuda
from llm_numba.cuda.jit import kernel, to_storage


@kernel
def good(x):
    x[cuda.grid(1)] *= np.float32(0.5)

@kernel
def wide_literal(x):
    x[cuda.grid(1)] *= 0.1

@kernel
def wide_sum(x):
    x[0] += x[1]

@kernel
def stack(x):
    local = cuda.local.array(256, np.float32)
    for j in range(256):
        local[j] = x[j]
    cuda.syncthreads()
    for j in range(256):
        x[j] += local[255 - j]

@kernel(launch_bounds=(1024, 2))
def spilling(x):
    local = cuda.local.array(48, np.float32)
    for j in range(48):
        local[j] = x[cuda.threadIdx.x + 1024 * j]
    cuda.syncthreads()
    for j in range(48):
        x[cuda.threadIdx.x + 1024 * j] = local[47 - j]

@kernel
def ill_typed(x):
    x[0] = "text"

@kernel
def rounds(x, y):
    y[0] = to_storage(x[0], y)

@kernel
def without_case(x):
    x[0] = 0

def make_variant(constant):
    @kernel
    def variant(x):
        x[0] = constant
    return variant

ONE, OTHER = make_variant(1), make_variant(2)

def made_when_called():
    @kernel
    def late(x):
        x[0] = 0
    return late

def cases():
    f1, h1 = array("f1"), array("h1")
    return [
        dict(kernel=good, signature=(f1,), bf16=False),
        dict(kernel=wide_literal, signature=(f1,), bf16=True),
        dict(kernel=wide_literal, signature=(array("d1"),), bf16=True, wide=True),
        dict(kernel=wide_sum, signature=(array("d1"),), bf16=True),
        dict(kernel=stack, signature=(f1,), bf16=True),
        dict(kernel=spilling, signature=(f1,), bf16=True),
        dict(kernel=ill_typed, signature=(f1,), bf16=True),
        dict(kernel=rounds, signature=(f1, h1), bf16=True, contains="F2FP"),
        dict(kernel=rounds, signature=(f1, f1), bf16=True, contains=("STG", "HMMA")),
        dict(kernel=ONE, signature=(f1,), bf16=True),
    ]
"""


@pytest.fixture(scope="module")
def assemble():
    """A function that assembles the cases of files and returns the printed lines by file."""

    def run(*files):
        simulated = ("NUMBA_ENABLE_CUDASIM", "NUMBA_DISABLE_JIT")
        environment = {name: value for name, value in os.environ.items() if name not in simulated}
        done = subprocess.run([sys.executable, PROGRAM, *files], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        lines = defaultdict(list)
        for line in map(json.loads, done.stdout.splitlines()):
            lines[line["file"]].append(line)
        return lines

    return run


@pytest.fixture(scope="module")
def assembled(assemble, request):
    """The lines of every file that is tested in this session, all assembled at once."""
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    return assemble(*sorted({call.params["kernels_of"] for call in calls if call and "kernels_of" in call.params}))


@pytest.mark.parametrize("kernels_of", FILES)
def test_no_stack_no_spills_no_unintended_64_bit_floats(kernels_of, assembled):
    problems = [f"{line['what']}: {problem}" for line in assembled[kernels_of] for problem in line["problems"]]
    assert not problems, "\n".join(["", *problems])


def test_each_problem_is_reported(assemble, tmp_path):
    file = tmp_path / "examples.py"
    file.write_text(EXAMPLES)
    reported = defaultdict(str)
    for line in assemble(file)[str(file)]:
        reported[line["what"]] += "; ".join(line["problems"])

    def of(kernel, capability):
        return next(text for what, text in reported.items() if what.startswith(kernel) and what.endswith(capability))

    for capability in ("for 8.0", "for 9.0"):
        assert of("good(", capability) == ""
        assert of("wide_literal(array(float32", capability).endswith("64-bit floating-point instructions")
        assert of("wide_literal(array(float64", capability) == ""
        assert of("wide_sum(", capability) == "1 64-bit floating-point instructions"
        assert of("stack(", capability) == "1024 bytes of stack"
        assert "bytes of spills" in of("spilling(", capability)
        assert of("ill_typed(", capability).startswith("TypingError: ")
        assert of("rounds(array(float32, 1d, C), array(uint16", capability) == ""
        assert of("rounds(array(float32, 1d, C), array(float32", capability) == "no HMMA"
    assert of("good(", "for 7.5") == ""
    assert not [what for what in reported if what.startswith("rounds") and what.endswith("7.5")]
    assert {what for what, text in reported.items() if text == "no case"} == {"without_case", "variant", "late"}
