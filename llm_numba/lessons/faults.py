"""Memory errors in a recorded run: races, shared memory read before it is written, barriers, indices out of bounds."""

from collections import defaultdict

from llm_numba.lessons.tracing import Access, Trace, at_line, name_of_thread


def faults(trace: Trace) -> list[str]:
    """One message for each memory error of the run; empty if there is none."""
    return trace.faults + races(trace) + uninitialised(trace)


def races(trace: Trace) -> list[str]:
    """One message for each array with a race: two threads access the same element, at least one of them writes, and
    nothing orders the two. A barrier orders the threads of a block; nothing orders threads of different blocks."""
    by_element: dict[tuple, dict[tuple, list[Access]]] = defaultdict(lambda: defaultdict(list))
    for access in trace.accesses:
        # accesses of the same kind by one thread between two barriers count once
        element = (access.launch, access.array, access.offset, access.block if access.space == "shared" else None)
        by_element[element][access.block, access.lane, access.epoch, access.kind] = access
    found: dict[str, str] = {}
    for (_, array, _, _), accesses in by_element.items():
        if array not in found and (pair := racing(list(accesses.values()))):
            found[array] = message(*pair)
    return list(found.values())


def racing(accesses: list[Access]) -> tuple[Access, Access] | None:
    """Two unordered accesses to one element, at least one of them a write; None if there are no such accesses."""
    writes = [access for access in accesses if access.kind != "read"]
    if not writes or len(accesses) == 1:
        return None
    for write in writes:
        for other in accesses:
            if (write.block, write.lane) == (other.block, other.lane) or write.kind == other.kind == "atomic":
                continue
            if write.block != other.block or write.epoch == other.epoch:
                return write, other
    return None


def message(write: Access, other: Access) -> str:
    element = f"{write.array}[{', '.join(map(str, write.index))}]"
    first, second = (name_of_thread(a.block, a.thread) for a in (write, other))
    verb = {"read": "reads", "write": "writes", "atomic": "adds to"}
    if not write.block:
        why = "iterations of prange run in parallel; each element must have one owner"
    elif write.block != other.block:
        why = "blocks run in any order, and a barrier does not synchronise them"
    else:
        why = "no barrier (cuda.syncthreads) separates the two, so they may happen in either order"
    lines = at_line(write.line) if write.line == other.line else f"{at_line(write.line)}, {at_line(other.line)}"
    return f"a race: {first} {verb[write.kind]} {element} and {second} {verb[other.kind]} it: {why}; {lines}"


def uninitialised(trace: Trace) -> list[str]:
    """One message for each shared array with an element that is read before any thread of the block has written it."""
    written, found = set(), {}
    for access in trace.accesses:
        if access.space == "shared":
            element = access.launch, access.block, access.array, access.offset
            if access.kind == "write":
                written.add(element)
            elif element not in written and access.array not in found:
                name = f"{access.array}[{', '.join(map(str, access.index))}]"
                found[access.array] = (
                    f"{name_of_thread(access.block, access.thread)} reads {name} in shared memory before any thread "
                    f"of its block has written it, so its value is undefined; {at_line(access.line)}"
                )
    return list(found.values())
