"""How much memory a run needs, said before it takes any."""

from bisect import bisect_right
from dataclasses import replace

from llm_numba import sample
from llm_numba.arena import DTYPES, Groups, format_map, layout, training_groups
from llm_numba.models.config import GPT2Config
from llm_numba.training.settings import Settings
from llm_numba.util.cli import UserError
from llm_numba.util.files import format_bytes

MOST_SEQUENCES = 1 << 16  # of a batch that is proposed


def plan_of(s: Settings) -> str:
    """Who looks inside gets every tensor in memory of its own."""
    return "keep" if s.check_finite or s.no_jit or s.interpret else "reuse"


def all_groups(s: Settings, config: GPT2Config, T: int, ops) -> Groups:
    """All that a run puts into the arena."""
    dtype = DTYPES[s.dtype]
    training = training_groups(
        config,
        s.batch_size,
        T,
        ops,
        dtype,
        master=s.dtype == "bf16" and not s.stochastic_rounding,
        micro_batches=micro_batches(s, T),
        recompute=s.recompute,
    )
    return training | sample.sampling_groups(config, ops, dtype)


def micro_batches(s: Settings, T: int) -> int:
    """How many of them make a step."""
    return (s.tokens_per_step or s.batch_size * T) // (s.batch_size * T)


def plan_memory(s: Settings, config: GPT2Config, ops) -> None:
    """Print the arena's map and what the machine has; nothing is allocated."""
    groups = all_groups(s, config, s.sequence_length or config.max_seq_len, ops)
    print(format_map(*layout(groups, config.num_layers, plan_of(s))))
    check_memory(groups, s, config, ops)
    T = s.sequence_length or config.max_seq_len
    most = largest_batch(range(s.batch_size, MOST_SEQUENCES), s, config, T, ops)
    free = format_bytes(ops.available_memory())
    print(f"available {ops.describe_device()}: {free}; it fits, and so would --batch-size {most}")


def check_memory(groups: Groups, s: Settings, config: GPT2Config, ops) -> None:
    """Raise a UserError, with a batch size that would fit, where the arena is larger than the memory available."""

    available, needed = ops.available_memory(), layout(groups, config.num_layers, plan_of(s))[1]
    if needed <= available:
        return
    fits = largest_batch(range(1, s.batch_size), s, config, s.sequence_length or config.max_seq_len, ops)
    smaller = "model" if s.init else "--preset"
    hint = f"--batch-size {fits} would fit" if fits else f"no batch size fits: choose a smaller {smaller}"
    raise UserError(
        f"--batch-size {s.batch_size}: the arena needs {format_bytes(needed)}, but {format_bytes(available)} of "
        f"memory are available; {hint}"
    )


def largest_batch(sizes: range, s: Settings, config: GPT2Config, T: int, ops) -> int:
    """The largest of these batch sizes whose arena fits into the memory available; one less than all if none does."""

    def bytes_of(B):
        return layout(all_groups(replace(s, batch_size=B), config, T, ops), config.num_layers, plan_of(s))[1]

    return sizes.start + bisect_right(sizes, ops.available_memory(), key=bytes_of) - 1
