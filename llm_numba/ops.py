"""The contract: the ops that every backend has, and how to get them.

Destinations come first, then what is saved for the backward, then inputs; sizes come from the shapes.
The residual stream's gradient accumulates (`+=`), those of parameters do where `accumulate` says so, which a step's
first micro-batch does not; every other gradient is written (`=`).
An op that needs memory beside its results takes it from `scratch`, a flat float32 array whose content means nothing
before and after; how much it must hold is the backend's `scratch_size(config, B, T)`.
"""

import importlib
import os
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace

from llm_numba.util.cli import UserError

# file of the backend -> its ops -> the arguments an op writes or accumulates into
CONTRACT = {
    "memory": {"zero": ("tensor",), "copy": ("out",), "to_device": ("tensor",)},
    "encoder": {"encoder_forward": ("out",), "encoder_backward": ("dwte", "dwpe")},
    "layernorm": {
        "layernorm_forward": ("out", "mean", "rstd"),
        "layernorm_backward": ("dinp", "dweight", "dbias"),
    },
    "matmul": {"matmul_forward": ("out",), "matmul_backward": ("dinp", "dweight", "dbias")},
    "attention": {
        "attention_forward": ("out", "att"),
        "attention_backward": ("dqkv",),
        "attention_cached_forward": ("out", "cache"),
    },
    "gelu": {"gelu_forward": ("out",), "gelu_backward": ("dinp",)},
    "residual": {"residual_layernorm_forward": ("residual", "out", "mean", "rstd"), "residual_backward": ("dinp",)},
    "classifier": {"fused_classifier": ("logits", "losses"), "add_mean": ("loss",)},
    "global_norm": {"global_norm_squared": ("out",), "clip": ("grad_scale",)},
    "adamw": {"adamw_update": ("params", "master", "m", "v")},
}
WRITES = {op: names for file in CONTRACT.values() for op, names in file.items()}
# what a device offers beside its ops: of jit.py, memory.py and peak.py
BACKEND = {
    "jit": ("is_compiled", "nothing_compiled"),
    "memory": (
        "allocate",
        "available_memory",
        "view",
        "to_host",
        "set_threads",
        "attention_specs",
        "scratch_size",
        "capture",
        "describe_device",
    ),
    "peak": ("peak_flops", "peak_bandwidth", "timed"),
}


DEVICES = ("auto", "cpu", "cuda", "cudasim")  # cudasim: the CUDA kernels in Numba's simulator


def choose_device(device: str) -> str:
    """The device that "auto" means here; any other is itself."""
    if device != "auto":
        return device
    from llm_numba.cuda.gpu import available

    return "cuda" if available() else "cpu"


def get_ops(device: str, dtype: str = "fp32", interpret: Iterable[str] = (), no_jit: bool = False) -> SimpleNamespace:
    """The ops of a device ("cpu", "cuda" or "cudasim") by name, with what the arena and the training loop ask of it.

    interpret: layers (files of the contract) or single ops to run as plain Python, so that a debugger steps through
    them; the rest stays compiled. no_jit: all of it as plain Python; it must come before anything is compiled.
    Errors: UserError where the device or its dtype is not to be had.
    """
    if device == "cuda":
        from llm_numba.cuda.gpu import check_gpu

        check_gpu(dtype)
    if device == "cpu" and dtype != "fp32":
        raise UserError(f"--dtype {dtype}: the CPU computes in float32 only; use --dtype fp32, or --device cuda")
    if device == "cudasim":
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # Numba reads it when it is loaded
    if no_jit:
        from numba import config  # the command line reads the contract above without loading Numba

        config.DISABLE_JIT = True
    found = {}
    for file in CONTRACT | BACKEND:
        module = importlib.import_module(f"llm_numba.{'cpu' if device == 'cpu' else 'cuda'}.{file}")
        if file in interpret or any(op in interpret for op in CONTRACT.get(file, ())):
            _interpret(module, CONTRACT[file], interpret)
        found |= {name: getattr(module, name) for name in (*CONTRACT.get(file, ()), *BACKEND.get(file, ()))}
    return SimpleNamespace(**found)


def _interpret(module: ModuleType, ops: Iterable[str], wanted: Iterable[str]) -> None:
    """Put the Python of a module's compiled functions in their place, all of them or all but the ops not wanted.

    Functions of other modules that they call stay compiled: the register tile, exp.
    """
    whole = module.__name__.rpartition(".")[2] in wanted
    for name, function in list(vars(module).items()):
        mine = getattr(function, "py_func", None) is not None and function.py_func.__module__ == module.__name__
        if mine and (whole or name not in ops or name in wanted):
            setattr(module, name, function.py_func)
