"""One provider put on trial by the gate, and whether what it failed can be accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..accuracy.case import Case
from ..accuracy.check import Report, make_provider, run_check
from ..accuracy.faults import get_fault
from ..accuracy.gate import BAD, FAILED, run_case
from ..accuracy.providers.base import Description
from ..isolate.host import IsolatedProvider
from .certificate import selected_cases

SLACK = 1.5
"""An accepted fault explains a case up to this many times its model's error."""


@dataclass(frozen=True)
class Settings:
    """How the gate runs, the same for every command.

    Attributes:
        cases: "all", "quick" or "case:PATTERN".
        time_limit: seconds for one call of a provider.
        on_result: called after each trial, for a progress bar.
    """

    device: torch.device
    cases: str = "all"
    seed: int = 0
    limit: float = 1.7
    time_limit: float = 300.0
    on_result: Callable[[dict[str, Any]], None] | None = None

    def catalogue(self) -> list[Case]:
        from ..accuracy.cases import CASES

        return selected_cases(self.cases, CASES)

    def provider(self, spec: str, label: str | None = None) -> IsolatedProvider:
        """An isolated provider; ValueError if there is none."""
        made = make_provider(spec, self.device, isolate=True, limit=self.time_limit, label=label)
        assert isinstance(made, IsolatedProvider)
        return made


def at(name: str, place: Path) -> str:
    """The spec of a provider that lives in `place`."""
    return f"{name.partition('@')[0]}@{place}"


def describe(provider: IsolatedProvider) -> Description:
    return Description.from_json(provider.describe())


def try_provider(
    spec: str, settings: Settings, cases: Sequence[Case] | None = None, diagnose: bool = True
) -> tuple[Report, Description]:
    """Run the gate on one provider in its own process."""
    chosen = settings.catalogue() if cases is None else list(cases)
    with settings.provider(spec) as provider, torch.no_grad():
        description = describe(provider)
        report = run_check(
            [provider],
            chosen,
            seed=settings.seed,
            device=settings.device,
            limit=settings.limit,
            diagnose=diagnose,
            on_result=settings.on_result,
        )
    return report, description


def known_fault(name: str) -> None:
    """ValueError for a fault to accept that the library does not have; "" is none."""
    if name:
        get_fault(name)


def refusal(report: Report, fault: str, settings: Settings) -> str | None:
    """Why a report is not acceptable; None if it is.

    Args:
        fault: one fault of the library that may be there, "" for none. It explains a failure if
            the diagnosis names it, its own model fails that case, and the error is no more than
            `SLACK` times the model's.
    """
    if report.ok:
        return None
    bad = [row for row in report.results if row["status"] in BAD]
    told = "; ".join(entry["text"] for entry in report.diagnoses)
    words = f"{report.summary}" + (f"; {told}" if told else "")
    if not bad:
        return f"nothing passed: {words}"
    if not fault:
        return words
    gone = [f"{row['case']} {row['status']}" for row in bad if row["status"] != FAILED]
    if gone:
        return f"{gone[0]}, which no fault explains: {words}"
    if [entry["fault"] for entry in report.diagnoses] != [fault]:
        return f"the failures are not {fault}: {words}"
    by_name = {case.name: case for case in settings.catalogue()}
    for row in bad:
        measured = (row["metrics"] or {}).get("multiple")
        model = run_case(
            get_fault(fault).kernel(),
            by_name[row["case"]],
            settings.seed,
            settings.device,
            settings.limit,
        )
        allowed = 0.0 if model.metrics is None else model.metrics.multiple
        if measured is None or model.status != FAILED or measured > SLACK * allowed:
            return f"{fault} does not explain {row['case']} ({row['detail']})"
    return None
