"""A whole model in its arena, trained step by step: what the tests of the model and of the arena share."""

import math
from types import SimpleNamespace

import numpy as np

from llm_numba.arena import Arena
from llm_numba.training import step
from llm_numba.training.generate import generation_step
from llm_numba.training.memory_plan import complete, training_groups
from llm_numba.training.step import set_parameter

SETTINGS = SimpleNamespace(grad_clip=1.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def groups_of(ops, model, B, T, more_groups=None, dtype="float32", recompute="none", **options):
    """The tensors of training, and more_groups, such as those of generating text."""
    groups = training_groups(model, B, T, recompute=recompute, **options) | (more_groups or {})

    def program(ops, arena):
        step.training_step(ops, model, arena.training(recompute), SETTINGS)
        if "cache" in groups:
            generation_step(ops, arena)

    return complete(groups, model, ops, dtype, program)


def new_run(ops, model, B, T, plan, more_groups=None, **options):
    """An arena for training, and what a step needs of it.

    options: micro_batches, master and recompute, as for training_groups, and dtype.
    """
    arena = Arena(groups_of(ops, model, B, T, more_groups, **options), model, plan, ops)
    m = arena.training(options.get("recompute", "none"))
    ops.to_device(m.limits, np.inf)
    return SimpleNamespace(ops=ops, model=model, arena=arena, m=m, updates=0)


def random_parameters(model, rng):
    """Values for every parameter, far larger than a fresh model's, such that activations stay around 1; wte (V, C)."""
    C, values = model.channels, {}
    for spec in model.parameters():
        layers = (model.num_layers,) if spec.per_layer else ()
        shape = (model.vocab_size, C) if spec.name == "wte" else spec.shape
        x = rng.standard_normal((*layers, *shape))
        if spec.name in ("wte", "wpe"):
            x *= 3 / math.sqrt(C)  # logits then deviate by 3
        elif len(shape) == 2:
            x /= math.sqrt(shape[1])
        else:
            x = 0.3 * x + spec.fill  # biases around 0, layernorm weights around 1
        values[spec.name] = x.astype(np.float32)
    return values


def random_batch(model, B, T, rng):
    """(tokens, targets), both (B, T)."""
    stream = rng.integers(0, model.vocab_size, (B, T + 1), dtype=np.int32)
    return stream[:, :-1], stream[:, 1:]


def set_parameters(arena, parameters):
    for name, values in parameters.items():
        padded = np.zeros(arena.tensors["parameters", name].shape, np.float32)
        padded[tuple(map(slice, values.shape))] = values
        set_parameter(arena.backend, arena, name, padded)


def set_batch(run, batch):
    run.ops.to_device(run.m.tokens, batch[0])
    run.ops.to_device(run.m.targets, batch[1])


def logits_of(run, batch):
    """(B, T, V)"""
    set_batch(run, batch)
    run.model.forward(run.ops, run.m)
    blocks = []
    for rows in run.m.blocks:
        run.model.logits(run.ops, run.m, rows)
        blocks.append(np.array(run.ops.to_host(rows.logits)).reshape(-1, run.model.padded_vocab_size))
    return np.concatenate(blocks).reshape(*batch[0].shape, -1)[..., : run.model.vocab_size]


def loss_of(run, batch):
    """The mean loss of a batch."""
    set_batch(run, batch)
    run.ops.zero(run.m.loss)
    run.model.forward(run.ops, run.m)
    run.model.loss(run.ops, run.m, write_dlogits=False)
    return float(run.ops.to_host(run.m.loss)[0])


def compute_gradients(run, batches, ops=None):
    """The mean loss over the batches, as many as the run has micro-batches; the gradients are its gradient."""
    ops = ops or run.ops
    ops.to_device(run.m.batches, np.array(batches))
    step.gradients(ops, run.model, run.m)
    return float(ops.to_host(run.m.loss)[0])


def train_step(run, batch, learning_rate=1e-3, ops=None):
    """(loss, gradient norm) of a batch, and the update: clipped to a norm of 1, decay 0.1."""
    ops, m = ops or run.ops, run.m
    run.updates += 1
    ops.to_device(m.learning_rate, learning_rate)
    ops.to_device(m.step, run.updates)
    loss = compute_gradients(run, [batch], ops)
    run.model.update(ops, m, SETTINGS)
    return loss, math.sqrt(ops.to_host(m.grad_norm_squared)[0])


def copy_of(run, group):
    """The tensors of a group by name, copied to the host."""
    return {name: np.array(run.ops.to_host(x)) for name, x in run.arena.named(group).items()}


def bits_of(run, *groups):
    """The bytes of these groups' tensors."""
    return {(group, name): x.tobytes() for group in groups for name, x in copy_of(run, group).items()}
