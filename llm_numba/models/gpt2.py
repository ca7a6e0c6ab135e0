"""GPT-2: the forward pass, the loss, the backward pass and the update, as calls of ops in their order.

`ops` are the functions of one device, `m` the arena's tensors by name (`Arena.namespace`), `m.layers` the same for each
layer. Nothing here knows which device it is on, and nothing is allocated. B, T, C, Vp: batch, time, channels, padded
vocabulary. Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import numpy as np

from llm_numba.arena import Arena, parameter_specs


def initialise(ops, arena: Arena, seed: int) -> None:
    """parameters = GPT-2's random start; the rows of wte that only pad the vocabulary are 0 and stay so."""
    rng = np.random.default_rng(seed)
    for spec in parameter_specs(arena.config):
        values = np.float32(spec.fill)
        if spec.std:
            values = rng.standard_normal(arena.tensors["parameters", spec.name].shape, np.float32)
            values *= np.float32(spec.std)
            if spec.name == "wte":
                values[arena.config.vocab_size :] = 0
        set_parameter(ops, arena, spec.name, values)


def set_parameter(ops, arena: Arena, name: str, values) -> None:
    """A parameter = values, in every precision in which the arena keeps it."""
    for group in "parameters", "master":
        if (group, name) in arena.tensors:
            ops.to_device(arena.tensors[group, name], values)


def exact_parameters(arena: Arena) -> dict:
    """The parameters by name, as precise as the arena has them."""
    return arena.named("master") or arena.named("parameters")


def forward(ops, m):
    """m.tokens (B, T) -> m.lnf (B, T, C), from which `logits` follow."""
    first = m.layers[0]
    ops.encoder_forward(m.encoded, m.tokens, m.wte, m.wpe)  # (B, T, C)
    ops.layernorm_forward(first.ln1, first.ln1_mean, first.ln1_rstd, m.encoded, first.ln1w, first.ln1b)  # (B, T, C)
    for l in m.layers:
        ops.matmul_forward(l.qkv, l.ln1, l.qkvw, l.qkvb, m.scratch)  # (B, T, 3*C)
        ops.attention_forward(l.atty, l.lse, l.qkv, m.num_heads, m.num_heads, m.scratch)  # (B, T, C)
        ops.matmul_forward(l.attproj, l.atty, l.attprojw, l.attprojb, m.scratch)  # (B, T, C)
        ops.residual_layernorm_forward(
            l.residual2, l.ln2, l.ln2_mean, l.ln2_rstd, l.inp, l.attproj, l.ln2w, l.ln2b
        )  # both (B, T, C)
        ops.matmul_forward(l.fch, l.ln2, l.fcw, l.fcb, m.scratch)  # (B, T, 4*C)
        ops.gelu_forward(l.fch_gelu, l.fch)  # (B, T, 4*C)
        ops.matmul_forward(l.fcproj, l.fch_gelu, l.fcprojw, l.fcprojb, m.scratch)  # (B, T, C)
        next = l.next  # the LayerNorm that follows: the next layer's ln1, or lnf
        ops.residual_layernorm_forward(
            l.residual3, next.out, next.mean, next.rstd, l.residual2, l.fcproj, next.weight, next.bias
        )  # both (B, T, C)


def logits(ops, m, rows):
    """rows.lnf (1, n, C) -> rows.logits (1, n, Vp); rows are one of m.blocks, or m itself."""
    ops.matmul_forward(rows.logits, rows.lnf, m.wte, None, m.scratch)


def loss(ops, m, vocab_size, share=1.0, write_dlogits=True, accumulate=False):
    """m.losses (B, T) for m.targets, m.loss += share * their mean. Where write_dlogits, also the backward of the last
    matmul: m.dlnf, and m.dwte, to which it is added where accumulate.

    One block of rows after the other, so that the logits of a whole batch need not exist.
    """
    for number, rows in enumerate(m.blocks):
        logits(ops, m, rows)
        ops.fused_classifier(rows.logits, rows.losses, rows.targets, share / m.tokens.size, vocab_size, write_dlogits)
        if write_dlogits:
            more = accumulate or number > 0
            ops.matmul_backward(rows.dlnf, m.dwte, None, rows.logits, rows.lnf, m.wte, m.scratch, more)
    ops.add_mean(m.loss, m.losses, share)


