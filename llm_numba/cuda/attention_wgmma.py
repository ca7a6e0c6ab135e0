"""Attention in bf16 with wgmma and TMA, for Hopper (compute capability 9.0): heads of 64 or 128 channels.

The kernels are in wgmma_attention_forward.py and wgmma_attention_backward.py, which draw their tiles. Here is what the
host does: tensor maps, launches, and which block works on what. Both kernels are persistent: there is one block per SM,
which works through a list. Weights and the gradients of scores are rounded to bf16 for the next product; sums stay in
float32.

Source: Shah et al. 2024, FlashAttention-3, arXiv:2407.08608; Dao 2023, FlashAttention-2, arXiv:2307.08691.
"""

import functools
import heapq
import itertools
import math

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import SIMULATED, blocks_for, compute_capability, float32, stream, uint16, with_shared
from llm_numba.cuda.tensor_maps import tensor_map
from llm_numba.cuda.wgmma_attention_backward import KEYS, QUERIES, backward_kernel, statistics_kernel
from llm_numba.cuda.wgmma_attention_backward import THREADS as BACKWARD_THREADS
from llm_numba.cuda.wgmma_attention_backward import layout as backward_layout
from llm_numba.cuda.wgmma_attention_forward import CONSUMERS, forward_kernel, forward_shared

HEADS_AT_ONCE = 44  # whose keys and values the forward reads at a time, so that they stay in L2
TEAMS = (2, 4, 8)  # blocks that may share a head in the backward


def supports(dtype, HS) -> str:
    """Why the kernels cannot run with this dtype and head size, or ""."""
    if dtype != uint16:
        return "needs bf16"
    if not SIMULATED and compute_capability() != (9, 0):
        return "needs compute capability 9.0"
    return "" if HS in CONSUMERS else "needs heads of 64 or 128 channels"


@functools.cache
def blocks() -> int:
    """One per SM: all are resident at once."""
    return 1 if SIMULATED else cuda.get_current_device().MULTIPROCESSOR_COUNT


@functools.cache
def forward_schedule(heads: int, T: int, HS: int, blocks: int):
    """int32 (rounds, blocks, 2) on the GPU: each block's items (head, first query), and a head of -1 after the last.

    Items end with the sequence's last 64 queries, so a head's first one may begin before 0, where that costs least.
    Each item goes to the block that has least to do so far. Heads come in groups, a group's longest items first, and at
    the end the shortest of all heads, which even out the load.
    """
    size, end = 64 * CONSUMERS[HS], blocks_for(T, 64) * 64
    firsts = [end - i * size for i in range(blocks_for(end, size), 0, -1)]
    costs = {t0: blocks_for(t0 + size, KEYS) + 0.5 for t0 in firsts}  # in tiles of keys, 0.5 for start and end
    shortest, groups = firsts[: min(2, len(firsts) - 1)], max(1, round(heads / HEADS_AT_ONCE))

    def rank(item):
        h, t0 = item
        return (1, 0, -costs[t0]) if t0 in shortest else (0, h * groups // heads, -costs[t0])

    lists: list[list[tuple[int, int]]] = [[] for _ in range(blocks)]
    loads = [(0.0, block) for block in range(blocks)]  # a heap
    for h, t0 in sorted(itertools.product(range(heads), firsts), key=rank):
        load, block = heapq.heappop(loads)
        lists[block].append((h, t0))
        heapq.heappush(loads, (load + costs[t0], block))
    table = np.full((max(map(len, lists)) + 1, blocks, 2), -1, np.int32)
    for block, found in enumerate(lists):
        table[: len(found), block] = np.reshape(found, (-1, 2))
    on_gpu = cuda.to_device(table, stream())
    if not SIMULATED:
        stream().synchronize()
    return on_gpu


def team_size(heads: int, tiles: int, blocks: int) -> int:
    """How many blocks share a head in the backward: many spread the work better, few wait less for each other."""
    count = blocks_for(tiles, 2)  # blocks of keys

    def cost(team):
        turns = [
            (i % team if i // team % 2 == 0 else team - 1 - i % team, tiles - 2 * (count - 1 - i)) for i in range(count)
        ]
        longest = max(sum(work for rank, work in turns if rank == one) for one in range(team))
        return blocks_for(heads, blocks // team) * longest * (1 + team / (2 * count))  # fits times on an H200

    return min((team for team in TEAMS if team <= min(count, blocks)), key=cost, default=1)


def forward(out, lse, qkv, num_heads, num_kv_heads, scratch):
    """See attention.attention_forward."""
    B, NH, T = lse.shape
    HS = out.shape[2] // num_heads
    schedule = forward_schedule(B * NH, T, HS, blocks())
    launch = with_shared(forward_kernel(HS), blocks(), 128 * (CONSUMERS[HS] + 1), forward_shared(HS))
    scale = float32(1 / math.sqrt(HS))
    maps = tensor_map(qkv, 64), tensor_map(qkv, KEYS), tensor_map(out, 64)
    launch(*maps, lse.reshape(B * NH, T), schedule, NH, num_kv_heads, scale)


def backward(dqkv, dout, out, lse, qkv, num_heads, num_kv_heads, scratch):
    """See attention.attention_backward."""
    B, NH, T = lse.shape
    HS, tiles, heads = out.shape[2] // num_heads, blocks_for(T, QUERIES), B * num_kv_heads
    # dq's tiles while they are added up; lse and delta of each tile; how many additions each tile has had
    sizes = QUERIES * HS, 2 * QUERIES, 1
    ends = np.cumsum([0, *sizes]) * (B * NH * tiles)
    dq, statistics, flags = (scratch[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True))
    statistics, flags = statistics.reshape(B * NH, tiles, 2, QUERIES), flags.reshape(B * NH, tiles)
    statistics_kernel(HS)[(tiles, NH, B), QUERIES * HS // 16, stream()](statistics, flags, out, dout, lse)
    team = team_size(heads, tiles, blocks())
    launch = with_shared(backward_kernel(HS), blocks(), BACKWARD_THREADS[HS], backward_layout(HS)["end"])
    maps = tensor_map(qkv, 64), tensor_map(qkv, KEYS), tensor_map(dout, 64), tensor_map(dqkv, 64)
    sizes = team, blocks() // team, heads, tiles, NH, num_kv_heads
    launch(*maps, statistics, dq, flags, *sizes, float32(1 / math.sqrt(HS)))


def backward_scratch(B: int, T: int, NH: int, HS: int) -> int:
    """Floats of scratch that `backward` needs."""
    return B * NH * blocks_for(T, QUERIES) * (QUERIES * HS + 2 * QUERIES + 1)
