"""llm_numba: GPT-2 training in Python that Numba compiles."""

__version__ = "0.1.0"
