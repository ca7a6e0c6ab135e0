"""Tensor cores and asynchronous copies: PTX instructions that Numba has no function for.

mma multiplies small bf16 matrices. Every thread of a warp holds a few elements of each, its fragment. With g = lane //
4 and q = lane % 4, two bf16 per register, the first in the lower half:

    a (16 x 16), 4 registers: rows g, g + 8, g, g + 8; columns 2q and 2q + 1 of the left half in the first two
                              registers, of the right half in the other two
    b (16 x 8), 2 registers:  rows 2q and 2q + 1 of the upper half, then of the lower half; column g
    c (16 x 8), 4 float32:    rows g, g, g + 8, g + 8; columns 2q, 2q + 1, 2q, 2q + 1

Addresses in shared memory are uint32, addresses in global memory int64.
Source: NVIDIA, PTX ISA, "Matrix fragments for mma.m16n8k16", "ldmatrix", "cp.async"
"""

from inspect import Parameter, Signature

from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

I1, I8, I32, I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
ADDRESS, SHARED, PAIR, FLOAT = types.int64, types.uint32, types.uint32, types.float32
FRAGMENT, SUMS = types.UniTuple(PAIR, 4), types.UniTuple(FLOAT, 4)


def instruction(text, constraints, arguments, result=types.void, pure=False):
    """A device function that runs a line of PTX. $0, $1, ... are the results, then the arguments with tuples unpacked.

    constraints: a letter for each: r 32-bit integer, l 64-bit integer, f float32; results have a = in front
    pure: the result depends on the arguments only, so the compiler may move the instruction
    """

    def emit(typingctx, *given):
        def codegen(context, builder, sig, args):
            values = []
            for value, kind in zip(args, arguments, strict=True):
                is_tuple = isinstance(kind, types.UniTuple)
                values += cgutils.unpack_tuple(builder, value, kind.count) if is_tuple else [value]
            if not isinstance(result, types.UniTuple):
                returns = ir.VoidType() if result == types.void else context.get_value_type(result)
                returned = call(builder, returns, values)
                return None if result == types.void else returned
            returns = ir.LiteralStructType([context.get_value_type(result.dtype)] * result.count)
            returned = call(builder, returns, values)
            return cgutils.pack_array(builder, cgutils.unpack_tuple(builder, returned, result.count))

        return signature(result, *arguments), codegen

    def call(builder, returns, values):
        kind = ir.FunctionType(returns, [value.type for value in values])
        clobbers = constraints if pure else ",".join(filter(None, [constraints, "~{memory}"]))
        return builder.asm(kind, text, clobbers, values, not pure)

    # Numba inspects the signature
    names = ("typingctx", *(f"argument{i}" for i in range(len(arguments))))
    emit.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    return intrinsic(emit)


@intrinsic
def shared_address(typingctx, array):
    """The address of a shared array, within shared memory."""

    def codegen(context, builder, sig, args):
        data = context.make_array(array)(context, builder, value=args[0]).data
        return builder.ptrtoint(builder.addrspacecast(data, ir.PointerType(I8, 3)), I32)

    return signature(SHARED, array), codegen


@intrinsic
def address(typingctx, array):
    """The address of an array in global memory."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(context.make_array(array)(context, builder, value=args[0]).data, I64)

    return signature(ADDRESS, array), codegen


@intrinsic
def holds_bf16(typingctx, array):
    """Whether the elements of an array are bf16, as a compile-time constant."""

    def codegen(context, builder, sig, args):
        return ir.Constant(I1, array.dtype == types.uint16)

    return signature(types.boolean, array), codegen


def wait_group(pending):
    """A device function that waits until at most `pending` of this thread's latest groups of copies are unfinished."""
    return instruction(f"cp.async.wait_group {pending};", "", ())


# copy 16 bytes to shared memory asynchronously: (to, from, 16); or write zeros without reading: (to, from, 0)
copy_async = instruction("cp.async.cg.shared.global [$0], [$1], 16, $2;", "r,l,r", (SHARED, ADDRESS, types.uint32))
# the copies since the previous call become a group
commit_group = instruction("cp.async.commit_group;", "", ())

LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{$0,$1,$2,$3}}, [$4];"
# four 8 x 8 matrices; lane l passes the address of row l % 8 of matrix l // 8. A thread gets row g, columns 2q and 2q +
# 1 of each; transposed: rows 2q and 2q + 1, column g
ldmatrix = instruction(LDMATRIX.format(""), "=r,=r,=r,=r,r", (SHARED,), FRAGMENT)
ldmatrix_transposed = instruction(LDMATRIX.format(".trans"), "=r,=r,=r,=r,r", (SHARED,), FRAGMENT)

# (c, a, b0, b1) -> c + a @ b; b0, b1: the two registers of b
mma = instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$4,$5,$6,$7};",
    "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r",
    (SUMS, FRAGMENT, PAIR, PAIR),
    SUMS,
    pure=True,
)
# the same for float32 operands, of which TF32 keeps 10 bits of the mantissa. a is 16 x 8, b 8 x 8: a register holds one
# element, of column (of b row) q instead of 2q and 2q + 1
mma_tf32 = instruction(
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$4,$5,$6,$7};",
    "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r",
    (SUMS, FRAGMENT, PAIR, PAIR),
    SUMS,
    pure=True,
)
# a float32 -> rounded to TF32 (to nearest, ties away from zero); as bits
round_to_tf32 = instruction("cvt.rna.tf32.f32 $0, $1;", "=r,r", (PAIR,), PAIR, pure=True)

# two float32 -> two bf16 in a register, the first in the lower half
pack = instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", (FLOAT, FLOAT), PAIR, pure=True)
# two bf16 from global memory, as float32
load_bf16x2 = instruction(
    "{ .reg .b32 both; ld.global.b32 both, [$2]; shl.b32 $0, both, 16; and.b32 $1, both, 0xFFFF0000; }",
    "=f,=f,l", (ADDRESS,), types.UniTuple(FLOAT, 2),
)  # fmt: skip

load_shared = instruction("ld.shared.b32 $0, [$1];", "=r,r", (SHARED,), PAIR)
store_shared = instruction("st.shared.b32 [$0], $1;", "r,r", (SHARED, PAIR))
# copy 16 bytes from shared to global memory: (to, from)
store_16_bytes = instruction(
    "{ .reg .b32 w, x, y, z; ld.shared.v4.b32 {w, x, y, z}, [$1]; st.global.v4.b32 [$0], {w, x, y, z}; }",
    "l,r", (ADDRESS, SHARED),
)  # fmt: skip
load_float2 = instruction("ld.global.v2.f32 {$0, $1}, [$2];", "=f,=f,l", (ADDRESS,), types.UniTuple(FLOAT, 2))
store_float2 = instruction("st.global.v2.f32 [$0], {$1, $2};", "l,f,f", (ADDRESS, FLOAT, FLOAT))
