"""The contract: the ops that every device has, and how to get them.

Destinations come first, then what is saved for the backward, then inputs; sizes come from the shapes.
Gradients of parameters are added (`+=`) if `accumulate`, which is False for the first micro-batch of a step, else
written (`=`). The gradient of the residual stream accumulates (`+=`). Every other gradient is written (`=`).
An op that needs memory beside its results takes it from `scratch`, a flat float32 array whose content means nothing
before and after. `<op>_scratch`, with the op's other arguments, says how many floats that is.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from types import ModuleType, SimpleNamespace

from llm_numba.arena import DTYPES
from llm_numba.cuda import variants
from llm_numba.util.cli import Parser, UserError
from llm_numba.util.host import usable_cpus

# file of the device -> its ops -> the arguments that an op writes or adds to
CONTRACT = {
    "memory": {"zero": ("tensor",), "copy": ("out",), "to_device": ("tensor",)},
    "encoder": {
        "encoder_forward": ("out",),
        "encoder_forward_at": ("out",),
        "encoder_backward": ("dwte", "dwpe"),
    },
    "layernorm": {"layernorm_forward": ("out", "mean", "rstd"), "layernorm_backward": ("dinp", "dweight", "dbias")},
    "matmul": {
        "matmul_forward": ("out",),
        "matmul_gelu_forward": ("pre", "out"),  # in the order of computing
        "matmul_backward": ("dinp", "dweight", "dbias"),
        "gelu_matmul_backward": ("dpre", "dweight", "dbias"),
    },
    "attention": {
        "attention_forward": ("out", "lse"),
        "attention_backward": ("dqkv",),
        "attention_cached_forward": ("out", "cache"),
        "attention_weights": ("weights",),
    },
    "gelu": {"gelu_forward": ("out",), "gelu_backward": ("dinp",)},
    "residual": {"residual_layernorm_forward": ("residual", "out", "mean", "rstd"), "residual_backward": ("dinp",)},
    "classifier": {"fused_classifier": ("logits", "losses"), "add_mean": ("loss",)},
    "global_norm": {"global_norm_squared": ("out",), "clip": ("grad_scale",)},
    "adamw": {"adamw_update": ("params", "master", "m", "v")},
    "sampler": {"sample_token": ("token", "position")},
}
WRITES = {op: names for file in CONTRACT.values() for op, names in file.items()}
# what a device offers beside its ops: in jit.py, memory.py and peak.py
BACKEND = {
    "jit": ("is_compiled", "shares"),
    "memory": tuple(
        "allocate available_memory view storage_dtype to_host reader set_threads capture describe_device".split()
    ),
    "peak": ("peak_flops", "peak_bandwidth", "timed"),
}

DEVICES = ("auto", "cpu", "cuda", "cudasim")  # cudasim: the CUDA kernels in Numba's simulator


class Ops(SimpleNamespace):
    """The ops of a device by name, and what BACKEND lists."""

    def replace(self, **functions: Callable) -> "Ops":
        """The same ops, with these functions in place of those of the same names."""
        return Ops(**{**vars(self), **functions})

    def wrap(self, wrapper: Callable[[str, Callable], Callable], names: Iterable[str] = WRITES) -> "Ops":
        """The same ops, with wrapper(name, op) in place of each op among `names`."""
        return self.replace(**{name: wrapper(name, getattr(self, name)) for name in names})


def device_flags(parser: Parser, *others: str) -> None:
    """Add --device and, if `others` names them, --dtype and --threads to a command."""
    help = "auto (default): a CUDA GPU if there is one, else the CPU"
    parser.add_argument("--device", choices=DEVICES, default="auto", help=help)
    if "dtype" in others:
        help = "bf16 needs a CUDA GPU (default: fp32)"
        parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help=help)
    if "threads" in others:
        help = "CPU threads, at most the cores that this process may use; 0: one for each physical core"
        parser.number("--threads", 0, help, most=len(usable_cpus()), metavar="N")


def choose_device(device: str) -> str:
    """The device that "auto" stands for on this machine; any other name is returned as it is."""
    if device != "auto":
        return device
    from llm_numba.cuda.gpu import available

    return "cuda" if available() else "cpu"


def simulate() -> None:
    """Run CUDA kernels in Numba's simulator. Call it before numba.cuda is loaded, which reads the variable.

    Before it compiles, Numba would see the change, reload all its options and lose those that cpu/jit.py has set.
    """
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    if "numba" in sys.modules:
        sys.modules["numba"].config.reload_config()
    if "llm_numba.cpu.jit" in sys.modules:
        sys.modules["llm_numba.cpu.jit"].set_options()


def get_ops(
    device: str, dtype: str = "fp32", interpret: Iterable[str] = (), no_jit=False, variant: Iterable[str] = ()
) -> Ops:
    """The ops of a device ("cpu", "cuda" or "cudasim").

    interpret: layers (files of the contract) or single ops to run as plain Python, so that a debugger steps through
    them; the rest stays compiled. no_jit: run everything as plain Python; nothing may be compiled before.
    variant: FAMILY=NAME of op families whose variant is not to be chosen automatically.
    Errors: UserError if the device, or this dtype on it, is not available.
    """
    if device == "cuda":
        from llm_numba.cuda.gpu import begin_context, check_gpu

        check_gpu(dtype)
        begin_context()
    if device == "cpu" and dtype != "fp32":
        raise UserError(f"--dtype {dtype}: the CPU computes in float32 only; use --dtype fp32, or --device cuda")
    if device == "cudasim":
        simulate()
    if device != "cpu":
        variants.force((family, name) for family, _, name in (value.partition("=") for value in variant))
    elif variant:
        raise UserError(f"--variant {' '.join(variant)}: the CPU has no variants; leave it out, or use --device cuda")
    if no_jit:
        from numba import config  # imported here: the command line reads the contract without loading Numba

        config.DISABLE_JIT = True  # pyright: ignore[reportAttributeAccessIssue]  (Numba adds its settings at run time)
    found = {}
    for file in CONTRACT | BACKEND:
        module = importlib.import_module(f"llm_numba.{'cpu' if device == 'cpu' else 'cuda'}.{file}")
        if file in interpret or any(op in interpret for op in CONTRACT.get(file, ())):
            _interpret(module, CONTRACT[file], interpret)
        found |= {name: getattr(module, name) for name in (*CONTRACT.get(file, ()), *BACKEND.get(file, ()))}
        found |= {name: value for name, value in vars(module).items() if name.removesuffix("_scratch") in WRITES}
    return Ops(**found)


def _interpret(module: ModuleType, ops: Iterable[str], wanted: Iterable[str]) -> None:
    """Replace the compiled functions of a module by their Python source: all of them, or all but the ops not wanted.

    Functions that they call in other modules stay compiled: the register tile, exp.
    """
    whole = module.__name__.rpartition(".")[2] in wanted
    for name, function in list(vars(module).items()):
        own = getattr(function, "py_func", None) is not None and function.py_func.__module__ == module.__name__
        if own and (whole or name not in ops or name in wanted):
            setattr(module, name, function.py_func)
