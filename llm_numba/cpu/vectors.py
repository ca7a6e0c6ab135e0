"""The vector registers of this machine, and the processor features that the compiler may use."""

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
    """Set the features to compile for.

    With NUMBA_CPU_NAME, only the features of that processor: NUMBA_CPU_NAME=haswell gives AVX2 on a machine with
    AVX-512. (By itself Numba would still use all features of this machine.) Otherwise the features of this machine,
    with vectors of the full width: on Intel processors with AVX-512, LLVM would use half of each register.
    """
    if config.CPU_FEATURES is None:
        here = get_host_cpu_features()
        whole = here + ",-prefer-256-bit" if "+avx512f" in here else here
        config.CPU_FEATURES = "" if config.CPU_NAME else whole


def vector_bits() -> int:
    """The width of a vector register, found by compiling an addition of 16 float32: it takes one instruction of 512
    bits (AVX-512), two of 256 (AVX2) or four of 128 (NEON, SSE)."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=config.CPU_NAME or llvm.get_host_cpu_name(),
        features=config.CPU_FEATURES,
    )
    words = machine.emit_assembly(llvm.parse_assembly(SIXTEEN_SUMS)).split()
    return 512 // sum(word in ("vaddps", "addps", "fadd") for word in words)
