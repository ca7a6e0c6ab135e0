"""Run the step again that --check-finite stopped: llm-numba replay RUN

The run folder's bad_step.safetensors holds the parameters, moments and batches that the step started from. It runs on
any device, also as plain Python, without the data of the run.
"""

import math
from dataclasses import replace
from pathlib import Path

from llm_numba.arena import DTYPES, Arena
from llm_numba.ops import choose_device, device_flags, get_ops
from llm_numba.training import settings
from llm_numba.training.checkpoint import Checkpoint, open_checkpoint
from llm_numba.training.memory_plan import check_memory, micro_batches, run_groups
from llm_numba.training.nan_check import bad_step_path, checked
from llm_numba.training.override import override
from llm_numba.training.step import training_step
from llm_numba.training.trainer import State, restore
from llm_numba.util.cli import Parser, UserError, exit_with


def replay(path: Path, device: str, dtype: str | None, no_jit: bool) -> tuple[float, float]:
    """(loss, gradient norm) of the step saved at `path`. dtype: None for that of the run, if the device has it.

    Errors: UserError that names the first value that is not finite; a file that is not a saved step.
    """
    stored = open_checkpoint(path)
    model, s = stored.model, stored.settings
    dtype = dtype or ("fp32" if device == "cpu" else s.dtype)
    s = replace(s, device=device, dtype=dtype, stochastic_rounding=s.stochastic_rounding and dtype == "bf16",
                no_jit=no_jit, interpret=(), check_finite=True)  # fmt: skip
    settings.check(s)
    T = s.sequence_length or model.max_seq_len
    inputs = read_inputs(stored, (micro_batches(s, T), 2, s.batch_size, T))

    production = get_ops(device, dtype, no_jit=no_jit, variant=s.variant)
    production.set_threads(0)
    ops = override(production, s.use)
    groups = run_groups(s, model, T, ops)
    check_memory(groups, s, model, ops)
    arena, state = Arena(groups, model, "keep", ops), State()
    m = arena.training(s.recompute)
    restore(ops, arena, state, stored.tensors, stored.record)
    ops.to_device(m.seed, s.seed % 2**31)
    for name, value in inputs.items():
        ops.to_device(getattr(m, name), value)
    training_step(checked(ops, production, m, arena, state), model, m, s)
    return float(ops.to_host(m.loss)[0]), math.sqrt(ops.to_host(m.grad_norm_squared)[0])


def read_inputs(stored: Checkpoint, shape: tuple) -> dict:
    """The step's inputs; shape: of its batches. Errors: they are missing, or do not fit the model's sizes."""
    batches, scalars = stored.tensors.get("batches"), stored.record.get("inputs")
    if not isinstance(scalars, dict) or scalars.keys() != {"learning_rate", "step", "limits"}:
        scalars = {}
    if not scalars or batches is None or batches.shape != shape or batches.dtype != "int32":
        raise UserError(f"{stored.path}: not a step that --check-finite saved, or damaged")
    if batches.min() < 0 or batches.max() >= stored.model.vocab_size:
        raise UserError(f"{stored.path}: holds tokens beyond the vocabulary of {stored.model.vocab_size}")
    return {"batches": batches, **scalars}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="llm-numba replay", description="Run the step again that train --check-finite stopped; name "
                    "the first value that is not finite.")  # fmt: skip
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, or its bad_step.safetensors")
    device_flags(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of the run; the CPU has fp32 only")
    parser.add_argument("--no-jit", action="store_true", help="run as plain Python, so that a debugger can step in")
    args = parser.parse_args(argv)
    path = bad_step_path(args.run) if args.run.is_dir() else args.run
    if not path.exists():
        raise UserError(f"{args.run}: no bad_step.safetensors there: train --check-finite saves a step that it stops")
    loss, norm = replay(path, "cpu" if args.no_jit else choose_device(args.device), args.dtype, args.no_jit)
    print(f"every value of the step is finite here: loss {loss:.4f}, norm of the gradients {norm:.4f}")
    return 0


if __name__ == "__main__":
    exit_with(main)
