"""Which NVIDIA GPUs there are, and what keeps a run from using one. Asks the driver, before anything is compiled.

Nothing here loads Numba, which reads NUMBA_ENABLE_CUDASIM when it is loaded.
"""

import os
import threading
from dataclasses import dataclass
from importlib.util import find_spec

from llm_numba.util.cli import UserError, install

OLDEST, OLDEST_WITH_BF16 = (7, 5), (8, 0)  # compute capabilities
DRIVERS = {12: "R525", 13: "R580"}  # the oldest driver for CUDA 12, for CUDA 13
LIBRARIES = ("nvvm", "nvrtc", "nvJitLink")  # of the CUDA toolkit, used by numba-cuda to compile
INSTALL = install("cuda")


@dataclass(frozen=True)
class Gpu:
    """memory: total bytes."""

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def has_bf16(self) -> bool:
        return self.capability >= OLDEST_WITH_BF16

    def __str__(self):
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def check_gpu(dtype: str) -> None:
    """Raise a UserError unless the first GPU can run in this dtype (fp32 or bf16)."""
    reason = obstacle()
    if reason:
        raise UserError(f"--device cuda: {reason}; or use --device cpu")
    gpu = gpus()[0]
    if dtype == "bf16" and not gpu.has_bf16:
        raise UserError(
            f"--dtype bf16: {gpu} does not support bf16, which needs compute capability {_dotted(OLDEST_WITH_BF16)}; "
            "use --dtype fp32"
        )


def begin_context() -> None:
    """Create the context of the first GPU in a thread, a few tenths of a second of work that Numba then finds done."""
    driver = load_driver()
    threading.Thread(target=driver.cuDevicePrimaryCtxRetain, args=(0,), daemon=True).start()


def available() -> bool:
    """Whether the first GPU can run in float32."""
    return obstacle() is None


def obstacle() -> str | None:
    """Why a run cannot use the first GPU and what to do about it, in one line; None if it can."""
    try:
        gpu = gpus()[0]
    except UserError as error:
        return str(error)
    if gpu.capability < OLDEST:
        return f"{gpu} is too old: compute capability {_dotted(OLDEST)} or newer is needed"
    missing = missing_parts()
    if missing:
        return f"{', '.join(missing)} of the CUDA toolkit not found: {INSTALL}"
    return None


def gpus() -> list[Gpu]:
    """The GPUs that a run can see; it uses the first. Errors: UserError if there is none."""
    driver = load_driver()
    driver_version()
    _ask(driver, "cuInit", 0)
    count = _ask(driver, "cuDeviceGetCount")
    if not count:
        raise _no_gpu()
    return [_gpu(driver, index) for index in range(count)]


def driver_version() -> str:
    """The CUDA version that the driver supports, such as "13.2". Errors: UserError if it is older than the toolkit."""
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
    """Bytes of a GPU's memory that no process has allocated."""
    driver = load_driver()
    handle = _ask(driver, "cuDeviceGet", index)
    _ask(driver, "cuCtxSetCurrent", _ask(driver, "cuDevicePrimaryCtxRetain", handle))
    try:
        return _ask(driver, "cuMemGetInfo")[0]
    finally:
        _ask(driver, "cuDevicePrimaryCtxRelease", handle)


def missing_parts() -> list[str]:
    """The parts of the CUDA toolkit that numba-cuda needs and does not find."""
    from cuda import pathfinder

    found = {"libdevice": lambda: pathfinder.find_bitcode_lib("device")}
    found |= {name: lambda name=name: pathfinder.load_nvidia_dynamic_lib(name) for name in LIBRARIES}
    missing = []
    for name, find in found.items():
        try:
            find()
        except Exception:  # the type depends on the part and on the version of cuda-pathfinder
            missing.append(name)
    return missing


def load_driver():
    """The Python binding of the driver, which works without a driver. Errors: UserError if packages are missing."""
    if find_spec("numba_cuda") is None:
        raise UserError(f"numba-cuda is not installed: {INSTALL}")
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UserError(f"cuda-bindings cannot be loaded ({error}): {INSTALL}") from error
    return driver


def _ask(driver, function: str, *args):
    """The result of a driver function: a value, or a tuple of none or several."""
    try:
        error, *values = getattr(driver, function)(*args)
    except RuntimeError as error:  # no library, or the function is not in it
        major = driver.CUDA_VERSION // 1000
        release = DRIVERS.get(major, "a release")
        raise UserError(f"no NVIDIA driver found: install {release} or newer, for CUDA {major}") from error
    if error.name == "CUDA_ERROR_NO_DEVICE":
        raise _no_gpu()
    if error.name != "CUDA_SUCCESS":
        raise UserError(f"the NVIDIA driver returned {error.name} from {function}: check the GPU with nvidia-smi")
    return values[0] if len(values) == 1 else tuple(values)


def _no_gpu() -> UserError:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return UserError("no NVIDIA GPU found" + ("" if shown is None else f" with CUDA_VISIBLE_DEVICES={shown!r}"))


def _gpu(driver, index: int) -> Gpu:
    handle = _ask(driver, "cuDeviceGet", index)
    attribute = driver.CUdevice_attribute
    return Gpu(
        name=_ask(driver, "cuDeviceGetName", 256, handle).split(b"\0")[0].decode(),
        capability=(
            _ask(driver, "cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle),
            _ask(driver, "cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle),
        ),
        memory=_ask(driver, "cuDeviceTotalMem", handle),
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
