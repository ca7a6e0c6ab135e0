"""How a card would serve the accesses of a recorded run: warp by warp.

The 32 threads of a warp make an access together. Global memory comes in sectors of 32 bytes, four of them a line of
128: what a warp asks for costs as many sectors as it touches, however little it needs of each. Shared memory has 32
banks, one for each 4-byte word in turn; a bank gives one word at a time, so that a warp that wants several words of one
bank waits for as many turns.
"""

from collections import defaultdict
from typing import NamedTuple

from llm_numba.lessons.tracing import Access, Trace

WARP, SECTOR, WORD, BANKS = 32, 32, 4, 32


class Count(NamedTuple):
    """Of the reads, writes or atomics of one array.

    accesses: of single threads; instructions: of warps; sectors: that they touch (global), fewest: would they lie side
    by side; coalesced: instructions that touch no more than these; turns: of the banks (shared), where one an
    instruction is the best.
    """

    space: str
    array: str
    kind: str
    accesses: int
    instructions: int
    sectors: int
    fewest: int
    coalesced: int
    turns: int


def instructions(trace: Trace) -> list[list[Access]]:
    """The accesses that the threads of a warp make together, in program order.

    Together is what stands at one place of the program and is come to for the same, n-th, time by each of the threads.
    """
    times: dict[tuple, int] = defaultdict(int)
    groups: dict[tuple, list[Access]] = {}
    for access in trace.accesses:
        me = access.launch, access.block, access.lane, access.site, access.kind
        place = access.launch, access.block, access.lane // WARP, access.site, access.kind, access.array
        groups.setdefault((*place, times[me]), []).append(access)
        times[me] += 1
    return list(groups.values())


def sectors(group: list[Access]) -> int:
    """The sectors of 32 bytes that one instruction touches; an array starts at a multiple of 32."""
    return len({access.offset // SECTOR for access in group} | {(a.offset + a.nbytes - 1) // SECTOR for a in group})


def fewest(group: list[Access]) -> int:
    """The sectors that the same bytes would take side by side."""
    return -(-sum(dict((access.offset, access.nbytes) for access in group).values()) // SECTOR)


def is_coalesced(group: list[Access]) -> bool:
    """Whether what the warp asks for lies together: no more sectors than needed, or one more, where the start of the
    piece does not fall on a sector's."""
    bytes_of = dict((access.offset, access.nbytes) for access in group)
    first, last = min(bytes_of), max(bytes_of)
    together = last + bytes_of[last] - first == sum(bytes_of.values())
    return together or sectors(group) == fewest(group)


def turns(group: list[Access]) -> int:
    """How many words the busiest bank of shared memory has to give to one instruction; 1 is the best."""
    words = {access.offset // WORD for access in group}
    busy: dict[int, int] = defaultdict(int)
    for word in words:
        busy[word % BANKS] += 1
    return max(busy.values())


def count(trace: Trace) -> list[Count]:
    """A line for the reads, the writes and the atomics of each array, global memory first."""
    by: dict[tuple, list[list[Access]]] = defaultdict(list)
    for group in instructions(trace):
        by[group[0].space, group[0].array, group[0].kind].append(group)
    return [
        Count(
            *key,
            accesses=sum(map(len, groups)),
            instructions=len(groups),
            sectors=sum(map(sectors, groups)) if key[0] == "global" else 0,
            fewest=sum(map(fewest, groups)) if key[0] == "global" else 0,
            coalesced=sum(map(is_coalesced, groups)) if key[0] == "global" else 0,
            turns=sum(map(turns, groups)) if key[0] == "shared" else 0,
        )
        for key, groups in sorted(by.items(), key=lambda item: (item[0][0], item[0][2], item[0][1]))
    ]


def total(trace: Trace) -> dict[str, int]:
    """The sums that a ladder's rungs are compared by."""
    counts = count(trace)
    in_global = [c for c in counts if c.space == "global"]
    in_shared = [c for c in counts if c.space == "shared"]
    return {
        "global accesses": sum(c.accesses for c in in_global),
        "global sectors": sum(c.sectors for c in in_global),
        "fewest sectors": sum(c.fewest for c in in_global),
        "shared accesses": sum(c.accesses for c in in_shared),
        "shared instructions": sum(c.instructions for c in in_shared),
        "shared turns": sum(c.turns for c in in_shared),
    }
