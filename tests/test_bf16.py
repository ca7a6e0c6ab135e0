"""The model in bf16: the error of each tensor against float64 is at most twice that of PyTorch in bf16.

Both start from the same parameters, rounded to bf16. PyTorch stores every tensor in bf16; we store parameter gradients,
means, standard deviations, lse and losses in float32. Errors are norms of whole tensors.
"""

import numpy as np
import pytest
from training import compute_gradients, copy_of, new_run, random_batch, random_parameters, set_batch, set_parameters

from llm_numba.models.gpt2 import GPT2
from llm_numba.ops import get_ops

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
torch_gpt2 = pytest.importorskip("torch_gpt2")

SIZES = [  # L, NH, C, maxT, V, B, T
    (1, 2, 16, 7, 17, 1, 7),
    pytest.param((3, 4, 256, 128, 1031, 2, 97), marks=pytest.mark.real),  # heads of 64 channels: tensor cores
    pytest.param((1, 12, 768, 1024, 50257, 1, 257), marks=pytest.mark.real),
]


@pytest.fixture(scope="module")
def ops(device):
    return get_ops(device, "bf16")


def error(got, expected):
    return np.linalg.norm(np.subtract(got, expected, dtype=np.float64))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_errors_beside_torch(ops, sizes):
    L, NH, C, maxT, V, B, T = sizes
    model, rng = GPT2(maxT, V, L, NH, C), np.random.default_rng(1)
    run = new_run(ops, model, B, T, "keep", dtype="bfloat16")
    set_parameters(run.arena, random_parameters(model, rng))
    batch = random_batch(model, B, T, rng)
    weights = copy_of(run, "parameters") | {"wte": copy_of(run, "parameters")["wte"][:V]}
    exact = torch_gpt2.forward_backward(weights, *batch, NH)
    torchs = torch_gpt2.forward_backward(weights, *batch, NH, torch.bfloat16)

    def view(name, layer):
        tensor = ops.to_host(getattr(run.m if layer is None else run.m.layers[layer], name))
        return tensor[..., :V] if name == "logits" else tensor

    set_batch(run, batch)
    run.model.forward(ops, run.m)
    run.model.logits(ops, run.m, run.m)
    logits = view("logits", None)
    loss = compute_gradients(run, [batch])

    ours = {("activation", *key): view(*key) for key in exact.activations if key != ("logits", None)}
    ours["activation", "logits", None] = logits
    ours |= {
        ("d", name, layer): view("d" + name, layer) for name, layer in exact.activation_gradients if name != "logits"
    }
    ours["d", "logits", None] = view("logits", None)
    gradients = {name[1:]: x for name, x in copy_of(run, "gradients").items()}
    ours |= {("gradient", name, None): x[:V] if name == "wte" else x for name, x in gradients.items()}
    kinds = {"activation": "activations", "d": "activation_gradients", "gradient": "gradients"}
    worst = {}
    for (kind, name, layer), tensor in ours.items():
        key = name if kind == "gradient" else (name, layer)
        expected, theirs = (getattr(side, kinds[kind])[key] for side in (exact, torchs))
        assert tensor.shape == expected.shape, (kind, key)
        worst[kind, name, layer] = error(tensor, expected) / error(theirs, expected)
    assert max(worst.values()) <= 2, {key: ratio for key, ratio in worst.items() if ratio > 2}
    # the error of a loss is at most twice the largest error of a logit
    assert abs(loss - exact.loss) <= 2 * np.abs(logits - exact.activations["logits", None]).max()
