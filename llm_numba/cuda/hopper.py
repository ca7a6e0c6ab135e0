"""Hopper's instructions (compute capability 9.0): wgmma, TMA, mbarriers, and what orders them. For sm_90a only.

wgmma: a warpgroup (four warps, the first a multiple of four) multiplies tiles in shared memory; the sums stay in its
registers. Of a 64 x N float32 result, thread t of the warpgroup holds N / 2 values; with g = t % 32 // 4, q = t % 4:

    sums[i] is row 16 (t // 32) + g + 8 (i // 2 % 2), column 8 (i // 4) + 2 q + i % 2

TMA: one thread asks for a box of a matrix in global memory, described by a tensor map (tensor_maps.py), and continues.
All boxes are 64 bf16 columns wide (128 bytes) and lie row by row, with the eight 16-byte chunks of a row swizzled
(XOR with the row's index modulo 8), at a multiple of 1024 bytes.

mbarrier: 8 bytes of shared memory that count arrivals, and bytes that TMA still has to write. When neither is left, its
phase is complete and the next one begins. `mbarrier_wait(barrier, parity)` waits for the phase with this parity, 0 for
the first; with parity 1 it returns at once on a new barrier.

Proxies: TMA and wgmma reach shared memory another way than loads and stores. What a thread has stored is theirs to read
after its `fence_proxy_async()` and then a barrier.

Addresses in shared memory are uint32, in global memory int64. In the simulator, hopper_simulated.py has the same names.
Source: NVIDIA, PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", "cp.async.bulk.tensor", "mbarrier"
"""

from llvmlite import ir
from numba import cuda
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from llm_numba.cuda.jit import SIMULATED, inlined, int64, literal
from llm_numba.cuda.tensor_cores import ADDRESS, FLOAT, FRAGMENT, I32, PAIR, SHARED, address, instruction  # noqa: F401

I8, I64, F32 = ir.IntType(8), ir.IntType(64), ir.FloatType()
WORD, INDEX = types.uint32, types.int32
EVICT_FIRST = 0x12F0000000000000  # a cache hint: read once
CHUNK = 8192  # bytes of 64 rows of a box


def expanded(function):
    """A device function whose body is copied to where it is called, so that constant arguments can be passed on as such
    to the instructions below that need constants. Otherwise as `inlined`.
    """
    return function if SIMULATED else cuda.jit(device=True, inline="always")(function)


# Memory and threads


@intrinsic
def dynamic_shared(typingctx):
    """The address of the block's dynamic shared memory, a multiple of 1024."""

    def codegen(context, builder, sig, args):
        name = "dynamic_shared_memory"
        memory = builder.module.globals.get(name)
        if memory is None:
            memory = cgutils.add_global_variable(builder.module, ir.ArrayType(I8, 0), name, 3)
            memory.linkage, memory.align = "external", 1024
        return builder.ptrtoint(memory, I32)

    return signature(SHARED), codegen


# a value that is the same in the whole warp, so that the compiler may keep it in a uniform register
uniform = instruction("shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", (WORD,), WORD)
# the same value, unknown to the compiler: it does not unroll a loop that counts with it
opaque = instruction("", "=r,0", (WORD,), WORD)
# the same value: the compiler keeps it in registers, where it would otherwise compute it again in each round of a loop
keep = instruction("", "=l,0", (ADDRESS,), ADDRESS)
# (x, mask): the value of x in lane ^ mask
shuffle_xor = instruction("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", (FLOAT, WORD), FLOAT)
# (barrier, threads): wait until that many threads are at named barrier 1 to 15; syncthreads is barrier 0
named_barrier = instruction("bar.sync $0, $1;", "r,r", (WORD, WORD))
sync_warp = instruction("bar.warp.sync 0xffffffff;", "", ())


def division(operation):
    """A 32-bit division: // and % of Numba widen to 64 bits."""

    def emit(typingctx, a, b):
        return signature(WORD, WORD, WORD), lambda context, builder, sig, args: getattr(builder, operation)(*args)

    return intrinsic(emit)


