"""The lessons' tools: ladders of kernels that are checked and timed, what a kernel's threads read and write, exercises.

The lessons themselves are in the folder `lessons` of a checkout. A process of a lesson runs CUDA kernels in Numba's
simulator, so that it is the same everywhere; where there is a card, another process times them there (timing.py).
"""

import os
import sys
from pathlib import Path

if "numba.cuda" not in sys.modules:  # later it would change nothing
    os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")  # Numba reads it when it is loaded
    if "numba" in sys.modules:
        sys.modules["numba"].config.ENABLE_CUDASIM = int(os.environ["NUMBA_ENABLE_CUDASIM"])

FOLDER = Path(__file__).parents[2] / "lessons"
FAST = os.environ.get("LESSONS_FAST", "0") != "0"  # small sizes, as in the tests: a lesson in some seconds


def sized(real, fast):
    """What a lesson takes, and what it takes in the tests."""
    return fast if FAST else real
