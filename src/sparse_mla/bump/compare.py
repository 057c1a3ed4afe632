"""Two providers on the same inputs: which is better, by a rule that is written down.

A case, in this order:

1. It did not run for want of memory or hardware on either side, or neither side offers it: not
   comparable.
2. Answers go passed > failed > crashed or hung. A better one is better, a worse one worse. What the
   base passed and the candidate no longer offers is worse; what only the candidate passes is
   better; what it newly offers and gets wrong is worse; refusing what the base got wrong is better.
3. Both answered: better or worse if the case's error changed by more than 5 % (`MARGIN`) and the
   rows agree on the direction: sign-flip test over paired rows, p < 0.001 (`ALPHA`), or, where
   they are too few for that, a factor of two and every row; same if not.

An op: worse if any case is worse by rule 2; otherwise better if any is better by it; otherwise the
geometric mean of the cases' error ratios decides, with the same margin, if the cases agree: those
that rule 3 calls better or worse all point one way, or the sign-flip test over cases says p < 0.01.
Not comparable if no case is.

All: worse if any op is worse, otherwise better if any is better; where every comparable op is the
same, speed decides if it was measured: 5 % of the geometric mean over workloads. Not comparable if
no op is. Accuracy comes first: a faster candidate that is less accurate is worse.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .. import arch
from ..accuracy.case import Case, Implementation
from ..accuracy.check import run_check
from ..accuracy.gate import BAD, CRASHED, FAILED, HUNG, NOT_OFFERED, NOT_RUN, PASSED
from ..accuracy.providers.base import machine_word
from .paired import Paired, compare_pairs

FORMAT = "sparse_mla.compare/1"
BETTER, SAME, WORSE, NOT_COMPARABLE = "better", "same", "worse", "not comparable"
BASE, CANDIDATE = "base", "candidate"
SAID = ("date", "cases", "catalogue", "seed", "limit", "python")
"""What a comparison keeps of the check's own facts."""

MARGIN = 1.05
ALPHA = 0.001
OP_ALPHA = 0.01

_RANK = {PASSED: 0, FAILED: 1, CRASHED: 2, HUNG: 2}

Row = dict[str, Any]


@dataclass(frozen=True)
class CaseVerdict:
    """One case on both sides; `base` and `candidate` are `CaseResult.as_json`.

    Attributes:
        by_status: decided by rule 2, not by the size of an error.
        kind: "lost", "gained", "fixed", "broken" and the like, for reports; "" if by error.
    """

    case: str
    op: str
    about: str
    verdict: str
    reason: str
    by_status: bool
    kind: str
    base: Row
    candidate: Row
    rows: Paired | None = None

    @property
    def ratio(self) -> float | None:
        """candidate / base of the case's error."""
        before, after = error_of(self.base), error_of(self.candidate)
        if before is None or after is None or before <= 0:
            return None
        return after / before


@dataclass(frozen=True)
class OpVerdict:
    op: str
    verdict: str
    reason: str
    cases: dict[str, int]
    errors: Paired | None = None


@dataclass(frozen=True)
class Comparison:
    """What `sparse-mla compare` found.

    Attributes:
        about: machine, date, cases, seed, limit and the sides' descriptions.
        diagnoses: per side, "fault" (or None) and "text"; a side that passed has none.
        speed: rows of `speed.compare_speed`, empty where nothing was timed.
        remains: what is left of the candidate's error and what would remove it (`remains.py`).
    """

    about: dict[str, Any]
    verdict: str
    reason: str
    ops: tuple[OpVerdict, ...]
    cases: tuple[CaseVerdict, ...]
    diagnoses: dict[str, dict[str, Any]] = field(default_factory=dict)
    speed: tuple[Row, ...] = ()
    remains: Row | None = None

    @property
    def ok(self) -> bool:
        return self.verdict in (BETTER, SAME)

    def count(self, verdict: str) -> int:
        return sum(case.verdict == verdict for case in self.cases)

    def side(self, name: str) -> list[Row]:
        return [case.base if name == BASE else case.candidate for case in self.cases]

    @property
    def summary(self) -> str:
        counts = ", ".join(
            f"{self.count(v)} {v}" for v in (BETTER, SAME, WORSE, NOT_COMPARABLE) if self.count(v)
        )
        return f"{self.verdict}: {self.reason} ({counts})"

    def as_json(self) -> dict[str, Any]:
        """Everything but the values of single rows, which the verdicts have used already."""
        data = asdict(self)
        for case, made in zip(self.cases, data["cases"], strict=True):
            made["ratio"] = case.ratio
            for side in (BASE, CANDIDATE):
                if made[side]["metrics"]:
                    for values in ("row_multiples", "worst_out", "worst_ref"):
                        made[side]["metrics"].pop(values, None)
        return {"format": FORMAT, "summary": self.summary, **data}


