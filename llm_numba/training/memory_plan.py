"""What a run puts into the arena, and how much memory that takes, reported before any is allocated."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from llm_numba.arena import DTYPES, RUN, Arena, Groups, TensorSpec, count, format_map, in_precision, layout
from llm_numba.models import Model
from llm_numba.ops import Ops
from llm_numba.training.generate import generation_groups, generation_step
from llm_numba.training.settings import Settings
from llm_numba.training.step import training_step
from llm_numba.util.cli import UserError
from llm_numba.util.files import format_bytes

LARGEST_BATCH = 1 << 16  # sequences, of the batch sizes that are proposed

Program = Callable[[Ops, Arena], None]


def training_groups(
    model: Model, B: int, T: int, master: bool = False, micro_batches: int = 1, recompute: str = "none"
) -> Groups:
    """All tensors of training but scratch, group by group. master: keep the parameters in float32 too."""
    parameters = model.parameters()
    exact = [spec._replace(dtype="float32") for spec in parameters]
    inputs = [
        # from the host in each step
        TensorSpec("batches", (micro_batches, 2, B, T), "int32"),  # tokens and targets
        TensorSpec("learning_rate", (1,), "float32"),
        TensorSpec("step", (1,), "int32"),
        TensorSpec("limits", (2,), "float64"),  # no update above this loss and this gradient norm
        # to the host in each step
        *(TensorSpec(name, (1,), "float64") for name in ("loss", "grad_norm_squared")),
        TensorSpec("grad_scale", (1,), "float32"),
        # neither
        *(TensorSpec(name, (B, T), "int32") for name in ("tokens", "targets")),
        TensorSpec("decays", (count(parameters, model.num_layers) // RUN,), "uint8"),
        TensorSpec("seed", (1,), "int32"),
    ]
    return {
        "parameters": parameters,
        "master": exact if master else [],
        "gradients": [spec._replace(name="d" + spec.name) for spec in exact],
        "m": exact,
        "v": exact,
        "activations": model.activations(B, T, recompute),
        "activation gradients": model.activation_gradients(B, T),
        "inputs": inputs,
    }


def complete(groups: Groups, model: Model, ops: Ops, dtype: str, *programs: Program) -> Groups:
    """The groups in the precision of the run, and the scratch that the ops of these programs need: the programs run
    once without memory, and every op only reports how much scratch it needs for its arguments' shapes."""
    needed = [0]

    def report(name, op):
        needs = getattr(ops, f"{name}_scratch", lambda *arguments: 0)
        return lambda *arguments: needed.append(needs(*(x for x in arguments if x is not scratch)))

    dry = ops.wrap(report).replace(
        allocate=lambda nbytes: None,
        view=lambda memory, offset, shape, dtype: np.broadcast_to(np.empty((), ops.storage_dtype(dtype)), shape),
        capture=lambda function: function,
    )
    groups = in_precision(groups, dtype)
    arena = Arena(groups | {"scratch": [TensorSpec("scratch", (0,), "float32")]}, model, "reuse", dry)
    scratch = arena.tensors["scratch", "scratch"]
    for program in programs:
        program(dry, arena)
    return groups | {"scratch": [TensorSpec("scratch", (max(needed),), "float32")]}


def plan_of(s: Settings) -> str:
    """Debug modes give every tensor its own memory."""
    return "keep" if s.check_finite or s.no_jit or s.interpret else "reuse"


def run_groups(s: Settings, model: Model, T: int, ops: Ops) -> Groups:
    """All that a training run puts into the arena."""
    master = s.dtype == "bf16" and not s.stochastic_rounding
    groups = training_groups(model, s.batch_size, T, master, 1, s.recompute) | generation_groups(model)

    def training(ops, arena):
        training_step(ops, arena.model, arena.training(s.recompute), s)

    # all micro-batches need the same scratch, so the dry run has one
    groups = complete(groups, model, ops, DTYPES[s.dtype], training, generation_step)
    batches, *rest = groups["inputs"]
    return groups | {"inputs": [batches._replace(shape=(micro_batches(s, T), *batches.shape[1:])), *rest]}


def micro_batches(s: Settings, T: int) -> int:
    """The micro-batches of a step."""
    return (s.tokens_per_step or s.batch_size * T) // (s.batch_size * T)


def print_plan(s: Settings, model: Model, ops: Ops) -> None:
    """Print the arena's map and what the machine has. Nothing is allocated. Errors: it does not fit."""
    T = s.sequence_length or model.max_seq_len
    groups = run_groups(s, model, T, ops)
    print(format_map(*layout(groups, model.num_layers, plan_of(s))))
    check_memory(groups, s, model, ops)
    largest = largest_batch(range(s.batch_size, LARGEST_BATCH), s, model, T, ops)
    free = format_bytes(ops.available_memory())
    print(f"available {ops.describe_device()}: {free}; it fits, and so would --batch-size {largest}")


def check_memory(groups: Groups, s: Settings, model: Model, ops: Ops) -> None:
    """Raise a UserError, with a setting that would fit, if the arena is larger than the available memory."""
    available, needed = ops.available_memory(), layout(groups, model.num_layers, plan_of(s))[1]
    if needed <= available:
        return
    T = s.sequence_length or model.max_seq_len
    flag, fits = f"--batch-size {s.batch_size}", largest_batch(range(1, s.batch_size), s, model, T, ops)
    if arena_bytes(replace(s, tokens_per_step=0), model, T, ops) <= available:
        flag, hint = f"--tokens-per-step {s.tokens_per_step}", "a step's tokens are kept in the arena; give fewer"
    elif fits:
        hint = f"--batch-size {fits} would fit"
    else:
        hint = f"no batch size fits: choose a smaller {'model' if s.init else '--preset'}"
    sizes = f"{format_bytes(needed)}, but {format_bytes(available)} of memory are available"
    raise UserError(f"{flag}: the arena needs {sizes}; {hint}")


def largest_batch(sizes: range, s: Settings, model: Model, T: int, ops: Ops) -> int:
    """The largest of these batch sizes whose arena fits into the available memory; one less than all if none does."""
    s, memory = replace(s, tokens_per_step=0), ops.available_memory()
    fitting = bisect_right(sizes, memory, key=lambda B: arena_bytes(replace(s, batch_size=B), model, T, ops))
    return sizes.start + fitting - 1


def arena_bytes(s: Settings, model: Model, T: int, ops: Ops) -> int:
    return layout(run_groups(s, model, T, ops), model.num_layers, plan_of(s))[1]
