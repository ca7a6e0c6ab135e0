"""Benchmarks against the hardware limits and PyTorch: python -m llm_numba.bench --against torch"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import llvmlite.binding as llvm

from llm_numba.arena import DTYPES, layout
from llm_numba.bench import op_cases, races, tables
from llm_numba.bench.datasheets import datasheet_peak
from llm_numba.bench.machine import describe_machine, describe_versions
from llm_numba.bench.worker import Build, WorkerFailed, build_shim, require_torch, torch_worker
from llm_numba.cuda.gpu import gpus
from llm_numba.models import preset
from llm_numba.models.gpt2 import GPT2
from llm_numba.ops import DEVICES, choose_device, get_ops
from llm_numba.training.precompile import precompile
from llm_numba.training.settings import Settings
from llm_numba.util.cli import Parser, UserError
from llm_numba.util.files import format_bytes, write_whole

ROUNDS, QUICK_ROUNDS = 5, 2
SAMPLED_TOKENS = 64
DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
# on a GPU, the PyTorch builds compared with each --dtype: column -> Build
CUDNN = dict(attention="cudnn", modes=("compiled",))
GPU_BUILDS = {
    "fp32": {"torch": Build("cuda", "fp32"), "tf32": Build("cuda", "tf32")},
    "bf16": {
        "autocast": Build("cuda", "autocast"),
        "autocast+cudnn": Build("cuda", "autocast", **CUDNN),
        "bf16": Build("cuda", "bf16"),
        "bf16+cudnn": Build("cuda", "bf16", **CUDNN),
    },
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="llm-numba bench",
        description="Time every op, whole training steps and sampling, and compare them with the hardware limits and "
        "with PyTorch. Run it on an idle machine.",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: a CUDA GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision of llm_numba; bf16 needs a GPU")
    parser.add_argument("--against", choices=["torch"], help="also time PyTorch, interleaved with llm_numba")
    parser.add_argument("--preset", choices=GPT2.PRESETS, default="d12", help="the model (default: %(default)s)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="BxT",
        help="batch size and sequence length of the training steps; default, up to the preset's context: "
        + "; ".join(f"{d} {' '.join(f'{B}x{T}' for B, T in at.shapes)}" for d, at in op_cases.SIZES.items()),
    )
    parser.add_argument("--threads", type=int, default=0, help="on both sides (default: one per physical core)")
    parser.add_argument("--skip-ops", action="store_true", help="time only whole steps and sampling")
    parser.add_argument("--scaling", action="store_true", help="also time the first shape on 1, 2, 4, ... threads")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a d12 target is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement to this file")
    parser.add_argument(
        "--docs", action="store_true", help="update the tables of this device and dtype in docs/benchmarks.md"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    model, device = preset(args.preset), choose_device(args.device)
    if args.check and (args.preset != "d12" or device != "cpu"):
        raise UserError(
            f"--check: targets exist only for --preset d12 --device cpu, not {args.preset} on {device}; drop --check"
        )
    if args.scaling and device != "cpu":
        raise UserError(f"--scaling: times CPU threads, not {device}; drop it or use --device cpu")
    at = op_cases.SIZES[device]
    shapes = [parse_shape(text, model) for text in args.shapes or ()] or op_cases.shapes_within(at, model)
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: the folder {args.json.parent} does not exist; create it first")
    if args.docs:
        tables.split_at_marker(DOCS, marker(device, args.dtype))
    if args.against:
        require_torch("--against torch")
    ops = get_ops(device, args.dtype)
    from numba import config as numba_config  # after get_ops, which may enable the simulator
    from numba import get_num_threads

    if numba_config.DISABLE_JIT:
        raise UserError("NUMBA_DISABLE_JIT is set: the benchmark needs compiled ops; unset it")
    most = numba_config.NUMBA_NUM_THREADS
    if not 0 <= args.threads <= most:
        raise UserError(f"--threads {args.threads}: must be 0 to {most}, the number of cores available")
    if device == "cuda":
        numba_config.CUDA_DEALLOCS_COUNT = 0  # free memory at once, for the next case and for PyTorch
    for B, T in shapes:
        check_memory(ops, model, B, T, args.dtype)

    ops.set_threads(args.threads)
    seconds = precompile(ops, model, Settings(preset=args.preset, dtype=args.dtype, device=device))
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    results = new_results(args.preset, get_num_threads(), device, args.dtype)
    races.measure_machine(ops, results)
    results["machine"] = describe_machine(device, results["threads"], ops)
    if device == "cuda":
        results["datasheet"] = datasheet_peak(gpus()[0].name, args.dtype)
    print(f"{results['machine']}; ops ready in {seconds:.1f} s", file=sys.stderr)
    with torch_builds(bool(args.against), results) as builds:
        if not args.skip_ops:
            races.run_ops(ops, model, op_cases.op_list(model, at), rounds, builds, results)
        for B, T in shapes:
            races.run_step(ops, model, B, T, rounds, builds, results)
        races.run_sampling(ops, model, min(SAMPLED_TOKENS, model.max_seq_len), rounds, builds, results)
    if args.scaling:
        races.run_scaling(ops, model, *shapes[0], rounds, results)
    races.measure_machine(ops, results)
    return deliver(args, results)


def deliver(args: argparse.Namespace, results: dict) -> int:
    """Print the tables and write the requested files. Returns the exit status."""
    text = tables.report(results)
    print(text)
    if args.json:
        write_whole(args.json, json.dumps(results, indent=1).encode() + b"\n")
    if args.docs:
        tables.write_tables(DOCS, marker(results["device"], results["dtype"]), text)
    if not args.check:
        return 1 if results["wrong"] else 0
    found = tables.verdicts(results)
    print("", *tables.verdict_table(found), sep="\n")
    return 0 if all(verdict.met for verdict in found) and not results["wrong"] else 1


def marker(device: str, dtype: str) -> str:
    """The name of the section of docs/benchmarks.md that holds these tables."""
    return f"bench {device} {dtype}"


def parse_shape(text: str, model: GPT2) -> tuple[int, int]:
    """ "4x64" -> (4, 64)"""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise UserError(f"--shapes {text}: expected BATCHxTOKENS, for example 4x64")
    B, T = map(int, text.split("x"))
    if T > model.max_seq_len:
        raise UserError(f"--shapes {text}: {T} tokens exceed the model's context of {model.max_seq_len}; use fewer")
    return B, T


def check_memory(ops, model: GPT2, B: int, T: int, dtype: str) -> None:
    groups = races.step_groups(ops, model, B, T, dtype)
    _, needed = layout(groups, model.num_layers, "reuse")
    available = ops.available_memory()
    if needed > available:
        raise UserError(
            f"--shapes {B}x{T}: needs {format_bytes(needed)}, but only {format_bytes(available)} of memory are "
            "available; use a smaller shape"
        )


def new_results(name: str, threads: int, device: str, dtype: str) -> dict:
    """An empty record of results: settings, versions, and a place for every measurement."""
    return {
        "date": date.today().isoformat(),
        "preset": name,
        "threads": threads,
        "device": device,
        "dtype": dtype,
        "machine": "",
        "versions": describe_versions(device),
        "peak_flops": 0.0,
        "datasheet": 0.0,
        "bandwidth": {},
        "builds": [],
        "no_build": {},
        "rows": [],
        "breakdown": {},
        "wrong": [],
        "scaling": [],
    }


@contextmanager
def torch_builds(wanted: bool, results: dict) -> Iterator[dict[str, Build]]:
    """The PyTorch builds to time. Adds them to `results`, with the reason for each build that is unavailable."""
    if not wanted:
        yield {}
        return
    device = "cuda" if results["device"] == "cuda" else "cpu"
    try:
        with torch_worker(Build(device)) as ask:
            about = ask("start", threads=results["threads"], device=device, precision="fp32")
    except WorkerFailed as error:
        raise UserError(f"--against torch: PyTorch does not start ({error}); run: pip install torch") from error
    results["versions"] += f", torch {about['version']}"
    if results["device"] != "cpu":
        builds = {name: build._replace(device=device) for name, build in GPU_BUILDS[results["dtype"]].items()}
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
