"""A whole model in its arena, trained step by step: what the tests of the model and of the arena share."""

import math
from types import SimpleNamespace

import numpy as np

from llm_numba import model
from llm_numba.arena import Arena, parameter_specs, training_groups

NAMESPACE = ("parameters", "gradients", "activations", "activation gradients", "inputs", "scratch")


def new_run(ops, config, B, T, plan, more_groups=None, attention=None):
    """An arena for training, and what a step needs of it; attention keeps what it does under `plan`, unless told."""
    groups = training_groups(config, B, T, ops, attention or plan)
    arena = Arena(groups | (more_groups or {}), config, plan, ops)
    return SimpleNamespace(
        ops=ops,
        arena=arena,
        m=arena.namespace(*NAMESPACE),
        sets=model.parameter_sets(arena),
        gradients=arena.flat("gradients"),
        updates=0,
    )


def random_parameters(config, rng):
    """Values for every parameter, far larger than a fresh model's, such that activations stay around 1; wte (V, C)."""
    C, values = config.channels, {}
    for spec in parameter_specs(config):
        layers = (config.num_layers,) if spec.per_layer else ()
        shape = (config.vocab_size, C) if spec.name == "wte" else spec.shape
        x = rng.standard_normal((*layers, *shape))
        if spec.name in ("wte", "wpe"):
            x *= 3 / math.sqrt(C)  # logits then deviate by 3
        elif len(shape) == 2:
            x /= math.sqrt(shape[1])
        else:
            x = 0.3 * x + spec.fill  # biases around 0, layernorm weights around 1
        values[spec.name] = x.astype(np.float32)
    return values


def random_batch(config, B, T, rng):
    """(tokens, targets), both (B, T)."""
    stream = rng.integers(0, config.vocab_size, (B, T + 1), dtype=np.int32)
    return stream[:, :-1], stream[:, 1:]


def set_parameters(arena, parameters):
    for name, values in parameters.items():
        tensor = arena.tensors["parameters", name]
        padded = np.zeros(tensor.shape, np.float32)
        padded[tuple(map(slice, values.shape))] = values
        arena.backend.to_device(tensor, padded)


def set_batch(run, batch):
    run.ops.to_device(run.m.tokens, batch[0])
    run.ops.to_device(run.m.targets, batch[1])


def compute_gradients(run, batches, ops=None):
    """The mean loss over the batches; the gradients are its gradient."""
    ops, loss = ops or run.ops, 0.0
    ops.zero(run.gradients)
    for batch in batches:
        set_batch(run, batch)
        model.forward(ops, run.m)
        dloss = 1.0 / (len(batches) * batch[0].size)
        loss += model.loss(ops, run.m, run.arena.config.vocab_size, dloss) / len(batches)
        model.backward(ops, run.m)
    return loss


def train_step(run, batch, learning_rate=1e-3, ops=None):
    """(loss, gradient norm) of a batch, and the update: clipped to a norm of 1, decay 0.1."""
    ops, m = ops or run.ops, run.m
    loss = compute_gradients(run, [batch], ops)
    ops.global_norm_squared(m.grad_norm_squared, run.gradients, m.scratch)
    norm = math.sqrt(ops.to_host(m.grad_norm_squared)[0])
    run.updates += 1
    ops.to_device(m.learning_rate, learning_rate)
    ops.to_device(m.step, run.updates)
    ops.to_device(m.grad_scale, min(1.0, 1.0 / norm))
    model.update(ops, m, run.sets, 0.9, 0.95, 1e-8, 0.1)
    return loss, norm


def copy_of(run, group):
    """The tensors of a group by name, copied to the host."""
    return {name: np.array(run.ops.to_host(x)) for name, x in run.arena.named(group).items()}


def bits_of(run, *groups):
    """The bytes of these groups' tensors."""
    return {(group, name): x.tobytes() for group in groups for name, x in copy_of(run, group).items()}
