"""Which NVIDIA cards there are, and why a run cannot have one: asked of the driver, before anything is compiled.

Nothing here loads Numba, which reads NUMBA_ENABLE_CUDASIM when it is loaded.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec

from llm_numba.util.cli import UserError, install

OLDEST, OLDEST_WITH_BF16 = (7, 5), (8, 0)  # compute capabilities
DRIVERS = {12: "R525", 13: "R580"}  # the first driver for a toolkit of CUDA 12, of CUDA 13
LIBRARIES = ("nvvm", "nvrtc", "nvJitLink")  # parts of the toolkit that numba-cuda compiles with
INSTALL = install("cuda")


@dataclass(frozen=True)
class Card:
    """memory: bytes in all."""

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def has_bf16(self) -> bool:
        return self.capability >= OLDEST_WITH_BF16

    def __str__(self):
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def check_card(dtype: str) -> None:
    """Raise a UserError unless the first card can run in this dtype (fp32 or bf16)."""
    reason = obstacle()
    if reason:
        raise UserError(f"--device cuda: {reason}; or use --device cpu")
    card = cards()[0]
    if dtype == "bf16" and not card.has_bf16:
        raise UserError(f"--dtype bf16: {card} has none, it comes with {_dotted(OLDEST_WITH_BF16)}; use --dtype fp32")


def available() -> bool:
    """Whether there is a card that can run in float32."""
    return obstacle() is None


def obstacle() -> str | None:
    """What keeps a run from the first card, and what to do about it, in one line; None where nothing does."""
    try:
        card = cards()[0]
    except UserError as error:
        return str(error)
    if card.capability < OLDEST:
        return f"{card} is too old: {_dotted(OLDEST)} is the least"
    missing = missing_parts()
    if missing:
        return f"{', '.join(missing)} of the CUDA toolkit not found: {INSTALL}"
    return None


def cards() -> list[Card]:
    """The cards that a run would see, of which it takes the first; raises a UserError where there is none."""
    driver = load_driver()
    driver_version()
    _ask(driver, "cuInit", 0)
    count = _ask(driver, "cuDeviceGetCount")
    if not count:
        raise _no_card()
    return [_card(driver, index) for index in range(count)]


def driver_version() -> str:
    """The CUDA version that the driver is for, such as "13.2"; a UserError without one that knows the toolkit's."""
    driver = load_driver()
    version, major = _ask(driver, "cuDriverGetVersion"), driver.CUDA_VERSION // 1000
    dotted = f"{version // 1000}.{version % 1000 // 10}"
    if version // 1000 < major:
        other = f", or {install('cuda12')} in a new environment" if version // 1000 == 12 else ""
        raise UserError(
            f"the NVIDIA driver is for CUDA {dotted}, the installed packages are for CUDA {major}: update the driver "
            f"to {DRIVERS.get(major, 'a release')} or newer{other}"
        )
    return dotted


def free_memory(index: int) -> int:
    """Bytes of a card that nobody has taken."""
    driver = load_driver()
    handle = _ask(driver, "cuDeviceGet", index)
    _ask(driver, "cuCtxSetCurrent", _ask(driver, "cuDevicePrimaryCtxRetain", handle))
    try:
        return _ask(driver, "cuMemGetInfo")[0]
    finally:
        _ask(driver, "cuDevicePrimaryCtxRelease", handle)


def missing_parts() -> list[str]:
    """What numba-cuda compiles with and does not find."""
    from cuda import pathfinder

    found = {"libdevice": lambda: pathfinder.find_bitcode_lib("device")}
    found |= {name: lambda name=name: pathfinder.load_nvidia_dynamic_lib(name) for name in LIBRARIES}
    missing = []
    for name, find in found.items():
        try:
            find()
        except Exception:  # which one depends on the part, and on cuda-pathfinder's version
            missing.append(name)
    return missing


def load_driver():
    """The driver's functions; raises a UserError where the Python packages are missing. No driver is needed yet."""
    if find_spec("numba_cuda") is None:
        raise UserError(f"numba-cuda is not installed: {INSTALL}")
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UserError(f"cuda-bindings cannot be loaded ({error}): {INSTALL}") from error
    return driver


def _ask(driver, function: str, *args):
    """What a function of the driver answers: nothing, a value or a tuple of several."""
    try:
        error, *values = getattr(driver, function)(*args)
    except RuntimeError as error:  # there is no library, or the function is not in it
        major = driver.CUDA_VERSION // 1000
        release = DRIVERS.get(major, "a release")
        raise UserError(f"no NVIDIA driver found: install {release} or newer, for CUDA {major}") from error
    if error.name == "CUDA_ERROR_NO_DEVICE":
        raise _no_card()
    if error.name != "CUDA_SUCCESS":
        raise UserError(f"the NVIDIA driver answers {error.name} to {function}: see what nvidia-smi says of the card")
    return values[0] if len(values) == 1 else tuple(values)


def _no_card() -> UserError:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return UserError("there is no NVIDIA card" + ("" if shown is None else f" among CUDA_VISIBLE_DEVICES={shown!r}"))


def _card(driver, index: int) -> Card:
    handle = _ask(driver, "cuDeviceGet", index)
    attribute = driver.CUdevice_attribute
    return Card(
        name=_ask(driver, "cuDeviceGetName", 256, handle).split(b"\0")[0].decode(),
        capability=(
            _ask(driver, "cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle),
            _ask(driver, "cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle),
        ),
        memory=_ask(driver, "cuDeviceTotalMem", handle),
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
