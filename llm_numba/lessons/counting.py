"""How a GPU would serve the accesses of a recorded run, warp by warp.

The 32 threads of a warp access memory together. Global memory moves in sectors of 32 bytes, four to a 128-byte line: an
access costs every sector that it touches, however few bytes of it are used. Shared memory has 32 banks, and consecutive
4-byte words lie in consecutive banks. A bank serves one word at a time: if a warp accesses n words of one bank, that is
an n-way bank conflict, and the access takes n passes.
"""

from collections import defaultdict
from typing import NamedTuple

from llm_numba.lessons.tracing import Access, Trace

WARP, SECTOR, WORD, BANKS = 32, 32, 4, 32


class Count(NamedTuple):
    """The reads, the writes or the atomics of one array.

    accesses: by single threads; instructions: by warps. Global memory: sectors touched; fewest: the sectors that the
    same bytes would take if they were contiguous; coalesced: instructions that touch no more than these. Shared memory:
    passes over the banks, one per instruction if there is no bank conflict, n for an n-way conflict.
    """

    space: str
    array: str
    kind: str
    accesses: int
    instructions: int
    sectors: int
    fewest: int
    coalesced: int
    passes: int


def instructions(trace: Trace) -> list[list[Access]]:
    """The accesses grouped by warp instruction, in program order.

    Threads of a warp access memory together if they reach the same instruction of the program for the same, n-th, time.
    """
    times: dict[tuple, int] = defaultdict(int)
    groups: dict[tuple, list[Access]] = {}
    for access in trace.accesses:
        thread = access.launch, access.block, access.lane, access.site, access.kind
        warp = access.launch, access.block, access.lane // WARP, access.site, access.kind, access.array
        times[thread] += access.first
        groups.setdefault((*warp, times[thread]), []).append(access)
    return list(groups.values())


def sectors(group: list[Access]) -> int:
    """The 32-byte sectors that one instruction touches. Arrays start on a sector boundary."""
    return len({access.offset // SECTOR for access in group} | {(a.offset + a.nbytes - 1) // SECTOR for a in group})


def fewest(group: list[Access]) -> int:
    """The sectors that the same bytes would take if they were contiguous."""
    return -(-sum(dict((access.offset, access.nbytes) for access in group).values()) // SECTOR)


def is_coalesced(group: list[Access]) -> bool:
    """Whether the instruction touches as few sectors as possible. A contiguous range also counts if it starts within a
    sector, and so touches one more."""
    bytes_of = dict((access.offset, access.nbytes) for access in group)
    first, last = min(bytes_of), max(bytes_of)
    contiguous = last + bytes_of[last] - first == sum(bytes_of.values())
    return contiguous or sectors(group) == fewest(group)


def bank_conflict(group: list[Access]) -> int:
    """n if the instruction has an n-way bank conflict; 1 if it has none."""
    words = {access.offset // WORD for access in group}
    of_bank: dict[int, int] = defaultdict(int)
    for word in words:
        of_bank[word % BANKS] += 1
    return max(of_bank.values())


def count(trace: Trace) -> list[Count]:
    """One Count for the reads, the writes and the atomics of each array, global memory first."""
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
            passes=sum(map(bank_conflict, groups)) if key[0] == "shared" else 0,
        )
        for key, groups in sorted(by.items(), key=lambda item: (item[0][0], item[0][2], item[0][1]))
    ]


def total(trace: Trace) -> dict[str, int]:
    """The totals by which the rungs of a ladder are compared."""
    counts = count(trace)
    in_global = [c for c in counts if c.space == "global"]
    in_shared = [c for c in counts if c.space == "shared"]
    return {
        "global accesses": sum(c.accesses for c in in_global),
        "global sectors": sum(c.sectors for c in in_global),
        "fewest sectors": sum(c.fewest for c in in_global),
        "shared accesses": sum(c.accesses for c in in_shared),
        "shared instructions": sum(c.instructions for c in in_shared),
        "shared passes": sum(c.passes for c in in_shared),
    }
