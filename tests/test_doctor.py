"""What is reported about a GPU, or why there is none, with a fake driver; and the table of llm-numba doctor."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from programs import environment, error_line, run

from llm_numba import doctor
from llm_numba.cuda import gpu
from llm_numba.util.cli import UserError

MIB = 1 << 20
T4 = ("Tesla T4", (7, 5), 15 << 30)
A100 = ("NVIDIA A100-SXM4-40GB", (8, 0), 40 << 30)
P100 = ("Tesla P100", (6, 0), 16 << 30)


class Driver:
    """The functions of cuda.bindings.driver that are called; `failing` return an error, `lacking` does not exist."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=0, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=1
    )

    def __init__(self, *cards, version=13020, toolkit=13000, failing=None, lacking=None):
        self.CUDA_VERSION, self.failing, self.lacking, self.contexts = toolkit, failing or {}, lacking, 0
        self.answers = {
            "cuDriverGetVersion": lambda: (version,),
            "cuInit": lambda flags: (),
            "cuDeviceGetCount": lambda: (len(cards),),
            "cuDeviceGet": lambda index: (f"handle of {index}",),
            "cuDeviceGetName": lambda length, handle: (cards[int(handle[-1])][0].encode().ljust(length, b"\0"),),
            "cuDeviceGetAttribute": lambda attribute, handle: (cards[int(handle[-1])][1][attribute],),
            "cuDeviceTotalMem": lambda handle: (cards[int(handle[-1])][2],),
            "cuDevicePrimaryCtxRetain": lambda handle: (self.hold(1),),
            "cuDevicePrimaryCtxRelease": lambda handle: self.hold(-1) and (),
            "cuCtxSetCurrent": lambda context: (),
            "cuMemGetInfo": lambda: (3 * MIB, 4 * MIB),
        }

    def hold(self, change):
        self.contexts += change
        return ("context",)

    def __getattr__(self, function):
        def answer(*args):
            if self.lacking in (function, "all"):
                raise RuntimeError(f"{function} not found")
            if function in self.failing:
                return (SimpleNamespace(name=self.failing[function]), None)
            return (SimpleNamespace(name="CUDA_SUCCESS"), *self.answers[function](*args))

        return answer


