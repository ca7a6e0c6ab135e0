"""What the compiler has to work with: how wide this machine's vector registers are."""

import llvmlite.binding as llvm
from numba import config
from numba.core.codegen import get_host_cpu_features

SIXTEEN_SUMS = """
define <16 x float> @sums(<16 x float> %a, <16 x float> %b) {
    %c = fadd <16 x float> %a, %b
    ret <16 x float> %c
}
"""


def choose_features() -> None:
    """Where NUMBA_CPU_NAME names a processor, build for what that one has: with the name alone Numba goes on using all
    that the present one has. NUMBA_CPU_NAME=haswell then gives AVX2 on a machine with AVX-512. Otherwise build for the
    present one, and let loops have all of its registers: for Intel's with AVX-512, LLVM would take half of each."""
    if config.CPU_FEATURES is None:
        here = get_host_cpu_features()
        whole = here + ",-prefer-256-bit" if "+avx512f" in here else here
        config.CPU_FEATURES = "" if config.CPU_NAME else whole


def vector_bits() -> int:
    """The bits of a vector register, as the compiler shows: it adds 16 float32 in one instruction of 512 bits
    (AVX-512), in two of 256 (AVX2) or in four of 128 (NEON, SSE)."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=config.CPU_NAME or llvm.get_host_cpu_name(),
        features=config.CPU_FEATURES,
    )
    words = machine.emit_assembly(llvm.parse_assembly(SIXTEEN_SUMS)).split()
    return 512 // sum(word in ("vaddps", "addps", "fadd") for word in words)
