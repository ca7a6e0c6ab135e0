"""The products of Hopper, at sizes around their tiles of 128 x 192, on a GPU or in the simulator.

In the simulator, each part of the kernels that orders accesses is left out once: its checks must find every one.
"""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from comparing import assert_close, by_oracle, stored, sum_error

pytest.importorskip("numba_cuda")
from numba import cuda

from llm_numba.cuda import matmul_wgmma, memory, wgmma_product, wgmma_tiles
from llm_numba.cuda.jit import SIMULATED, float32, uint16
from llm_numba.cuda.matmul_wgmma import Schedule, schedule
from llm_numba.models import preset

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_hopper(device, monkeypatch):
    if device == "cpu" or matmul_wgmma.supports(uint16, 8, 8, 8):
        pytest.skip("needs compute capability 9, real or simulated")
    # so few that each consumer of a block has several tiles
    monkeypatch.setattr(matmul_wgmma, "multiprocessors", lambda: 2)
    memory.zero(matmul_wgmma.flags())


@pytest.fixture(autouse=True)
def splits_cost_nothing(monkeypatch):
    """So that small products are split too."""
    monkeypatch.setattr(matmul_wgmma, "HANDOVER", 0)
    monkeypatch.setattr(matmul_wgmma, "ADDITION", 0)
    matmul_wgmma.schedule.cache_clear()
    yield
    matmul_wgmma.schedule.cache_clear()


@pytest.fixture
def bf16(rng):
    """A function that makes (float64 values, the same in bf16 on the device)."""

    def make(*shape):
        values = rng.standard_normal(shape).astype("bfloat16")
        return values.astype(np.float64), cuda.to_device(values.view(np.uint16))

    return make


def poisoned(*shape, dtype=np.uint16):
    return cuda.to_device(np.full(shape, 0xFFFF, np.uint16) if dtype == np.uint16 else np.full(shape, np.nan, dtype))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("R, C, OC", [(264, 136, 200), (1, 8, 8)])
def test_forward(bf16, R, C, OC, with_bias):
    (x, inp), (w, weight), (b, bias), out = bf16(R, C), bf16(OC, C), bf16(OC), poisoned(R, OC)
    matmul_wgmma.forward(out, inp, weight, bias if with_bias else None, None)
    expected = x @ w.T + b * with_bias
    error = sum_error(abs(x) @ abs(w).T + abs(b), C)
    assert_close("out", memory.to_host(out), expected, stored("bfloat16", expected, error))


def test_forward_in_groups(bf16, monkeypatch):
    monkeypatch.setattr(matmul_wgmma, "WIDE", 1)
    monkeypatch.setattr(matmul_wgmma, "GROUP", 2)
    test_forward(bf16, 264, 8, 392, True)


def test_gelu(bf16):
    R, C, OC = 200, 72, 200
    (x, inp), (w, weight), (b, bias) = bf16(R, C), bf16(OC, C), bf16(OC)
    out, pre = poisoned(R, OC), poisoned(R, OC)
    matmul_wgmma.forward(out, inp, weight, bias, None, pre)
    expected = x @ w.T + b
    error = sum_error(abs(x) @ abs(w).T + abs(b), C)
    assert_close("pre", memory.to_host(pre), expected, stored("bfloat16", expected, error))
    expected = by_oracle("gelu_forward", np.empty((R, OC)), memory.to_host(pre))
    assert_close("out", memory.to_host(out), expected, stored("bfloat16", expected, 2**-20 * np.abs(expected) + 1e-14))


