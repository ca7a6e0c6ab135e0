"""The ops compute the same whether they were just compiled or read from what an earlier process compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import hashlib, sys
sys.path[:0] = {paths!r}
import numpy as np
from training import new_run, random_batch, random_parameters, set_parameters, train_step
from llm_numba.models.gpt2 import GPT2
from llm_numba.ops import get_ops

model, rng = GPT2(130, 97, 1, 2, 130), np.random.default_rng(7)
run = new_run(get_ops("cpu"), model, 2, 130, "keep")
set_parameters(run.arena, random_parameters(model, rng))
train_step(run, random_batch(model, 2, 130, rng))
run.m.scratch.fill(0)
print(hashlib.sha256(run.arena.memory).hexdigest())
"""


@pytest.mark.compiled
def test_compiled_anew_and_read_back_give_the_same_bits(tmp_path):
    """LLVM sees a parallel loop in two forms, and once optimised them differently where it might reorder sums."""
    here = Path(__file__).parent
    script = SCRIPT.format(paths=[str(here), str(here.parent)])
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    digests = [
        subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, check=True).stdout
        for _ in range(2)
    ]
    assert digests[0] == digests[1]


@pytest.mark.compiled
def test_the_first_start_shares_the_compiling_with_a_second_process(tmp_path):
    """Setting up the threads compiles something too, which must not pass for a compiled op."""
    script = """if True:
        import numpy as np
        from llm_numba.ops import get_ops
        ops = get_ops("cpu")
        ops.set_threads(0)
        told = [ops.nothing_compiled()]
        ops.residual_backward(np.zeros((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32))
        print(*told, ops.nothing_compiled())
    """
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]
