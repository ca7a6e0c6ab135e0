"""NumPy's normally distributed numbers, drawn on all cores: bit for bit those of one core.

NumPy's method (the ziggurat) takes one number of a stream of random 32-bit numbers for most results and several for a
few, so nobody knows where in the stream the millionth result begins. But two readers that start at different places of
a stream soon agree on where results begin. So every task starts at a known place of the stream. The first results of a
task, up to where it agrees with the task before, are dropped.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from llm_numba.util.host import usable_cpus

SEGMENT = 1 << 20  # 64-bit numbers of the stream for a task; it reads each in two halves
FEWEST_PER_RESULT, MOST_PER_RESULT = 1.0205, 1.0235  # 32-bit numbers for each result; 1.0221 on average
OVERLAP = 32  # results at the start of a segment, among which it must agree with the segment before
STEP, STEPS = 64, 256  # near the end of its segment a task draws STEP results at a time, at most STEPS times

State = Mapping[str, Any]  # of a generator
Place = tuple[int, int]  # in the stream: the generator's state, and whether half a number is left


def standard_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """rng.standard_normal(shape, np.float32); rng is a generator of `np.random.default_rng`."""
    out = np.empty(shape, np.float32)
    flat, done, start = out.reshape(-1), 0, rng.bit_generator.state
    segments = int(out.size * FEWEST_PER_RESULT / (2 * SEGMENT))
    with ThreadPoolExecutor(len(usable_cpus())) as pool:
        for values, begins, end in pool.map(lambda i: draw_segment(start, i), range(segments)):
            meeting = min(done + OVERLAP // 2, out.size)
            while done < meeting and place(rng.bit_generator.state) not in begins:
                flat[done] = rng.standard_normal(dtype=np.float32)
                done += 1
            if done == meeting or end is None:
                break  # then one core draws the rest
            values = values[begins.index(place(rng.bit_generator.state)) :]
            if done + len(values) > out.size:
                break
            flat[done : done + len(values)] = values
            done += len(values)
            rng.bit_generator.state = end
    rng.standard_normal(dtype=np.float32, out=flat[done:])
    return out


def draw_segment(start: State, index: int) -> tuple[np.ndarray, list[Place], State | None]:
    """(results, places, state) of a segment: all results that begin in it; where each of the first ones begins; and the
    state of the generator after the last, or None if the end was not found."""
    rng = generator(start, index)
    places, values = [], []
    for _ in range(OVERLAP):
        places.append(place(rng.bit_generator.state))
        values.append(rng.standard_normal(1, np.float32))
    values.append(rng.standard_normal(int(2 * SEGMENT / MOST_PER_RESULT) - OVERLAP, np.float32))
    beyond = set(places_from(start, index + 1))
    for _ in range(STEPS):
        before = rng.bit_generator.state
        values.append(rng.standard_normal(STEP, np.float32))
        if place(rng.bit_generator.state) in beyond:
            rng.bit_generator.state = before
            values.pop()
            while place(rng.bit_generator.state) not in beyond:
                values.append(rng.standard_normal(1, np.float32))
            return np.concatenate(values), places, rng.bit_generator.state
    return np.concatenate(values), places, None


def generator(start: State, index: int) -> np.random.Generator:
    """A generator at the start of a segment; `start`: the state at the start of the first one."""
    bits: Any = np.random.PCG64()
    bits.state = start
    return np.random.Generator(bits.advance(index * SEGMENT) if index else bits)


def places_from(start: State, index: int) -> Iterator[Place]:
    """The places from the start of a segment on, of as many numbers as STEP results can take."""
    bits: Any = generator(start, index).bit_generator
    yield place(bits.state)
    for _ in range(2 * STEP):
        state = bits.advance(1).state["state"]["state"]
        yield state, 0
        yield state, 1


def place(state: State) -> Place:
    return state["state"]["state"], state["has_uint32"]