# the last one is split along K
@pytest.mark.parametrize("with_gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("R, C, OC", [(264, 200, 136), (1, 8, 8), (8, 72, 328)])
def test_input_gradient(bf16, R, C, OC, with_gelu):
    (dy, dout), (w, weight), (u, pre), dinp = bf16(R, OC), bf16(OC, C), bf16(R, C), poisoned(R, C)
    scratch = poisoned(max(1, matmul_wgmma.backward_scratch(R, C, OC, False)), dtype=np.float32)
    matmul_wgmma.input_gradient(dinp, dout, weight, scratch, pre if with_gelu else None)
    expected, error = dy @ w, sum_error(abs(dy) @ abs(w), OC)
    if with_gelu:
        ones = by_oracle("gelu_backward", np.empty((R, C)), u, np.ones((R, C)))
        expected, error = expected * ones, error * abs(ones) + 2**-20 * abs(expected)  # that of GELU' is 2**-20 at most
    assert_close("dinp", memory.to_host(dinp), expected, stored("bfloat16", expected, error))


GRADIENTS = [
    (200, 264, 200, Schedule(2, 4)),  # R, C, OC and how they are split
    (600, 200, 8, Schedule(2, 2)),
    (648, 8, 264, Schedule(2, 2, 1, 1, 6)),
    (1, 8, 8, Schedule(1, 1)),
]


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("R, C, OC, plan", GRADIENTS)
def test_weight_gradient(rng, bf16, R, C, OC, plan, accumulate):
    assert schedule(OC, C, R, 2) == plan
    (dy, dout), (x, inp), with_bias = bf16(R, OC), bf16(R, C), accumulate
    before = [rng.standard_normal(size, np.float32) for size in ((OC, C), OC)]
    gradients = [cuda.to_device(x) if accumulate else poisoned(*x.shape, dtype=np.float32) for x in before]
    scratch = poisoned(max(1, matmul_wgmma.backward_scratch(R, C, OC, with_bias)), dtype=np.float32)
    matmul_wgmma.weight_gradient(gradients[0], gradients[1] if with_bias else None, dout, inp, scratch, accumulate)
    sums = [(dy.T @ x, abs(dy).T @ abs(x)), (dy.sum(0), abs(dy).sum(0))]
    for got, (expected, magnitude), was in list(zip(gradients, sums, before, strict=True))[: 1 + with_bias]:
        was = was * float32(accumulate)
        assert_close("gradient", got.copy_to_host(), was + expected, sum_error(magnitude + abs(was), R))


@pytest.mark.parametrize(
    "M, N, K, blocks", [(2304, 768, 4096, 132), (768, 768, 32768, 132), (3072, 768, 4096, 132), (1600, 6400, 650, 7)]
)
def test_every_step_is_dealt_to_one_block(M, N, K, blocks):
    """And an owner waits for the slots that helpers fill."""
    if not SIMULATED:
        pytest.skip("on a GPU these functions are compiled")
    plan = schedule(M, N, K, blocks)
    tiles, steps = -(-M // 128) * -(-N // matmul_wgmma.tile_width(N)), -(-K // 64)
    done, filled, awaited = np.zeros((tiles, steps), int), [], []
    for block in map(np.uint32, range(plan.blocks)):
        tile, already = block, np.uint32(0)
        while True:
            shape = block, plan.blocks, steps, plan.whole, plan.splits, plan.helpers, plan.owned
            current, k, k_end, tile, already = wgmma_tiles.next_item(tile, already, *map(np.uint32, shape))
            if k == k_end:
                break
            done[current, k:k_end] += 1
            split = current - plan.whole
            if k > 0:
                filled.append(block + split)
            elif k_end < steps:
                first, last = wgmma_tiles.helpers_of(split, steps, plan.splits, plan.helpers, plan.owned)
                awaited += [helper + split for helper in range(first, last + 1)]
    assert (done == 1).all()
    assert sorted(filled) == sorted(set(awaited)) and max(filled) < plan.helpers + plan.splits - 1
    assert len(set(filled)) == len(filled) == len(awaited)


# (the function, the line that is left out, which of several, the product that shows it, what the simulator says)
MUTATIONS = [
    ("load_steps", "mbarrier_wait(full + EMPTY", 0, "forward", "race"),
    ("multiply_steps", "mbarrier_wait(barriers + TURN", 0, "forward", "race"),
    ("multiply_steps", "mbarrier_wait(full", 0, "forward", "race"),
    ("multiply_steps", "wgmma_wait(1)", 0, "forward", "wgmma of warpgroup . may still read"),
    ("multiply_steps", "mbarrier_arrive(read)", 0, "forward", "deadlock"),
    ("multiply_steps", "mbarrier_arrive(barriers + TURN", 0, "forward", "deadlock"),
    ("multiply_steps", "wgmma_wait(0)", 0, "forward", "wgmma of warpgroup . may still read"),
    ("multiply_steps", "mbarrier_arrive(read)", 1, "forward", "deadlock"),
    ("store_columns", "tma_store_wait_read(1)", 0, "forward", "race"),
    ("store_columns", "named_barrier", 0, "forward", "race"),
    ("store_columns", "fence_proxy_async", 0, "forward", "without fence_proxy_async"),
    ("store_columns", "named_barrier", 1, "forward", "race"),
    ("product", "tma_store_wait_read(0)", 0, "input_gradient", "race"),
    ("store_times_slope", "mbarrier_wait", 0, "input_gradient", "race"),
    ("store_times_slope", "fence_proxy_async", 0, "input_gradient", "without fence_proxy_async"),
    ("store_times_slope", "named_barrier", 0, "input_gradient", "race"),
    ("store_times_slope", "tma_store_wait_read(1)", 0, "input_gradient", "race"),
    ("product", "fence_proxy_async()", 0, "weight_gradient", "without fence_proxy_async"),
    ("add_piece", "mbarrier_wait", 0, "weight_gradient", "race"),
    ("add_piece", "named_barrier", 0, "weight_gradient", "race"),
    ("add_piece", "mbarrier_arrive", 0, "weight_gradient", "deadlock"),
    ("publish_part", "store_flag(flag, 1)", 0, "weight_gradient", "deadlock: .*a flag"),
]


def without_line(function, text, number):
    """The function without its number-th line that contains text."""
    file = wgmma_product if function == "product" else sys.modules[getattr(wgmma_product, function).__module__]
    lines = Path(file.__file__).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if f"def {function}(" in line)
    at = [i for i in range(start, len(lines)) if text in lines[i]][number]
    lines[at] = lines[at][: len(lines[at]) - len(lines[at].lstrip())] + "pass"
    module = ModuleType("mutated")
    exec(compile("\n".join(lines), f"without {text}", "exec"), module.__dict__)
    return getattr(module, "product_kernel" if function == "product" else function)


@pytest.mark.parametrize("function, text, number, way, message", MUTATIONS)
def test_simulator_finds_what_is_left_out(bf16, monkeypatch, function, text, number, way, message):
    if not SIMULATED:
        pytest.skip("a GPU computes something wrong, or nothing")
    changed = without_line(function, text, number)
    if function == "product":
        monkeypatch.setattr(matmul_wgmma, "product_kernel", changed)
    else:
        monkeypatch.setattr(wgmma_product, function, changed)
    monkeypatch.setattr(matmul_wgmma, "multiprocessors", lambda: 3 if way == "weight_gradient" else 1)
    with pytest.raises(Exception, match=message):
        if way == "forward":
            test_forward(bf16, 392, 520, 8, True)
        elif way == "input_gradient":
            test_input_gradient(bf16, 264, 200, 8, True)
        else:
            R, C, OC = 648, 8, 8
            dweight, dbias = poisoned(OC, C, dtype=np.float32), poisoned(OC, dtype=np.float32)
            scratch = poisoned(matmul_wgmma.backward_scratch(R, C, OC, True), dtype=np.float32)
            matmul_wgmma.weight_gradient(dweight, dbias, bf16(R, OC)[1], bf16(R, C)[1], scratch, False)


@pytest.mark.parametrize("name", ["d12", "d24", "d36", "d48"])
def test_the_miniature_has_the_same_kernels(name):
    """Compiling them before the first step is of use only if the first step runs those."""
    model = preset(name)
    small, C = model.miniature(17), model.channels
    widths = [[matmul_wgmma.tile_width(N) for N in (C, 3 * C, 4 * C, x.padded_vocab_size)] for x in (model, small)]
    assert small.channels == C and widths[0] == widths[1]
