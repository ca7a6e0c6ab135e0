"""The ops on the CPU, compiled by Numba: one file per layer."""
