"""Risks of a bump, found mechanically: each is a kind and its facts, put into words by words.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..accuracy.gate import BAD, PASSED
from .changes import Changes
from .compare import MARGIN, NOT_COMPARABLE, WORSE, Comparison
from .git import is_full_hash
from .pins import Pin

LSE_GROWTH, LSE_SHARE = 2.0, 0.1
"""lse inside its budget counts as worse if it doubled and uses more than a tenth of the budget."""


@dataclass(frozen=True)
class Risk:
    """One risk; `grave` ones stand first."""

    kind: str
    grave: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def find_risks(comparison: Comparison, changes: Changes | None, pins: Sequence[Pin]) -> list[Risk]:
    """All that applies, grave ones first."""
    found = [
        *_answers(comparison),
        *_coverage(comparison),
        *_inside_budget(comparison),
        *_speed(comparison),
        *_sources(comparison, changes),
        *_pins(pins),
    ]
    return sorted(found, key=lambda risk: not risk.grave)


def _answers(comparison: Comparison) -> list[Risk]:
    found = []
    for word in BAD:
        cases = [case for case in comparison.cases if case.candidate["status"] == word]
        if cases:
            new = sum(case.base["status"] == PASSED for case in cases)
            facts = {"word": word, "n": len(cases), "new": new, "cases": _names(cases)}
            found.append(Risk("not_passed", True, facts))
    return found


def _coverage(comparison: Comparison) -> list[Risk]:
    found = []
    chosen, catalogue = (comparison.about.get(key) for key in ("cases", "catalogue"))
    if chosen is not None and catalogue is not None and chosen < catalogue:
        found.append(Risk("selection", True, {"n": chosen, "catalogue": catalogue}))
    lost = [case for case in comparison.cases if case.kind == "lost"]
    if lost:
        found.append(Risk("lost", True, {"n": len(lost), "cases": _names(lost)}))
    for op in comparison.ops:
        if op.verdict == NOT_COMPARABLE:
            found.append(Risk("op_not_covered", False, {"op": op.op}))
    by_reason: dict[str, list[str]] = {}
    side = comparison.about.get("sides", {}).get("candidate", {})
    open_ops = {op.op for op in comparison.ops if op.verdict != NOT_COMPARABLE}
    for offer in side.get("offers", ()):
        if not offer["ok"] and offer["op"] in open_ops:
            by_reason.setdefault(offer["reason"], []).append(f"{offer['op']} {offer['layout']}")
    for reason, what in by_reason.items():
        found.append(Risk("layout_not_covered", False, {"what": what, "reason": reason}))
    not_run = [case for case in comparison.cases if case.candidate["status"] == "not_run"]
    if not_run:
        found.append(Risk("not_run", False, {"n": len(not_run), "cases": _names(not_run)}))
    measured = comparison.about.get("architecture", "")
    others = [a for a in side.get("architectures", ()) if a != measured]
    if others:
        facts = {"architectures": others, "measured": measured}
        found.append(Risk("architecture", False, facts))
    return found


def _inside_budget(comparison: Comparison) -> list[Risk]:
    both = [
        case
        for case in comparison.cases
        if case.base["status"] == case.candidate["status"] == PASSED
    ]
    worse = [case for case in both if case.verdict == WORSE]
    found = []
    if worse:
        most = max(worse, key=lambda case: case.ratio or 0.0)
        facts = {"n": len(worse), "cases": _names(worse), "case": most.case, "ratio": most.ratio}
        found.append(Risk("inside_budget", False, facts))
    grown = [case for case in both if _lse_grew(case.base, case.candidate)]
    if grown:
        found.append(Risk("lse_inside_budget", False, {"n": len(grown), "cases": _names(grown)}))
    return found


def _lse_grew(base: dict[str, Any], candidate: dict[str, Any]) -> bool:
    before, after = base["metrics"] or {}, candidate["metrics"] or {}
    values = [before.get("lse_err"), after.get("lse_err"), after.get("lse_budget")]
    numbers = [v for v in values if isinstance(v, (int, float))]
    if len(numbers) < len(values):
        return False
    old, new, budget = numbers
    return new > LSE_GROWTH * old and new > LSE_SHARE * budget


def _speed(comparison: Comparison) -> list[Risk]:
    if not comparison.speed:
        return [Risk("speed_unmeasured")]
    slower = [row for row in comparison.speed if row["ratio"] and row["ratio"] > MARGIN]
    found = []
    if slower:
        most = max(slower, key=lambda row: row["ratio"])
        facts = {"n": len(slower), "ratio": most["ratio"], "workload": most["workload"]}
        found.append(Risk("speed_lost", False, facts))
    untimed = [row["workload"] for row in comparison.speed if row["ratio"] is None]
    if untimed:
        found.append(Risk("speed_partly", False, {"n": len(untimed), "workloads": untimed}))
    return found


def _sources(comparison: Comparison, changes: Changes | None) -> list[Risk]:
    found = []
    sides = comparison.about.get("sides", {})
    for name in ("base", "candidate"):
        side = sides.get(name, {})
        origin = side.get("origin", {})
        commit = side.get("commit") or origin.get("commit", "")
        if origin.get("dirty"):
            found.append(Risk("dirty", name == "candidate", {"side": name}))
        elif not is_full_hash(commit):
            known = commit or origin.get("version") or "-"
            found.append(Risk("unknown_commit", False, {"side": name, "known": known}))
    runtimes = {side.get("runtime", {}).get("torch") for side in sides.values()} - {None}
    if len(runtimes) > 1:
        found.append(Risk("other_torch", False, {"versions": sorted(runtimes)}))
    if changes is not None:
        if not changes.forward:
            found.append(Risk("diverged", True, {"n": len(changes.dropped)}))
        if changes.later:
            facts = {"n": len(changes.later), "commits": [c.hash[:12] for c in changes.later[:5]]}
            found.append(Risk("later", any(c.repair for c in changes.later), facts))
    return found


def _pins(pins: Sequence[Pin]) -> list[Risk]:
    found = []
    for pin in pins:
        if not pin.weakness:
            continue
        facts = {"where": f"{pin.file.name}:{pin.line}", "name": pin.name, "value": pin.value}
        moving = pin.kind != "requirements" or bool(pin.url)
        if moving:
            found.append(Risk("moving_ref", True, facts))
        else:
            grave = not re.match(r"pinned by version", pin.weakness)
            found.append(Risk("unpinned" if grave else "no_hash", grave, facts))
    return found


def _names(cases: Sequence[Any], most: int = 5) -> list[str]:
    names = [case.case for case in cases[:most]]
    return names + ([f"… +{len(cases) - most}"] if len(cases) > most else [])
