"""Tools for the lessons: ladders of kernels that are checked and timed, recorded memory accesses, exercises.

The lessons themselves are in the `lessons` folder of a checkout. CUDA kernels run in Numba's simulator, so a lesson
works the same on every machine. If the machine has a GPU, a separate process times the kernels on it (timing.py).
"""

import os
import sys
from pathlib import Path

from llm_numba.ops import simulate

if "numba.cuda" not in sys.modules and "NUMBA_ENABLE_CUDASIM" not in os.environ:
    simulate()

FOLDER = Path(__file__).parents[2] / "lessons"
FAST = os.environ.get("LESSONS_FAST", "0") != "0"  # small sizes, used by the tests: each lesson runs in seconds


def sized(real, fast):
    """`real` in a normal run, `fast` under LESSONS_FAST."""
    return fast if FAST else real
