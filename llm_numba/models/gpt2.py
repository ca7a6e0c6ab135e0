"""GPT-2, all of it: sizes and presets, tensors, and the ops of a training step in their order.

Nothing here knows which device it runs on, and nothing allocates memory: `ops` are the ops of one device, `m` is a
namespace of the arena's tensors (`Arena.namespace`), `m.layers` holds the same for each layer.
B, T, C, V, Vp: batch, time (sequence length), channels, vocabulary, padded vocabulary.
Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np

from llm_numba.arena import TensorSpec, padded
from llm_numba.util.cli import UserError
from llm_numba.util.normal import standard_normal


def logits_rows(rows: int) -> int:
    """How many of the rows (b, t) have their logits in memory at a time; those of all would be the largest tensor.

    A quarter, but at least 4096: each block of rows adds to the whole of dwte, which costs time.
    """
    return min(rows, max(4096, padded(-(-rows // 4))))


@dataclass(frozen=True)
class GPT2:
    """The sizes of a GPT-2, with llm.c's names, and everything that follows from them."""

    max_seq_len: int  # the context: the longest T
    vocab_size: int  # V
    num_layers: int  # L
    num_heads: int  # NH
    channels: int  # C

    name: ClassVar[str] = "gpt2"
    PRESETS: ClassVar[dict[str, "GPT2"]] = {}  # the end of the file fills in these three
    huggingface: ClassVar[SimpleNamespace]
    llmc: ClassVar[SimpleNamespace]
    vocab_parameters: ClassVar[set[str]] = {"wte"}  # a row for each token: Vp rows here, V to any number in files

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        if self.channels % self.num_heads:
            raise UserError(f"channels ({self.channels}) must be a multiple of num_heads ({self.num_heads})")

    @property
    def padded_vocab_size(self) -> int:
        """Vp: V rounded up to a multiple of 128, which keeps the rows of the logits aligned."""
        return -(-self.vocab_size // 128) * 128

    def miniature(self, T: int) -> "GPT2":
        """A GPT-2 of one layer with a context of T tokens and few words: its step compiles the same code. The rows of
        its matrices are as long, because a GPU has kernels for several widths."""
        return replace(self, max_seq_len=T, vocab_size=257, num_layers=1)

    def flops_per_token(self, T: int) -> float:
        """Forward and backward: 6 per matmul weight, and attention's two products over half of T x T."""
        L, C = self.num_layers, self.channels
        return 6.0 * (12 * L * C * C + self.padded_vocab_size * C) + 6.0 * L * C * T

    # -----------------------------------------------------------------------------------------------------------------
    # Tensors

    def parameters(self) -> list[TensorSpec]:
        """The parameters, in llm.c's order. The projections into the residual stream start smaller, because 2*L of
        them add up in it (Radford et al. 2019, section 2.3)."""
        C, residual_std = self.channels, 0.02 / math.sqrt(2 * self.num_layers)
        return [
            TensorSpec("wte", (self.padded_vocab_size, C), std=0.02, decays=True),
            TensorSpec("wpe", (self.max_seq_len, C), std=0.02, decays=True),
            TensorSpec("ln1w", (C,), fill=1, per_layer=True),
            TensorSpec("ln1b", (C,), per_layer=True),
            TensorSpec("qkvw", (3 * C, C), std=0.02, decays=True, per_layer=True),
            TensorSpec("qkvb", (3 * C,), per_layer=True),
            TensorSpec("attprojw", (C, C), std=residual_std, decays=True, per_layer=True),
            TensorSpec("attprojb", (C,), per_layer=True),
            TensorSpec("ln2w", (C,), fill=1, per_layer=True),
            TensorSpec("ln2b", (C,), per_layer=True),
            TensorSpec("fcw", (4 * C, C), std=0.02, decays=True, per_layer=True),
            TensorSpec("fcb", (4 * C,), per_layer=True),
            TensorSpec("fcprojw", (C, 4 * C), std=residual_std, decays=True, per_layer=True),
            TensorSpec("fcprojb", (C,), per_layer=True),
            TensorSpec("lnfw", (C,), fill=1),
            TensorSpec("lnfb", (C,)),
        ]

    def activations(self, B: int, T: int, recompute: str = "none") -> list[TensorSpec]:
        """What `forward` and `loss` write, in their order.

        recompute: what the backward pass computes again, so that all layers can share its memory.
        """
        C = self.channels
        norm, gelu = "norm" if "layernorm" in recompute else "", "gelu" if "gelu" in recompute else ""
        return [
            TensorSpec("encoded", (B, T, C)),
            TensorSpec("ln1", (B, T, C), per_layer=True, shares=norm),
            TensorSpec("ln1_mean", (B, T), "float32", per_layer=True),
            TensorSpec("ln1_rstd", (B, T), "float32", per_layer=True),
            TensorSpec("qkv", (B, T, 3 * C), per_layer=True),
            TensorSpec("lse", (B, self.num_heads, T), "float32", per_layer=True),  # log-sum-exp of each query's scores
            TensorSpec("atty", (B, T, C), per_layer=True),
            TensorSpec("attproj", (B, T, C), per_layer=True, shares="branch"),
            TensorSpec("residual2", (B, T, C), per_layer=True),
            TensorSpec("ln2", (B, T, C), per_layer=True, shares=norm),
            TensorSpec("ln2_mean", (B, T), "float32", per_layer=True),
            TensorSpec("ln2_rstd", (B, T), "float32", per_layer=True),
            TensorSpec("fch", (B, T, 4 * C), per_layer=True),
            TensorSpec("fch_gelu", (B, T, 4 * C), per_layer=True, shares=gelu),
            TensorSpec("fcproj", (B, T, C), per_layer=True, shares="branch"),
            TensorSpec("residual3", (B, T, C), per_layer=True),
            TensorSpec("lnf", (B, T, C)),
            TensorSpec("lnf_mean", (B, T), "float32"),
            TensorSpec("lnf_rstd", (B, T), "float32"),
            TensorSpec("logits", (B, T, self.padded_vocab_size), rows=logits_rows(B * T)),
            TensorSpec("losses", (B, T), "float32"),
        ]

    def activation_gradients(self, B: int, T: int) -> list[TensorSpec]:
        """What `loss` and `backward` write, in their order. The gradient of the logits replaces the logits."""
        C = self.channels
        return [
            TensorSpec("dlnf", (B, T, C), shares="dbranch"),
            TensorSpec("dresidual3", (B, T, C), per_layer=True, shares="dstream"),
            TensorSpec("dfch", (B, T, 4 * C), per_layer=True, shares="dwide"),
            TensorSpec("dln2", (B, T, C), per_layer=True, shares="dbranch"),
            TensorSpec("dresidual2", (B, T, C), per_layer=True, shares="dstream"),
            TensorSpec("datty", (B, T, C), per_layer=True, shares="dbranch"),
            TensorSpec("dqkv", (B, T, 3 * C), per_layer=True, shares="dwide"),
            TensorSpec("dln1", (B, T, C), per_layer=True, shares="dbranch"),
            TensorSpec("dencoded", (B, T, C), shares="dstream"),
        ]

    def wire(self, m: SimpleNamespace) -> None:
        """Connect the layers: `inp` and `dinp` are the residual stream that enters a layer and its gradient; `next` is
        the LayerNorm that follows: out, mean, rstd, weight and bias of the next layer's ln1, or of lnf."""
        stream, dstream = m.encoded, getattr(m, "dencoded", None)
        parts = {"out": "", "mean": "_mean", "rstd": "_rstd", "weight": "w", "bias": "b"}
        for l, layer in enumerate(m.layers):
            layer.inp, layer.dinp = stream, dstream
            if hasattr(layer, "cache"):  # to generate text, attention saves keys and values instead of lse
                layer.lse = layer.cache
            stream, dstream = layer.residual3, getattr(layer, "dresidual3", None)
            owner, norm = (m.layers[l + 1], "ln1") if l + 1 < self.num_layers else (m, "lnf")
            layer.next = SimpleNamespace(**{part: getattr(owner, norm + end) for part, end in parts.items()})

    def initial_parameters(self, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        """(name, values) of every parameter at the start of training. Rows of wte that only pad the vocabulary are 0
        and stay 0."""
        rng = np.random.default_rng(seed)
        for spec in self.parameters():
            values = np.array(spec.fill, np.float32)
            if spec.std:
                values = standard_normal(rng, (self.num_layers, *spec.shape) if spec.per_layer else spec.shape)
                values *= np.float32(spec.std)
            if spec.name == "wte":
                values[self.vocab_size :] = 0
            yield spec.name, values

    # -----------------------------------------------------------------------------------------------------------------
    # A training step

    def forward(self, ops, m) -> None:
        """m.tokens (B, T) -> m.lnf (B, T, C), the input of `logits`. Without a comment a result is (B, T, C)."""
        NH, first = self.num_heads, m.layers[0]
        ops.encoder_forward(m.encoded, m.tokens, m.wte, m.wpe)
        ops.layernorm_forward(first.ln1, first.ln1_mean, first.ln1_rstd, m.encoded, first.ln1w, first.ln1b)
        for l in m.layers:
            ops.matmul_forward(l.qkv, l.ln1, l.qkvw, l.qkvb, m.scratch)  # (B, T, 3*C)
            ops.attention_forward(l.atty, l.lse, l.qkv, NH, NH, m.scratch)
            ops.matmul_forward(l.attproj, l.atty, l.attprojw, l.attprojb, m.scratch)
            ops.residual_layernorm_forward(l.residual2, l.ln2, l.ln2_mean, l.ln2_rstd, l.inp, l.attproj, l.ln2w, l.ln2b)
            ops.matmul_gelu_forward(l.fch_gelu, l.fch, l.ln2, l.fcw, l.fcb, m.scratch)  # (B, T, 4*C)
            ops.matmul_forward(l.fcproj, l.fch_gelu, l.fcprojw, l.fcprojb, m.scratch)
            n = l.next  # ln1 of the next layer, or lnf
            ops.residual_layernorm_forward(l.residual3, n.out, n.mean, n.rstd, l.residual2, l.fcproj, n.weight, n.bias)

    def logits(self, ops, m, rows) -> None:
        """rows.lnf (1, n, C) -> rows.logits (1, n, Vp); rows is one of m.blocks, or m itself."""
        ops.matmul_forward(rows.logits, rows.lnf, m.wte, None, m.scratch)

    def loss(self, ops, m, share: float = 1.0, write_dlogits: bool = True, accumulate: bool = False) -> None:
        """m.losses (B, T) = the loss of each target in m.targets, m.loss += share * their mean.

        If write_dlogits, also the backward of the last matmul: m.dlnf =, m.dwte = (+= if accumulate). It works on one
        block of rows at a time, so the logits of a whole batch need not exist.
        """
        for i, rows in enumerate(m.blocks):
            self.logits(ops, m, rows)
            dloss = share / m.tokens.size
            ops.fused_classifier(rows.logits, rows.losses, rows.targets, dloss, self.vocab_size, write_dlogits)
            if write_dlogits:
                add = accumulate or i > 0
                ops.matmul_backward(rows.dlnf, m.dwte, None, rows.logits, rows.lnf, m.wte, m.scratch, add)
        ops.add_mean(m.loss, m.losses, share)

    def backward(self, ops, m, accumulate: bool = False) -> None:
        """m.dlnf and m.dwte -> the gradient of every parameter. Read `forward` from its last line up.

        Gradients of parameters are written (=), or added (+=) if accumulate. `encoder_backward` always adds: to what
        `loss` left in m.dwte, and to m.dwpe.
        """
        NH, top, scratch, add = self.num_heads, m.layers[-1], m.scratch, accumulate
        if not add:
            ops.zero(m.dwpe)
        ops.zero(top.dresidual3)
        ops.layernorm_backward(top.dresidual3, m.dlnfw, m.dlnfb, m.dlnf, top.residual3, m.lnfw, m.lnf_mean, m.lnf_rstd,
                               scratch, add)  # fmt: skip
        for l in reversed(m.layers):
            if "gelu" in m.recompute:
                ops.gelu_forward(l.fch_gelu, l.fch)
            ops.gelu_matmul_backward(l.dfch, l.dfcprojw, l.dfcprojb, l.dresidual3, l.fch_gelu, l.fcprojw, l.fch,
                                     scratch, add)  # fmt: skip
            if "layernorm" in m.recompute:
                ops.layernorm_forward(l.ln2, l.ln2_mean, l.ln2_rstd, l.residual2, l.ln2w, l.ln2b)
            ops.matmul_backward(l.dln2, l.dfcw, l.dfcb, l.dfch, l.ln2, l.fcw, scratch, add)
            ops.residual_backward(l.dresidual2, l.dresidual3)
            ops.layernorm_backward(l.dresidual2, l.dln2w, l.dln2b, l.dln2, l.residual2, l.ln2w, l.ln2_mean, l.ln2_rstd,
                                   scratch, add)  # fmt: skip
            ops.matmul_backward(l.datty, l.dattprojw, l.dattprojb, l.dresidual2, l.atty, l.attprojw, scratch, add)
            ops.attention_backward(l.dqkv, l.datty, l.atty, l.lse, l.qkv, NH, NH, scratch)
            if "layernorm" in m.recompute:
                ops.layernorm_forward(l.ln1, l.ln1_mean, l.ln1_rstd, l.inp, l.ln1w, l.ln1b)
            ops.matmul_backward(l.dln1, l.dqkvw, l.dqkvb, l.dqkv, l.ln1, l.qkvw, scratch, add)
            ops.residual_backward(l.dinp, l.dresidual2)
            ops.layernorm_backward(l.dinp, l.dln1w, l.dln1b, l.dln1, l.inp, l.ln1w, l.ln1_mean, l.ln1_rstd,
                                   scratch, add)  # fmt: skip
        ops.encoder_backward(m.dwte, m.dwpe, m.dencoded, m.tokens, scratch)

    def update(self, ops, m, s) -> None:
        """One step of AdamW on every parameter, with the settings s, m.learning_rate, m.step and m.seed.

        The step is skipped if the loss or the norm of the gradients is not finite or above m.limits.
        """
        flat = m.flat
        ops.global_norm_squared(m.grad_norm_squared, flat.gradients, m.scratch)
        ops.clip(m.grad_scale, m.loss, m.grad_norm_squared, m.limits, s.grad_clip)
        ops.adamw_update(flat.parameters, flat.master, flat.gradients, flat.m, flat.v, m.decays, m.learning_rate,
                         s.beta1, s.beta2, s.eps, s.weight_decay, m.step, m.seed, m.grad_scale)  # fmt: skip

    # -----------------------------------------------------------------------------------------------------------------
    # Generating text

    def generation_cache(self) -> list[TensorSpec]:
        """The keys and values of earlier tokens."""
        return [TensorSpec("cache", (1, self.max_seq_len, 2, self.channels), per_layer=True)]

    def generation_activations(self, T: int) -> list[TensorSpec]:
        """What `next_logits` needs for T new tokens, beside parameters and cache; all layers share it."""
        activations = self.activations(1, T)
        return [
            *(s._replace(shares=f"{s.name} of {T}" if s.per_layer else "") for s in activations if s.name != "lse"),
            TensorSpec("tokens", (1, T), "int32"),
        ]

    def next_logits(self, ops, m) -> None:
        """m.logits (1, T, Vp) = the logits after each token of m.tokens, which stand at m.position and after it; the
        cache gets their keys and values.

        This is `forward` from a position on, with attention that reads the keys and values of earlier tokens from the
        cache.
        """

        def encoder(out, tokens, wte, wpe):
            ops.encoder_forward_at(out, tokens, wte, wpe, m.position)

        def attention(out, cache, qkv, num_heads, num_kv_heads, scratch):
            ops.attention_cached_forward(out, cache, qkv, m.position, num_heads, num_kv_heads)

        self.forward(ops.replace(encoder_forward=encoder, attention_forward=attention), m)
        self.logits(ops, m, m)


# ---------------------------------------------------------------------------------------------------------------------
# Presets, and GPT-2 in other programs' files

GPT2.PRESETS.update({
    #             context  V      L   NH  C
    "nano": GPT2(32, 257, 2, 2, 16),  # 12 thousand parameters: for stepping through
    "tiny": GPT2(128, 2048, 4, 3, 192),  # 2 million: the first run
    "d12": GPT2(1024, 50257, 12, 12, 768),  # 124 million: GPT-2 small
    "d24": GPT2(1024, 50257, 24, 16, 1024),  # 355 million: medium
    "d36": GPT2(1024, 50257, 36, 20, 1280),  # 774 million: large
    "d48": GPT2(1024, 50257, 48, 25, 1600),  # 1558 million: XL
})  # fmt: skip

# Hugging Face stores tensors per layer, and matrices as (in, out); ours are (out, in)
GPT2.huggingface = SimpleNamespace(
    architecture="GPT2LMHeadModel",
    sizes=dict(  # our fields -> keys of config.json
        max_seq_len="n_positions", vocab_size="vocab_size", num_layers="n_layer", num_heads="n_head", channels="n_embd",
    ),
    accepted=dict(  # values with which our model computes the same; the first is the default for a missing key
        model_type=("gpt2",), activation_function=("gelu_new", "gelu_pytorch_tanh"), layer_norm_epsilon=(1e-5,),
        scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,),
        tie_word_embeddings=(True,),
    ),
    accepted_for=lambda model: {"n_inner": (None, 4 * model.channels)},
    written=dict(n_inner=None, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    tensors=dict(
        wte="wte.weight", wpe="wpe.weight", lnfw="ln_f.weight", lnfb="ln_f.bias",
        ln1w="h.{}.ln_1.weight", ln1b="h.{}.ln_1.bias", ln2w="h.{}.ln_2.weight", ln2b="h.{}.ln_2.bias",
        qkvw="h.{}.attn.c_attn.weight", qkvb="h.{}.attn.c_attn.bias",
        attprojw="h.{}.attn.c_proj.weight", attprojb="h.{}.attn.c_proj.bias",
        fcw="h.{}.mlp.c_fc.weight", fcb="h.{}.mlp.c_fc.bias",
        fcprojw="h.{}.mlp.c_proj.weight", fcprojb="h.{}.mlp.c_proj.bias",
    ),
    transposed={"qkvw", "attprojw", "fcw", "fcprojw"},
    prefix="transformer.",  # of every tensor's name; may be missing
    ignored=re.compile(r"h\.\d+\.attn\.(masked_)?bias"),  # attention masks, which old versions saved
    tied={"lm_head.weight": "wte.weight"},  # may be saved twice
)  # fmt: skip

GPT2.llmc = SimpleNamespace(
    model=20240326, state=20240327,  # magic numbers
    sizes=("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels"),  # header[2:7]; header[7] is Vp
)  # fmt: skip
