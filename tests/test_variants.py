"""The choice of op variants: the first that supports the operands, or the forced one; and what is reported about it."""

import subprocess
import sys
from ast import literal_eval
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from programs import environment

from llm_numba.cuda import variants
from llm_numba.ops import get_ops
from llm_numba.util.cli import UserError

FLOAT32, BF16 = np.dtype(np.float32), np.dtype(np.uint16)


@pytest.fixture
def family(monkeypatch):
    """A family of three variants, which need bf16, rows of 8, or nothing; restores every choice."""
    modules = {
        "tensor": SimpleNamespace(supports=lambda dtype, width: "" if dtype == BF16 else "needs bf16"),
        "wide": SimpleNamespace(supports=lambda dtype, width: "needs rows of 8" if width % 8 else ""),
        "any": SimpleNamespace(supports=lambda dtype, width: ""),
    }
    monkeypatch.setattr(variants, "FAMILIES", {"product": tuple(modules)})
    monkeypatch.setattr(variants, "EXAMPLES", {"product": (768,)})
    monkeypatch.setattr(variants, "_load", lambda family, name: modules[name])
    variants.force({})
    yield modules
    variants.force({})


def test_the_first_variant_that_supports_the_operands_is_chosen(family):
    assert variants.choose("product", BF16, 5) is family["tensor"]
    assert variants.choose("product", FLOAT32, 16) is family["wide"]
    assert variants.choose("product", FLOAT32, 5) is family["any"]


def test_a_forced_variant_is_chosen_until_the_next_call(family):
    assert variants.choose("product", BF16, 16) is family["tensor"]
    variants.force({"product": "wide"})
    assert variants.choose("product", BF16, 16) is family["wide"]
    variants.force({})
    assert variants.choose("product", BF16, 16) is family["tensor"]


@pytest.mark.parametrize(
    "pair, message",
    [
        (("prodct", "any"), "--variant prodct=any: unknown op family, expected one of product"),
        (("product", ""), "--variant product=: unknown variant, expected one of tensor, wide, any"),
        (("product", "fast"), "--variant product=fast: unknown variant, expected one of tensor, wide, any"),
    ],
)
def test_unknown_names_are_refused_and_change_nothing(family, pair, message):
    variants.force({"product": "any"})
    with pytest.raises(UserError) as error:
        variants.force([pair])
    assert str(error.value) == message
    assert variants.choose("product", BF16, 16) is family["any"]


def test_a_forced_variant_that_does_not_support_the_operands_is_an_error(family):
    variants.force({"product": "tensor"})
    with pytest.raises(UserError, match="--variant product=tensor: needs bf16; remove the flag, or choose another"):
        variants.choose("product", FLOAT32, 16)


def test_no_supported_variant_is_an_error_with_every_reason(family):
    family["any"].supports = lambda dtype, width: "needs rows of 4"
    with pytest.raises(UserError, match="no variant of product: tensor needs bf16; wide needs .* 8; any needs .* 4"):
        variants.choose("product", FLOAT32, 5)


def test_explain_names_the_choice_and_the_reasons(family):
    assert variants.explain() == [
        ("product", "fp32", "tensor", "needs bf16"),
        ("product", "fp32", "wide", "chosen"),
        ("product", "fp32", "any", "after wide"),
        ("product", "bf16", "tensor", "chosen"),
        ("product", "bf16", "wide", "after tensor"),
        ("product", "bf16", "any", "after tensor"),
    ]
    variants.force({"product": "any"})
    assert ("product", "bf16", "any", "forced") in variants.explain()
    assert ("product", "bf16", "tensor", "after any") in variants.explain()


def test_the_simulator_runs_the_variants_without_tensor_cores():
    program = "from llm_numba.ops import get_ops; get_ops('cudasim'); from llm_numba.cuda import variants; "
    program += "print(*variants.explain(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    rows = [literal_eval(line) for line in done.stdout.splitlines()]
    assert {row[:2] for row in rows} == {(f, d) for f in ("matmul", "attention") for d in ("fp32", "bf16")}
    reasons = {"simt": "chosen", "wgmma": "slow in the simulator: only with --variant"}
    reasons |= {"few_rows": "needs at most 16 rows"}  # a step has more
    for _, _, name, reason in rows:
        assert reason == reasons.get(name, "not in the simulator")


def test_every_variant_has_its_file_and_no_other_file_looks_like_one():
    for family, names in variants.FAMILIES.items():
        files = {path.stem.removeprefix(f"{family}_") for path in Path(variants.__file__).parent.glob(f"{family}_*.py")}
        assert set(names) == files - {"common"}


def test_the_names_of_the_variants_are_known_without_numba():
    program = "import sys; from llm_numba.cuda import variants; variants.force({'matmul': 'simt'})"
    program += "; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())


def test_the_cpu_has_no_variants():
    with pytest.raises(UserError, match="--variant matmul=simt: the CPU has no variants"):
        get_ops("cpu", variant=["matmul=simt"])