divide, remainder = division("udiv"), division("urem")

# Shared memory

store_shared_16_bytes = instruction("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", (SHARED, FRAGMENT))
load_shared_float2 = instruction("ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r", (SHARED,), types.UniTuple(FLOAT, 2))
# (address, four pairs): store four 8 x 8 bf16 matrices; lane l passes the address of row l % 8 of matrix l // 8, and of
# each matrix the pair in row l // 4, columns 2 (l % 4) and the next. ldmatrix loads them the same way
stmatrix = instruction(
    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", (SHARED, FRAGMENT)
)
ldmatrix = instruction(
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", (SHARED,), FRAGMENT
)

# Global memory

FLOAT2, FLOAT4 = types.UniTuple(FLOAT, 2), types.UniTuple(FLOAT, 4)
load_float = instruction("ld.global.f32 $0, [$1];", "=f,l", (ADDRESS,), FLOAT)
store_float = instruction("st.global.f32 [$0], $1;", "l,f", (ADDRESS, FLOAT))
load_float4 = instruction("ld.global.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", (ADDRESS,), FLOAT4)
store_float4 = instruction("st.global.v4.f32 [$0], {$1, $2, $3, $4};", "l,f,f,f,f", (ADDRESS, FLOAT4))
# memory += values, in L2: nothing returns
add_float = instruction("red.global.add.f32 [$0], $1;", "l,f", (ADDRESS, FLOAT))
store_float2 = instruction("st.global.v2.f32 [$0], {$1, $2};", "l,f,f", (ADDRESS, FLOAT, FLOAT))
add_float2 = instruction("red.global.add.v2.f32 [$0], {$1, $2};", "l,f,f", (ADDRESS, FLOAT, FLOAT))
add_float4 = instruction("red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4};", "l,f,f,f,f", (ADDRESS, FLOAT4))
# what the kernel never writes: the compiler may move the load
load_constant_pair = instruction("ld.global.nc.b32 $0, [$1];", "=r,l", (ADDRESS,), PAIR, pure=True)
load_constant_16_bytes = instruction(
    "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", (ADDRESS,), FRAGMENT, pure=True
)
# a count by which blocks tell each other what is written: everything this thread knows to be written before store_flag
# can be read after a wait_flag for that count
store_flag = instruction("fence.acq_rel.gpu; st.relaxed.gpu.global.b32 [$0], $1;", "l,r", (ADDRESS, WORD))
clear_flag = instruction("st.relaxed.gpu.global.b32 [$0], 0;", "l", (ADDRESS,))  # nothing becomes readable by it
# (address, count): wait until the flag is at least that
wait_flag = instruction(
    "{ .reg .pred less; .reg .b32 flag; again: ld.acquire.gpu.global.b32 flag, [$0]; setp.lt.u32 less, flag, $1; "
    "@less bra again; }",
    "l,r",
    (ADDRESS, WORD),
)

# two bf16 in a register <- two float32, the first in the lower half; and back
pack = instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", (FLOAT, FLOAT), PAIR, pure=True)
unpack = instruction(
    "{ .reg .b32 l, h; shl.b32 l, $2, 16; and.b32 h, $2, 0xFFFF0000; mov.b32 $0, l; mov.b32 $1, h; }",
    "=f,=f,r", (PAIR,), FLOAT2, pure=True,
)  # fmt: skip

# mbarriers

mbarrier_init = instruction("mbarrier.init.shared::cta.b64 [$0], $1;", "r,r", (SHARED, WORD))  # (barrier, arrivals)
mbarrier_arrive = instruction("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [$0]; }", "r", (SHARED,))
# (barrier, nbytes): arrive, and TMA will write that many bytes in this phase
mbarrier_arrive_expect_tx = instruction(
    "{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [$0], $1; }", "r,r", (SHARED, WORD)
)
mbarrier_wait = instruction(
    "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra again; }",
    "r,r",
    (SHARED, WORD),
)
fence_mbarrier_init = instruction("fence.mbarrier_init.release.cluster;", "", ())  # after init, before TMA uses them
fence_proxy_async = instruction("fence.proxy.async.shared::cta;", "", ())
fence_proxy_async_global = instruction("fence.proxy.async.global;", "", ())  # the same for global memory

