"""Vectors: adjacent elements of a tensor that a thread moves with as few instructions as possible.

A thread that moves 16 bytes at a time keeps memory busier than one that moves a bf16, 2 bytes, at a time.
"""

import math

import numpy as np

from llm_numba.cuda.jit import SIMULATED, to_float, to_storage

LARGEST = 8  # elements: 16 bytes of bf16, or twice 16 bytes of float32


def vector_size(row_length: int) -> int:
    """The elements of a vector in rows of this length: the largest power of two up to LARGEST that divides it, so that
    no vector crosses the end of a row and all have aligned addresses."""
    return math.gcd(row_length, LARGEST)


if not SIMULATED:
    from llvmlite import ir
    from numba.cuda import cgutils, types
    from numba.cuda.extending import intrinsic
    from numba.cuda.typing import signature

    I16, I32, F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
    WORDS = 4  # of 4 bytes in the largest access

    def pointer(context, builder, kind, array, indices, pointee):
        """The address of an element of an array, as a pointer to `pointee`."""
        array = context.make_array(kind)(context, builder, array)
        place = cgutils.get_item_pointer(context, builder, kind, array, indices)
        return builder.bitcast(place, pointee.as_pointer())

    def accesses(context, builder, kind, tensor, row, column, size):
        """(words of an access, the pointer of each access) for a vector of at least one word."""
        words = size * kind.dtype.bitwidth // 32
        each = min(words, WORDS)
        first = pointer(context, builder, kind, tensor, [row, column], ir.VectorType(I32, each))
        return each, [builder.gep(first, [ir.Constant(I32, i)]) for i in range(words // each)]

    @intrinsic
    def load_vector(typingctx, x, first, tensor, row, column, size):
        """x[first : first + size] = tensor[row, column : column + size].

        x: local, float32, or int32 for an int32 tensor; tensor: two-dimensional, float32, bf16 or int32; size: a
        constant, see `vector_size`; column: a multiple of it.
        """
        if not isinstance(size, types.IntegerLiteral):
            return None  # Numba then tries the constant
        kind, size, is_bf16 = size, size.literal_value, tensor.dtype == types.uint16

        def codegen(context, builder, sig, args):
            x, first, array, row, column, _ = args
            found = []
            if is_bf16 and size == 1:
                bits = builder.load(pointer(context, builder, tensor, array, [row, column], I16))
                found.append(builder.shl(builder.zext(bits, I32), ir.Constant(I32, 16)))
            else:
                each, places = accesses(context, builder, tensor, array, row, column, size)
                for place in places:
                    vector = builder.load(place, align=4 * each)
                    for i in range(each):
                        word = builder.extract_element(vector, ir.Constant(I32, i))
                        lower, upper = ir.Constant(I32, 16), ir.Constant(I32, 0xFFFF0000)
                        found += [builder.shl(word, lower), builder.and_(word, upper)] if is_bf16 else [word]
            element = context.get_value_type(sig.args[0].dtype)
            to = pointer(context, builder, sig.args[0], x, [first], element)
            for i, bits in enumerate(found):
                builder.store(builder.bitcast(bits, element), builder.gep(to, [ir.Constant(I32, i)]))

        return signature(types.void, x, types.int64, tensor, types.int64, types.int64, kind), codegen

    @intrinsic
    def store_vector(typingctx, tensor, row, column, x, first, size):
        """tensor[row, column : column + size] = x[first : first + size], rounded to bf16 if that is what it holds."""
        if not isinstance(size, types.IntegerLiteral):
            return None  # Numba then tries the constant
        kind, size, is_bf16 = size, size.literal_value, tensor.dtype == types.uint16

        def codegen(context, builder, sig, args):
            array, row, column, x, first, _ = args
            start = pointer(context, builder, sig.args[3], x, [first], F32)
            values = [builder.load(builder.gep(start, [ir.Constant(I32, i)])) for i in range(size)]
            if is_bf16 and size == 1:
                convert = ir.FunctionType(I16, [F32])
                bits = builder.asm(convert, "cvt.rn.bf16.f32 $0, $1;", "=h,f", values, False)
                builder.store(bits, pointer(context, builder, tensor, array, [row, column], I16))
                return
            if is_bf16:
                pack = ir.FunctionType(I32, [F32, F32])
                pairs = zip(values[::2], values[1::2], strict=True)
                bits = [builder.asm(pack, "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", pair, False) for pair in pairs]
            else:
                bits = [builder.bitcast(value, I32) for value in values]
            each, places = accesses(context, builder, tensor, array, row, column, size)
            for k, place in enumerate(places):
                vector = ir.Constant(place.type.pointee, ir.Undefined)
                for i in range(each):
                    vector = builder.insert_element(vector, bits[k * each + i], ir.Constant(I32, i))
                builder.store(vector, place, align=4 * each)

        return signature(types.void, tensor, types.int64, types.int64, x, types.int64, kind), codegen

else:

    def load_vector(x, first, tensor, row, column, size):
        elements = tensor[row, np.arange(column, column + size)]  # at once, as an access of the lessons' recorder
        for i in range(size):
            x[first + i] = elements[i] if tensor.dtype == np.int32 else to_float(elements[i])

    def store_vector(tensor, row, column, x, first, size):
        tensor[row, column : column + size] = [to_storage(x[first + i], tensor) for i in range(size)]
