"""Matrix products by cuBLASLt, NVIDIA's library, instead of our kernels. It runs only on request: --variant
matmul=cublas. The bindings are those of nvmath-python, the extra `cublas` of pyproject.toml.

cuBLASLt reads memory by columns, and a row-major matrix is then its transpose. So a product is computed as out.T =
weight @ inp.T. What follows it, its epilogue, runs in the same kernel if cuBLASLt has one for these operands, else in a
kernel of ours. cuBLASLt only approximates GELU (its gradient was up to 1% off), so that is fused for bf16 only; and it
takes `pre` before it is rounded, so --recompute gelu gives slightly other bits.
The functions without a docstring are explained in matmul.py.
Source: NVIDIA, cuBLAS documentation, "Using the cuBLASLt API"
"""

import functools
from importlib.util import find_spec

import numpy as np

from llm_numba.cuda.gelu import gelu_backward, gelu_forward
from llm_numba.cuda.jit import blocks_for, compute_capability, stream, uint16
from llm_numba.cuda.matmul_common import add_column_sums, column_sums_scratch
from llm_numba.cuda.tiling import add_splits
from llm_numba.util.cli import UserError, install, not_installed

TYPES = {"float32": 0, "uint16": 14}  # cudaDataType of float32 and bf16
COMPUTE_FLOAT32 = 68  # cublasComputeType: sums are float32, and so are the products of float32 operands (no TF32)
WORKSPACE = 1 << 25  # bytes; what PyTorch gives cuBLASLt on a Hopper GPU
ALIGNMENT = 256  # bytes: of the workspace; kernels ask for no more of a matrix
SCRATCH = (WORKSPACE + ALIGNMENT) // 4
FACTORS = np.array([0, 1], np.float32)


def supports(dtype, R: int, C: int, OC: int) -> str:
    """Why cuBLASLt cannot run, or "". Its kernels with an epilogue need rows of whole 16-byte chunks."""
    if find_spec("nvmath") is None:
        return not_installed("nvmath")
    if dtype == uint16 and compute_capability() < (8, 0):
        return "bf16 needs compute capability 8.0"
    chunk = 8 if dtype == uint16 else 4
    return f"rows must be multiples of {chunk} elements" if C % chunk or OC % chunk else ""


def forward_scratch(R: int, C: int, OC: int) -> int:
    return SCRATCH


def backward_scratch(R: int, C: int, OC: int, with_bias: bool) -> int:
    return max(OC + SCRATCH, column_sums_scratch(R, OC)) if with_bias else SCRATCH


def forward(out, inp, weight, bias, scratch, pre=None):
    end = [] if bias is None else ["BIAS"]
    product = functools.partial(multiply, a=weight, b=inp, scratch=scratch, a_transposed=True, bias=bias)
    if pre is None:
        product(out, epilogue=end)
    elif out.dtype != uint16 or not product(out, epilogue=["GELU", "AUX", *end], aux=pre):
        product(pre, epilogue=end)
        gelu_forward(out, pre)


def input_gradient(dinp, dout, weight, scratch, pre=None):
    if pre is None:
        multiply(dinp, weight, dout, scratch)
    elif dinp.dtype != uint16 or not multiply(dinp, weight, dout, scratch, epilogue=["DGELU"], aux=pre):
        multiply(dinp, weight, dout, scratch)
        gelu_backward(dinp, pre, dinp)


def weight_gradient(dweight, dbias, dout, inp, scratch, accumulate):
    """cuBLASLt can add to dweight, but not to dbias: the sums of dout then go to scratch first."""
    product = functools.partial(multiply, dweight, inp, dout, b_transposed=True, accumulate=accumulate)
    if dbias is None:
        product(scratch)
        return
    OC = dbias.shape[0]
    sums = scratch[:OC] if accumulate else dbias
    if not product(scratch[OC:], epilogue=["BGRADB"], bias=sums):
        product(scratch)
        add_column_sums(dbias, dout, scratch, accumulate)
    elif accumulate:
        add_splits(dbias.reshape(1, OC), sums.reshape(1, 1, OC), accumulate=True)


