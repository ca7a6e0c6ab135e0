"""The argument types for which llm_numba.cuda.classifier's kernels are compiled."""

from assembling import array
from numba.cuda import types

from llm_numba.cuda.classifier import add_mean_kernel, classifier_kernel


def cases():
    numbers = (types.float32, types.int64, types.boolean)
    found = [dict(kernel=add_mean_kernel, signature=(array("d1"), array("f1"), types.float64), bf16=False, wide=True)]
    for x in "f", "h":
        signature = array(x + "2"), array("f1"), array("i1"), *numbers
        found += [dict(kernel=classifier_kernel(size), signature=signature, bf16=x == "h") for size in (1, 8)]
    return found
