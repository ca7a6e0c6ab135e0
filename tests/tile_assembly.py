"""Prints the vector bits and the machine code of a product on the register tile: for the processor that NUMBA_CPU_NAME
names, or, where a triple and a processor are given, for a machine of another kind."""

import re
import sys

import llvmlite.binding as llvm
from numba import njit, types

from llm_numba.cpu.jit import TASK
from llm_numba.cpu.tile import add_tile, multiply, new_tile
from llm_numba.cpu.vectors import vector_bits


@njit(**TASK)
def product(out, a, b):
    tile = new_tile()
    multiply(tile, a, b)
    add_tile(out, tile, True)


def for_another_machine(text: str, triple: str, cpu: str) -> str:
    """LLVM's intermediate code, compiled for a machine of another kind; functions that only this kind has are left out,
    which are those of Numba's memory management."""
    head, *functions = re.split(r"(?m)^(?=define )", text)
    for i, function in enumerate(functions):
        end = function.index("\n}\n") + 3
        if "x86" in function[:end]:
            name = re.search(r'@("[^"]*"|[\w.$]+)\(', function)[1]
            functions[i] = f"declare void @{name}(ptr)\n{function[end:]}"
    text = re.sub(r'"target-(cpu|features)"="[^"]*"', "", head + "".join(functions))
    text = re.sub(r'target datalayout = ".*"', "", re.sub(r'target triple = ".*"', f'target triple = "{triple}"', text))
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return (
        llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3).emit_assembly(llvm.parse_assembly(text))
    )


if __name__ == "__main__":
    matrix = types.Array(types.float32, 2, "C")
    product.compile((matrix, matrix, matrix))
    print(vector_bits())
    if len(sys.argv) > 1:
        print(for_another_machine(product.inspect_llvm(product.signatures[0]), *sys.argv[1:]))
    else:
        print(product.inspect_asm(product.signatures[0]))
