"""A model that exists only here: an embedding, two ops, a loss. A template for a model of your own."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from llm_numba.arena import TensorSpec
from llm_numba.models.gpt2 import GPT2


@dataclass(frozen=True)
class Toy:
    """Predicts the next token from this one and its position: gelu(wte[token] + wpe[t]) times a matrix per layer."""

    max_seq_len: int
    vocab_size: int
    num_layers: int
    channels: int

    name: ClassVar[str] = "toy"
    PRESETS: ClassVar[dict[str, "Toy"]] = {}
    vocab_parameters: ClassVar[set[str]] = set()  # no padding of the vocabulary

    update = GPT2.update

    def parameters(self):
        C, V = self.channels, self.vocab_size
        return [
            TensorSpec("wte", (V, C), std=0.02, decays=True),
            TensorSpec("wpe", (self.max_seq_len, C), std=0.02),
            TensorSpec("w", (C, C), std=1 / math.sqrt(C), decays=True, per_layer=True),
            TensorSpec("head", (V, C), std=0.02, decays=True),
        ]

    def activations(self, B, T, recompute="none"):
        C = self.channels
        return [
            TensorSpec("encoded", (B, T, C)),
            TensorSpec("hidden", (B, T, C), per_layer=True),
            TensorSpec("active", (B, T, C), per_layer=True),
            TensorSpec("logits", (B, T, self.vocab_size)),
            TensorSpec("losses", (B, T), dtype="float32"),
        ]

    def activation_gradients(self, B, T):
        C = self.channels
        return [
            TensorSpec("dactive", (B, T, C), shares="dactive", per_layer=True),
            TensorSpec("dhidden", (B, T, C), shares="dhidden", per_layer=True),
            TensorSpec("dencoded", (B, T, C), shares="dactive"),
        ]

    def wire(self, m):
        inp, dinp = m.encoded, getattr(m, "dencoded", None)
        for l in m.layers:
            l.inp, l.dinp = inp, dinp
            inp, dinp = l.active, getattr(l, "dactive", None)

    def initial_parameters(self, seed):
        rng = np.random.default_rng(seed)
        for spec in self.parameters():
            layers = (self.num_layers,) if spec.per_layer else ()
            yield spec.name, rng.standard_normal((*layers, *spec.shape), np.float32) * np.float32(spec.std)

    def forward(self, ops, m):
        ops.encoder_forward(m.encoded, m.tokens, m.wte, m.wpe)
        for l in m.layers:
            ops.matmul_forward(l.hidden, l.inp, l.w, None, m.scratch)
            ops.gelu_forward(l.active, l.hidden)

    def loss(self, ops, m, share=1.0, write_dlogits=True, accumulate=False):
        top = m.layers[-1]
        ops.matmul_forward(m.logits, top.active, m.head, None, m.scratch)
        ops.fused_classifier(m.logits, m.losses, m.targets, share / m.tokens.size, self.vocab_size, write_dlogits)
        if write_dlogits:
            ops.matmul_backward(top.dactive, m.dhead, None, m.logits, top.active, m.head, m.scratch, accumulate)
        ops.add_mean(m.loss, m.losses, share)

    def backward(self, ops, m, accumulate=False):
        if not accumulate:
            ops.zero(m.dwte)
            ops.zero(m.dwpe)
        for l in reversed(m.layers):
            ops.gelu_backward(l.dhidden, l.hidden, l.dactive)
            ops.matmul_backward(l.dinp, l.dw, None, l.dhidden, l.inp, l.w, m.scratch, accumulate)
        ops.encoder_backward(m.dwte, m.dwpe, m.dencoded, m.tokens, m.scratch)

    def generation_cache(self):
        return []

    def generation_activations(self, T):
        return [
            *(s._replace(shares=f"{s.name} of {T}" if s.per_layer else "") for s in self.activations(1, T)),
            TensorSpec("tokens", (1, T), "int32"),
        ]

    def next_logits(self, ops, m):
        def encoder(out, tokens, wte, wpe):
            ops.encoder_forward_at(out, tokens, wte, wpe, m.position)

        self.forward(ops.replace(encoder_forward=encoder), m)
        ops.matmul_forward(m.logits, m.layers[-1].active, m.head, None, m.scratch)

    def flops_per_token(self, T):
        return 6.0 * (self.num_layers * self.channels**2 + self.vocab_size * self.channels)

    def miniature(self, T):
        return replace(self, max_seq_len=T, num_layers=1)


Toy.PRESETS["toy"] = Toy(max_seq_len=16, vocab_size=257, num_layers=2, channels=24)
