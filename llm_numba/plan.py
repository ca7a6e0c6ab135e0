"""How much memory a run needs, said before it takes any."""

from bisect import bisect_right
from dataclasses import replace

from llm_numba import sample, settings
from llm_numba.arena import Groups, format_bytes, format_map, layout, training_groups
from llm_numba.config import GPT2Config, preset
from llm_numba.errors import UserError
from llm_numba.settings import Settings

VOCABULARIES = {"gpt2": 50257, "bytes": 257}


def plan_of(s: Settings) -> str:
    """Who looks inside gets every tensor in memory of its own."""
    return "keep" if s.check_finite or s.no_jit or s.interpret else "reuse"


def attention_of(s: Settings) -> str:
    """Who steps through attention sees all its weights; --check-finite computes what the run did, bit for bit."""
    return "keep" if s.no_jit or s.interpret else "reuse"


def all_groups(s: Settings, config: GPT2Config, T: int, ops) -> Groups:
    return training_groups(config, s.batch_size, T, ops, attention_of(s)) | sample.sampling_groups(config, ops)


def plan_memory(s: Settings, ops) -> None:
    """Print the arena's map and what the machine has; nothing is allocated."""
    kind = settings.tokenizer_kind(s)
    config = preset(s.preset, vocab_size=VOCABULARIES.get(kind) or s.vocab_size or preset(s.preset).vocab_size)
    groups = all_groups(s, config, s.sequence_length or config.max_seq_len, ops)
    print(format_map(*layout(groups, config.num_layers, plan_of(s))))
    check_memory(groups, s, config, ops)
    print(f"available on this machine: {format_bytes(ops.available_memory())}; it fits")


def check_memory(groups: Groups, s: Settings, config: GPT2Config, ops) -> None:
    """Raise a UserError, with a batch size that would fit, where the arena is larger than the memory available."""

    def bytes_of(groups):
        return layout(groups, config.num_layers, plan_of(s))[1]

    available, needed = ops.available_memory(), bytes_of(groups)
    if needed <= available:
        return
    T = s.sequence_length or config.max_seq_len
    fits = bisect_right(
        range(1, s.batch_size), available, key=lambda B: bytes_of(all_groups(replace(s, batch_size=B), config, T, ops))
    )
    hint = f"--batch-size {fits} would fit" if fits else "no batch size fits: choose a smaller --preset"
    raise UserError(
        f"--batch-size {s.batch_size}: the arena needs {format_bytes(needed)}, but {format_bytes(available)} of "
        f"memory are available; {hint}"
    )
