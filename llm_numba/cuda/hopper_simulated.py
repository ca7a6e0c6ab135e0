"""The instructions of hopper.py in NumPy, for Numba's simulator, with checks that a GPU does not make.

Products and copies work on a byte array, the block's shared memory, with TMA's swizzle. Each access is checked for
races. As in ThreadSanitizer, every actor (a warp, a warpgroup's asynchronous products, the copies to an mbarrier) has a
clock, and every warp knows up to which time of each actor's clock it has seen the actor's work done: barriers hand on
what is known. Two accesses to the same 16 bytes, one of them a write, must be ordered by such knowledge. So a missing
wait or barrier is found whatever the order in which threads run.

Also errors: a proxy fence that is missing after a store, more arrivals than an mbarrier expects, operands of a product
that differ between threads, boxes that are not aligned, and (simulator.py) deadlocks.
"""

import ctypes
import functools
import threading
from types import SimpleNamespace

import numpy as np
from ml_dtypes import bfloat16

from llm_numba.cuda.jit import WARP

FIRST, NBYTES = 1024, 232448  # where dynamic shared memory begins, and how much a block can have
GRANULE, WARPGROUP, BARRIERS, REGISTERS = 16, 128, 64, 65536
UNFINISHED = np.iinfo(np.int64).max  # the time of a read that is still under way


