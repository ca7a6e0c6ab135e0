"""How fast it is, against what the machine can do and against PyTorch: python -m llm_numba.bench --against torch"""

import argparse
import importlib.util
import json
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path

import llvmlite.binding as llvm

from llm_numba.arena import DTYPES, layout, training_groups
from llm_numba.bench import op_cases, races, tables
from llm_numba.bench.machine import describe_machine
from llm_numba.bench.worker import Build, WorkerFailed, build_shim, torch_worker
from llm_numba.models.config import PRESETS, GPT2Config, preset
from llm_numba.ops import DEVICES, choose_device, get_ops
from llm_numba.training.precompile import warm_up
from llm_numba.training.settings import Settings
from llm_numba.util.cli import Parser, UserError
from llm_numba.util.files import format_bytes, write_whole

ROUNDS, QUICK_ROUNDS = 5, 2
SAMPLED = 64  # tokens
SHAPES = {"cpu": ("4x64", "4x256", "4x1024"), "cuda": ("4x1024", "32x1024"), "cudasim": ("1x8",)}
# on a card, what of PyTorch is timed for a --dtype: its column, and its precision
PRECISIONS = {"fp32": {"torch": "fp32", "tf32": "tf32"}, "bf16": {"autocast": "autocast", "bf16": "bf16"}}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="llm-numba bench",
        description="Time each op, whole training steps and sampling, and compare them with what this machine can do "
        "and with PyTorch. Tables go to the screen; run it on a machine that does nothing else.",
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="where the ops run; auto: on a CUDA card where there is one"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of ours; bf16 needs a CUDA card")
    parser.add_argument("--against", choices=["torch"], help="time PyTorch too, in turn with ours")
    parser.add_argument("--preset", choices=PRESETS, default="d12", help="the model; default: %(default)s")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="BxT",
        help="; ".join(["of the steps; default", *(f"on {d}: {' '.join(shapes)}" for d, shapes in SHAPES.items())]),
    )
    parser.add_argument("--threads", type=int, default=0, help="on both sides; default: one for each physical core")
    parser.add_argument("--skip-ops", action="store_true", help="only whole steps and sampling")
    parser.add_argument("--scaling", action="store_true", help="also the first shape's step on 1, 2, 4, ... threads")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a target (those of d12) is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured, each single time")
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="write the tables into this file, between {} and {} for these and other devices and dtypes".format(
            *tables.markers("cpu", "fp32")
        ),
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    config, device = preset(args.preset), choose_device(args.device)
    if args.check and (args.preset != "d12" or device != "cpu"):
        raise UserError(
            f"--check: the targets are those of --preset d12 --device cpu, not of {args.preset} on {device}"
        )
    if args.scaling and device != "cpu":
        raise UserError("--scaling: is of a CPU's threads; leave it out, or use --device cpu")
    shapes = [parse_shape(text, config) for text in args.shapes or SHAPES[device]]
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}; make it first")
    if args.readme:
        tables.read_around(args.readme, *tables.markers(device, args.dtype))
    if args.against and importlib.util.find_spec("torch") is None:
        raise UserError("--against torch: PyTorch is not installed; install it with: pip install torch")
    ops = get_ops(device, args.dtype)
    from numba import config as numba_config  # loaded by now, with or without the simulator
    from numba import get_num_threads

    if numba_config.DISABLE_JIT:
        raise UserError("NUMBA_DISABLE_JIT is set, and plain Python has no speed to measure: unset it")
    most = numba_config.NUMBA_NUM_THREADS
    if not 0 <= args.threads <= most:
        raise UserError(f"--threads {args.threads}: must be 0 to {most}, the cores that this process may use")
    if device == "cuda":
        numba_config.CUDA_DEALLOCS_COUNT = 0  # what one case held is free for the next, and for PyTorch
    for B, T in shapes:
        check_memory(ops, config, B, T, args.dtype)

    ops.set_threads(args.threads)
    seconds = warm_up(ops, config, Settings(preset=args.preset, dtype=args.dtype))
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    results = new_results(args.preset, get_num_threads(), device, args.dtype)
    races.measure_machine(ops, results)
    results["machine"] = describe_machine(device, results["threads"], ops)
    print(f"{results['machine']}; ops ready in {seconds:.1f} s", file=sys.stderr)
    with torch_builds(bool(args.against), results) as builds:
        if not args.skip_ops:
            races.run_ops(ops, config, op_cases.op_list(config, op_cases.SIZES[device]), rounds, builds, results)
        for B, T in shapes:
            races.run_step(ops, config, B, T, rounds, builds, results)
        races.run_sampling(ops, config, min(SAMPLED, config.max_seq_len), rounds, builds, results)
    if args.scaling:
        races.run_scaling(ops, config, *shapes[0], rounds, results)
    races.measure_machine(ops, results)
    return deliver(args, results)


