"""How the simulator runs the threads of a block."""

import threading

import numpy as np
import pytest

pytest.importorskip("numba_cuda")
from numba import cuda

from llm_numba.cuda.jit import SIMULATED, kernel

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def simulated(device):
    if device == "cpu" or not SIMULATED:
        pytest.skip("the simulator")


@kernel
def exchange_kernel(out, failing):
    """out[i] = the number of the other thread of a pair; threads from 4 on leave before."""
    shared = cuda.shared.array(4, np.int32)
    i = cuda.threadIdx.x
    if i < 4:
        shared[i] = i
        cuda.syncthreads()
        if i == failing:
            raise ValueError("this thread fails")
        out[i] = shared[i ^ 1]
        cuda.syncthreads()
        out[i] *= 10


def test_threads_wait_for_those_that_have_not_left():
    out = np.zeros(4, np.int32)
    exchange_kernel[1, 6](out, -1)
    assert out.tolist() == [10, 0, 30, 20]


@pytest.mark.parametrize("failing", [0, 3])
def test_an_error_ends_every_thread(failing):
    before = threading.active_count()
    with pytest.raises(ValueError, match=rf"tid=\[{failing}, 0, 0\] .*: this thread fails"):
        exchange_kernel[1, 6](np.zeros(4, np.int32), failing)
    for thread in threading.enumerate()[before:]:
        thread.join(10)
    assert threading.active_count() == before
