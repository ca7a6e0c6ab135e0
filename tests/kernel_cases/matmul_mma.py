"""The argument types for which llm_numba.cuda.matmul_mma's kernels are compiled."""

from assembling import array
from numba.cuda.types import boolean, int64

from llm_numba.cuda.matmul_mma import KERNELS


def cases():
    return [
        dict(
            kernel=kernel,
            signature=(array(out), array("h2"), array("h2"), array("h1"), boolean, boolean, int64),
            bf16=True,
            contains=("HMMA", "LDSM", "LDGSTS"),
        )
        for layout, kernel in KERNELS.items()
        for out in ("h3", "f3")
        if (layout, out) != ((True, True), "h3")
    ]