def deliver(args: argparse.Namespace, results: dict) -> int:
    """Print the tables and write the files asked for; returns the exit status."""
    text = tables.report(results)
    print(text)
    if args.json:
        write_whole(args.json, json.dumps(results, indent=1).encode() + b"\n")
    if args.readme:
        tables.write_readme(args.readme, *tables.markers(results["device"], results["dtype"]), text)
    if not args.check:
        return 1 if results["wrong"] else 0
    found = tables.verdicts(results)
    print("", *tables.verdict_table(found), sep="\n")
    return 0 if all(verdict.met for verdict in found) and not results["wrong"] else 1


def parse_shape(text: str, config: GPT2Config) -> tuple[int, int]:
    """ "4x64" -> (4, 64)"""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise UserError(f"--shapes {text}: expected BATCHxTOKENS, as in 4x64")
    B, T = map(int, text.split("x"))
    if T > config.max_seq_len:
        raise UserError(f"--shapes {text}: the model's context is {config.max_seq_len} tokens; give no more")
    return B, T


def check_memory(ops, config: GPT2Config, B: int, T: int, dtype: str) -> None:
    groups = training_groups(config, B, T, ops, DTYPES[dtype], master=dtype == "bf16")
    _, needed = layout(groups, config.num_layers, "reuse")
    available = ops.available_memory()
    if needed > available:
        raise UserError(
            f"--shapes {B}x{T}: our side alone needs {format_bytes(needed)}, but {format_bytes(available)} of memory "
            "are available; give a smaller shape"
        )


def new_results(name: str, threads: int, device: str, dtype: str) -> dict:
    """The settings and the versions, and room for what is measured."""
    packages = ["numba"] if device == "cpu" else ["numba", "numba-cuda"]
    return {
        "date": date.today().isoformat(),
        "preset": name,
        "threads": threads,
        "device": device,
        "dtype": dtype,
        "machine": "",
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]),
        "peak_flops": 0.0,
        "bandwidth": {},
        "builds": [],
        "no_build": {},
        "rows": [],
        "wrong": [],
        "scaling": [],
    }


@contextmanager
def torch_builds(wanted: bool, results: dict) -> Iterator[dict[str, Build]]:
    """The builds of PyTorch to time; results learn of them, and why one is absent."""
    if not wanted:
        yield {}
        return
    device = "cuda" if results["device"] == "cuda" else "cpu"
    try:
        with torch_worker(Build(device)) as ask:
            about = ask("start", threads=results["threads"], device=device, precision="fp32")
    except WorkerFailed as error:
        raise UserError(f"--against torch: PyTorch does not start ({error}); reinstall it") from error
    results["versions"] += f", torch {about['version']}"
    if results["device"] != "cpu":
        builds = {name: Build(device, precision) for name, precision in PRECISIONS[results["dtype"]].items()}
        results["builds"] = list(builds)
        yield builds
        return
    builds = {"torch": Build()}
    with tempfile.TemporaryDirectory() as folder:
        shim, why = build_shim(Path(folder), llvm.get_host_cpu_name(), llvm.get_host_cpu_features())
        if shim and about["mkl"]:
            builds["avx512"] = Build(preload=shim)
        else:
            results["no_build"]["avx512"] = why or "this PyTorch does not use MKL"
        results["builds"] = list(builds)
        yield builds
