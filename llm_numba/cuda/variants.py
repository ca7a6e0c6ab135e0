"""Which variant of an op runs. This is the only place that decides.

A variant is a file `<family>_<name>.py` beside this one. Its `supports(...)` returns "" when it supports the operands,
else the reason in words. `choose` takes the first supported variant of a family, unless `force` has named one.

Nothing here imports Numba: the command line reads FAMILIES before it is loaded.
"""

import functools
import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType

from llm_numba.util.cli import UserError

# family -> its variants, fastest first; simt supports everything, so those after it run only if forced
FAMILIES = {"matmul": ("few_rows", "wgmma", "mma", "simt", "tf32", "cublas"), "attention": ("wgmma", "mma", "simt")}
NOT_SIMULATED = ("mma", "tf32", "cublas")  # they need instructions or a library that the simulator does not have
ONLY_FORCED_SIMULATED = ("wgmma",)  # variants whose PTX is emulated: too slow for a whole model
EXAMPLES = {"matmul": (4096, 768, 2304), "attention": (64,)}  # what `explain` asks about: the shapes of GPT-2 124M
_forced: dict[str, str] = {}


def force(pairs: Mapping[str, str] | Iterable[tuple[str, str]]) -> None:
    """Make these families run the named variant: {"matmul": "simt"}. Every call replaces the previous choice.

    Errors: UserError for an unknown family or variant.
    """
    pairs = dict(pairs)
    for family, name in pairs.items():
        if family not in FAMILIES:
            raise UserError(f"--variant {family}={name}: unknown op family, expected one of {', '.join(FAMILIES)}")
        if name not in FAMILIES[family]:
            expected = ", ".join(FAMILIES[family])
            raise UserError(f"--variant {family}={name}: unknown variant, expected one of {expected}")
    _forced.clear()
    _forced.update(pairs)
    choose.cache_clear()


@functools.cache
def choose(family: str, dtype, *sizes: int) -> ModuleType:
    """The variant to run: the forced one, else the first that supports the operands.

    dtype: float32, or uint16 for bf16; sizes: what the variants' `supports` of this family take after it.
    Errors: UserError if the forced variant does not support the operands.
    """
    forced = _forced.get(family)
    reasons = {}
    for name in [forced] if forced else FAMILIES[family]:
        reasons[name] = reason_against(family, name, dtype, *sizes)
        if not reasons[name]:
            return _load(family, name)
    if forced:
        raise UserError(f"--variant {family}={forced}: {reasons[forced]}; remove the flag, or choose another variant")
    raise UserError(f"no variant of {family}: " + "; ".join(f"{name} {reason}" for name, reason in reasons.items()))


def reason_against(family: str, name: str, dtype, *sizes: int) -> str:
    """Why a variant cannot run on these operands; "" if it can."""
    from llm_numba.cuda.jit import SIMULATED

    if SIMULATED and name in NOT_SIMULATED:
        return "not in the simulator"
    if SIMULATED and name in ONLY_FORCED_SIMULATED and _forced.get(family) != name:
        return "slow in the simulator: only with --variant"
    return _load(family, name).supports(dtype, *sizes)


def explain() -> list[tuple[str, str, str, str]]:
    """(family, dtype, variant, reason) for each variant on this device, at the shapes of GPT-2 124M.

    The reason is "chosen", "forced", why the variant cannot run, or which one comes before it.
    """
    from llm_numba.cuda.jit import float32, uint16

    rows = []
    for family, names in FAMILIES.items():
        for label, dtype in (("fp32", float32), ("bf16", uint16)):
            reasons = {name: reason_against(family, name, dtype, *EXAMPLES[family]) for name in names}
            supported = [name for name in names if not reasons[name]]
            first = _forced.get(family) or supported[0]
            for name in names:
                chosen = "forced" if family in _forced else "chosen"
                rows.append((family, label, name, reasons[name] or (chosen if name == first else f"after {first}")))
    return rows


def _load(family: str, name: str) -> ModuleType:
    return importlib.import_module(f"llm_numba.cuda.{family}_{name}")
