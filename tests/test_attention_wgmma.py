"""Attention with wgmma: in the simulator, where it runs only when it is forced, and on a Hopper GPU."""

import importlib
import runpy
from pathlib import Path

import numpy as np
import pytest
from test_attention import check_backward, check_forward, make

pytest.importorskip("numba_cuda")

from llm_numba.cuda import attention_wgmma, variants
from llm_numba.cuda.jit import SIMULATED, uint16

pytestmark = pytest.mark.gpu

# (B, T, NH, HS, NKV): T below, at and above a tile of queries or keys
CASES = [
    (1, 1, 1, 64, 1),
    (2, 3, 1, 128, 1),
    (1, 64, 1, 64, 1),
    (1, 97, 2, 64, 1),
    (1, 65, 2, 128, 1),
    (1, 129, 1, 128, 1),
    (1, 257, 1, 64, 1),
]


@pytest.fixture(autouse=True)
def forced(device):
    if reason := attention_wgmma.supports(uint16, 64):
        pytest.skip(f"attention_wgmma {reason}")
    variants.force({"attention": "wgmma"})
    yield
    variants.force({})


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_forward_and_backward(ops, rng, place, garbage, sizes):
    NH, NKV = sizes[2], sizes[4]
    qkv, dout = make(rng, *sizes, dtype="bfloat16")
    check_forward(ops, place, garbage, qkv, NH, NKV, "bfloat16")
    check_backward(ops, place, garbage, qkv, dout, NH, NKV, "bfloat16")


@pytest.mark.parametrize("HS", [64, 128])
def test_very_negative_scores(ops, rng, place, garbage, HS):
    """Rows of a tile for queries and keys that do not exist have scores of 0, which would give weights of e**800."""
    qkv, dout = make(rng, 1, 3, 1, HS, 1)
    qkv[..., :HS] += 40 * HS**-0.25
    qkv[..., HS : 2 * HS] -= 40 * HS**-0.25
    qkv, dout = (x.astype("bfloat16").astype(np.float32) for x in (qkv, dout))
    check_forward(ops, place, garbage, qkv, 1, 1, "bfloat16")
    check_backward(ops, place, garbage, qkv, dout, 1, 1, "bfloat16")


def test_blocks_add_to_dq_in_turn(ops, rng, place, garbage, monkeypatch):
    """Two blocks share a head; the simulator runs one after the other, and the second finds its turn has come."""
    if SIMULATED:
        monkeypatch.setattr(attention_wgmma, "blocks", lambda: 2)
    monkeypatch.setattr(attention_wgmma, "team_size", lambda heads, tiles, blocks: 2)
    qkv, dout = make(rng, 1, 200, 1, 64, 1, dtype="bfloat16")
    check_backward(ops, place, garbage, qkv, dout, 1, 1, "bfloat16")


# what is left out of the source, the head size, and what the simulator finds then
BREAKS = {
    "forward": [
        ("release(shared + EMPTY + 8 * k_stage)", 128, "deadlock"),
        ("wgmma_wait(1)", 128, "race"),
        ("tma_store_wait_read(0)", 128, "race"),
        ("fence_proxy_async()", 64, "without fence_proxy_async"),
    ],
    "backward": [
        ("mbarrier_wait(shared + DS_EMPTY + 8 * ds_stage, ds_parity ^ 1)", 64, "race"),
        ("mbarrier_wait(shared + DS_FULL + 8 * ds_stage, ds_parity)", 64, "race|deadlock"),
        ("release(barrier + ADDED_FULL)", 64, "deadlock"),
        ("named_barrier(warpgroup + 1, 128)", 64, "race"),
        ("named_barrier(3, 256)", 128, "race"),
        ("setmaxnreg_dec(PRODUCER_REGISTERS)", 128, "deadlock: .* 240 registers"),
        ("fence_proxy_async()", 128, "without fence_proxy_async"),
    ],
}


@pytest.mark.skipif(not SIMULATED, reason="only the simulator finds races")
@pytest.mark.parametrize("part, left_out, HS, error", [(part, *case) for part in BREAKS for case in BREAKS[part]])
def test_what_is_left_out_is_found(ops, rng, place, garbage, monkeypatch, tmp_path, part, left_out, HS, error):
    source = Path(importlib.import_module(f"llm_numba.cuda.wgmma_attention_{part}").__file__).read_text()
    assert left_out in source
    broken = tmp_path / "broken.py"
    broken.write_text(source.replace(left_out, "pass"))
    monkeypatch.setattr(attention_wgmma, f"{part}_kernel", runpy.run_path(str(broken))[f"{part}_kernel"])
    qkv, dout = make(rng, 1, 193, 1, HS, 1, dtype="bfloat16")
    check, inputs = (check_forward, (qkv,)) if part == "forward" else (check_backward, (qkv, dout))
    with pytest.raises((AssertionError, RuntimeError), match=error):
        check(ops, place, garbage, *inputs, 1, 1, "bfloat16")
