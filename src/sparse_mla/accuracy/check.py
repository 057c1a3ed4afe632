"""What `sparse-mla check` does, without its terminal: choose, run, keep, save and load."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from .case import Case, Implementation, NotOffered, Raised
from .gate import (
    BAD,
    CRASHED,
    FAILED,
    HUNG,
    NOT_OFFERED,
    NOT_RUN,
    PASSED,
    CaseResult,
    Prepared,
    context_lost,
    run_catalogue,
)
from .providers import load

FORMAT = "sparse_mla.check/1"
EVIDENCE = 6
"""Failing cases that the diagnosis looks at."""

STATUS_WORDS = {
    PASSED: "passed",
    FAILED: "failed",
    CRASHED: "crashed",
    HUNG: "hung",
    NOT_OFFERED: "not offered",
    NOT_RUN: "not run",
}


@dataclass
class Report:
    """A finished run, as it is printed, saved and drawn.

    Attributes:
        about: facts of the run: machine, versions, cases of the catalogue that were chosen and how
            many there are, date, seed, limit, implementations.
        results: one dict per trial, `CaseResult.as_json`.
        diagnoses: per implementation that failed: "implementation", "fault" (or null), "text".
    """

    about: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)
    diagnoses: list[dict[str, Any]] = field(default_factory=list)

    def count(self, status: str) -> int:
        return sum(r["status"] == status for r in self.results)

    @property
    def summary(self) -> str:
        """The command's last line."""
        line = f"{self.count(PASSED)} cases passed, {self.count(FAILED)} failed"
        for status in (CRASHED, HUNG, NOT_OFFERED, NOT_RUN):
            if self.count(status):
                line += f", {self.count(status)} {STATUS_WORDS[status]}"
        return line

    @property
    def ok(self) -> bool:
        """Something passed and nothing failed, crashed or hung."""
        return not any(self.count(status) for status in BAD) and self.count(PASSED) > 0

    def save(self, path: Path) -> None:
        fields = {"about": self.about, "results": self.results, "diagnoses": self.diagnoses}
        text = json.dumps({"format": FORMAT, **fields}, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")


def load_report(path: Path) -> Report:
    """Read what `Report.save` wrote; ValueError for a truncated or foreign file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or not JSON: {error}") from error
    kind = data.get("format") if isinstance(data, dict) else None
    if kind != FORMAT:
        raise ValueError(f"{path} has format {kind!r}, expected {FORMAT!r}")
    about, results = data.get("about"), data.get("results")
    if not isinstance(about, dict) or not isinstance(results, list):
        raise ValueError(f"{path} lacks 'about' or 'results'")
    for number, result in enumerate(results):
        if not _is_result(result):
            raise ValueError(f"{path}: result {number} is not one that check wrote")
    diagnoses = data.get("diagnoses", [])
    if not isinstance(diagnoses, list) or not all(_is_diagnosis(d) for d in diagnoses):
        raise ValueError(f"{path}: 'diagnoses' is not what check wrote")
    return Report(about, results, diagnoses)


def _is_diagnosis(entry: Any) -> bool:
    texts = ("implementation", "text")
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in texts)


def _is_result(result: Any) -> bool:
    if not isinstance(result, dict) or result.get("status") not in STATUS_WORDS:
        return False
    texts = ("case", "op", "about", "implementation", "detail")
    if not all(isinstance(result.get(key), str) for key in texts):
        return False
    metrics = result.get("metrics")
    return metrics is None or isinstance(metrics, dict)


def machine(device: torch.device) -> dict[str, str]:
    """What the results were measured on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": f"{device.type}: {name}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


def choose_cases(
    cases: Sequence[Case], pattern: str | None, quick: bool, extra: int, seed: int
) -> list[Case]:
    """The cases to run.

    Args:
        pattern: a shell pattern of case names, or the beginning of a part of them ("heads",
            "decode/scales").
        quick: only the short set.
        extra: how many random cases to add.

    Raises:
        ValueError: the pattern matches nothing.
    """
    from .cases import random_case

    chosen = [c for c in cases if c.quick or not quick]
    if pattern is not None:
        part = f"/{pattern}"
        chosen = [c for c in cases if part in f"/{c.name}" or fnmatchcase(c.name, pattern)]
        if not chosen:
            raise ValueError(f"no case matches {pattern!r}; --list shows all names")
    return chosen + [random_case(seed * 1_000_003 + i) for i in range(extra)]


def make_provider(
    spec: str,
    device: torch.device,
    *,
    isolate: bool = False,
    limit: float | None = None,
    label: str | None = None,
) -> Implementation:
    """A provider from what the user wrote: NAME, or NAME@PATH for one that lives elsewhere.

    Args:
        isolate: in a process of its own even without a path.
        limit: seconds for a call in a process of its own.
        label: the name in results, default the spec.

    Raises:
        ValueError: no such provider, interpreter or directory; one line.
    """
    from ..isolate.host import TIME_LIMIT, IsolatedProvider, find_home, here

    name, at, path = spec.partition("@")
    if not name or (at and not path):
        raise ValueError(f"provider is {spec!r}, expected NAME or NAME@PATH")
    try:
        if at or isolate:
            home = find_home(path) if at else here()
            return IsolatedProvider(name, home, device, limit or TIME_LIMIT, label or spec)
        return load(name)
    except Exception as error:  # importing foreign code can raise anything
        reason = " ".join(str(error).split())
        told = isinstance(error, (ValueError, Raised, NotOffered))
        kind = "" if told else f"{type(error).__name__}: "
        raise ValueError(f"provider {spec!r} cannot be used: {kind}{reason}") from error


def choose_implementations(
    backends: Sequence[str],
    providers: Sequence[str],
    device: torch.device,
    isolate: bool = False,
    limit: float | None = None,
) -> list[Implementation]:
    """What to put on trial: the named ones, or every backend that runs on this machine.

    Raises:
        ValueError: a backend that does not exist or does not run here, a module that cannot be
            imported or has none of FlashMLA's functions.
    """
    from .. import dispatch

    available = dispatch.available_backends(device)
    for name in backends:
        if name not in available:
            raise ValueError(
                f"backend {name!r} does not run on {device}; available: "
                f"{', '.join(available) or 'none'}"
            )
    specs = [*backends, *providers] or available
    options: dict[str, Any] = {"isolate": isolate, "limit": limit}
    return [make_provider(spec, device, **options) for spec in specs]


def run_check(
    implementations: Sequence[Implementation],
    cases: Sequence[Case],
    *,
    seed: int,
    device: torch.device,
    limit: float,
    diagnose: bool = True,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> Report:
    """Run the gate and keep what a report needs; `on_result` is called after each trial."""
    from .cases import CASES

    catalogue = {case.name for case in CASES}
    about: dict[str, Any] = {
        **machine(device),
        "cases": sum(case.name in catalogue for case in cases),
        "catalogue": len(catalogue),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "limit": limit,
        "implementations": [i.name for i in implementations],
    }
    report = Report(about)

    failing: dict[str, list[Case]] = {}
    by_name = {case.name: case for case in cases}

    def keep(result: CaseResult, ready: Prepared) -> None:
        row = result.as_json()
        report.results.append(row)
        if result.status == FAILED and result.metrics is not None:
            failing.setdefault(result.implementation, []).append(by_name[result.case])
        if on_result is not None:
            on_result(row)

    run_catalogue(implementations, cases, seed, device, limit, keep)
    if diagnose:
        for implementation in implementations:
            wrong = failing.get(implementation.name, [])
            if wrong and context_lost(device):
                text = "not possible, the CUDA context was lost: run the failing cases with --case"
                report.diagnoses.append(
                    {"implementation": implementation.name, "fault": None, "text": text}
                )
            elif wrong:
                report.diagnoses.append(_diagnosis(implementation, wrong, seed, device))
    return report


def _diagnosis(
    implementation: Implementation, failing: list[Case], seed: int, device: torch.device
) -> dict[str, Any]:
    """Which known fault explains the failures."""
    from .cases import CASES
    from .diagnose import investigate

    # Cases past 2^31 bytes tell little beyond themselves and cost most.
    order = sorted(failing, key=lambda case: "offsets" in case.name)
    verdict, _ = investigate(implementation, order[:EVIDENCE], CASES, seed, device)
    return {
        "implementation": implementation.name,
        "fault": verdict.name,
        "text": verdict.text,
        "cases": [case.name for case in order[:EVIDENCE]],
    }
