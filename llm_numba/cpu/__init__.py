"""The ops on the CPU: one file a layer, its functions compiled by Numba."""
