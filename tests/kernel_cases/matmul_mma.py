"""The argument types for which llm_numba.cuda.matmul_mma's kernels are compiled."""

from assembling import array
from numba.cuda.types import boolean, int64

from llm_numba.cuda.matmul_mma import KERNELS


def cases():
    return [
        dict(
            kernel=kernel,
            signature=(array(out), array(x + "2"), array(x + "2"), array(x + "1"), boolean, boolean, int64),
            bf16=True,
            contains=(word, "LDGSTS"),
        )
        for layout, kernel in KERNELS.items()
        for x, out, word in (
            ("h", "h3", "HMMA.16816.F32.BF16"),
            ("h", "f3", "HMMA.16816.F32.BF16"),
            ("f", "f3", "HMMA.1688.F32.TF32"),
        )
        if (layout, out) != ((True, True), "h3")
    ]
