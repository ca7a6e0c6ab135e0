"""Compiler options of all CPU functions, and small functions that several ops share.

LLVM may fuse a multiply and an add everywhere. It may reorder a sum (to use vector lanes) only in the reductions below,
which do nothing else. Elsewhere it once chose one order in the process that compiled an op and another order in the
process that read it from disk, so the bits of a run changed. LLVM never assumes that there are no NaNs or infinities:
they pass through a step to where they can be seen.

The longer ops are a parallel loop that calls one function per task. This is easier to read and compiles faster, because
Numba analyses the body of a parallel loop many times.
"""

import os
from pathlib import Path

# A thread that waits for work spins for a few tenths of a millisecond, then sleeps. Spinning longer takes the core from
# other processes. Sleeping at once makes the thread late for the next loop, and the scheduler often wakes it on the
# core of the thread that woke it, so that the two share one core. OpenMP reads these variables when Numba loads it;
# only GNU's knows the second.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import numpy as np  # noqa: E402
from numba import config, njit  # noqa: E402

from llm_numba.cpu.vectors import choose_features  # noqa: E402
from llm_numba.util.cache import compiled_code_folder  # noqa: E402


def is_compiled() -> bool:
    """Whether Numba compiles the ops, rather than leaving them plain Python."""
    return not config.DISABLE_JIT


def shares() -> list[set[str]]:
    """The layers or ops that other processes should compile while this one compiles the rest: attention, most of the
    work; [] if the disk holds a compiled op already. (memory.py compiles a function that is not an op.)"""
    found = Path(config.CACHE_DIR).glob("cpu_*/*.nbi")  # Numba makes a folder for each folder of sources
    return [{"attention"}] if all(index.name.startswith("memory.") for index in found) else []


def set_options() -> None:
    """Set Numba's options: the processor's features and the folder of compiled code."""
    choose_features()
    config.CACHE_DIR = config.CACHE_DIR or str(compiled_code_folder())  # NUMBA_CACHE_DIR takes precedence


set_options()

PARALLEL = dict(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
TASK = dict(fastmath={"contract"}, error_model="numpy")  # the body of a parallel loop
INLINE = dict(inline="always", fastmath={"contract"}, error_model="numpy")
REDUCTION = dict(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")

LOG2E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # their sum is ln 2, the first is exact
EXP_LOWEST, EXP_HIGHEST = np.float32(-87), np.float32(88)
ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)


@njit(**INLINE)
def exp(x):
    """e**x in float32 without branches, so that LLVM vectorises a loop over it.

    x = n ln2 + r with an integer n; e**r is a polynomial, and 2**n is n written into the exponent bits of a float.
    The relative error is 1.2e-7 for |x| < 10 and rises to 3e-7 at the ends of [-87, 88]; x is clamped to this interval.
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
    """The largest of x (n,) float32. If x contains a NaN, the result may be NaN.

    LLVM vectorises a maximum of integers, but a maximum of floats only if there are no NaNs. Read as integers, floats
    keep their order if all bits but the sign are flipped for negative ones.
    """
    bits = x.view(np.int32)
    key = LOWEST
    for i in range(bits.shape[0]):
        key = max(key, bits[i] ^ ((bits[i] >> SIGN) & ALL_BUT_SIGN))
    return np.int32(key ^ ((key >> SIGN) & ALL_BUT_SIGN)).view(np.float32)