# TMA


def tma(text, first, dimensions, hint):
    """An instruction of TMA whose arguments are `first`, the coordinates of a box, and a cache hint if `hint`."""
    n, m = len(first), len(first) + dimensions
    text = text.format(n=dimensions, hint=".L2::cache_hint" if hint else "", at=", ".join(f"${i}" for i in range(n, m)))
    constraints = ["l" if kind == ADDRESS else "r" for kind in first] + ["r"] * dimensions + ["l"] * hint
    kinds = (*first, *[INDEX] * dimensions, *[ADDRESS] * hint)
    return instruction(text + (f", ${m};" if hint else ";"), ",".join(constraints), kinds)


def tma_load(dimensions, hint=False):
    text = "cp.async.bulk.tensor.{n}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{hint}"
    return tma(text + " [$0], [$1, {{{at}}}], [$2]", (SHARED, ADDRESS, SHARED), dimensions, hint)


def tma_store(dimensions, hint=False):
    text = "cp.async.bulk.tensor.{n}d.global.shared::cta.tile.bulk_group{hint} [$0, {{{at}}}], [$1]"
    return tma(text, (ADDRESS, SHARED), dimensions, hint)


# (to, tensor map, mbarrier, column, row[, plane[, cache hint]]): a box to shared memory, zeros outside the matrix
tma_load_2d = tma_load(2)
tma_load_3d, tma_load_3d_hint = tma_load(3), tma_load(3, hint=True)
# (tensor map, from, column, row[, plane[, cache hint]]): a box from shared memory; nothing outside the matrix
tma_store_2d = tma_store(2)
tma_store_3d, tma_store_3d_hint = tma_store(3), tma_store(3, hint=True)
# (tensor map, column, row): a box to L2
tma_prefetch_2d = instruction(
    "cp.async.bulk.prefetch.tensor.2d.L2.global.tile [$0, {$1, $2}];", "l,r,r", (ADDRESS, INDEX, INDEX)
)
# (to, from, nbytes, mbarrier): adjacent bytes, multiples of 16
bulk_load = instruction(
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
    "r,l,r,r",
    (SHARED, ADDRESS, WORD, SHARED),
)
# once per kernel and tensor map, by a thread of each block before a barrier: the map was written like ordinary memory
tensor_map_acquire = instruction("fence.proxy.tensormap::generic.acquire.sys [$0], 128;", "l", (ADDRESS,))
tma_commit = instruction("cp.async.bulk.commit_group;", "", ())  # the stores since the previous call become a group


def with_number(text):
    """A device function that runs a line of PTX with one constant in it."""

    def emit(typingctx, number):
        value = literal(number)

        def codegen(context, builder, sig, args):
            builder.asm(ir.FunctionType(ir.VoidType(), []), text.format(value), "~{memory}", [], True)

        return signature(types.void, number), codegen

    return intrinsic(emit)


# wait until shared memory has been read by all but this thread's latest n groups of stores
tma_store_wait_read = with_number("cp.async.bulk.wait_group.read {};")
# from now on each thread of this warpgroup has n registers, a multiple of 8: fewer for one that moves data, or more
setmaxnreg_dec = with_number("setmaxnreg.dec.sync.aligned.u32 {};")
setmaxnreg_inc = with_number("setmaxnreg.inc.sync.aligned.u32 {};")

# wgmma


@inlined
def descriptor(tile, chunk):
    """How wgmma finds an operand: a tile as TMA wrote it, at a multiple of 1024 bytes.

    chunk: bytes between the tile's boxes of 64 columns; it matters only for a transposed operand wider than one box.
    Adding n to a descriptor moves it by 16 n bytes.
    """
    return int64(1 << 62 | 1024 >> 4 << 32) | int64(chunk) >> 4 << 16 | int64(tile) >> 4


