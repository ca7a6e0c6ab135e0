"""How the results of an op are compared with those of the float64 oracle."""

import math

import ml_dtypes  # noqa: F401  registers "bfloat16" with NumPy
import numpy as np

from llm_numba import oracle
from llm_numba.ops import WRITES
from llm_numba.training.override import parameters_of

# (B, T, C): the smallest sizes, odd sizes, primes, one above a power of two; then whole vectors of 8 and of 4
SHAPES = [(1, 1, 1), (1, 1, 3), (2, 3, 5), (3, 2, 17), (1, 5, 257), (5, 1, 97), (1, 97, 2), (2, 17, 97), (1, 257, 3)]
SHAPES += [(2, 3, 40), (1, 5, 12)]

UNIT = 2.0**-24  # the largest relative error of one float32 operation
TINY = 1e-35  # below this float32 ops may return zero: exp is clamped at e**-87 = 1.6e-38
ROUNDING = {"float32": 0, "bfloat16": 2**-8}  # the largest relative error of storing a float32 in this dtype


def by_oracle(op, *arguments):
    """What the oracle writes, given the arguments of an op: a list of float64 arrays, or one array if there is one.

    Call it before the op runs: arrays that accumulate are inputs too.
    """
    wide = [x.astype(np.float64) if is_float(x) else x for x in arguments]
    getattr(oracle, op)(*wide)
    names = parameters_of(getattr(oracle, op))
    written = [x for name, x in zip(names, wide, strict=True) if name in WRITES[op]]
    return written if len(written) > 1 else written[0]


def is_float(x):
    return isinstance(x, np.ndarray) and x.dtype.name in ("bfloat16", "float32", "float64")


def sum_error(magnitude, n):
    """The error of a float32 sum of n products whose absolute values sum to `magnitude`.

    Each of the n additions rounds a partial sum, by at most UNIT of magnitude. The signs of the errors are close to
    random, so the total grows with the root of n. Four standard deviations, and one more term for the product's error.
    """
    return 4 * math.sqrt(n + 1) * UNIT * magnitude


def stored(dtype, expected, error):
    """The error, plus the error of storing the result in this dtype."""
    return error + ROUNDING[dtype] * (np.abs(expected) + error)


def assert_close(name, got, expected, tolerance):
    """Every element of `got` is within `tolerance` (a number or an array, absolute) of `expected`; NaN never is."""
    assert got.shape == np.shape(expected), f"{name} has shape {got.shape}, not {np.shape(expected)}"
    got, expected = got.astype(np.float64), np.asarray(expected, np.float64)
    excess = np.abs(got - expected) - tolerance
    excess = np.where(np.isnan(excess), np.inf, excess)
    worst = np.unravel_index(np.argmax(excess), got.shape)
    allowed = np.broadcast_to(tolerance, got.shape)[worst]
    index = ", ".join(str(i) for i in worst)
    assert excess[worst] <= 0, (
        f"{name}[{index}] is {got[worst]!r}, not {expected[worst]!r} within {allowed:.3g}"
        f" ({np.count_nonzero(excess > 0)} of {got.size} elements are wrong)"
    )
