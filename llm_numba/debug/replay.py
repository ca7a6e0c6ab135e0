"""A step again that --check-finite stopped: python -m llm_numba.debug.replay RUN

The run folder's bad_step.safetensors has the parameters, the moments and the batches from before that step, so that it
can be run on any device, as plain Python too, without the data of the run.
"""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from llm_numba.arena import DTYPES, Arena
from llm_numba.ops import DEVICES, choose_device, get_ops
from llm_numba.train import restore, set_inputs, update
from llm_numba.training import settings
from llm_numba.training.checkpoint import load, sizes_of
from llm_numba.training.memory_plan import all_groups, check_memory, micro_batches
from llm_numba.training.nan_check import checked, kept
from llm_numba.util.cli import Parser, UserError, exit_with


def replay(path: Path, device: str, dtype: str | None, no_jit: bool) -> tuple[float, float]:
    """(loss, gradient norm) of the step that is kept at `path`. dtype: None for that of the run, if the device has it.

    Errors: UserError that names the first value that is not finite; a file that is no kept step.
    """
    tensors, record, _ = load(path)
    config = sizes_of(path, tensors, record)
    s = settings.from_record(record["settings"], path)
    dtype = dtype or ("fp32" if device == "cpu" else s.dtype)
    rounding = s.stochastic_rounding and dtype == "bf16"
    s = replace(
        s, device=device, dtype=dtype, stochastic_rounding=rounding, no_jit=no_jit, interpret=(), check_finite=True
    )
    settings.check(s)
    T = s.sequence_length or config.max_seq_len
    inputs = read_inputs(tensors, record, (micro_batches(s, T), 2, s.batch_size, T), config.vocab_size, path)

    ops = get_ops(device, dtype, no_jit=no_jit)
    ops.set_threads(0)
    groups = all_groups(s, config, T, ops)
    check_memory(groups, s, config, ops)
    arena = Arena(groups, config, "keep", ops)
    m = arena.training(s.recompute)
    state = SimpleNamespace(step=0)
    restore(ops, arena, state, (tensors, record, None))
    ops.to_device(m.seed, s.seed % 2**31)
    set_inputs(ops, m, inputs)
    update(checked(ops, m, arena, state), m, config.vocab_size, s)
    return float(ops.to_host(m.loss)[0]), math.sqrt(ops.to_host(m.grad_norm_squared)[0])


def read_inputs(tensors, record, shape: tuple, vocab_size: int, path: Path) -> dict:
    """The step's inputs. Errors: they are missing, or not those of a model with these sizes."""
    batches, numbers = tensors.get("batches"), record.get("inputs")
    whole = batches is not None and isinstance(numbers, dict) and numbers.keys() == {"learning_rate", "step", "limits"}
    if not whole or batches.shape != shape or batches.dtype != "int32":
        raise UserError(f"{path}: not a step that --check-finite kept, or damaged")
    if batches.min() < 0 or batches.max() >= vocab_size:
        raise UserError(f"{path}: has tokens beyond the vocabulary of {vocab_size}")
    return {"batches": batches, **numbers}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="llm-numba replay",
        description="Run the step again that train --check-finite stopped; name the first value that is not finite.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, or its bad_step.safetensors")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: a CUDA card, or else the CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of the run; the CPU has fp32 only")
    parser.add_argument("--no-jit", action="store_true", help="as plain Python, so that a debugger can step in")
    args = parser.parse_args(argv)
    path = kept(args.run) if args.run.is_dir() else args.run
    if not path.exists():
        raise UserError(f"{args.run}: no bad_step.safetensors there: train --check-finite keeps a step that it stops")
    loss, norm = replay(path, "cpu" if args.no_jit else choose_device(args.device), args.dtype, args.no_jit)
    print(f"every value of the step is finite here: loss {loss:.4f}, norm of the gradient {norm:.4f}")
    return 0


if __name__ == "__main__":
    exit_with(main)
