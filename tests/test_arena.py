"""The arena: where every tensor stands, its random start, and that a step allocates nothing beside it."""

import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from training import (
    bits_of,
    compute_gradients,
    groups_of,
    new_run,
    random_batch,
    random_parameters,
    set_batch,
    set_parameters,
    train_step,
)

from llm_numba.arena import Arena, TensorSpec, format_map, in_precision, layout
from llm_numba.models import preset
from llm_numba.models.gpt2 import GPT2
from llm_numba.ops import get_ops
from llm_numba.training.generate import generation_groups
from llm_numba.training.nan_check import checked
from llm_numba.training.step import initialise
from llm_numba.util.cli import UserError
from llm_numba.util.files import format_bytes

PLANS = ["keep", "reuse"]
ODD = GPT2(max_seq_len=33, vocab_size=257, num_layers=3, num_heads=5, channels=35)
B, T = 3, 17


@pytest.fixture(scope="module")
def ops(device):
    """The device's ops as a run has them."""
    return get_ops(device)


def all_groups(ops, model=ODD):
    return groups_of(ops, model, B, T, generation_groups(model))


def bytes_of(place):
    """Without what rounding up to the alignment adds."""
    return math.prod(place.shape) * np.dtype(place.spec.dtype).itemsize


# ------------------------------------------------------------------------------------------------------------ layout