@pytest.fixture
def machine(monkeypatch):
    """A function that gives this machine a driver, GPUs and the whole toolkit."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu, "missing_parts", lambda: [])

    def has(*cards, **options):
        driver = Driver(*cards, **options)
        monkeypatch.setattr(gpu, "load_driver", lambda: driver)
        return driver

    return has


def test_gpus_are_listed_with_their_properties(machine):
    machine(A100, T4)
    assert gpu.gpus() == [gpu.Gpu(*A100), gpu.Gpu(*T4)]
    assert [one.has_bf16 for one in gpu.gpus()] == [True, False]
    assert str(gpu.gpus()[1]) == "Tesla T4 (compute capability 7.5)"
    assert gpu.driver_version() == "13.2"


@pytest.mark.parametrize("dtype, cards", [("fp32", [T4]), ("fp32", [A100, P100]), ("bf16", [A100, T4])])
def test_a_supported_gpu_is_no_obstacle(machine, dtype, cards):
    machine(*cards)
    gpu.check_gpu(dtype)
    assert gpu.available() and gpu.obstacle() is None


@pytest.mark.parametrize(
    "cards, options, reason",
    [
        ([], dict(lacking="all"), "no NVIDIA driver found: install R580 or newer, for CUDA 13"),
        ([], dict(lacking="all", toolkit=12090), "no NVIDIA driver found: install R525 or newer, for CUDA 12"),
        ([T4], dict(lacking="cuDeviceGet"), "no NVIDIA driver found: install R580 or newer, for CUDA 13"),
        (
            [T4],
            dict(version=12080),
            "the NVIDIA driver is for CUDA 12.8, the installed packages are for CUDA 13: update the driver to R580 or "
            'newer, or pip install -e ".[cuda12]" in a new environment',
        ),
        (
            [T4],
            dict(version=11040, toolkit=12090),
            "the NVIDIA driver is for CUDA 11.4, the installed packages are for CUDA 12: update the driver to R525 or "
            "newer",
        ),
        ([], {}, "no NVIDIA GPU found"),
        ([], dict(failing={"cuInit": "CUDA_ERROR_NO_DEVICE"}), "no NVIDIA GPU found"),
        (
            [T4],
            dict(failing={"cuInit": "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"}),
            "the NVIDIA driver returned CUDA_ERROR_SYSTEM_DRIVER_MISMATCH from cuInit: check the GPU with nvidia-smi",
        ),
        ([P100, A100], {}, "Tesla P100 (compute capability 6.0) is too old: compute capability 7.5 or newer is needed"),
    ],
)
def test_an_obstacle_is_reported_in_one_line(machine, cards, options, reason):
    machine(*cards, **options)
    assert gpu.obstacle() == reason and not gpu.available()
    with pytest.raises(UserError) as refusal:
        gpu.check_gpu("fp32")
    assert str(refusal.value) == f"--device cuda: {reason}; or use --device cpu"


@pytest.mark.parametrize("version, toolkit", [(13000, 12090), (13000, 13050)])
def test_a_driver_supports_every_toolkit_up_to_its_major_version(machine, version, toolkit):
    machine(T4, version=version, toolkit=toolkit)
    assert gpu.available()


def test_hidden_gpus_differ_from_none(machine, monkeypatch):
    machine(failing={"cuInit": "CUDA_ERROR_NO_DEVICE"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.obstacle() == "no NVIDIA GPU found with CUDA_VISIBLE_DEVICES=''"


def test_bf16_needs_a_gpu_that_supports_it(machine):
    machine(T4, A100)
    with pytest.raises(UserError) as refusal:
        gpu.check_gpu("bf16")
    assert str(refusal.value) == (
        "--dtype bf16: Tesla T4 (compute capability 7.5) does not support bf16, which needs compute capability 8.0; "
        "use --dtype fp32"
    )


def test_an_incomplete_toolkit_is_an_obstacle(machine, monkeypatch):
    machine(A100)
    monkeypatch.setattr(gpu, "missing_parts", lambda: ["nvvm", "libdevice"])
    assert gpu.obstacle() == f"nvvm, libdevice of the CUDA toolkit not found: {gpu.INSTALL}"


def test_each_part_of_the_toolkit_is_looked_for(monkeypatch):
    from cuda import pathfinder

    def load(name):
        if name != "nvrtc":
            raise pathfinder.DynamicLibNotFoundError(name)

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", load)
    monkeypatch.setattr(pathfinder, "find_bitcode_lib", lambda name: name)
    assert gpu.missing_parts() == ["nvvm", "nvJitLink"]


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert gpu.obstacle() == f"numba-cuda is not installed: {gpu.INSTALL}"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert gpu.obstacle().startswith("cuda-bindings cannot be loaded (") and gpu.obstacle().endswith(gpu.INSTALL)


def test_free_memory_needs_a_context_that_is_released(machine):
    driver = machine(A100)
    assert gpu.free_memory(0) == 3 * MIB
    driver.failing["cuMemGetInfo"] = "CUDA_ERROR_UNKNOWN"
    with pytest.raises(UserError, match="CUDA_ERROR_UNKNOWN from cuMemGetInfo"):
        gpu.free_memory(0)
    assert driver.contexts == 0


def test_looking_for_a_gpu_does_not_load_numba():
    """Numba reads NUMBA_ENABLE_CUDASIM when it is loaded, which must come after --device is known."""
    program = "import sys; from llm_numba.cuda import gpu; gpu.available(); assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())


@pytest.mark.parametrize(
    "cards, runs",
    [
        ([A100, T4], "--device cpu, --device cuda --dtype bf16, --device cudasim"),
        ([T4], "--device cpu, --device cuda --dtype fp32, --device cudasim"),
        ([], "--device cpu, --device cudasim"),
    ],
)
def test_the_doctor_ends_with_the_devices_that_work(machine, cards, runs, monkeypatch, capsys):
    machine(*cards)
    monkeypatch.setattr(doctor, "run_op", lambda device: "runs")
    monkeypatch.setattr(doctor.variants, "explain", lambda: [("matmul", "fp32", "mma", "needs bf16")])
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert ("\n    matmul     fp32   mma: needs bf16\n" in printed) == bool(cards)
    assert f"\nworks here: {runs}\n" in printed
    assert printed.endswith("\n" if cards else "does not:   --device cuda: no NVIDIA GPU found\n")
    rows = [line for line in printed.splitlines() if line.startswith("  GPU ")]
    assert len(rows) == len(cards)
    for row, (name, capability, _) in zip(rows, cards, strict=True):
        assert name in row and "3 MiB free" in row
        assert ("no bf16" in row) == (capability < (8, 0))


def test_the_doctor_never_ends_in_a_traceback(machine, monkeypatch, capsys):
    """Whatever fails becomes a row of the table; the exit status is 1 if the CPU's ops fail."""
    machine(A100, failing={"cuMemGetInfo": "CUDA_ERROR_UNKNOWN"})

    def broken(*_):
        raise AttributeError("module 'numpy' has no attribute\n'row_stack'")

    for name in ("run_op", "processor", "cores", "memory"):
        monkeypatch.setattr(doctor, name, broken)
    monkeypatch.setattr(doctor, "version", lambda name: "1.0" if name == "numba-cuda" else broken())
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    told = "fails: AttributeError: module 'numpy' has no attribute 'row_stack'"
    for row in ("numba", "processor", "cores", "memory", "ops", "numba.cuda", "simulator"):
        assert f"  {row:<14} {told}\n" in printed
    assert "CUDA_ERROR_UNKNOWN from cuMemGetInfo" in printed
    assert printed.endswith("works here: nothing\ndoes not:   --device cuda: numba.cuda does not load\n")
    monkeypatch.setattr(gpu, "load_driver", broken)
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.endswith(f"does not:   --device cuda: {told}\n")