def error_of(row: Row) -> float | None:
    """The case's error in multiples of ideal; infinite for a wrong answer that has none."""
    value = (row["metrics"] or {}).get("multiple")
    if isinstance(value, (int, float)):
        return float(value)
    return math.inf if row["status"] == FAILED else None


def judge_case(base: Row, candidate: Row) -> CaseVerdict:
    """Rules 1 to 3 of the module's docstring."""
    rows: Paired | None = None

    def made(verdict: str, reason: str, kind: str = "", by_status: bool = True) -> CaseVerdict:
        known = (candidate["case"], candidate["op"], candidate["about"])
        return CaseVerdict(*known, verdict, reason, by_status, kind, base, candidate, rows)

    before, after = base["status"], candidate["status"]
    for side, row in ((BASE, base), (CANDIDATE, candidate)):
        if row["status"] == NOT_RUN:
            return made(NOT_COMPARABLE, f"not run on the {side}: {row['detail']}")
    if before == after == NOT_OFFERED:
        return made(NOT_COMPARABLE, "neither side offers it")
    if after == NOT_OFFERED:
        if before == PASSED:
            return made(WORSE, f"no longer offered: {candidate['detail']}", "lost")
        return made(BETTER, f"refused where the base {before}", "refused")
    if before == NOT_OFFERED:
        if after == PASSED:
            return made(BETTER, "passed where the base does not offer it", "gained")
        return made(WORSE, f"newly offered, and {after}: {candidate['detail']}", "broken")
    if _RANK[after] != _RANK[before]:
        if _RANK[after] < _RANK[before]:
            return made(BETTER, f"{after} where the base {before}", "fixed")
        return made(WORSE, f"{after} where the base {before}: {candidate['detail']}", "broken")
    if after in (CRASHED, HUNG):
        return made(SAME, f"{before} and {after}")
    old, new = error_of(base), error_of(candidate)
    if old is None or new is None or old == new:
        return made(SAME, "no difference", by_status=False)
    if math.isinf(old) or math.isinf(new):
        verdict = BETTER if new < old else WORSE
        return made(
            verdict, f"NaN, Inf or a wrong shape only in the {BASE if new < old else CANDIDATE}"
        )
    rows = _paired_rows(base, candidate)
    ratio = max(new, 1e-12) / max(old, 1e-12)
    numbers = f"error {old:.3g}x to {new:.3g}x ideal"
    if rows is None or not _rows_agree(rows, ratio):
        return made(SAME, f"{numbers}, within chance", by_status=False)
    if ratio > MARGIN:
        return made(WORSE, numbers, by_status=False)
    if ratio < 1 / MARGIN:
        return made(BETTER, numbers, by_status=False)
    return made(SAME, numbers, by_status=False)


def _rows_agree(rows: Paired, ratio: float) -> bool:
    if (ratio - 1) * (rows.ratio - 1) <= 0:
        return False
    unanimous = 1.0 in (rows.lower, rows.higher)
    return rows.p < ALPHA or (unanimous and abs(math.log(ratio)) > math.log(2))


def _paired_rows(base: Row, candidate: Row) -> Paired | None:
    before, after = (
        [v for v in (row["metrics"] or {}).get("row_multiples", []) if v is not None]
        for row in (base, candidate)
    )
    return compare_pairs(before, after) if len(before) == len(after) else None


