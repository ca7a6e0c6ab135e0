"""How far a loss or a gradient norm lies from its recent values: the sign of an update that is better skipped."""

import math

WINDOW = 128  # values
REMARKABLE = 5.0  # a step whose z-score is above this has its text named in the log


def z_score(history: list[float], value: float) -> float:
    """How many standard deviations `value` lies above the mean of the last WINDOW values, itself included.

    history: += `value`, if it is finite; the oldest value leaves a full window.
    Returns nan until the window is full (`value` is then taken in, not judged), 0 if all its values are equal, and inf
    for a value that is not finite. The deviation is the population's, sqrt(mean((x - mean)^2)), so a single value can
    lie at most sqrt(WINDOW - 1) = 11.3 deviations away. Source: llm.c, llmc/outlier_detector.h
    """
    value = float(value)
    full = len(history) == WINDOW
    if not math.isfinite(value):
        return math.inf if full else math.nan
    if full:
        del history[0]
    history.append(value)
    if not full:
        return math.nan
    mean = math.fsum(history) / WINDOW
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in history) / WINDOW)
    return (value - mean) / deviation if deviation else 0.0


def limit(history: list[float], z: float) -> float:
    """The value above which `z_score(history, value)` is above z; inf while the window is not full, or if z is 0.

    A new value that lies d above the mean of the values that stay has, among them and itself, the score
    d sqrt((n - 1) / n) / sqrt(deviation**2 + d**2 / n)  for n = WINDOW.
    """
    slack = WINDOW - 1 - z * z
    if len(history) < WINDOW or z == 0 or slack <= 0:
        return math.inf
    stay = history[1:]
    mean = math.fsum(stay) / len(stay)
    variance = math.fsum((x - mean) ** 2 for x in stay) / len(stay)
    return mean + z * math.sqrt(variance * WINDOW / slack) + 1e-12 * abs(mean)
