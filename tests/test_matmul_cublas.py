"""The variant of matmul by cuBLASLt, with a cuBLASLt in NumPy: which matrices it gets, and which epilogue.

The library itself runs on a GPU, in test_matmul_variants.py.
"""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import test_matmul
from ml_dtypes import bfloat16

from llm_numba import oracle
from llm_numba.cuda import variants
from llm_numba.util.cli import UserError

SHAPES = [(1, 1, 8, 8), (1, 3, 8, 16), (1, 2, 16, 8)]
DTYPES = {0: np.dtype(np.float32), 14: np.dtype(bfloat16)}
FUSED = {"GELU_AUX", "GELU_AUX_BIAS", "DGELU", "BGRADB"}
pytestmark = pytest.mark.gpu


class Names:
    """An enumeration whose members are their names."""

    def __getattr__(self, name):
        return name

    __getitem__ = __getattr__


class NotSupported(Exception):
    pass


class NumpyLibrary:
    """What matmul_cublas.py calls of nvmath.bindings.cublasLt. Matrices lie in memory by columns."""

    MatmulDescAttribute = MatmulPreferenceAttribute = Epilogue = Names()
    cuBLASLtError = NotSupported

    def __init__(self, epilogues):
        self.epilogues, self.objects, self.used = {"", "BIAS"} | epilogues, [], set()

    def create_object(self, *values):
        self.objects.append(values or {})
        return len(self.objects) - 1

    matrix_layout_create = matmul_preference_create = create_object

    def matmul_desc_create(self, compute_type, scale_type):
        assert (compute_type, scale_type) == (68, 0)
        return self.create_object()

    def matmul_preference_destroy(self, preference):
        self.objects[preference] = None

    def get_matmul_desc_attribute_dtype(self, attribute):
        return np.dtype("U13") if attribute == "EPILOGUE" else np.dtype(np.int64)

    get_matmul_preference_attribute_dtype = get_matmul_desc_attribute_dtype

    def matmul_desc_set_attribute(self, description, attribute, buffer, nbytes):
        values = np.frombuffer(ctypes.string_at(buffer, nbytes), self.get_matmul_desc_attribute_dtype(attribute))
        self.objects[description][attribute] = values[0]

    matmul_preference_set_attribute = matmul_desc_set_attribute

    def MatmulHeuristicResult(self):
        return SimpleNamespace(ptr=1)

    def matmul_algo_get_heuristic(self, handle, operation, a, b, c, d, preference, wanted, results, count):
        assert set(self.objects[preference]) == {"MAX_WORKSPACE_BYTES", *(f"MIN_ALIGNMENT_{x}_BYTES" for x in "ABCD")}
        if self.objects[operation].get("EPILOGUE", "") not in self.epilogues:
            raise NotSupported
        ctypes.c_int.from_address(count).value = 1

    def matrix(self, pointer, layout):
        dtype, rows, columns, ld = self.objects[layout]
        memory = (ctypes.c_char * (ld * columns * DTYPES[dtype].itemsize)).from_address(pointer)
        return np.frombuffer(memory, DTYPES[dtype]).reshape(columns, ld).T[:rows]

    def matmul(self, handle, operation, alpha, a, A, b, B, beta, c, C, d, D, algorithm, workspace, nbytes, stream):
        operation, out = self.objects[operation], self.matrix(d, D)
        assert (c, C) == (d, D) and workspace % 256 == 0 and ctypes.c_float.from_address(alpha).value == 1
        factors = [self.matrix(*x).astype(np.float64) for x in ((a, A), (b, B))]
        factors = [x.T if operation[key] else x for x, key in zip(factors, ("TRANSA", "TRANSB"), strict=True)]
        total = factors[0] @ factors[1]
        if ctypes.c_float.from_address(beta).value:
            total += out
        name = operation.get("EPILOGUE", "")
        self.used.add(name)
        dtype, rows, columns, _ = self.objects[D]
        vector, aux = int(operation["BIAS_POINTER"]), int(operation["EPILOGUE_AUX_POINTER"])
        if name.endswith("BIAS"):
            total += self.matrix(vector, self.create_object(dtype, rows, 1, rows)).astype(np.float64)
        if name == "BGRADB":
            self.matrix(vector, self.create_object(dtype, columns, 1, columns))[:, 0] = factors[1].sum(axis=0)
        if "GELU" in name:
            ld = int(operation["EPILOGUE_AUX_LD"])
            aux = self.matrix(aux, self.create_object(dtype, rows, columns, ld))
            if name == "DGELU":
                oracle.gelu_backward(total, aux.astype(np.float64), total)
            else:
                aux[...] = total
                oracle.gelu_forward(total, total)
        out[...] = total


@pytest.fixture(params=[FUSED, set()], ids=["fused", "unfused"])
def library(request, device, monkeypatch):
    """In the simulator, the variant with the library in NumPy, which has these epilogues or only the bias."""
    if device != "cudasim":
        pytest.skip("test_matmul_variants.py tests the real library")
    from llm_numba.cuda import matmul_cublas

    found = NumpyLibrary(request.param)
    monkeypatch.setattr(matmul_cublas, "library", lambda: (found, None))
    monkeypatch.setattr(matmul_cublas, "address", lambda x: x._ary.ctypes.data)
    monkeypatch.setattr(matmul_cublas, "SCRATCH", 256)  # the library in NumPy has no use for it
    monkeypatch.setattr(matmul_cublas, "find_spec", lambda name: name)
    monkeypatch.setattr(matmul_cublas, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(variants, "NOT_SIMULATED", ())
    matmul_cublas.plan.cache_clear()
    variants.force({"matmul": "cublas"})
    yield found
    variants.force({})
    matmul_cublas.plan.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_results(ops, library, rng, place, garbage, dtype, shape):
    for with_bias in True, False:
        test_matmul.check_forward(ops, rng, place, garbage, shape, with_bias, dtype)
        test_matmul.check_gelu_forward(ops, rng, place, garbage, shape, with_bias, dtype)
        test_matmul.check_backward(ops, rng, place, garbage, shape, with_bias, dtype)
        test_matmul.check_gelu_backward(ops, rng, place, garbage, shape, with_bias, dtype)
    expected = library.epilogues if dtype == "bfloat16" else library.epilogues & {"", "BIAS", "BGRADB"}
    assert library.used == expected


def test_rows_of_whole_chunks(library):
    for dtype, chunk in (np.dtype(np.float32), 4), (np.dtype(np.uint16), 8):
        assert variants.reason_against("matmul", "cublas", dtype, 3, 16, 8) == ""
        for C, OC in (16, chunk + 1), (chunk + 2, 8):
            assert f"multiples of {chunk} elements" in variants.reason_against("matmul", "cublas", dtype, 3, C, OC)


def test_without_nvmath(device, monkeypatch):
    from llm_numba.cuda import matmul_cublas

    monkeypatch.setitem(sys.modules, "nvmath.bindings", None)
    matmul_cublas.library.cache_clear()
    with pytest.raises(UserError, match=r'matmul=cublas: cuBLASLt does not load \(.*\): pip install -e "\.\[cublas\]"'):
        matmul_cublas.library()
    monkeypatch.setattr(matmul_cublas, "find_spec", lambda name: None)
    reason = matmul_cublas.supports(np.dtype(np.float32), 8, 8, 8)
    assert reason == 'nvmath-python is not installed: pip install -e ".[cublas]"'