def multiply(
    out, a, b, scratch, a_transposed=False, b_transposed=False, accumulate=False, epilogue=(), bias=None, aux=None
) -> bool:
    """out.T = (+= if accumulate) a.T @ b.T, with a instead of a.T if a_transposed, likewise b; then the epilogue.

    epilogue: the parts of a name of cublasLtEpilogue_t; bias, aux: its vector and its matrix. Returns False, and does
    nothing, if cuBLASLt has no kernel with this epilogue.
    """
    cublaslt, handle = library()
    matrices = tuple((x.dtype.name, x.shape) for x in (a, b, out))
    pointers = [0 if x is None else address(x) for x in (a, b, out, bias, aux)]
    alignments = tuple(min(pointer & -pointer, ALIGNMENT) for pointer in pointers)
    found = plan(matrices, a_transposed, b_transposed, "_".join(epilogue), alignments)
    if found is None:
        return False
    operation, layouts, algorithm = found
    set_pointers(operation, *pointers[3:])
    a, b, d = zip(pointers[:3], layouts, strict=True)
    zero, one = FACTORS.ctypes.data, FACTORS.ctypes.data + FACTORS.itemsize
    workspace = blocks_for(address(scratch), ALIGNMENT) * ALIGNMENT
    cublaslt.matmul(
        handle, operation, one, *a, *b, one if accumulate else zero, *d, *d, algorithm.ptr, workspace, WORKSPACE,
        int(stream()),
    )  # fmt: skip
    return True


@functools.cache
def plan(matrices, a_transposed: bool, b_transposed: bool, epilogue: str, alignments):
    """(operation, layouts of a, b and out, algorithm): what cuBLASLt's heuristic chooses for these matrices. None if it
    has no kernel with this epilogue. An alignment stands for a pointer that has it."""
    cublaslt, handle = library()
    attributes = cublaslt.MatmulDescAttribute
    operation = cublaslt.matmul_desc_create(COMPUTE_FLOAT32, TYPES["float32"])
    values = {attributes.TRANSA: a_transposed, attributes.TRANSB: b_transposed}
    if epilogue:
        values[attributes.EPILOGUE] = cublaslt.Epilogue[epilogue]
    if alignments[4]:
        values[attributes.EPILOGUE_AUX_LD] = matrices[2][1][1]
    for attribute, value in values.items():
        set_attribute(cublaslt, "matmul_desc", operation, attribute, value)
    set_pointers(operation, *alignments[3:])

    attributes = cublaslt.MatmulPreferenceAttribute
    preference = cublaslt.matmul_preference_create()
    values = {attributes.MAX_WORKSPACE_BYTES: WORKSPACE}
    for name, alignment in zip("ABCD", (*alignments[:3], alignments[2]), strict=True):
        values[attributes[f"MIN_ALIGNMENT_{name}_BYTES"]] = alignment
    for attribute, value in values.items():
        set_attribute(cublaslt, "matmul_preference", preference, attribute, value)

    layouts = [cublaslt.matrix_layout_create(TYPES[dtype], N, M, N) for dtype, (M, N) in matrices]
    algorithm, count = cublaslt.MatmulHeuristicResult(), np.zeros(1, np.int32)
    try:
        cublaslt.matmul_algo_get_heuristic(
            handle, operation, *layouts, layouts[2], preference, 1, algorithm.ptr, count.ctypes.data
        )
    except cublaslt.cuBLASLtError:
        pass  # not supported, like a count of 0
    cublaslt.matmul_preference_destroy(preference)
    if not count[0] and epilogue in ("", "BIAS"):
        raise RuntimeError(f"cuBLASLt has no kernel for (dtype, shape) of a, b and out = {matrices}")
    return (operation, layouts, algorithm) if count[0] else None


def set_pointers(operation: int, bias: int, aux: int) -> None:
    """Where the vector and the matrix of the epilogue are; 0: there is none."""
    cublaslt, _ = library()
    set_attribute(cublaslt, "matmul_desc", operation, cublaslt.MatmulDescAttribute.BIAS_POINTER, bias)
    set_attribute(cublaslt, "matmul_desc", operation, cublaslt.MatmulDescAttribute.EPILOGUE_AUX_POINTER, aux)


def set_attribute(cublaslt, kind: str, description: int, attribute, value: int) -> None:
    """kind: matmul_desc or matmul_preference."""
    buffer = np.array([value], getattr(cublaslt, f"get_{kind}_attribute_dtype")(attribute))
    getattr(cublaslt, f"{kind}_set_attribute")(description, attribute, buffer.ctypes.data, buffer.nbytes)


def address(x) -> int:
    """Of an array in GPU memory."""
    return x.__cuda_array_interface__["data"][0]


@functools.cache
def library():
    """The bindings, and a handle. Errors: UserError if cuBLASLt cannot be loaded."""
    try:
        from nvmath.bindings import cublasLt

        return cublasLt, cublasLt.create()
    except Exception as error:  # of several kinds: no such library, one that does not fit the driver
        reason = str(error).partition("\n")[0]
        raise UserError(f"--variant matmul=cublas: cuBLASLt does not load ({reason}): {install('cublas')}") from error
