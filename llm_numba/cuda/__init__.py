"""The GPU's side of every op: the files, functions and signatures of llm_numba.cpu, as CUDA kernels."""
