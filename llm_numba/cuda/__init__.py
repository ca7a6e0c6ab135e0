"""The ops as CUDA kernels: the same files, functions and signatures as in llm_numba.cpu.

A file `<family>_<name>.py` of a family in variants.py is a variant, such as matmul_mma.py.
"""
