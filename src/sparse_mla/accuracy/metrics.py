"""How good an answer is: non-finite masks first, then rows, then the case, gain and lse.

Errors are told in multiples of ideal rounding: the error of the oracle's own output rounded to
bf16. What is allowed comes from `budgets`; nothing here is a tolerance chosen by hand.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .budgets import DEFAULT_LIMIT, GAIN_FLOOR, GAIN_SIGMAS, Expected
from .case import Output

KEPT_ROWS = 512
"""Row errors kept for the report's histograms."""


@dataclass(frozen=True)
class Metrics:
    """One call's answer against the oracle.

    Attributes:
        problem: the first thing that is wrong, in words; None if the answer is within budget.
        rel_l2: |out - ref| / |ref| over the call.
        ideal: the same for the oracle's output rounded to bf16.
        multiple: rel_l2 / ideal.
        budget: what `multiple` may be.
        row_ratio: the worst row's error over that row's budget (1 = all of it).
        row: which row that is: query token and head.
        gain: <out, ref> / <ref, ref> - 1; gain_budget: what its magnitude may be.
        lse_err: max |lse - ref| over rows with something valid; lse_budget: what was allowed
            there, at the row that used the largest part of its budget; NaN if there is no lse.
        max_logits_err: the same for max_logits, None if there are none.
        kappa: rms amplification of independent weight errors in this input.
        exempt: query tokens that may be anything, out of `tokens`.
        row_multiples: errors of up to 512 rows in multiples of ideal, for histograms.
        worst_out, worst_ref: the worst row's values.
    """

    problem: str | None
    rel_l2: float = math.nan
    ideal: float = math.nan
    multiple: float = math.nan
    budget: float = math.nan
    row_ratio: float = math.nan
    row: tuple[int, int] = (0, 0)
    gain: float = math.nan
    gain_budget: float = math.nan
    lse_err: float = math.nan
    lse_budget: float = math.nan
    max_logits_err: float | None = None
    kappa: float = math.nan
    exempt: int = 0
    tokens: int = 0
    row_multiples: list[float] = field(default_factory=list)
    worst_out: list[float] = field(default_factory=list)
    worst_ref: list[float] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.problem is None

    def as_json(self) -> dict[str, Any]:
        """A dict of JSON types; numbers that JSON lacks become null."""
        return {key: _finite(value) for key, value in asdict(self).items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def compare(output: Output, expected: Expected, limit: float = DEFAULT_LIMIT) -> Metrics:
    """Hold an answer to its budget.

    Args:
        output: what the implementation answered.
        expected: from `budgets.expect` on the same inputs.
        limit: the case budget for kappa = 1, in multiples of ideal.
    """
    n, h, d_v = expected.ref.out.shape
    counts: dict[str, Any] = {"exempt": int(expected.exempt.sum()), "tokens": n}
    shape = _shape_problem(output, expected)
    if shape is not None:
        return Metrics(shape, **counts)
    if n * h == 0:
        return Metrics(None, 0.0, 0.0, 0.0, 0.0, 0.0, (0, 0), 0.0, 0.0, 0.0, 0.0, **counts)
    out = output.out.reshape(n, h, d_v).double()
    lse = None if output.lse is None else output.lse.reshape(n, h).double()
    top = None if output.max_logits is None else output.max_logits.reshape(n, h).double()
    problem = _non_finite_problem(out, lse, top, output.empty_lse, expected)
    if problem is not None:
        return Metrics(problem, kappa=expected.kappa, **counts)

    keep = ~expected.exempt
    ref = torch.where(keep[:, None, None], expected.ref.out, 0.0)
    out = torch.where(keep[:, None, None], out, 0.0)
    error = (out - ref).square().sum(-1)
    norms = ref.square().sum(-1)
    total = float(norms.sum())
    margin = limit**2 / 2
    scale = limit / DEFAULT_LIMIT

    plain = expected.ideal_power + expected.weight_power
    allowed = torch.maximum(margin * plain, scale**2 * expected.row_power) + expected.fp32_power
    ratios = torch.where(error > 0, (error / allowed.clamp_min(1e-300)).sqrt(), 0.0)
    token, head = divmod(int(ratios.argmax()), h)
    row_ratio = float(ratios[token, head])

    ideal_power = float(expected.ideal_power.sum())
    fp32 = float(expected.fp32_power.sum())
    case = max(margin * float(plain.sum()), scale**2 * expected.tail_power) + fp32
    multiple = math.sqrt(float(error.sum()) / ideal_power) if ideal_power else 0.0
    budget = math.sqrt(case / ideal_power) if ideal_power else 0.0
    along = ((out - ref) * ref).sum(-1)
    gain = float(along.sum()) / total if total else 0.0
    gain_budget = scale * (
        GAIN_FLOOR
        + abs(expected.ideal_gain)
        + GAIN_SIGMAS * expected.gain_sigma
        + expected.gain_bound
    )
    rows = keep & ~expected.empty
    lse_err, lse_budget, lse_ratio = math.nan, 0.0, 0.0
    if lse is not None:
        lse_err, lse_budget, lse_ratio = _worst(lse, expected.ref.lse, scale * expected.lse, rows)
    top_err, top_budget, top_ratio = None, 0.0, 0.0
    if top is not None:
        top_err, top_budget, top_ratio = _worst(
            top, expected.ref.max_logits, scale * expected.max_logits, rows
        )

    if row_ratio > 1:
        problem = (
            f"query token {token}, head {head}: error is {row_ratio:.3g} times the row's budget"
        )
    elif multiple > budget:
        problem = f"error is {multiple:.3g}x ideal, budget {budget:.3g}x"
    elif abs(gain) > gain_budget:
        problem = f"gain is {gain:+.2e}, budget {gain_budget:.2e}"
    elif (part := _part_gain(along, norms, expected, scale)) is not None:
        problem = part
    elif lse_ratio > 1:
        problem = f"lse is off by {lse_err:.2e}, budget {lse_budget:.2e}"
    elif top_ratio > 1:
        problem = f"max_logits is off by {top_err:.2e}, budget {top_budget:.2e}"
    row_ideal = torch.sqrt(error / expected.ideal_power.clamp_min(1e-300))[
        rows & (norms > 0).any(1)
    ]
    return Metrics(
        problem,
        rel_l2=math.sqrt(float(error.sum()) / total) if total else 0.0,
        ideal=math.sqrt(ideal_power / total) if total else 0.0,
        multiple=multiple,
        budget=budget,
        row_ratio=row_ratio,
        row=(token, head),
        gain=gain,
        gain_budget=gain_budget,
        lse_err=lse_err,
        lse_budget=lse_budget,
        max_logits_err=top_err,
        kappa=expected.kappa,
        row_multiples=row_ideal.flatten()[:KEPT_ROWS].tolist(),
        worst_out=out[token, head].tolist(),
        worst_ref=ref[token, head].tolist(),
        **counts,
    )


def _part_gain(
    along: torch.Tensor, norms: torch.Tensor, expected: Expected, scale: float
) -> str | None:
    """A head or a query token whose gain is over its budget, from <error, ref> and |ref|^2."""
    for name, dim, allowed in (
        ("head", 0, expected.head_gain),
        ("query token", 1, expected.token_gain),
    ):
        power = norms.sum(dim)
        gains = along.sum(dim) / torch.where(power > 0, power, 1.0)
        ratio = gains.abs() / (scale * allowed)
        at = int(ratio.argmax())
        if float(ratio[at]) > 1:
            budget = scale * float(allowed[at])
            return f"{name} {at}: gain is {float(gains[at]):+.2e}, budget {budget:.2e}"
    return None


def _worst(
    got: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor, rows: torch.Tensor
) -> tuple[float, float, float]:
    """Error, budget and their ratio where that ratio is largest; [n, h] inputs, rows [n]."""
    if not bool(rows.any()):
        return 0.0, 0.0, 0.0
    error = (got[rows] - want[rows]).abs().flatten()
    budget = allowed[rows].flatten()
    ratio = error / budget.clamp_min(1e-300)
    at = int(ratio.argmax())
    return float(error[at]), float(budget[at]), float(ratio[at])


def _shape_problem(output: Output, expected: Expected) -> str | None:
    n, h, d_v = expected.ref.out.shape
    if output.out.numel() != n * h * d_v or output.out.shape[-2:] != (h, d_v):
        return f"out has shape {tuple(output.out.shape)}, expected {n} query tokens x {h} x {d_v}"
    for name, value in (("lse", output.lse), ("max_logits", output.max_logits)):
        if value is not None and (value.numel() != n * h or value.shape[-1] != h):
            return f"{name} has shape {tuple(value.shape)}, expected {n} query tokens x {h}"
    return None


def _non_finite_problem(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    top: torch.Tensor | None,
    empty_lse: float,
    expected: Expected,
) -> str | None:
    """NaN and Inf where none may be, and rows whose answer is exact: empty, or scaled to 0."""
    keep, empty = ~expected.exempt, expected.empty
    some = keep & ~empty
    bad = ~torch.isfinite(out) & keep[:, None, None]
    if bool(bad.any()):
        return f"out: {_count(bad.any(-1), keep)} hold NaN or Inf where the answer is finite"
    checks = [("lse", lse, empty_lse)] if lse is not None else []
    if top is not None:
        checks.append(("max_logits", top, float("-inf")))
    for name, value, for_empty in checks:
        bad = ~torch.isfinite(value) & some[:, None]
        if bool(bad.any()):
            return f"{name}: {_count(bad, some)} are NaN or Inf where the answer is finite"
        wrong = (value != for_empty) & (empty & keep)[:, None]
        if bool(wrong.any()):
            got = float(value[wrong][0])
            return f"{name} of a row with nothing valid is {got:g}, must be {for_empty:g}"
    zero = (expected.ref.out == 0).all(-1) & keep[:, None]
    wrong = zero & (out != 0).any(-1)
    if bool(wrong.any()):
        return f"out: {_count(wrong, keep)} are not 0 where the answer is exactly 0"
    return None


def _count(bad: torch.Tensor, of: torch.Tensor) -> str:
    return f"{int(bad.sum())} of {int(of.sum()) * bad.shape[1]} rows"


def same_bits(a: Output, b: Output) -> bool:
    """Whether two answers are equal bit for bit, NaN included."""
    pairs = [(a.out, b.out)]
    if a.lse is not None and b.lse is not None:
        pairs.append((a.lse, b.lse))
    if a.max_logits is not None and b.max_logits is not None:
        pairs.append((a.max_logits, b.max_logits))
    return all(
        x.shape == y.shape
        and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in pairs
    )