def judge_op(op: str, cases: Sequence[CaseVerdict]) -> OpVerdict:
    """The op's verdict from its cases'."""
    counts = dict(Counter(case.verdict for case in cases))
    comparable = [case for case in cases if case.verdict != NOT_COMPARABLE]
    if not comparable:
        reasons = Counter(case.reason for case in cases).most_common(1)
        return OpVerdict(op, NOT_COMPARABLE, reasons[0][0] if reasons else "no case", counts)
    pairs = [
        (error_of(case.base), error_of(case.candidate))
        for case in comparable
        if case.ratio is not None
    ]
    finite = [(a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(a + b)]
    errors = compare_pairs([a for a, _ in finite], [b for _, b in finite])
    for verdict in (WORSE, BETTER):
        decided = [case for case in comparable if case.by_status and case.verdict == verdict]
        if decided:
            kinds = Counter(case.kind or "changed" for case in decided)
            words = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
            return OpVerdict(op, verdict, f"cases {words}: {_some(decided)}", counts, errors)
    if errors is None:
        return OpVerdict(op, SAME, "the same answers to every case", counts, None)
    numbers = (
        f"errors changed by {errors.ratio - 1:+.0%} over {errors.pairs} cases (p {errors.p:.2g})"
    )
    moved = {case.verdict for case in comparable} & {BETTER, WORSE}
    verdict = SAME
    if errors.ratio > MARGIN and (errors.p < OP_ALPHA or moved == {WORSE}):
        verdict = WORSE
    elif errors.ratio < 1 / MARGIN and (errors.p < OP_ALPHA or moved == {BETTER}):
        verdict = BETTER
    return OpVerdict(op, verdict, numbers, counts, errors)


def _some(cases: Sequence[CaseVerdict], most: int = 3) -> str:
    names = [case.case for case in cases[:most]]
    return ", ".join(names) + (f" and {len(cases) - most} more" if len(cases) > most else "")


def judge_all(ops: Sequence[OpVerdict], speed: Sequence[Row] = ()) -> tuple[str, str]:
    """The verdict over all ops, and its reason."""
    for verdict in (WORSE, BETTER):
        found = [op for op in ops if op.verdict == verdict]
        if found:
            return verdict, "; ".join(f"{op.op}: {op.reason}" for op in found)
    same = [op for op in ops if op.verdict == SAME]
    if not same:
        return NOT_COMPARABLE, "; ".join(f"{op.op}: {op.reason}" for op in ops) or "no case ran"
    text = "; ".join(f"{op.op}: {op.reason}" for op in same)
    ratio = speed_ratio(speed)
    if ratio is not None and ratio > MARGIN:
        return WORSE, f"accuracy is the same, {ratio - 1:.0%} slower"
    if ratio is not None and ratio < 1 / MARGIN:
        return BETTER, f"accuracy is the same, {1 - ratio:.0%} less time"
    return SAME, text


def speed_ratio(speed: Sequence[Row]) -> float | None:
    """Geometric mean of candidate / base time over the workloads that both ran."""
    ratios = [row["ratio"] for row in speed if row.get("ratio")]
    if not ratios:
        return None
    return math.exp(sum(math.log(r) for r in ratios) / len(ratios))


def run_comparison(
    base: Implementation,
    candidate: Implementation,
    cases: Sequence[Case],
    *,
    seed: int,
    device: torch.device,
    limit: float,
    sides: dict[str, Any],
    speed: Callable[[], Sequence[Row]] | None = None,
    on_result: Callable[[Row], None] | None = None,
) -> Comparison:
    """Run both sides on the cases and judge.

    Args:
        base, candidate: named "base" and "candidate" in results.
        sides: what each side is, kept in `about`.
        speed: times both, after the answers are known.
    """
    from .certificate import machine_facts
    from .remains import name_faults, what_remains

    for name, implementation in ((BASE, base), (CANDIDATE, candidate)):
        if implementation.name != name:
            raise ValueError(f"implementation is named {implementation.name!r}, expected {name!r}")
    report = run_check(
        [base, candidate], cases, seed=seed, device=device, limit=limit, on_result=on_result
    )
    name_faults(report, (base, candidate), cases, seed, device)
    kept = {key: report.about[key] for key in SAID if key in report.about}
    architecture = machine_word(arch.of(device))
    return judge_report(
        {**machine_facts(device), **kept, "architecture": architecture, "sides": sides},
        report.results,
        report.diagnoses,
        list(speed()) if speed is not None else [],
        what_remains(report, cases, seed, device, limit),
    )


def judge_report(
    about: dict[str, Any],
    results: Sequence[Row],
    diagnoses: Sequence[Row] = (),
    speed: Sequence[Row] = (),
    remains: Row | None = None,
) -> Comparison:
    """The verdicts over results of two implementations named base and candidate."""
    sides: dict[str, dict[str, Row]] = {BASE: {}, CANDIDATE: {}}
    for row in results:
        sides[row["implementation"]][row["case"]] = row
    cases = tuple(judge_case(row, sides[CANDIDATE][name]) for name, row in sides[BASE].items())
    names = dict.fromkeys(case.op for case in cases)
    ops = tuple(judge_op(op, [case for case in cases if case.op == op]) for op in names)
    verdict, reason = judge_all(ops, speed)
    told = {entry["implementation"]: dict(entry) for entry in diagnoses}
    return Comparison(about, verdict, reason, ops, cases, told, tuple(speed), remains)


def passes(rows: Sequence[Row]) -> bool:
    """Something passed, and nothing failed, crashed or hung."""
    return not any(row["status"] in BAD for row in rows) and any(
        row["status"] == PASSED for row in rows
    )