def steps_of(operand, step, N_steps):
    """PTX for the descriptors of an operand's steps along K: operand0 is given, operand1, ... follow `step` apart."""
    return "".join(f"add.s64 {operand}{i}, {operand}0, {i * step};" for i in range(1, N_steps))


def k_step(transposed):
    """Units of 16 bytes from one 16 of K to the next: 16 columns, or 16 rows of a transposed operand."""
    return (16 * 128 if transposed else 16 * 2) >> 4


def load_registers(context, builder, kind, value, count):
    """(values of the first `count` elements of a local array, pointer to it): while an intrinsic generates code."""
    data = context.make_array(kind)(context, builder, value=value).data
    return [builder.load(builder.gep(data, [ir.Constant(I32, i)])) for i in range(count)], data


def store_registers(builder, data, values):
    """The reverse."""
    for i, value in enumerate(values):
        builder.store(value, builder.gep(data, [ir.Constant(I32, i)]))


def unpacked(builder, aggregate, count):
    return [builder.extract_value(aggregate, i) for i in range(count)]


def emit_wgmma(context, builder, acc_kind, acc, fragments, operands, accumulate, M, N, K, transposed, commit):
    """sums (M x N) (+)= a @ b.T as one statement, so that the compiler moves nothing in between.

    fragments: a's registers, or [] if operands is [a's descriptor, b's descriptor]
    """
    halves, steps = M // 64, K // 16
    size = halves * N // 2
    sums, data = load_registers(context, builder, acc_kind, acc, size)
    first = 2 * size  # the number of the next operand
    given = {name: f"${first + len(fragments) + i}" for i, name in enumerate("ab"[2 - len(operands) :])}
    flag = f"${first + len(fragments) + len(operands)}"
    lines = ["{ .reg .pred p;", f"setp.ne.b32 p, {flag}, 0;"]
    for name, step_transposed in zip(given, transposed[2 - len(operands) :], strict=True):
        lines.append(
            ".reg .b64 " + ", ".join(f"{name}{i}" for i in range(steps)) + f"; mov.b64 {name}0, {given[name]};"
        )
        lines.append(steps_of(name, k_step(step_transposed), steps))
    if halves == 2:
        lines.append(".reg .b64 " + ", ".join(f"lower{i}" for i in range(steps)) + ";")
        lines += [f"add.s64 lower{i}, a{i}, {CHUNK >> 4};" for i in range(steps)]
    lines.append("wgmma.fence.sync.aligned;")
    flags = ", ".join(str(int(flag)) for flag in transposed[2 - len(operands) :])
    for step in range(steps):
        for half in range(halves):
            result = ", ".join(f"${i}" for i in range(half * N // 2, (half + 1) * N // 2))
            if fragments:
                a = "{" + ", ".join(f"${first + 4 * step + i}" for i in range(4)) + "}"
            else:
                a = f"{'lower' if half else 'a'}{step}"
            lines.append(
                f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {{{result}}}, {a}, b{step}, "
                f"{'1' if step else 'p'}, 1, 1, {flags};"
            )
    lines.append("wgmma.commit_group.sync.aligned; }" if commit else "}")
    constraints = ["=f"] * size + [str(i) for i in range(size)] + ["r"] * len(fragments) + ["l"] * len(operands) + ["r"]
    returns = ir.LiteralStructType([F32] * size)
    arguments = [*sums, *fragments, *operands, accumulate]
    kind = ir.FunctionType(returns, [value.type for value in arguments])
    result = builder.asm(kind, "\n\t".join(lines), ",".join([*constraints, "~{memory}"]), arguments, True)
    store_registers(builder, data, unpacked(builder, result, size))


def wgmma_from_shared(commit):
    """wgmma with both operands in shared memory."""

    def emit(typingctx, sums, a, b, accumulate, M, N, K, a_transposed, b_transposed):
        sizes = literal(M), literal(N), literal(K), (literal(a_transposed), literal(b_transposed))

        def codegen(context, builder, sig, args):
            emit_wgmma(context, builder, sums, args[0], [], list(args[1:3]), args[3], *sizes, commit)

        numbers = (M, N, K, a_transposed, b_transposed)
        return signature(types.void, sums, ADDRESS, ADDRESS, WORD, *numbers), codegen

    return intrinsic(emit)


def wgmma_from_registers(commit):
    """wgmma with a in registers, as `pack` makes it from the sums of another product: M is 64."""

    def emit(typingctx, sums, a, b, accumulate, N, K, b_transposed):
        sizes = 64, literal(N), literal(K), (0, literal(b_transposed))

        def codegen(context, builder, sig, args):
            fragments, _ = load_registers(context, builder, a, args[1], sizes[2] // 4)
            emit_wgmma(context, builder, sums, args[0], fragments, [args[2]], args[3], *sizes, commit)

        return signature(types.void, sums, a, ADDRESS, WORD, N, K, b_transposed), codegen

    return intrinsic(emit)


# (sums, a, b, accumulate, M, N, K, a_transposed, b_transposed): start sums (= or +=) a @ b.T, as a group of its own.
# sums: a local array of M N / 128 float32, the upper 64 rows first; a, b: descriptors of an M x K and an N x K tile, or
# K x M and K x N if transposed; the second 64 rows of a (columns if transposed) are CHUNK bytes after the first.
# accumulate: 0 or 1; the other arguments are constants. M is 64 or 128, K at most 64 unless transposed.
# Nothing may touch sums until `wgmma_wait` and then `settle`.
wgmma = wgmma_from_shared(commit=True)
# (sums, a, b, accumulate, N, K, b_transposed): the same with a in a local array of K / 4 pairs of bf16
wgmma_rs = wgmma_from_registers(commit=True)
# the same, in the group that the next product closes
wgmma_open, wgmma_rs_open = wgmma_from_shared(commit=False), wgmma_from_registers(commit=False)
# wait until at most the latest n groups of this warpgroup are unfinished
wgmma_wait = with_number("wgmma.wait_group.sync.aligned {};")


# Local arrays in registers


@intrinsic
def settle(typingctx, array, count):
    """The first `count` registers of a local array change here, so the compiler moves no use of them across.

    After `wgmma_wait`, for all arrays that finished products wrote or read.
    """
    size = literal(count)

    def codegen(context, builder, sig, args):
        values, data = load_registers(context, builder, array, args[0], size)
        kind, letter = (F32, "f") if array.dtype == FLOAT else (I32, "r")
        constraints = [f"={letter}"] * size + [str(i) for i in range(size)] + ["~{memory}"]
        returns = ir.LiteralStructType([kind] * size)
        result = builder.asm(ir.FunctionType(returns, [kind] * size), "", ",".join(constraints), values, True)
        store_registers(builder, data, unpacked(builder, result, size))

    return signature(types.void, array, count), codegen


@intrinsic
def clear(typingctx, array, count):
    """The first `count` elements of a local array of float32 = 0, without a loop."""
    size = literal(count)

    def codegen(context, builder, sig, args):
        data = context.make_array(array)(context, builder, value=args[0]).data
        store_registers(builder, data, [ir.Constant(F32, 0.0)] * size)

    return signature(types.void, array, count), codegen


@intrinsic
def forget(typingctx, array, count):
    """The first `count` elements of a local array of float32 = anything: their registers are free until the next write.

    A product that does not accumulate still names its sums' old values; without this they would keep their registers.
    """
    size = literal(count)

    def codegen(context, builder, sig, args):
        data = context.make_array(array)(context, builder, value=args[0]).data
        store_registers(builder, data, [ir.Constant(F32, ir.Undefined)] * size)

    return signature(types.void, array, count), codegen


if SIMULATED:
    from llm_numba.cuda.hopper_simulated import *  # noqa: F403
