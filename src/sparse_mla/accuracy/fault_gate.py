"""The gate on trial: does it stop every wrong kernel of the fault library, and only those?

Each fault runs through the cases that say they show it, until one catches it; the rest of the
catalogue is tried only if none does. What was caught is then diagnosed. The clean kernel runs
through the whole catalogue and through random cases, where any alarm is a false one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import terminal
from .budgets import DEFAULT_LIMIT
from .case import Case, Implementation
from .cases import CASES, random_case
from .diagnose import investigate
from .faults import FAULTS, CleanKernel
from .faults_fault import Fault
from .gate import FAILED, NOT_RUN, PASSED, CaseResult, Prepared, prepare, run_case

RANDOM_CASES = 200
KEPT_BYTES = 1 << 28


@dataclass(frozen=True)
class FaultResult:
    """What the gate made of one fault.

    Attributes:
        case: the first case that failed; None if all passed.
        detail: what the gate said there.
        tried: how many cases ran until then.
        named: the name that the diagnosis gave; None if it gave none.
        tied: names it could not tell apart, if it said so.
        diagnosis: its one line.
        not_run: cases made for this fault that could not run here, with the reason.
    """

    fault: Fault
    case: str | None
    detail: str
    tried: int
    named: str | None
    tied: tuple[str, ...]
    diagnosis: str
    not_run: tuple[str, ...] = ()

    @property
    def caught(self) -> bool:
        return self.case is not None

    @property
    def named_right(self) -> bool:
        return self.named == self.fault.name


@dataclass(frozen=True)
class FaultsReport:
    """Everything `run_faults` found.

    Attributes:
        faults: one result per fault.
        alarms: cases of the catalogue that the clean kernel failed.
        passed: how many it passed.
        random_alarms: random cases that the clean kernel failed, `seed: detail`.
        random_cases: how many random cases ran.
        seconds: the time all of it took.
    """

    faults: tuple[FaultResult, ...]
    alarms: tuple[str, ...]
    passed: int
    random_alarms: tuple[str, ...]
    random_cases: int
    seconds: float

    @property
    def ok(self) -> bool:
        """All caught, none named wrongly, no alarm on the clean kernel."""
        caught = all(result.caught for result in self.faults)
        wrong = any(result.named and not result.named_right for result in self.faults)
        return caught and not wrong and not self.alarms and not self.random_alarms

    @property
    def summary(self) -> str:
        caught = sum(result.caught for result in self.faults)
        return f"{caught}/{len(self.faults)} faults caught"


class Bench:
    """Cases made once for one seed and device, and shared by all kernels on trial.

    Inputs larger than `KEPT_BYTES` are made anew each time instead of being held.
    """

    def __init__(
        self, seed: int = 0, device: torch.device | str = "cpu", limit: float = DEFAULT_LIMIT
    ) -> None:
        self.seed, self.device, self.limit = seed, torch.device(device), limit
        self._ready: dict[str, Prepared] = {}

    def run(self, implementation: Implementation, case: Case) -> CaseResult:
        ready = self._ready.get(case.name) or prepare(case, self.seed, self.device)
        size = sum(call.cache.pages.untyped_storage().nbytes() for call in ready.calls)
        if size <= KEPT_BYTES:
            self._ready[case.name] = ready
        return run_case(implementation, case, self.seed, self.device, self.limit, ready)


def run_faults(
    cases: Sequence[Case] = CASES,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    limit: float = DEFAULT_LIMIT,
    console: Console | None = None,
) -> int:
    """Put the library and the clean kernel through the gate and print what came of it.

    Returns:
        the exit status: 0 if every fault is caught, none is named wrongly and the clean kernel
        raises no alarm, 1 otherwise.
    """
    out = console or terminal.console()
    with terminal.progress(len(FAULTS) + 2) as step:
        report = try_faults(
            cases=cases,
            seed=seed,
            device=device,
            limit=limit,
            on_step=lambda label: step({"case": label}),
        )
    return print_report(report, out)


def try_faults(
    faults: Sequence[Fault] = FAULTS,
    cases: Sequence[Case] = CASES,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    limit: float = DEFAULT_LIMIT,
    random_cases: int = RANDOM_CASES,
    on_step: Callable[[str], None] | None = None,
) -> FaultsReport:
    """Every fault, and the clean kernel, through the gate.

    Args:
        limit: the gate's case budget in multiples of ideal rounding.
        random_cases: how many random cases the clean kernel must pass besides the catalogue.
        on_step: told what has just been done.
    """
    started = time.perf_counter()
    tell = on_step or (lambda label: None)
    bench = Bench(seed, torch.device(device), limit)
    results = []
    clean = CleanKernel()
    with torch.no_grad(), _one_thread():
        for fault in faults:
            results.append(try_fault(fault, cases, bench))
            tell(fault.name)
        tried = [bench.run(clean, case) for case in cases]
        tell("clean kernel")
        alarms = random_alarms(range(random_cases), device, limit)
        tell("random cases")
    return FaultsReport(
        faults=tuple(results),
        alarms=tuple(f"{r.case}: {r.detail}" for r in tried if r.status == FAILED),
        passed=sum(r.status == PASSED for r in tried),
        random_alarms=tuple(alarms),
        random_cases=random_cases,
        seconds=time.perf_counter() - started,
    )


def try_fault(fault: Fault, cases: Sequence[Case], bench: Bench) -> FaultResult:
    """Run one fault until a case catches it, those made to show it first, and diagnose it."""
    ordered = sorted(cases, key=lambda case: fault.name not in case.shows)
    kernel = fault.kernel()
    not_run = []
    for tried, case in enumerate(ordered, start=1):
        result = bench.run(kernel, case)
        if result.status == NOT_RUN and fault.name in case.shows:
            not_run.append(f"{case.name}: {result.detail}")
        if result.status != FAILED:
            continue
        found, _ = investigate(fault.kernel(), [case], cases, bench.seed, bench.device)
        tied = tuple(match.fault.name for match in found.tied)
        return FaultResult(
            fault, case.name, result.detail, tried, found.name, tied, found.text, tuple(not_run)
        )
    return FaultResult(fault, None, "", len(ordered), None, (), "", tuple(not_run))


def random_alarms(
    seeds: Iterable[int],
    device: torch.device | str = "cpu",
    limit: float = DEFAULT_LIMIT,
    kernel: Implementation | None = None,
) -> list[str]:
    """Random cases that the clean kernel (or `kernel`) fails, one line each."""
    kernel = kernel or CleanKernel()
    alarms = []
    for seed in seeds:
        result = run_case(kernel, random_case(seed), seed, device, limit)
        if result.status == FAILED:
            alarms.append(f"{result.case}: {result.detail}")
    return alarms


def print_report(report: FaultsReport, console: Console) -> int:
    """Print the table, and the summary as the last line; 0 if all is well, 1 otherwise."""
    table = Table(title="Faults through the gate: each stops at the first case that catches it")
    for heading in ("line", "fault", "caught by", "what the gate said", "named"):
        table.add_column(heading, overflow="fold")
    for result in report.faults:
        table.add_row(
            str(result.fault.line),
            result.fault.name,
            result.case or "[red]missed[/red]",
            escape(result.detail),
            _name_cell(result),
        )
    console.print(table)
    for result in report.faults:
        for reason in result.not_run:
            console.print(f"{result.fault.name}: could not run {escape(reason)}")
    right = sum(result.named_right for result in report.faults)
    tied = sum(len(result.tied) > 1 for result in report.faults)
    wrong = sum(result.named is not None and not result.named_right for result in report.faults)
    console.print(f"{right} named right, {tied} tied, {wrong} named wrongly")
    for alarm in report.alarms + report.random_alarms:
        console.print(f"[red]false alarm[/red] {escape(alarm)}")
    console.print(
        f"clean kernel: {report.passed} cases and {report.random_cases} random cases, "
        f"{len(report.alarms) + len(report.random_alarms)} alarms; {report.seconds:.0f} s"
    )
    console.print(report.summary, highlight=False)
    return 0 if report.ok else 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inputs are small: threads cost more than they bring, ten times more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _name_cell(result: FaultResult) -> str:
    if result.named_right:
        return "[green]right[/green]"
    if result.named is not None:
        return f"[red]{result.named}[/red]"
    if result.tied:
        return "one of " + ", ".join(result.tied)
    return "none" if result.caught else ""