class Shared:
    """A block's shared memory and what its actors know.

    knows[w, a]: the time of actor a up to which warp w has seen its work done
    writer, written: by granule, who wrote it last and at which time; read[g, a]: when actor a read it last, 0 if not
    since; unfenced: the thread whose store needs its proxy fence, -1: none
    """

    def __init__(self, threads):
        self.bytes = np.full(FIRST + NBYTES, 0xFF, np.uint8)  # NaN in bf16 and float32
        warps, groups = -(-threads // WARP), -(-threads // WARPGROUP)
        self.warps, self.actors = warps, warps + groups + BARRIERS
        self.knows, self.time = np.zeros((warps, self.actors), np.int64), np.ones(self.actors, np.int64)
        granules = self.bytes.size // GRANULE
        self.writer, self.written = np.zeros(granules, np.int64), np.zeros(granules, np.int64)
        self.read = np.zeros((granules, warps + groups), np.int64)
        self.unfenced = np.full(granules, -1)
        self.barriers, self.meetings, self.deposits, self.stores = {}, {}, {}, {}
        self.flag_waiters = []
        self.registers = REGISTERS // threads // 8 * 8  # of a thread when the kernel starts
        self.free_registers, self.register_waiters = 0, []
        for warp in range(warps):
            self.knows[warp, warp] = UNFINISHED

    def name(self, actor):
        groups = self.read.shape[1] - self.warps
        if actor < self.warps:
            return f"warp {actor}"
        if actor < self.warps + groups:
            return f"wgmma of warpgroup {actor - self.warps}"
        return f"TMA for mbarrier {actor - self.warps - groups}"

    def check_read(self, granules, warp, asynchronous=False, verb="reads"):
        """The warp may read: it has seen the last writes done."""
        writer = self.writer[granules]
        early = self.written[granules] > self.knows[warp, writer]
        if early.any():
            raise AssertionError(f"race: warp {warp} {verb} what {self.name(writer[early][0])} may still write")
        if asynchronous and (self.unfenced[granules] >= 0).any():
            thread = self.unfenced[granules].max()
            raise AssertionError(f"TMA or wgmma reads what thread {thread} stored without fence_proxy_async")

    def check_write(self, granules, warp):
        """The warp may write: it has seen the last reads and writes done."""
        self.check_read(granules, warp, verb="writes")
        early = self.read[granules] > np.minimum(self.knows[warp, : self.read.shape[1]], UNFINISHED - 1)
        if early.any():
            raise AssertionError(f"race: warp {warp} writes what {self.name(np.nonzero(early)[1][0])} may still read")

    def wrote(self, granules, actor):
        self.writer[granules], self.written[granules] = actor, self.time[actor]
        self.read[granules] = 0

    def release(self, warp):
        """What a barrier hands on from a warp that arrives there; the warp's later work is not in it."""
        known = self.knows[warp].copy()
        known[warp] = self.time[warp]
        self.time[warp] += 1
        return known


def here():
    """(the running thread, its block's Shared)."""
    thread = threading.current_thread()
    block = thread.block
    if not hasattr(block, "shared"):
        shared = block.shared = Shared(int(np.prod(block._block_dim)))
        block.after_syncthreads = lambda: join(shared, range(shared.warps))
    return thread, block.shared


def meet(what, count, value, action=None):
    """Wait until `count` threads have called this; then each gets action({thread_id: value})[thread_id]."""
    thread, shared = here()
    meeting = shared.meetings.setdefault(what, SimpleNamespace(values={}, waiting=[], results={}))
    assert thread.thread_id not in meeting.values, f"thread {thread.thread_id} is twice at {what}"
    meeting.values[thread.thread_id] = value
    if len(meeting.values) < count:
        meeting.waiting.append(thread)
        thread.block.wait(thread, what if isinstance(what, str) else " ".join(map(str, what)))
    else:
        values, meeting.values = meeting.values, {}
        if action:
            meeting.results.update(action(values) or {})
        thread.block.wake(meeting.waiting)
    return meeting.results.pop(thread.thread_id, None)


def deposit_for_warp(what, value, action):
    """The same without waiting, for what has no result: the last lane to come calls the action for all."""
    thread, shared = here()
    count = thread.__dict__.setdefault("deposits", {})
    count[what] = count.get(what, 0) + 1
    key = what, thread.thread_id // WARP, count[what]
    values = shared.deposits.setdefault(key, {})
    values[thread.thread_id] = value
    if len(values) == WARP:
        action(shared.deposits.pop(key))


def meet_warp(what, value, action):
    thread, _ = here()
    return meet((what, "of warp", thread.thread_id // WARP), WARP, value, action)


def join(shared, warps):
    """All these warps know what any of them does."""
    known = np.max([shared.release(warp) for warp in warps], axis=0)
    for warp in warps:
        np.maximum(shared.knows[warp], known, out=shared.knows[warp])


def granules_of(address, nbytes=GRANULE):
    return np.arange(int(address) // GRANULE, -(-(int(address) + int(nbytes)) // GRANULE))


def memory_at(address, nbytes, dtype=np.uint8):
    """Global memory at an address: the host's."""
    assert int(address) % min(nbytes, GRANULE) == 0, f"address {int(address):#x} is not aligned to {nbytes} bytes"
    return np.frombuffer((ctypes.c_ubyte * nbytes).from_address(int(address)), dtype)


def swizzled(addresses):
    return addresses ^ ((addresses >> 7 & 7) << 4)


# Memory and threads


def dynamic_shared():
    return np.uint32(FIRST)


def uniform(x):
    return x


opaque = keep = uniform


def shuffle_xor(x, mask):
    return meet_warp("shuffle_xor", np.float32(x), lambda values: {t: values[t ^ int(mask)] for t in values})


def named_barrier(barrier, threads):
    _, shared = here()
    assert 1 <= int(barrier) <= 15 and int(threads) % WARP == 0

    def action(values):
        join(shared, sorted({t // WARP for t in values}))

    meet(("named barrier", int(barrier), "of", int(threads), "threads"), int(threads), None, action)


def sync_warp():
    meet_warp("sync_warp", None, lambda values: None)


def divide(a, b):
    return np.uint32(int(a) // int(b))


def remainder(a, b):
    return np.uint32(int(a) % int(b))


# Shared memory


def store_shared(address, values):
    thread, shared = here()
    assert int(address) % values.nbytes == 0
    granules, warp = granules_of(address, values.nbytes), thread.thread_id // WARP
    shared.check_write(granules, warp)
    shared.bytes[int(address) : int(address) + values.nbytes] = values.view(np.uint8)
    shared.wrote(granules, warp)
    shared.unfenced[granules] = thread.thread_id


def load_shared(address, nbytes, dtype):
    thread, shared = here()
    assert int(address) % nbytes == 0
    granules, warp = granules_of(address, nbytes), thread.thread_id // WARP
    shared.check_read(granules, warp)
    shared.read[granules, warp] = shared.time[warp]
    return shared.bytes[int(address) : int(address) + nbytes].view(dtype).copy()


def store_shared_16_bytes(address, words):
    store_shared(address, np.array(words, np.uint32))


def load_shared_float2(address):
    return tuple(load_shared(address, 8, np.float32))


def rows_of_matrices(values):
    """(32, 16): the byte addresses of the rows of four matrices, given by the lanes in order."""
    addresses = np.array([int(address) for _, address in sorted(values.items())])
    assert (addresses % 16 == 0).all()
    return addresses[:, None] + np.arange(16)


def stmatrix(address, pairs):
    thread, shared = here()
    warp = thread.thread_id // WARP

    def action(values):
        rows = rows_of_matrices({t: address for t, (address, _) in values.items()})
        granules = rows[:, 0] // GRANULE
        shared.check_write(granules, warp)
        words = np.array([pairs for _, (_, pairs) in sorted(values.items())], np.uint32)  # (lane, matrix)
        shared.bytes[rows] = words.T.reshape(32, 4).copy().view(np.uint8)
        shared.wrote(granules, warp)

    shared.unfenced[int(address) // GRANULE] = thread.thread_id
    deposit_for_warp("stmatrix", (address, pairs), action)


def ldmatrix(address):
    thread, shared = here()
    warp = thread.thread_id // WARP

    def action(values):
        rows = rows_of_matrices(values)
        granules = rows[:, 0] // GRANULE
        shared.check_read(granules, warp)
        shared.read[granules, warp] = shared.time[warp]
        words = shared.bytes[rows].view(np.uint32).reshape(4, 32)
        return {t: tuple(words[:, t % WARP]) for t in values}

    return meet_warp("ldmatrix", address, action)


# Global memory


def address(array):
    array = getattr(array, "_item", array)
    return np.int64(getattr(array, "_ary", array).ctypes.data)


def load_float(address):
    return memory_at(address, 4, np.float32)[0]


def store_float(address, x):
    memory_at(address, 4, np.float32)[0] = x


def add_float(address, x):
    memory_at(address, 4, np.float32)[0] += x


def add_float2(address, x, y):
    memory_at(address, 8, np.float32)[:] += np.float32([x, y])


def store_float2(address, x, y):
    memory_at(address, 8, np.float32)[:] = x, y


def load_float4(address):
    return tuple(memory_at(address, 16, np.float32).copy())


def store_float4(address, values):
    memory_at(address, 16, np.float32)[:] = values


def add_float4(address, values):
    memory_at(address, 16, np.float32)[:] += np.float32(values)


def load_constant_pair(address):
    return memory_at(address, 4, np.uint32)[0]


def load_constant_16_bytes(address):
    return tuple(memory_at(address, 16, np.uint32).copy())


def store_flag(address, value):
    thread, shared = here()
    memory_at(address, 4, np.uint32)[0] = value
    thread.block.wake(shared.flag_waiters)


def clear_flag(address):
    memory_at(address, 4, np.uint32)[0] = 0


def wait_flag(address, count):
    thread, shared = here()
    while memory_at(address, 4, np.uint32)[0] < count:
        shared.flag_waiters.append(thread)
        thread.block.wait(thread, f"a flag to become {count}")


def pack(low, high):
    return np.array([low, high], np.float32).astype(bfloat16).view(np.uint32)[0]


def unpack(pair):
    return tuple(np.array([pair], np.uint32).view(bfloat16).astype(np.float32))


# mbarriers


def mbarrier_init(barrier, arrivals):
    thread, shared = here()
    assert int(barrier) % 8 == 0 and int(arrivals) > 0
    index, warp = len(shared.barriers), thread.thread_id // WARP
    assert index < BARRIERS
    shared.barriers[int(barrier)] = SimpleNamespace(
        actor=shared.actors - BARRIERS + index,
        arrivals=int(arrivals),
        left=int(arrivals),
        nbytes=0,
        parity=0,
        arriving=np.zeros(shared.actors, np.int64),  # what the arrivals of this phase hand on,
        done=np.zeros(shared.actors, np.int64),  # and those of the previous one
        waiting=[],
        maker=warp,
        made=shared.time[warp],
    )


def mbarrier_at(address):
    thread, shared = here()
    barrier, warp = shared.barriers.get(int(address)), thread.thread_id // WARP
    if barrier is None or shared.knows[warp, barrier.maker] < barrier.made:
        raise AssertionError(f"warp {warp} does not know that there is an mbarrier at {int(address) - FIRST}")
    return thread, shared, barrier


def complete_phase(thread, shared, barrier):
    if barrier.left == 0 and barrier.nbytes == 0:
        barrier.left, barrier.parity = barrier.arrivals, barrier.parity ^ 1
        barrier.done, barrier.arriving = barrier.arriving, np.zeros(shared.actors, np.int64)
        thread.block.wake(barrier.waiting)


def mbarrier_arrive(address):
    mbarrier_arrive_expect_tx(address, 0)


def mbarrier_arrive_expect_tx(address, nbytes):
    thread, shared, barrier = mbarrier_at(address)
    assert barrier.left > 0, f"more than {barrier.arrivals} arrivals at the mbarrier at {int(address) - FIRST}"
    barrier.left, barrier.nbytes = barrier.left - 1, barrier.nbytes + int(nbytes)
    np.maximum(barrier.arriving, shared.release(thread.thread_id // WARP), out=barrier.arriving)
    complete_phase(thread, shared, barrier)


def mbarrier_wait(address, parity):
    thread, shared, barrier = mbarrier_at(address)
    while barrier.parity == int(parity):
        barrier.waiting.append(thread)
        thread.block.wait(thread, f"mbarrier {int(address) - FIRST}")
    known = shared.knows[thread.thread_id // WARP]
    np.maximum(known, barrier.done, out=known)


def fence_mbarrier_init():
    pass


def fence_proxy_async_global():
    pass


def fence_proxy_async():
    thread, shared = here()
    shared.unfenced[shared.unfenced == thread.thread_id] = -1


# TMA


def memory_of(array):
    """The NumPy array that holds the elements of an array of the simulator."""
    return getattr(getattr(array, "_item", array), "_ary", array)


def simulated_map(array, rows):
    """The address of a tensor map: see tensor_maps.tensor_map."""
    array = memory_of(array)
    assert array.dtype == np.uint16 and array.flags.c_contiguous and rows <= 256
    assert array.shape[-1] % 8 == 0 and array.ctypes.data % 16 == 0, "TMA needs rows of whole 16 bytes"
    return _map(array.ctypes.data, array.shape, rows)[0].ctypes.data


@functools.cache
def _map(address, shape, rows):
    encoded = np.zeros(128, np.uint8)
    matrix = memory_at(address, 2 * int(np.prod(shape)), np.uint16).reshape((-1, *shape[-2:]))
    MAPS[encoded.ctypes.data] = SimpleNamespace(matrix=matrix, rows=rows)
    return encoded, MAPS


MAPS = {}


def box_addresses(address, rows):
    """(rows, 64): the byte addresses of a box's elements in shared memory."""
    assert int(address) % 1024 == 0, f"a box begins at {int(address) - FIRST}, which is no multiple of 1024"
    return swizzled(int(address) + np.arange(rows)[:, None] * 128 + np.arange(64) * 2)


def box_of(tensor_map, column, row, plane):
    """(the part of the matrix that is in the box, the part of the box that is in the matrix)"""
    found = MAPS[int(tensor_map)]
    assert 0 <= int(plane) < found.matrix.shape[0]
    R, C = found.matrix.shape[1:]
    rows, rows_inside = overlap(int(row), found.rows, R)
    columns, columns_inside = overlap(int(column), 64, C)
    return found.matrix[int(plane), rows, columns], (rows_inside, columns_inside), found.rows


def overlap(start, size, length):
    """What the range from start on and 0 ... length have in common: as a slice of the latter, and of the former."""
    first = min(max(start, 0), length)
    last = max(first, min(start + size, length))
    return slice(first, last), slice(first - start, last - start)


def arrive_bytes(thread, shared, barrier, address, granules, nbytes):
    """A copy for an mbarrier has written these granules."""
    shared.check_write(granules, thread.thread_id // WARP)
    shared.time[barrier.actor] += 1
    shared.wrote(granules, barrier.actor)
    shared.unfenced[granules] = -1
    barrier.arriving[barrier.actor] = shared.time[barrier.actor]
    barrier.nbytes -= nbytes
    complete_phase(thread, shared, barrier)


def tma_load_3d(to, tensor_map, address, column, row, plane):
    thread, shared, barrier = mbarrier_at(address)
    part, inside, rows = box_of(tensor_map, column, row, plane)
    box = np.zeros((rows, 64), np.uint16)
    box[inside] = part
    addresses = box_addresses(to, rows)
    arrive_bytes(thread, shared, barrier, address, granules_of(to, 128 * rows), 128 * rows)
    shared.bytes.view(np.uint16)[addresses >> 1] = box


def tma_load_3d_hint(to, tensor_map, address, column, row, plane, hint):
    tma_load_3d(to, tensor_map, address, column, row, plane)


def tma_load_2d(to, tensor_map, address, column, row):
    tma_load_3d(to, tensor_map, address, column, row, 0)


def bulk_load(to, source, nbytes, address):
    thread, shared, barrier = mbarrier_at(address)
    assert int(to) % 16 == 0 and int(source) % 16 == 0 and int(nbytes) % 16 == 0
    arrive_bytes(thread, shared, barrier, address, granules_of(to, nbytes), int(nbytes))
    shared.bytes[int(to) : int(to) + int(nbytes)] = memory_at(source, int(nbytes))


def tma_store_3d(tensor_map, source, column, row, plane):
    thread, shared = here()
    part, inside, rows = box_of(tensor_map, column, row, plane)
    granules = granules_of(source, 128 * rows)
    shared.check_read(granules, thread.thread_id // WARP, asynchronous=True)
    shared.read[granules, thread.thread_id // WARP] = UNFINISHED
    part[...] = shared.bytes.view(np.uint16)[box_addresses(source, rows) >> 1][inside]
    shared.stores.setdefault(thread.thread_id, [[]])[-1].append(granules)


def tma_store_3d_hint(tensor_map, source, column, row, plane, hint):
    tma_store_3d(tensor_map, source, column, row, plane)


def tma_store_2d(tensor_map, source, column, row):
    tma_store_3d(tensor_map, source, column, row, 0)


def tma_prefetch_2d(tensor_map, column, row):
    assert int(tensor_map) in MAPS


def tensor_map_acquire(tensor_map):
    assert int(tensor_map) in MAPS


def tma_commit():
    thread, shared = here()
    shared.stores.setdefault(thread.thread_id, [[]]).append([])


def tma_store_wait_read(n):
    thread, shared = here()
    groups, warp = shared.stores.setdefault(thread.thread_id, [[]]), thread.thread_id // WARP
    while len(groups) > n + 1:
        for granules in groups.pop(0):
            shared.read[granules, warp] = shared.time[warp]


def setmaxnreg_dec(n):
    thread, shared = here()
    assert n % 8 == 0 and 24 <= n <= 256
    shared.free_registers += shared.registers - n
    thread.block.wake(shared.register_waiters)


def setmaxnreg_inc(n):
    thread, shared = here()
    assert n % 8 == 0 and 24 <= n <= 256
    while shared.free_registers < n - shared.registers:
        shared.register_waiters.append(thread)
        thread.block.wait(thread, f"{n} registers")
    shared.free_registers -= n - shared.registers


# wgmma


def operand(shared, descriptor, rows, K, transposed):
    """(the granules of an operand, a function that returns it as (rows, K) float32)"""
    start, chunk, group = ((int(descriptor) >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    assert int(descriptor) >> 62 == 1
    row, k = np.arange(rows)[:, None], np.arange(K)
    if transposed:
        offsets = row % 64 * 2 + row // 64 * chunk + k % 8 * 128 + k // 8 * group
    else:
        assert K <= 64
        offsets = row % 8 * 128 + row // 8 * group + k * 2
    addresses = swizzled(start + offsets)
    return np.unique(addresses // GRANULE), lambda: floats(shared.bytes.view(np.uint16)[addresses >> 1])


def floats(words):
    return words.view(bfloat16).astype(np.float32)


def wgmma_open(sums, a, b, accumulate, M, N, K, a_transposed, b_transposed):
    start_product(sums, (int(a), M, K, a_transposed), (int(b), N, K, b_transposed), None, accumulate)


def wgmma_rs_open(sums, a, b, accumulate, N, K, b_transposed):
    start_product(sums, None, (int(b), N, K, b_transposed), np.array(a[: K // 4], np.uint32), accumulate)


def start_product(sums, a, b, fragments, accumulate):
    thread, shared = here()
    warp, group = thread.thread_id // WARP, shared.warps + thread.thread_id // WARPGROUP
    for given in (a, b):
        if given and thread.thread_id % WARP == 0:
            granules, _ = operand(shared, *given)
            shared.check_read(granules, warp, asynchronous=True)
            shared.read[granules, group] = UNFINISHED
    thread.__dict__.setdefault("products", [[]])[-1].append((a, b, int(accumulate), sums, fragments))


def commit_products():
    here()[0].products.append([])


def wgmma(*arguments):
    wgmma_open(*arguments)
    commit_products()


def wgmma_rs(*arguments):
    wgmma_rs_open(*arguments)
    commit_products()


def wgmma_wait(n):
    thread, shared = here()
    groups, finished = thread.__dict__.setdefault("products", [[]]), []
    while len(groups) > n + 1:
        finished += groups.pop(0)
    index = thread.thread_id // WARPGROUP

    def action(values):
        for products in zip(*(products for _, products in sorted(values.items())), strict=True):
            multiply(shared, index, products)

    meet(("wgmma_wait of warpgroup", index), WARPGROUP, finished, action)


def multiply(shared, group, products):
    """One product of a warpgroup, given as each thread started it."""
    (a, b, accumulate, _, _), actor = products[0], shared.warps + group
    assert all(product[:3] == (a, b, accumulate) for product in products), "the threads' operands of wgmma differ"
    N, K = b[1:3]
    row, column = result_indices(N)
    b_granules, right = operand(shared, *b)
    if a:
        M = a[1]
        a_granules, left = operand(shared, *a)
        left = left()
    else:
        M, a_granules, left = 64, b_granules[:0], np.zeros((64, K), np.float32)
        indices = [index.reshape(WARPGROUP, K // 4, 2) for index in result_indices(K)]
        pairs = np.array([product[4] for product in products])
        left[indices[0], indices[1]] = floats(pairs.view(np.uint16)).reshape(WARPGROUP, K // 4, 2)
    result = left @ right().T
    for thread, (_, _, _, sums, _) in enumerate(products):
        for half in range(M // 64):
            part = sums[half * N // 2 : (half + 1) * N // 2]
            new = result[half * 64 + row[thread], column[thread]]
            part[...] = part + new if accumulate else new
    shared.time[actor] += 1
    for granules in (a_granules, b_granules):
        shared.read[granules, actor] = shared.time[actor]
    shared.knows[4 * group : 4 * group + 4, actor] = shared.time[actor]


@functools.cache
def result_indices(N):
    """(128, N / 2) rows and columns of the result that a thread holds."""
    t, i = np.arange(WARPGROUP)[:, None], np.arange(N // 2)
    return 16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (t % 4) + i % 2


# Local arrays in registers


def settle(array, count):
    pass


def clear(array, count):
    array[:count] = 0


def forget(array, count):
    array[:count] = np.nan
