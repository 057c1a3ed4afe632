"""The metrics and the budgets: what they must notice, in which order, and what they must allow."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from gate_kernels import Folding, Ideal

from sparse_mla.accuracy import budgets, metrics
from sparse_mla.accuracy.case import Inputs, Output
from sparse_mla.accuracy.case_inputs import Draw, draw

CPU = torch.device("cpu")


def made(**fields: object) -> tuple[Inputs, budgets.Expected, Output]:
    spec = Draw(**{"b": 3, "h": 4, "topk": 96, **fields})  # type: ignore[arg-type]
    inputs = draw(spec, 1, "test", CPU)
    return inputs, budgets.expect(inputs), Ideal().run(inputs, None)


def judge(output: Output, expected: budgets.Expected, limit: float = 1.7) -> metrics.Metrics:
    return metrics.compare(output, expected, limit)


def test_bf16_rms_is_what_rounding_measures() -> None:
    x = torch.exp2(torch.rand(1 << 20, dtype=torch.float64) * 8)
    error = (x.to(torch.bfloat16).double() - x) / x
    assert float(error.square().mean().sqrt()) == pytest.approx(budgets.BF16_RMS, rel=0.01)
    assert float(error.abs().max()) <= budgets.BF16_MAX_ERROR


@pytest.mark.parametrize("kernel", [Ideal(), Folding(), Folding(16)], ids=lambda k: k.name)
def test_correct_kernels_pass(kernel: Ideal) -> None:
    inputs, expected, _ = made()
    assert judge(kernel.run(inputs, None), expected).problem is None


def test_ideal_is_the_unit() -> None:
    _, expected, output = made(b=8)
    assert judge(output, expected).multiple == pytest.approx(1.0, abs=0.1)


def test_budget_is_limit_for_kappa_one() -> None:
    _, expected, output = made(b=8, h=16, topk=256)
    got = judge(output, expected)
    plain = 1.7 * math.sqrt((1 + (expected.kappa * budgets.BF16_RMS / got.ideal) ** 2) / 2)
    assert got.budget == pytest.approx(plain, rel=0.02)


def test_nan_is_reported_before_values() -> None:
    _, expected, output = made()
    out = output.out * 3
    out[1, 0, 2, 100] = float("nan")
    problem = judge(replace(output, out=out), expected).problem
    assert problem is not None and "NaN" in problem and "1 of" in problem


def test_infinite_lse_is_reported() -> None:
    _, expected, output = made()
    lse = output.lse.clone()
    lse[0, 0, 0] = float("-inf")
    problem = judge(replace(output, lse=lse), expected).problem
    assert problem is not None and problem.startswith("lse")


def test_empty_rows_are_exact() -> None:
    _, expected, output = made(holes="some_rows_empty")
    assert judge(output, expected).problem is None
    flash_mla = replace(output, empty_lse=float("inf"))
    assert "nothing valid" in str(judge(flash_mla, expected).problem)
    fixed = replace(flash_mla, lse=torch.where(output.lse.isinf(), math.inf, output.lse))
    assert judge(fixed, expected).problem is None
    out = output.out.clone()
    out[1, 0, 0, 0] = 1e-20
    assert "exactly 0" in str(judge(replace(output, out=out), expected).problem)


def test_nan_tokens_exempt_their_own_rows_only() -> None:
    inputs, _, _ = made()
    inputs.q[1, 0, 0, 0] = float("nan")
    expected = budgets.expect(inputs)
    assert expected.exempt.tolist() == [False, True, False]
    output = Ideal().run(inputs, None)
    output.out[1] = float("nan")
    assert judge(output, expected).problem is None
    output.out[2, 0, 1, 5] = float("nan")
    assert "NaN" in str(judge(output, expected).problem)


@pytest.mark.parametrize("gain", [0.002, -0.002])
def test_gain_is_seen_where_the_error_hides_it(gain: float) -> None:
    _, expected, output = made(b=8, h=16, topk=256)
    scaled = (expected.ref.out * (1 + gain)).to(torch.bfloat16).view(output.out.shape)
    got = judge(replace(output, out=scaled), expected)
    assert got.multiple < got.budget
    assert "gain" in str(got.problem)


def test_lse_budget_is_fp32() -> None:
    _, expected, output = made()
    assert judge(replace(output, lse=output.lse + 1e-6), expected).problem is None
    assert "lse is off" in str(judge(replace(output, lse=output.lse + 1e-4), expected).problem)


def test_one_wrong_row_is_named() -> None:
    _, expected, output = made(b=8, h=16)
    out = output.out.clone()
    out[5, 0, 3] *= 1.05
    got = judge(replace(output, out=out), expected)
    assert got.row == (5, 3) and "query token 5, head 3" in str(got.problem)


def test_wrong_shapes_are_problems_not_crashes() -> None:
    _, expected, output = made()
    assert "shape" in str(judge(replace(output, out=output.out[:, :, :2]), expected).problem)
    assert "shape" in str(judge(replace(output, lse=output.lse[:2]), expected).problem)


def test_max_logits_are_judged() -> None:
    _, expected, output = made(op="prefill", layout="bf16", page_size=1, s_q=4)
    assert judge(output, expected).max_logits_err is not None
    assert output.max_logits is not None
    wrong = replace(output, max_logits=output.max_logits * 1.4427)
    assert "max_logits" in str(judge(wrong, expected).problem)


def test_weights_that_round_alike_get_the_worst_case() -> None:
    logits = torch.zeros(1, 64, dtype=torch.float64)
    logits[0, 1:] = -0.7
    found = budgets._shared_roundings(logits)
    assert [head for head, _ in found] == [0]
    spread = torch.randn(4, 256, dtype=torch.float64)
    assert budgets._shared_roundings(spread) == []


def test_limit_tightens_the_budget() -> None:
    inputs, expected, _ = made(b=8, h=16, topk=256)
    output = Folding().run(inputs, None)
    assert judge(output, expected).problem is None
    assert judge(output, expected, limit=1.0).problem is not None


def test_json_has_no_nan() -> None:
    _, expected, output = made()
    out = torch.full_like(output.out, float("nan"))
    data = judge(replace(output, out=out), expected).as_json()
    assert data["multiple"] is None and isinstance(data["problem"], str)


def test_same_bits_compares_nan() -> None:
    _, _, output = made()
    nan = replace(output, lse=output.lse * float("nan"))
    assert metrics.same_bits(nan, nan)
    assert not metrics.same_bits(output, nan)