def test_sizes_of_every_tensor(ops):
    """Shapes by hand, for 3 layers of 5 heads and 35 channels, 257 tokens padded to 384, 3 rows of 17 tokens."""
    parameters = {
        "wte": (384, 35), "wpe": (33, 35), "ln1w": (3, 35), "ln1b": (3, 35), "qkvw": (3, 105, 35), "qkvb": (3, 105),
        "attprojw": (3, 35, 35), "attprojb": (3, 35), "ln2w": (3, 35), "ln2b": (3, 35), "fcw": (3, 140, 35),
        "fcb": (3, 140), "fcprojw": (3, 35, 140), "fcprojb": (3, 35), "lnfw": (35,), "lnfb": (35,),
    }  # fmt: skip
    row, each, wide = (3, 17, 35), (3, 3, 17, 35), (3, 3, 17, 140)
    activations = {
        "encoded": row, "ln1": each, "ln1_mean": (3, 3, 17), "ln1_rstd": (3, 3, 17), "qkv": (3, 3, 17, 105),
        "lse": (3, 3, 5, 17),
        "atty": each, "attproj": each, "residual2": each, "ln2": each,
        "ln2_mean": (3, 3, 17), "ln2_rstd": (3, 3, 17), "fch": wide, "fch_gelu": wide, "fcproj": each,
        "residual3": each, "lnf": row, "lnf_mean": (3, 17), "lnf_rstd": (3, 17), "logits": (3, 17, 384),
        "losses": (3, 17),
    }  # fmt: skip
    activation_gradients = {
        "dlnf": row, "dresidual3": each, "dfch": wide, "dln2": each, "dresidual2": each,
        "datty": each, "dqkv": (3, 3, 17, 105), "dln1": each, "dencoded": row,
    }  # fmt: skip
    runs = sum(-(-math.prod(shape) // 64) for shape in parameters.values())
    inputs = {
        "batches": (1, 2, 3, 17), "learning_rate": (1,), "step": (1,), "limits": (2,), "loss": (1,),
        "grad_norm_squared": (1,), "grad_scale": (1,), "tokens": (3, 17), "targets": (3, 17), "decays": (runs,),
        "seed": (1,),
    }  # fmt: skip
    expected = {
        "parameters": parameters,
        "gradients": {"d" + name: shape for name, shape in parameters.items()},
        "m": parameters,
        "v": parameters,
        "activations": activations,
        "activation gradients": activation_gradients,
        "inputs": inputs,
    }
    places, nbytes = layout(groups_of(ops, ODD, B, T), 3, "keep")
    found = {group: {p.spec.name: p.shape for p in places if p.group == group} for group in expected}
    assert found == expected
    for group in expected:  # in this order, which is also that of a checkpoint
        assert list(found[group]) == list(expected[group])
    dtypes = {p.spec.name: p.spec.dtype for p in places if p.spec.dtype != "float32"}
    assert dtypes == {
        **dict.fromkeys(("batches", "tokens", "targets", "step", "seed"), "int32"),
        **dict.fromkeys(("limits", "loss", "grad_norm_squared"), "float64"),
        "decays": "uint8",
    }
    # each gradient has a tensor to be the gradient of, of the same shape
    shapes = parameters | activations
    for name, shape in (expected["gradients"] | activation_gradients).items():
        assert shapes[name.removeprefix("d")] == shape
    assert sum(p.nbytes for p in places) == nbytes


def test_gpt2_has_the_parameters_that_it_should(ops):
    """Known numbers: 124,439,808 and so on, plus the rows that pad the vocabulary from 50257 to 50304."""
    for name, published in (("d12", 124_439_808), ("d24", 354_823_168), ("d36", 774_030_080), ("d48", 1_557_611_200)):
        model = preset(name)
        places, _ = layout(groups_of(ops, model, 1, 1), model.num_layers, "reuse")
        for group in ("parameters", "gradients", "m", "v"):
            assert sum(math.prod(p.shape) for p in places if p.group == group) == published + 47 * model.channels


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_overlaps_but_what_shares(ops, plan):
    places, nbytes = layout(all_groups(ops), 3, plan)
    assert nbytes % 64 == 0
    taken = [(p.offset, p.offset + bytes_of(p), p) for p in places]
    for start, end, p in taken:
        assert start % 64 == 0 and end <= nbytes, p
        for other_start, other_end, other in taken:
            if p is not other and start < other_end and other_start < end:
                assert plan == "reuse" and p.spec.shares and p.spec.shares == other.spec.shares, (p, other)
                assert start == other_start


@pytest.mark.parametrize("plan", PLANS)
def test_no_room_is_lost(ops, plan):
    """Between two tensors there is less than a run; a slot is as large as its largest tensor."""
    places, nbytes = layout(all_groups(ops), 3, plan)
    ends = {}
    for p in places:
        last = p.offset + bytes_of(p), np.dtype(p.spec.dtype).itemsize
        ends[p.offset] = max(ends.get(p.offset, last), last)
    for offset, following in zip(sorted(ends), [*sorted(ends)[1:], nbytes], strict=True):
        end, itemsize = ends[offset]
        assert 0 <= following - end < 64 * itemsize


def test_what_shares_under_reuse(ops):
    """Nothing that the backward reads of the forward: only branches that the stream has taken up, and gradients."""
    places, _ = layout(groups_of(ops, ODD, B, T), 3, "reuse")
    by_slot = {}
    for p in places:
        if p.spec.shares:
            assert p.shape == p.spec.shape and not p.stacked
            by_slot.setdefault(p.offset, set()).add(p.spec.name)
    assert sorted(map(sorted, by_slot.values())) == [
        ["attproj", "fcproj"],
        ["datty", "dln1", "dln2", "dlnf"],
        ["dencoded", "dresidual2", "dresidual3"],
        ["dfch", "dqkv"],
    ]


def test_layout_by_hand():
    """Two layers, two groups, three dtypes, a slot that its second tensor makes larger, a scalar."""
    groups = {
        "a": [TensorSpec("x", (3,)), TensorSpec("small", (2, 2), shares="slot", per_layer=True)],
        "b": [
            TensorSpec("y", (5,), "float64", per_layer=True),
            TensorSpec("large", (65,), shares="slot"),
            TensorSpec("z", (1,), "int32"),
        ],
    }
    groups = in_precision(groups, "bfloat16")

    def lines(plan):
        places, nbytes = layout(groups, 2, plan)
        return [(p.spec.name, p.shape, p.offset, p.nbytes) for p in places], nbytes

    assert lines("keep") == (
        [
            ("x", (3,), 0, 128),
            ("small", (2, 2, 2), 128, 128),
            ("y", (2, 5), 256, 512),
            ("large", (65,), 768, 256),
            ("z", (1,), 1024, 256),
        ],
        1280,
    )
    assert lines("reuse") == (
        [
            ("x", (3,), 0, 128),
            ("small", (2, 2), 128, 256),
            ("y", (2, 5), 384, 512),
            ("large", (65,), 128, 0),
            ("z", (1,), 896, 256),
        ],
        1152,
    )


# ------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("plan", PLANS)
def test_views_are_the_memory_at_their_offsets(ops, plan):
    """Each tensor in turn is filled with 0, 1, 2, ..., and is found so in the arena's bytes."""
    arena = Arena(all_groups(ops), ODD, plan, ops)
    memory = ops.to_host(arena.memory)
    assert memory.nbytes == arena.nbytes and not memory.any()
    assert memory is not arena.memory or memory.ctypes.data % 64 == 0
    assert set(arena.tensors) == {(p.group, p.spec.name) for p in arena.places}
    for p in arena.places:
        tensor = arena.tensors[p.group, p.spec.name]
        assert (tensor.shape, tensor.dtype) == (p.shape, p.spec.dtype)
        ops.to_device(tensor, np.arange(tensor.size, dtype=p.spec.dtype).reshape(p.shape))
        stored = ops.to_host(arena.memory)[p.offset : p.offset + bytes_of(p)].view(p.spec.dtype)
        assert (stored == np.arange(tensor.size, dtype=p.spec.dtype)).all()


@pytest.mark.real  # the simulator has no addresses
@pytest.mark.parametrize("plan", PLANS)
def test_namespace(ops, plan):
    """A layer has its slice of what is stacked, the whole of what is shared, and nothing that belongs to no layer."""
    run = new_run(ops, ODD, B, T, plan)
    m, tensors = run.m, {name: x for (group, name), x in run.arena.tensors.items() if group not in ("m", "v")}
    extra = {"layers", "flat", "micro_batches", "blocks", "recompute"}
    assert set(vars(m)) == {*tensors, *extra} and len(m.layers) == 3
    assert all(getattr(m, name) is x for name, x in tensors.items())

    def address(x):
        start = x.ctypes.data if ops.to_host(x) is x else x.device_ctypes_pointer.value
        return start, x.shape

    per_layer = {p.spec.name: p.stacked for p in run.arena.places if p.spec.per_layer}
    for l, layer in enumerate(m.layers):
        assert set(vars(layer)) == {*per_layer, "inp", "dinp", "next"}
        after, name = (m.layers[l + 1], "ln1") if l < 2 else (m, "lnf")
        for part, end in ("out", ""), ("mean", "_mean"), ("rstd", "_rstd"), ("weight", "w"), ("bias", "b"):
            assert address(getattr(layer.next, part)) == address(getattr(after, name + end))
        for name, stacked in per_layer.items():
            assert address(getattr(layer, name)) == address(tensors[name][l] if stacked else tensors[name])
        assert address(layer.inp) == address(m.layers[l - 1].residual3 if l else m.encoded)
        assert address(layer.dinp) == address(m.layers[l - 1].dresidual3 if l else m.dencoded)
    forward_only = run.arena.namespace("parameters", "activations")
    assert not hasattr(forward_only, "dwte") and forward_only.layers[2].dinp is None


def test_flat_is_the_group_and_its_padding(ops):
    arena = Arena(groups_of(ops, ODD, B, T), ODD, "reuse", ops)
    for name, tensor in arena.named("gradients").items():
        ops.to_device(tensor, 1)
        assert name.startswith("d")
    flat = ops.to_host(arena.flat("gradients"))
    assert flat.sum() == sum(tensor.size for tensor in arena.named("gradients").values())
    ops.to_device(arena.flat("gradients"), 0)
    assert not ops.to_host(arena.memory).any()


@pytest.mark.parametrize("plan", PLANS)
def test_format_map(ops, plan):
    """Each tensor has its line, and the bytes add up."""
    places, nbytes = layout(all_groups(ops), 3, plan)
    lines = format_map(places, nbytes).splitlines()
    assert lines[-1] == f"whole arena: {nbytes:,} bytes = {format_bytes(nbytes)}"
    groups = [line for line in lines[:-1] if not line.startswith(" ")]
    assert [line.split(":")[0] for line in groups] == list(all_groups(ops))
    assert sum(float(line.split(", ")[1].rstrip("%")) for line in groups) == pytest.approx(100, abs=0.05 * len(groups))
    total, rows = 0, [line for line in lines if line.startswith(" ")]
    for p, row in zip(places, rows, strict=True):
        what, _, where = row.partition(" at ")
        assert what.split() == [p.spec.name, *" x ".join(map(str, p.shape)).split(), p.spec.dtype]
        offset, size = where.split(maxsplit=1)
        assert int(offset.replace(",", "")) == p.offset
        if p.nbytes:
            total += int(size.split()[0].replace(",", ""))
        else:
            assert size == f"shares {p.spec.shares}"
    assert total == nbytes


@pytest.mark.parametrize(
    "nbytes, text",
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (3 * 2**30, "3 GiB"),
        (2**53, "8192 TiB"),
    ],
)
def test_format_bytes(nbytes, text):
    assert format_bytes(nbytes) == text


# -------------------------------------------------------------------------------------------------------- initialise


def test_initialise(ops):
    """Deviations of 0.02, and 0.02 / sqrt(2 L) into the residual stream; within four deviations of the estimate."""
    model = GPT2(64, 257, 4, 2, 32)
    run = new_run(ops, model, 1, 1, "reuse")
    initialise(ops, run.arena, 1)
    values = {name: ops.to_host(x) for name, x in run.arena.named("parameters").items()}
    assert not values["wte"][257:].any()
    values["wte"] = values["wte"][:257]
    residual = 0.02 / math.sqrt(8)
    deviations = dict(wte=0.02, wpe=0.02, qkvw=0.02, attprojw=residual, fcw=0.02, fcprojw=residual)
    for name, deviation in deviations.items():
        x = values.pop(name).astype(np.float64)
        assert x.std() == pytest.approx(deviation, rel=4 / math.sqrt(2 * x.size)), name
        assert abs(x.mean()) < 4 * deviation / math.sqrt(x.size), name
        assert len(np.unique(x)) > 0.99 * x.size, name  # no layer is another's copy
        assert abs(np.abs(x).max() / deviation - math.sqrt(2 * math.log(x.size))) < 1, name  # a normal's tails
    for name, x in values.items():
        assert (x == (1 if name in ("ln1w", "ln2w", "lnfw") else 0)).all(), name
    for group in ("gradients", "m", "v"):
        assert not any(ops.to_host(x).any() for x in run.arena.named(group).values())


def test_same_seed_same_bits(ops):
    """Also where other numbers were before, under the other plan, for another batch size."""
    results = []
    for plan, batch, seed in (("reuse", 1, 5), ("keep", 2, 5), ("reuse", 1, 6)):
        run = new_run(ops, ODD, batch, 3, plan)
        ops.to_device(run.arena.flat("parameters"), 7)
        initialise(ops, run.arena, seed)
        results.append(bits_of(run, "parameters"))
    assert results[0] == results[1]
    different = {name for group, name in results[0] if results[0][group, name] != results[2][group, name]}
    assert different == {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}


# ------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.compiled
@pytest.mark.parametrize("plan", PLANS)
def test_padding_stays_zero(ops, plan):
    """Nothing is written between two tensors in three steps, whose sizes are far from multiples of the alignment."""
    run, rng = new_run(ops, ODD, B, T, plan), np.random.default_rng(1)
    set_parameters(run.arena, random_parameters(ODD, rng))
    for _ in range(3):
        train_step(run, random_batch(ODD, B, T, rng))
    between = np.ones(run.arena.nbytes, bool)
    for p in run.arena.places:
        between[p.offset : p.offset + bytes_of(p)] = False
    assert between.sum() > 500
    assert not ops.to_host(run.arena.memory)[between].any()


@pytest.mark.compiled
@pytest.mark.parametrize("plan", PLANS)
def test_steps_allocate_nothing(ops, device, plan, monkeypatch):
    """Python's and NumPy's memory while 50 steps run, and that of the whole process over 200; on a GPU, the card's.

    The smallest activation has B*T*C = 8 KiB, the smallest of its temporaries would show. What is seen is Python's
    small change: views, frames, float objects.
    """
    model = preset("nano")
    run, rng = new_run(ops, model, 4, 32, plan), np.random.default_rng(1)
    initialise(ops, run.arena, 1)
    batch = random_batch(model, 4, 32, rng)
    for _ in range(3):
        train_step(run, batch)
    if device != "cpu":
        from numba import cuda

        monkeypatch.setattr(cuda.current_context(), "memalloc", lambda nbytes: pytest.fail("memory was allocated"))
        train_step(run, batch)
        return

    tracemalloc.start()
    try:
        train_step(run, batch)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(50):
            train_step(run, batch)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1024
    assert peak - before < 4096

    resident = psutil.Process().memory_info().rss
    for _ in range(200):
        train_step(run, batch)
    assert psutil.Process().memory_info().rss - resident < 256 * 1024


# ------------------------------------------------------------------------------------------------------------ finite


def checked_run(ops):
    """A run of which five updates are done, its checked ops, and a batch."""
    run, rng = new_run(ops, ODD, B, T, "keep"), np.random.default_rng(1)
    set_parameters(run.arena, random_parameters(ODD, rng))
    return run, checked(ops, ops, run.m, run.arena, SimpleNamespace(step=5)), random_batch(ODD, B, T, rng)


@pytest.mark.compiled
def test_checked_ops_compute_the_same(ops):
    plain, _, batch = checked_run(ops)
    run, checked_ops, _ = checked_run(ops)
    assert train_step(run, batch, ops=checked_ops) == train_step(plain, batch)
    assert bits_of(run, "parameters", "m", "v") == bits_of(plain, "parameters", "m", "v")


FIRST_SEEN = [  # a tensor, where in it which value is put, and what the first op that reads it makes of it
    ("wpe", (3, 2), np.nan, "encoded[0, 3, 2] is nan after encoder_forward"),
    ("ln1w", (2, 34), np.nan, "layer 2 ln1[0, 0, 34] is nan after residual_layernorm_forward"),
    ("qkvw", (1, 104, 7), np.nan, "layer 1 qkv[0, 0, 104] is nan after matmul_forward"),
    ("qkvb", (1, 71), -np.inf, "layer 1 qkv[0, 0, 71] is -inf after matmul_forward"),
    ("attprojb", (0, 4), np.inf, "layer 0 attproj[0, 0, 4] is inf after matmul_forward"),
    ("ln2b", (2, 0), np.nan, "layer 2 ln2[0, 0, 0] is nan after residual_layernorm_forward"),
    ("fcw", (1, 139, 0), np.nan, "layer 1 fch[0, 0, 139] is nan after matmul_gelu_forward"),
    ("fcprojb", (2, 11), np.inf, "layer 2 fcproj[0, 0, 11] is inf after matmul_forward"),
    ("lnfw", (9,), np.nan, "lnf[0, 0, 9] is nan after residual_layernorm_forward"),
    ("dqkvw", (2, 50, 6), np.nan, "layer 2 dqkvw[50, 6] is nan after matmul_backward"),
    ("dln2b", (0, 8), np.inf, "layer 0 dln2b[8] is inf after layernorm_backward"),
    ("dwpe", (16, 34), np.nan, "dwpe[16, 34] is nan after encoder_backward"),
]


@pytest.mark.compiled
@pytest.mark.parametrize("name, index, value, message", FIRST_SEEN, ids=[case[0] for case in FIRST_SEEN])
def test_first_value_that_is_not_finite(ops, name, index, value, message):
    run, checked_ops, batch = checked_run(ops)
    poison(ops, getattr(run.m, name), index, value)
    set_batch(run, batch)
    with pytest.raises(UserError) as caught:  # as a second micro-batch, which adds to the gradients that are there
        run.model.forward(checked_ops, run.m)
        run.model.loss(checked_ops, run.m, accumulate=True)
        run.model.backward(checked_ops, run.m, accumulate=True)
    assert str(caught.value).startswith(f"step 6: {message}, the first value that is not finite; ")
    assert "\n" not in str(caught.value)


def poison(ops, tensor, index, value):
    values = np.array(ops.to_host(tensor))
    values[index] = value
    ops.to_device(tensor, values)


@pytest.mark.compiled
def test_update_that_is_not_finite(ops):
    """What AdamW makes of a moment that is not; the update sees whole tensors, so that the layer is the first index."""
    run, checked_ops, batch = checked_run(ops)
    poison(ops, run.arena.tensors["m", "fcw"], (1, 2, 3), np.inf)
    with pytest.raises(
        UserError, match=r"^step 6: fcw\[1, 2, 3\] is -inf after adamw_update, .* 1 of the tensor's 14,700 "
    ):
        train_step(run, batch, ops=checked_ops)


@pytest.mark.compiled
def test_what_the_error_counts(ops):
    """A token that stands in the batch a few times: one value of each of its rows."""
    run, checked_ops, (tokens, targets) = checked_run(ops)
    poison(ops, run.m.wte, (tokens[1, 2], 30), np.nan)
    rows = np.argwhere(tokens == tokens[1, 2])
    with pytest.raises(UserError) as caught:
        compute_gradients(run, [(tokens, targets)], checked_ops)
    b, t = rows[0]
    assert str(caught.value) == (
        f"step 6: encoded[{b}, {t}, 30] is nan after encoder_forward, the first value that is not finite; "
        f"{len(rows)} of the tensor's 1,785 elements are not"
    )


@pytest.mark.compiled
def test_a_moment_that_is_not_finite_is_named_by_its_parameter(ops):
    run, checked_ops, batch = checked_run(ops)
    poison(ops, run.arena.tensors["v", "fcw"], (1, 2, 3), np.inf)
    with pytest.raises(UserError, match=r"step 6: v of fcw\[1, 2, 3\] is inf after adamw_update"):
        train_step(run, batch, ops=checked_ops)