def backward(ops, m, accumulate=False):
    """m.dlnf and m.dwte -> the gradient of every parameter. Read `forward` from its last line up.

    Where accumulate, parameters' gradients are added to what is there, else they are written; m.dwte and m.dwpe, to
    which the embedding hands its share, are always added to.
    """
    top = m.layers[-1]
    ops.zero(top.dresidual3)
    ops.layernorm_backward(
        top.dresidual3, m.dlnfw, m.dlnfb, m.dlnf, top.residual3, m.lnfw, m.lnf_mean, m.lnf_rstd, m.scratch, accumulate
    )
    for l in reversed(m.layers):
        if "gelu" in m.recompute:
            ops.gelu_forward(l.fch_gelu, l.fch)
        ops.matmul_backward(
            l.dfch_gelu, l.dfcprojw, l.dfcprojb, l.dresidual3, l.fch_gelu, l.fcprojw, m.scratch, accumulate
        )
        ops.gelu_backward(l.dfch, l.fch, l.dfch_gelu)
        if "layernorm" in m.recompute:
            ops.layernorm_forward(l.ln2, l.ln2_mean, l.ln2_rstd, l.residual2, l.ln2w, l.ln2b)
        ops.matmul_backward(l.dln2, l.dfcw, l.dfcb, l.dfch, l.ln2, l.fcw, m.scratch, accumulate)
        ops.residual_backward(l.dresidual2, l.dresidual3)
        ops.layernorm_backward(
            l.dresidual2, l.dln2w, l.dln2b, l.dln2, l.residual2, l.ln2w, l.ln2_mean, l.ln2_rstd, m.scratch, accumulate
        )
        ops.matmul_backward(l.datty, l.dattprojw, l.dattprojb, l.dresidual2, l.atty, l.attprojw, m.scratch, accumulate)
        ops.attention_backward(l.dqkv, l.datty, l.atty, l.lse, l.qkv, m.num_heads, m.num_heads, m.scratch)
        if "layernorm" in m.recompute:
            ops.layernorm_forward(l.ln1, l.ln1_mean, l.ln1_rstd, l.inp, l.ln1w, l.ln1b)
        ops.matmul_backward(l.dln1, l.dqkvw, l.dqkvb, l.dqkv, l.ln1, l.qkvw, m.scratch, accumulate)
        ops.residual_backward(l.dinp, l.dresidual2)
        ops.layernorm_backward(
            l.dinp, l.dln1w, l.dln1b, l.dln1, l.inp, l.ln1w, l.ln1_mean, l.ln1_rstd, m.scratch, accumulate
        )
    ops.encoder_backward(m.dwte, m.dwpe, m.dencoded, m.tokens)


def gradients(ops, m, vocab_size):
    """m.loss, the gradient of every parameter = those of the mean over all micro-batches."""
    ops.zero(m.loss)
    ops.zero(m.dwpe)
    for number, (tokens, targets) in enumerate(m.micro_batches):
        ops.copy(m.tokens, tokens)
        ops.copy(m.targets, targets)
        forward(ops, m)
        loss(ops, m, vocab_size, 1.0 / len(m.micro_batches), accumulate=number > 0)
        backward(ops, m, accumulate=number > 0)


def update(ops, m, s):
    """One step of AdamW on every parameter, with the settings s, m.learning_rate, m.step and m.seed; it is left out
    where the loss or the gradients' norm is not finite or above m.limits."""
    flat = m.flat
    ops.global_norm_squared(m.grad_norm_squared, flat.gradients, m.scratch)
    ops.clip(m.grad_scale, m.loss, m.grad_norm_squared, m.limits, s.grad_clip)
    ops.adamw_update(
        flat.parameters, flat.master, flat.gradients, flat.m, flat.v, m.decays,
        m.learning_rate, s.beta1, s.beta2, s.eps, s.weight_decay, m.step, m.seed, m.grad_scale,
    )  # fmt: skip
