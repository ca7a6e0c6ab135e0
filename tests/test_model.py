"""The model against GPT-2 in PyTorch: from golden files always, and live where PyTorch is installed.

Errors are measured as norms: |got - expected| / |expected| of a whole tensor, one layer of it where there are layers.
float32 rounds by 6e-8 (2**-24); what passes through some twenty ops, each of which rounds its sums, ends up a few times
that off. Measured are at most 4e-7 for the golden model, and 1.2e-6 for the wide and the long ones below.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from training import (
    bits_of,
    compute_gradients,
    copy_of,
    logits_of,
    loss_of,
    new_run,
    random_batch,
    random_parameters,
    set_parameters,
    train_step,
)

from llm_numba.arena import Arena
from llm_numba.models import gpt2
from llm_numba.models.gpt2 import GPT2
from llm_numba.ops import get_ops
from llm_numba.training.generate import Choice, generation_groups, generation_step, generator, stepper
from llm_numba.training.memory_plan import complete
from llm_numba.training.nan_check import without_graphs
from llm_numba.training.step import initialise

pytestmark = pytest.mark.compiled

GOLDEN = Path(__file__).parent / "golden" / "gpt2.safetensors"
PLANS = ["keep", "reuse"]


@pytest.fixture(scope="module")
def ops(device):
    """The device's ops as a run has them."""
    return get_ops(device)


@pytest.fixture(scope="module")
def torch_gpt2():
    torch = pytest.importorskip("torch", reason="a live comparison with PyTorch, which is not installed")
    torch.set_num_threads(2)
    import torch_gpt2

    return torch_gpt2


@pytest.fixture(scope="module")
def golden():
    """What golden/make_golden.py wrote: model, batch, and a dict each of parameters, gradients and so on."""
    with safe_open(GOLDEN, "numpy") as file:
        model = GPT2(**json.loads(file.metadata()["config"]))
    tensors = load_file(GOLDEN)

    def those(prefix):
        return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

    return SimpleNamespace(
        model=model,
        batch=(tensors["tokens"], tensors["targets"]),
        parameters=those("param."),
        gradients=those("grad."),
        after=those("after."),
        **{name: tensors[name] for name in ("logits", "loss", "losses", "norms")},
    )


def golden_run(ops, golden, plan="reuse"):
    run = new_run(ops, golden.model, *golden.batch[0].shape, plan)
    set_parameters(run.arena, golden.parameters)
    return run


def fresh_run(ops, model, B, T, plan="reuse", seed=1, **options):
    """A run with random parameters, and a batch; options: of new_run."""
    rng = np.random.default_rng(seed)
    run = new_run(ops, model, B, T, plan, **options)
    set_parameters(run.arena, random_parameters(model, rng))
    return run, random_batch(model, B, T, rng)


def error(got, expected):
    """|got - expected| / |expected|, infinite where one is NaN; equal is 0, also where both are zero."""
    difference = np.linalg.norm(np.subtract(got, expected, dtype=np.float64))
    if difference == 0:
        return 0.0
    relative = difference / np.linalg.norm(expected) if np.any(expected) else math.inf
    return math.inf if math.isnan(relative) else relative


def assert_near(got, expected, tolerance):
    """Every tensor of the dict `expected` is within the tolerance, layer by layer where its key ends in a layer."""
    errors = {key: error(got[key], expected[key]) for key in expected}
    wrong = {key: f"{e:.2g}" for key, e in errors.items() if not e <= tolerance}
    assert not wrong, f"off by more than {tolerance:g}: {wrong}"


def by_layer(model, tensors):
    """{name: tensor} -> {name or (name, layer): tensor of one layer}"""
    stacked, found = {spec.name for spec in model.parameters() if spec.per_layer}, {}
    for name, tensor in tensors.items():
        found |= {(name, l): tensor[l] for l in range(len(tensor))} if name in stacked else {name: tensor}
    return found


def parameter_gradients(run):
    """By the parameters' names, as PyTorch has them: after a check that nothing reached the padding rows of wte."""
    gradients = {name.removeprefix("d"): x for name, x in copy_of(run, "gradients").items()}
    V = run.model.vocab_size
    assert not gradients["wte"][V:].any(), "the vocabulary's padding got a gradient"
    return gradients | {"wte": gradients["wte"][:V]}


