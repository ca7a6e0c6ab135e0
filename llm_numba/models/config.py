"""The sizes of a GPT-2, and the presets by name."""

from dataclasses import asdict, dataclass, replace

from llm_numba.util.cli import UserError


@dataclass(frozen=True)
class GPT2Config:
    """The sizes from which every tensor's shape follows; the names are llm.c's."""

    max_seq_len: int  # the context: the longest T
    vocab_size: int  # V
    num_layers: int  # L
    num_heads: int  # NH
    channels: int  # C

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        if self.channels % self.num_heads:
            raise UserError(f"channels ({self.channels}) must be a multiple of num_heads ({self.num_heads})")

    @property
    def padded_vocab_size(self) -> int:
        """Vp: V rounded up to a multiple of 128, so that the classifier's rows stay aligned."""
        return -(-self.vocab_size // 128) * 128

    @property
    def head_size(self) -> int:
        """HS: the channels of one attention head."""
        return self.channels // self.num_heads


PRESETS = {  #              context  vocabulary  L   NH  C
    "nano": GPT2Config(32, 257, 2, 2, 16),  # 12 thousand parameters: for stepping through
    "tiny": GPT2Config(128, 2048, 4, 3, 192),  # 2 million: the first run
    "d12": GPT2Config(1024, 50257, 12, 12, 768),  # 124 million: GPT-2 small
    "d24": GPT2Config(1024, 50257, 24, 16, 1024),  # 355 million: medium
    "d36": GPT2Config(1024, 50257, 36, 20, 1280),  # 774 million: large
    "d48": GPT2Config(1024, 50257, 48, 25, 1600),  # 1558 million: XL
}


def preset(name: str, **changes: int) -> GPT2Config:
    """The preset called `name`, with other sizes where `changes` says so."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)
