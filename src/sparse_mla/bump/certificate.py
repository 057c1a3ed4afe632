"""What a run of the gate proves about one provider, small enough for a lock file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

import torch

from .. import __version__
from ..accuracy.case import Case
from ..accuracy.check import Report, choose_cases
from ..accuracy.gate import BAD, PASSED

STATUSES = ("passed", "failed", "crashed", "hung", "not_offered", "not_run")

_CATALOGUE = (
    "accuracy/activations",
    "accuracy/case",
    "accuracy/budgets",
    "accuracy/metrics",
    "accuracy/writes",
)
_CATALOGUE_FILES = ("reference.py", "kv_layout.py", "kv_quantise.py", "kv_cache.py")


@dataclass(frozen=True)
class OpResult:
    """One op's results.

    Attributes:
        counts: cases per status.
        error: geometric mean of the measured errors, in multiples of ideal; None if none was.
        worst, worst_case: the largest share of a budget that was used, and where.
        bad: the cases that failed, crashed or hung, with that word.
    """

    counts: dict[str, int]
    error: float | None
    worst: float | None
    worst_case: str
    bad: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Certificate:
    """A run of the gate.

    Attributes:
        gate: version of this library.
        catalogue: hash of what defines cases and budgets.
        cases: "all", "quick" or "case:PATTERN".
        accepted: why cases that did not pass were accepted, "" if all passed.
        machine: device, driver, torch, triton and the like, as text.
    """

    date: str
    gate: str
    catalogue: str
    cases: str
    seed: int
    limit: float
    machine: dict[str, str]
    ops: dict[str, OpResult]
    accepted: str = ""

    @property
    def bad(self) -> dict[str, str]:
        return {case: word for op in self.ops.values() for case, word in op.bad.items()}

    @property
    def summary(self) -> str:
        totals = {s: sum(op.counts.get(s, 0) for op in self.ops.values()) for s in STATUSES}
        words = [f"{n} {status.replace('_', ' ')}" for status, n in totals.items() if n]
        return ", ".join(words)


def catalogue_hash() -> str:
    """Of the sources that define cases, oracle and budgets, and of the packaged activations."""
    digest = hashlib.sha256()
    root = resources.files("sparse_mla")
    names = [
        f"accuracy/{entry.name}"
        for entry in root.joinpath("accuracy").iterdir()
        if f"accuracy/{entry.name}".startswith(_CATALOGUE) and entry.name.endswith(".py")
    ]
    data = [
        f"accuracy/data/{entry.name}"
        for entry in root.joinpath("accuracy/data").iterdir()
        if entry.name.endswith(".safetensors")
    ]
    for name in sorted([*names, *_CATALOGUE_FILES, *data]):
        digest.update(name.encode() + b"\0" + root.joinpath(name).read_bytes())
    return f"sha256:{digest.hexdigest()}"


def selected_cases(selection: str, cases: Sequence[Case]) -> list[Case]:
    """The cases of "all", "quick" or "case:PATTERN"."""
    if selection.startswith("case:"):
        return choose_cases(cases, selection.removeprefix("case:"), False, 0, 0)
    if selection not in ("all", "quick"):
        raise ValueError(f"cases is {selection!r}, expected all, quick or case:PATTERN")
    return choose_cases(cases, None, selection == "quick", 0, 0)


def machine_facts(device: torch.device) -> dict[str, str]:
    """What the certificate was made on."""
    from ..bench.rows import this_machine

    facts = this_machine(device)
    return {
        "device": facts.gpu,
        "driver": facts.driver,
        "torch": facts.torch,
        "triton": facts.triton,
    }


def certify(
    report: Report, selection: str, device: torch.device, accepted: str = ""
) -> Certificate:
    """The certificate of a run of one implementation."""
    ops: dict[str, OpResult] = {}
    for op in dict.fromkeys(row["op"] for row in report.results):
        rows = [row for row in report.results if row["op"] == op]
        measured = [
            (row["metrics"]["multiple"], row["metrics"]["budget"], row["case"])
            for row in rows
            if row["metrics"] and row["metrics"].get("multiple") and row["metrics"].get("budget")
        ]
        logs = [math.log(value) for value, _, _ in measured]
        worst = max(((v / b, name) for v, b, name in measured), default=(None, ""))
        ops[op] = OpResult(
            counts={
                status: n
                for status in STATUSES
                if (n := sum(row["status"] == status for row in rows))
            },
            error=math.exp(sum(logs) / len(logs)) if logs else None,
            worst=worst[0],
            worst_case=worst[1],
            bad={row["case"]: row["status"] for row in rows if row["status"] in BAD},
        )
    return Certificate(
        date=report.about["date"],
        gate=__version__,
        catalogue=catalogue_hash(),
        cases=selection,
        seed=report.about["seed"],
        limit=report.about["limit"],
        machine=machine_facts(device),
        ops=ops,
        accepted=accepted,
    )


def worse_than(now: Certificate, then: Certificate) -> list[str]:
    """What got worse since the certificate was made, one line each.

    Coverage, and every case's word, must be at least as good; errors may move by 5 %, because
    another GPU or compiler sums in another order.
    """
    found = []
    for case, word in now.bad.items():
        before = then.bad.get(case, "passed")
        if before != word and not (before in ("crashed", "hung") and word == "failed"):
            found.append(f"{case} {word}, {before} in the lock")
    for op, old in then.ops.items():
        new = now.ops.get(op)
        if new is None:
            found.append(f"{op}: no case ran, {sum(old.counts.values())} in the lock")
            continue
        fewer = old.counts.get(PASSED, 0) - new.counts.get(PASSED, 0)
        newly_bad = sum(case not in old.bad for case in new.bad)
        if fewer > newly_bad:
            lost = fewer - newly_bad
            found.append(f"{op}: {lost} case(s) that passed are no longer offered or did not run")
        if old.error and new.error and new.error > 1.05 * old.error:
            found.append(f"{op}: error {new.error:.3f}x ideal, {old.error:.3f}x in the lock")
    return found