@pytest.mark.parametrize("plan", PLANS)
def test_golden_forward_and_backward(ops, golden, plan):
    run = golden_run(ops, golden, plan)
    assert error(logits_of(run, golden.batch), golden.logits) < 1e-6
    assert loss_of(run, golden.batch) == pytest.approx(golden.loss[0], rel=2e-7)
    assert compute_gradients(run, [golden.batch]) == pytest.approx(golden.loss[0], rel=2e-7)
    expected = by_layer(golden.model, golden.gradients)
    assert_near(by_layer(golden.model, parameter_gradients(run)), expected, 1e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_golden_training(ops, golden, plan):
    """Ten steps; the gradient's norm falls from 28 to 3, so that clipping to 1 weighs the steps' gradients anew."""
    run = golden_run(ops, golden, plan)
    losses, norms = zip(*[train_step(run, golden.batch) for _ in golden.losses], strict=True)
    assert losses == pytest.approx(golden.losses, rel=2e-7)
    assert norms == pytest.approx(golden.norms, rel=1e-6)

    # How far each parameter moved. AdamW divides by the gradient's own size: a single weight whose gradient happens to
    # be small, and so mostly rounding, still moves. Most tensors are 1e-5 off, one is 5e-5. Decay alone moves the
    # matrices by 3e-2 of this, and where it must not, the layernorms' weights by 2e-1.
    model, C = golden.model, golden.model.channels
    after = copy_of(run, "parameters")
    assert not after["wte"][model.vocab_size :].any(), "the vocabulary's padding moved"
    after["wte"] = after["wte"][: model.vocab_size]
    moved = {name: after[name] - start for name, start in golden.parameters.items()}
    expected = {name: golden.after[name] - start for name, start in golden.parameters.items()}
    # The bias of the keys adds the same to all scores of a query, which the softmax takes off again. Its gradient is 0,
    # and nothing but rounding in float32: it walks at random, without any effect on the loss.
    keys = slice(C, 2 * C)
    assert np.abs(golden.gradients["qkvb"][:, keys]).max() < 1e-12
    for values in (moved, expected):
        values["qkvb"][:, keys] = 0
    assert_near(by_layer(model, moved), by_layer(model, expected), 3e-4)


def test_golden_file_is_what_its_script_writes(torch_gpt2):
    """Within what another processor's float64 may round differently on the way to a float32."""
    from golden import make_golden

    made, stored = make_golden.make(), load_file(GOLDEN)
    assert made.keys() == stored.keys()
    for name, x in made.items():
        assert (x.shape, x.dtype) == (stored[name].shape, stored[name].dtype)
        exact = x.dtype == np.int32 or name.startswith("param.")
        # a gradient that is 0 but for rounding has no digits in common with itself: the keys' bias, see above
        np.testing.assert_allclose(stored[name], x, rtol=0 if exact else 2e-7, atol=0 if exact else 1e-12, err_msg=name)


SHAPES = [  # L, NH, C, maxT, V, B, T
    (2, 3, 3, 5, 7, 2, 5),  # heads of one channel
    (2, 5, 15, 97, 257, 1, 97),
    (3, 5, 35, 4, 128, 3, 1),  # one token: attention has nothing to choose
    (1, 7, 7, 33, 3, 5, 33),
    (2, 2, 130, 70, 129, 1, 70),  # heads of 65 channels, one more than a register tile has columns
    (1, 12, 768, 1024, 50257, 1, 64),  # d12's width and vocabulary
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_torch(ops, torch_gpt2, shape):
    """All that a pass each way leaves behind: activations, their gradients, the parameters' gradients, the loss."""
    L, NH, C, maxT, V, B, T = shape
    model = GPT2(maxT, V, L, NH, C)
    run, batch = fresh_run(ops, model, B, T, "keep")
    expected = torch_gpt2.forward_backward(copy_without_padding(run), *batch, NH)

    def view(name, layer):
        tensor = getattr(run.m if layer is None else run.m.layers[layer], name)
        return ops.to_host(tensor)[..., :V] if name == "logits" else ops.to_host(tensor)

    # three channels of one row may lie close together, and what rounding did to them grows when they are normalised
    tolerance = 1e-5 if C == 3 else 3e-6
    logits, dlogits = expected.activations.pop(("logits", None)), expected.activation_gradients.pop(("logits", None))
    assert error(logits_of(run, batch), logits) < 1e-6
    assert compute_gradients(run, [batch]) == pytest.approx(expected.loss, rel=1e-6)
    assert error(view("logits", None), dlogits) < tolerance  # they are where the logits were
    assert not ops.to_host(run.m.logits)[..., V:].any()
    assert_near({key: view(*key) for key in expected.activations}, expected.activations, tolerance)
    assert_near(by_layer(model, parameter_gradients(run)), by_layer(model, expected.gradients), tolerance)
    assert {"d" + name for name, _ in expected.activation_gradients} == set(run.arena.named("activation gradients"))
    got = {(name, l): view("d" + name, l) for name, l in expected.activation_gradients}
    assert_near(got, expected.activation_gradients, tolerance)


def copy_without_padding(run):
    parameters = copy_of(run, "parameters")
    return parameters | {"wte": parameters["wte"][: run.model.vocab_size]}


def test_one_channel(ops, torch_gpt2):
    """A single channel is its own mean: a layernorm's output is its bias, and no gradient goes through it, beside what
    rounding leaves of a difference that is 0, times rstd = 1e-5**-0.5 = 316."""
    run, batch = fresh_run(ops, GPT2(3, 2, 1, 1, 1), 2, 3, "keep")
    expected = torch_gpt2.forward_backward(copy_without_padding(run), *batch, 1)
    assert compute_gradients(run, [batch]) == pytest.approx(expected.loss, rel=1e-6)
    for name, gradient in parameter_gradients(run).items():
        np.testing.assert_allclose(gradient, expected.gradients[name], rtol=1e-6, atol=316 * 1e-7, err_msg=name)
    assert np.abs(expected.gradients["lnfb"]) > 0.1


def test_one_of_everything(ops):
    """One token in the vocabulary: it is certain, and there is nothing to learn."""
    run, batch = fresh_run(ops, GPT2(1, 1, 1, 1, 1), 1, 1)
    assert compute_gradients(run, [batch]) == 0
    assert not any(gradient.any() for gradient in parameter_gradients(run).values())


MIDDLING = GPT2(33, 257, 3, 5, 35)


def test_the_plans_give_the_same_bits(ops):
    """Sharing memory changes no bit."""
    runs, results = [fresh_run(ops, MIDDLING, 3, 33, plan) for plan in PLANS], []
    assert runs[0][0].arena.nbytes > runs[1][0].arena.nbytes
    for run, batch in runs:
        steps = [train_step(run, batch) for _ in range(3)]
        results.append((steps, bits_of(run, "parameters", "gradients", "m", "v")))
    assert results[0] == results[1]


@pytest.mark.parametrize("recompute", ["gelu", "gelu+layernorm"])
def test_recomputing_saves_memory_and_changes_no_bit(ops, recompute):
    results, sizes = [], []
    for chosen in "none", recompute:
        run, batch = fresh_run(ops, MIDDLING, 3, 33, recompute=chosen)
        steps = [train_step(run, batch) for _ in range(2)]
        results.append((steps, bits_of(run, "parameters", "gradients", "m", "v")))
        sizes.append(run.arena.nbytes)
    assert results[0] == results[1]
    layers, row = MIDDLING.num_layers, 3 * 33 * MIDDLING.channels * 4
    shared = 4 * row + (2 * row if "layernorm" in recompute else 0)
    saved = layers * shared - (5 if "layernorm" in recompute else 4) * row  # each slot stays once
    assert sizes[0] - sizes[1] == pytest.approx(saved, abs=64 * 4 * 10)


def test_a_step_over_its_limit_is_left_out(ops):
    """The loss's, the norm's, or neither; a limit is what the host asks of the device before the step."""
    run, batch = fresh_run(ops, MIDDLING, 2, 5)
    loss, norm = train_step(run, batch)
    before = bits_of(run, "parameters", "m", "v")
    for limits in ([0.5 * loss, np.inf], [np.inf, 0.5 * norm], [np.nan, np.inf]):
        ops.to_device(run.m.limits, limits)
        train_step(run, batch)
        assert ops.to_host(run.m.grad_scale)[0] == -1
        assert bits_of(run, "parameters", "m", "v") == before
    ops.to_device(run.m.limits, [2 * loss, 2 * norm])
    train_step(run, batch)
    assert bits_of(run, "parameters", "m", "v") != before


@pytest.mark.compiled
@pytest.mark.parametrize("plan", PLANS)
def test_logits_a_block_of_rows_at_a_time(ops, plan, torch_gpt2, monkeypatch):
    """1200 rows, of whose logits there are 1024 at a time: all else is as PyTorch, which has them all, says."""
    B, T = 40, 30
    assert [gpt2.logits_rows(rows) for rows in (1, 4096, 4097, 1 << 15)] == [1, 4096, 4096, 1 << 13]
    monkeypatch.setattr(gpt2, "logits_rows", lambda _: 1024)
    run, batch = fresh_run(ops, MIDDLING, B, T, plan)
    assert [rows.logits.shape[1] for rows in run.m.blocks] == [1024, 176]
    assert run.m.logits.size == (1024 if plan == "reuse" else B * T) * MIDDLING.padded_vocab_size
    expected = torch_gpt2.forward_backward(copy_without_padding(run), *batch, MIDDLING.num_heads)
    assert error(logits_of(run, batch), expected.activations["logits", None]) < 1e-6
    assert loss_of(run, batch) == pytest.approx(expected.loss, rel=1e-6)
    assert compute_gradients(run, [batch]) == pytest.approx(expected.loss, rel=1e-6)
    gradients = by_layer(MIDDLING, parameter_gradients(run))
    assert_near(gradients, by_layer(MIDDLING, expected.gradients), 3e-6)


def test_micro_batches_add_up(ops):
    """Two halves of a batch, each with half the weight, give the gradient of the whole, summed in another order."""
    whole, (tokens, targets) = fresh_run(ops, MIDDLING, 4, 33)
    halves, _ = fresh_run(ops, MIDDLING, 2, 33, micro_batches=2)
    loss = compute_gradients(whole, [(tokens, targets)])
    assert compute_gradients(halves, [(tokens[i : i + 2], targets[i : i + 2]) for i in (0, 2)]) == pytest.approx(
        loss, rel=1e-7
    )
    expected = by_layer(MIDDLING, parameter_gradients(whole))
    assert_near(by_layer(MIDDLING, parameter_gradients(halves)), expected, 1e-6)


def test_a_loss_alone_leaves_the_logits(ops):
    run, batch = fresh_run(ops, MIDDLING, 2, 5)
    before = logits_of(run, batch)
    loss_of(run, batch)
    assert (before == ops.to_host(run.m.logits)[..., : MIDDLING.vocab_size]).all()


def test_threads_and_repetition_change_no_bit(ops):
    """Five steps, each on a batch of its own, from the seed's own start."""

    def training(threads, seed=7):
        ops.set_threads(threads)
        rng, run = np.random.default_rng(0), new_run(ops, MIDDLING, 3, 33, "reuse")
        initialise(ops, run.arena, seed)
        losses = [train_step(run, random_batch(MIDDLING, 3, 33, rng)) for _ in range(5)]
        return losses, bits_of(run, "parameters", "gradients", "m", "v")

    try:
        first = training(1)
        for threads in (1, 2, 4):
            assert training(threads) == first
        assert training(1, seed=8) != first
    finally:
        ops.set_threads(0)


def sampling_arena(run, plan):
    """An arena for sampling with the run's parameters."""
    model, ops = run.model, run.ops
    groups = {"parameters": model.parameters()} | generation_groups(model)
    arena = Arena(complete(groups, model, ops, "float32", generation_step), model, plan, ops)
    set_parameters(arena, copy_of(run, "parameters"))
    return arena


def contexts(prompt, generated, maxT):
    """What stands in the context before each generated token: when it is full, its last half stays."""
    context = prompt[-maxT:]
    for token in generated:
        yield context
        context = [*context, token]
        if len(context) > maxT:
            context = context[-max(1, maxT // 2) :]


def last_logits(run, context):
    """Of a whole forward pass over the context; what stands behind it does not matter."""
    tokens = np.zeros(run.m.tokens.shape, np.int32)
    tokens[0, : len(context)] = context
    return logits_of(run, (tokens, tokens))[0, len(context) - 1]


GREEDY = Choice(temperature=0, top_p=1.0)


# a prompt goes through the model in chunks of 16 and single tokens
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "maxT, length", [(40, n) for n in (1, 15, 16, 17, 33, 40, 41, 90)] + [(33, 32), (5, 3), (1, 1), (1, 4)]
)
def test_generation_sees_what_the_forward_sees(ops, plan, maxT, length):
    """For more than twice the context: the logits that a token is chosen from are those of a whole forward pass."""
    run, _ = fresh_run(ops, GPT2(maxT, 97, 3, 5, 35), 1, maxT)
    rng, seen = np.random.default_rng(length), {}  # the logits of the last step that ended at a position

    def any_token(token, position, logits, uniforms, choice, vocab_size, scratch):
        before, T = int(ops.to_host(position)[0]), logits.shape[1]
        ops.to_device(position, before + T)
        ops.to_device(token, rng.integers(97))
        seen[before + T] = np.array(ops.to_host(logits))[0, -1, :97]

    prompt = rng.integers(0, 97, length).tolist()
    any_ops = without_graphs(ops.replace(sample_token=any_token))
    tokens = generator(any_ops, sampling_arena(run, plan))(prompt, 2 * maxT + 10, GREEDY, rng)
    for context in contexts(prompt, tokens, maxT):
        assert error(seen[len(context)], last_logits(run, context)) < 2e-6


def test_greedy_generation(ops):
    """Each token is the likeliest after its context. Strong positions keep the model from repeating itself."""
    run, _ = fresh_run(ops, GPT2(40, 97, 3, 5, 35), 1, 40)
    ops.to_device(run.m.wpe, 3 * ops.to_host(run.m.wpe))
    generate = generator(ops, sampling_arena(run, "reuse"))
    generated = list(generate([1, 2, 3], 90, GREEDY, np.random.default_rng(0)))
    assert len(set(generated)) > 5
    for context, token in zip(contexts([1, 2, 3], generated, 40), generated, strict=True):
        assert token == last_logits(run, context).argmax()


def test_every_row_of_a_chunk(ops):
    """All 16 rows of logits, of a chunk that starts at 0 and of one that starts in the middle."""
    run, (tokens, _) = fresh_run(ops, MIDDLING, 1, 33)
    expected = logits_of(run, (tokens, tokens))[0]
    arena = sampling_arena(run, "reuse")
    for group, start, stop in (("chunk", 0, 16), ("token", 16, 17), ("chunk", 17, 33)):
        ops.to_device(arena.tensors[group, "tokens"], tokens[:, start:stop])
        assert ops.to_host(arena.tensors["sampler", "position"]) == start
        stepper(ops, arena, group)()
        got = ops.to_host(arena.tensors[group, "logits"])[0, :, : MIDDLING.vocab_size]
        assert_near(dict(enumerate(got)), dict(enumerate(expected[start:stop])), 2e-6)


def test_a_reader_keeps_the_last_two_values(ops):
    arena = sampling_arena(fresh_run(ops, MIDDLING, 1, 2)[0], "reuse")
    token = arena.tensors["token", "tokens"]
    read, waits = ops.reader(token), []
    for value in range(5):
        ops.to_device(token, value)
        waits.append(read())
        if value:
            assert waits[-2]() == value - 1
    assert waits[-1]() == 4 and waits[-1]().shape == (1, 1)


def test_sampling_leaves_training_alone(ops):
    """A sample between two steps, from the same arena, changes no bit of either."""
    results = []
    for sampling in (False, True):
        run, batch = fresh_run(ops, MIDDLING, 3, 33, more_groups=generation_groups(MIDDLING))
        losses = [train_step(run, batch)]
        if sampling:
            choice = Choice(temperature=1.0, top_p=1.0)
            list(generator(ops, run.arena)([1, 2, 3], 40, choice, np.random.default_rng(0)))
        losses.append(train_step(run, batch))
        results.append((losses, bits_of(run, "parameters", "gradients", "m", "v")))
    assert results[0] == results[1]
