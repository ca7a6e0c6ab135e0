"""What is wrong with a recorded run, in words: races, shared memory that nobody wrote, barriers, indices."""

from collections import defaultdict

from llm_numba.lessons.tracing import Access, Trace, at_line, name_of_thread


def faults(trace: Trace) -> list[str]:
    """All that is wrong with how the threads of the run use memory; nothing where it is right."""
    return trace.faults + races(trace) + unwritten(trace)


def races(trace: Trace) -> list[str]:
    """A line for each array in which two threads meet at an element, of whom one at least writes, while nothing says
    who comes first. Within a block a barrier says it, between blocks nothing does."""
    meetings: dict[tuple, dict[tuple, list[Access]]] = defaultdict(lambda: defaultdict(list))
    for access in trace.accesses:
        # two accesses of a thread and a kind in one epoch are one to the others
        place = (access.launch, access.array, access.offset, access.block if access.space == "shared" else None)
        meetings[place][access.block, access.lane, access.epoch, access.kind] = access
    found: dict[str, str] = {}
    for (_, array, _, _), met in meetings.items():
        if array not in found and (pair := racing(list(met.values()))):
            found[array] = in_words(*pair)
    return list(found.values())


def racing(met: list[Access]) -> tuple[Access, Access] | None:
    """Two of these accesses to one element of which the order is open."""
    writes = [access for access in met if access.kind != "read"]
    if not writes or len(met) == 1:
        return None
    for write in writes:
        for other in met:
            if (write.block, write.lane) == (other.block, other.lane) or write.kind == other.kind == "atomic":
                continue
            if write.block != other.block or write.epoch == other.epoch:
                return write, other
    return None


def in_words(write: Access, other: Access) -> str:
    element = f"{write.array}[{', '.join(map(str, write.index))}]"
    doer, second = (name_of_thread(a.block, a.thread) for a in (write, other))
    verb = {"read": "reads", "write": "writes", "atomic": "adds to"}
    if not write.block:
        why = "iterations of prange run at the same time; each element must have one owner"
    elif write.block != other.block:
        why = "blocks run in any order, and no barrier holds between them"
    else:
        why = "no barrier (cuda.syncthreads) stands between the two, so either may come first"
    place = at_line(write.line) if write.line == other.line else f"{at_line(write.line)}, {at_line(other.line)}"
    return f"a race: {doer} {verb[write.kind]} {element} and {second} {verb[other.kind]} it: {why}; {place}"


def unwritten(trace: Trace) -> list[str]:
    """A line for each shared array of which an element is read that no thread of the block has written."""
    written, found = set(), {}
    for access in trace.accesses:
        if access.space == "shared":
            place = access.launch, access.block, access.array, access.offset
            if access.kind == "write":
                written.add(place)
            elif place not in written and access.array not in found:
                element = f"{access.array}[{', '.join(map(str, access.index))}]"
                found[access.array] = (
                    f"{name_of_thread(access.block, access.thread)} reads {element} in shared memory before any thread "
                    f"of its block has written it: it holds anything; {at_line(access.line)}"
                )
    return list(found.values())
