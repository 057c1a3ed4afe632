"""Which cases a named fault explains, and what is left of a wrong candidate's error.

The faultless model (bf16 weights, fp32 sums, exact reads) runs on the cases that the candidate
failed; the difference between its error and the candidate's is what removing the fault would gain.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from ..accuracy.case import Case, Implementation, NotOffered
from ..accuracy.check import Report
from ..accuracy.diagnose import GONE, diagnose, observe
from ..accuracy.faults import FAULTS, CleanKernel, get_fault
from ..accuracy.gate import FAILED, run_case

CASES = 12
"""Failing cases that the model runs on."""

SCALE_READS = (
    "scale_pow2_down",
    "scale_bf16",
    "dequantised_bf16",
    "scale_neighbour_tile",
    "scale_neighbour_token",
)


def name_faults(
    report: Report,
    implementations: Sequence[Implementation],
    cases: Sequence[Case],
    seed: int,
    device: torch.device,
) -> None:
    """Write "fault" to every failed row: the named fault, if its model reproduces that case too.

    The diagnosis names faults from a few cases (check.EVIDENCE); this looks at each but those with
    caches past 2^31 bytes. None: no named fault reproduces it.
    """
    by_name = {case.name: case for case in cases}
    for implementation in implementations:
        told = [d for d in report.diagnoses if d["implementation"] == implementation.name]
        names = [n for d in told for n in re.findall(r"\w+", f"{d['fault']} {d['text']}")]
        faults = [fault for fault in FAULTS if fault.name in names]
        for row in report.results:
            if row["implementation"] != implementation.name or row["status"] != FAILED:
                continue
            if not faults or row["metrics"] is None or "offsets" in row["case"]:
                continue
            try:
                trial = observe(implementation, by_name[row["case"]], seed, device, runs=1)
            except (NotOffered, *GONE):
                continue
            best = diagnose([trial], faults)[0]
            row["fault"] = best.fault.name if best.fits else None


def what_remains(
    report: Report,
    cases: Sequence[Case],
    seed: int,
    device: torch.device,
    limit: float,
    implementation: str = "candidate",
) -> dict[str, Any] | None:
    """The fault, the median error with it and without it; None where nothing wrong was measured."""
    wrong = {
        row["case"]: row["metrics"]["multiple"]
        for row in report.results
        if row["implementation"] == implementation
        and row["status"] == FAILED
        and row["op"] != "kv_write"
        and (row["metrics"] or {}).get("multiple") is not None
    }
    if not wrong:
        return None
    told = [d for d in report.diagnoses if d["implementation"] == implementation]
    fault = told[0]["fault"] if told else None
    chosen = [case for case in cases if case.name in wrong and "offsets" not in case.name]
    without = []
    for case in chosen[:CASES]:
        result = run_case(CleanKernel(), case, seed, device, limit)
        if result.metrics is not None:
            without.append(result.metrics.multiple)
    return {
        "fault": fault,
        "about": get_fault(fault).about if fault else "",
        "exact_read": fault in SCALE_READS,
        "cases": len(wrong),
        "median": median(wrong.values()),
        "without": median(without) if without else None,
    }