def test_an_op_that_crashes_its_process_is_a_row(monkeypatch):
    monkeypatch.setattr(doctor.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="an op fails: ended with status 1"):
        doctor.run_op("cpu")
    monkeypatch.undo()
    monkeypatch.setenv("NUMBA_THREADING_LAYER", "none such")
    with pytest.raises(UserError, match="an op fails: .*none such"):
        doctor.run_op("cpu")


HIDDEN = """
import importlib.util, sys
hidden, find = {modules}, importlib.util.find_spec

class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

importlib.util.find_spec = lambda name, *more: None if name in hidden else find(name, *more)
sys.meta_path.insert(0, Hidden)
from llm_numba.__main__ import main
main()
"""


def without(modules, *arguments, cwd):
    """`llm-numba ARGUMENTS` where these modules are not installed."""
    command = [sys.executable, "-c", HIDDEN.format(modules=modules), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(PYTHONWARNINGS="ignore"), cwd=cwd)


@pytest.mark.faults
def test_a_plain_installation(tmp_path):
    """Without any extra: the doctor reports what is missing, and an exercise is not blamed for it."""
    missing = {"numba_cuda", "huggingface_hub", "jupytext", "wandb"}
    done = without(missing, "doctor", cwd=tmp_path)
    rows = dict(line.strip().split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  "))
    assert rows["numba-cuda"] == f"numba-cuda is not installed: {gpu.INSTALL}"
    assert "huggingface_hub" in rows["download"] and 'pip install -e ".[download]"' in rows["download"]
    assert "jupytext" in rows["lessons"] and "numba_cuda" in rows["lessons"] and '".[lessons]"' in rows["lessons"]
    assert rows["wandb"] == 'wandb not installed: pip install -e ".[wandb]"'

    done = without(missing, "lessons", "check", "layernorm_mean", cwd=tmp_path)
    assert "numba-cuda, which is not installed" in error_line(done.returncode, done.stderr) and done.stdout == ""


def test_this_machine(tmp_path):
    done = run("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "works here: --device cpu" in done.stdout and "--device cudasim" in done.stdout
    assert "thread layer" in done.stdout and "fails" not in done.stdout
