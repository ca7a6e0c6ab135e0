"""How every CPU function is compiled, and the small pieces that several of them use.

LLVM may fuse a multiply with an add everywhere. It may reorder a sum, into vector lanes, only in the reductions below,
which do nothing else: elsewhere it has picked one order in a process that compiled an op, and another in the next one,
which read it from disk, and the bits of a run changed with it. Nowhere does it assume that there are no NaNs and
infinities: these travel through a step to where they can be seen.

The longer ops are a parallel loop that calls a function for each task: it reads better, and compiles sooner, as Numba
looks at the body of a parallel loop many times over.
"""

import hashlib
import os
from pathlib import Path

# A thread that waits for work spins for some tenths of a millisecond, then it sleeps. One that spins on takes the core
# from whoever else wants it; one that sleeps at once is late for the next loop, and often woken on the core of the one
# that woke it, where the two then take turns. OpenMP (GNU's; others know only the first) reads these when Numba loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import numpy as np  # noqa: E402
from numba import config, njit  # noqa: E402

from llm_numba.cpu.vectors import choose_features  # noqa: E402
from llm_numba.util.cache import cache_folder  # noqa: E402


def use_own_cache() -> None:
    """Keep compiled functions under a name that changes with any file beside this one: Numba itself notices a change
    in the file of a function, but not in another whose function it inlined there. NUMBA_CACHE_DIR comes first."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    config.CACHE_DIR = config.CACHE_DIR or str(cache_folder() / f"numba-{digest}")


def is_compiled() -> bool:
    """Whether Numba compiles the ops, or leaves them plain Python."""
    return not config.DISABLE_JIT


def nothing_compiled() -> bool:
    """Whether there is no op yet that could be read from disk; what starts the threads, in memory.py, is none."""
    return all(index.name.startswith("memory.") for index in Path(config.CACHE_DIR).rglob("*.nbi"))


choose_features()
use_own_cache()

PARALLEL = dict(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
TASK = dict(fastmath={"contract"}, error_model="numpy")  # what one iteration of a parallel loop does
INLINE = dict(inline="always", fastmath={"contract"}, error_model="numpy")
REDUCTION = dict(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")

LOG2E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # their sum is ln 2, the first is exact
EXP_LOWEST, EXP_HIGHEST = np.float32(-87), np.float32(88)
ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)


@njit(**INLINE)
def exp(x):
    """e**x in float32, free of branches, so that LLVM turns a loop over it into vector code.

    x = n ln2 + r with a whole n; e**r is a polynomial and 2**n is made by writing n into a float's exponent bits.
    Relative error 1.2e-7 for |x| < 10, rising to 3e-7 at the ends of [-87, 88]; beyond these x is taken as the bound;
    NaN stays NaN.
    Source:   S. L. Moshier, Cephes Mathematical Library, expf
    """
    x = EXP_LOWEST if x < EXP_LOWEST else x
    x = EXP_HIGHEST if x > EXP_HIGHEST else x
    n = np.floor(x * LOG2E + HALF)
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power_of_two = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + ONE) * power_of_two


@njit(**REDUCTION)
def sum_of(x):
    """The sum of x (n,)."""
    total = ZERO
    for i in range(x.shape[0]):
        total += x[i]
    return total


@njit(**REDUCTION)
def dot(x, y):
    """The sum of x * y, both (n,)."""
    total = ZERO
    for i in range(x.shape[0]):
        total += x[i] * y[i]
    return total


SIGN, ALL_BUT_SIGN, LOWEST = np.int32(31), np.int32(0x7FFFFFFF), np.int32(-0x80000000)


@njit(**TASK)
def largest(x):
    """The largest of x (n,) float32; a NaN among them gives a NaN or is passed over.

    LLVM vectorises a maximum of integers, but of floats only where there are no NaNs. A float's bits, all but the
    sign's flipped where it is negative, are in the order of the floats.
    """
    bits = x.view(np.int32)
    key = LOWEST
    for i in range(bits.shape[0]):
        key = max(key, bits[i] ^ ((bits[i] >> SIGN) & ALL_BUT_SIGN))
    return np.int32(key ^ ((key >> SIGN) & ALL_BUT_SIGN)).view(np.float32)
