"""How `sparse-mla check` looks in a terminal: progress, table, failures, summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .case import Case
from .check import STATUS_WORDS, Report
from .gate import BAD, PASSED

PLAIN_WIDTH = 140
"""Columns of the table where there is no terminal to ask."""

LEAST_WIDTH = 80
"""Columns below which a terminal is left to wrap the lines: a narrower table would lose cells."""

RANDOM = "random/"
_COLOURS = {
    "passed": "green",
    "failed": "bold red",
    "crashed": "bold red",
    "hung": "bold red",
    "not_offered": "yellow",
    "not_run": "yellow",
}


class Step(Protocol):
    def __call__(self, row: dict[str, Any]) -> None: ...


def console() -> Console:
    """Standard output; as wide as the table needs where that is not a terminal or a narrow one."""
    plain = Console()
    if not plain.is_terminal:
        return Console(width=PLAIN_WIDTH)
    return plain if plain.width >= LEAST_WIDTH else Console(width=LEAST_WIDTH)


@contextmanager
def progress(total: int) -> Iterator[Step]:
    """A progress bar on standard error, only where that is a terminal."""
    err = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=total)

        def step(row: dict[str, Any]) -> None:
            bar.update(task, advance=1, description=escape(row["case"]))

        yield step


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def results_table(report: Report) -> Table:
    """One line per trial; random cases only where they did not pass."""
    several = len(report.about.get("implementations", [])) > 1
    table = Table(box=None, header_style="bold", pad_edge=False)
    # Names are folded where there is no room for them, so that no verdict is cut off.
    table.add_column("case", overflow="fold")
    if several:
        table.add_column("implementation", overflow="fold")
    for name in ("error / ideal", "budget", "gain", "lse err"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in report.results:
        if row["case"].startswith(RANDOM) and row["status"] == PASSED:
            continue
        metrics = row["metrics"] or {}
        cells = [escape(row["case"])]
        if several:
            cells.append(escape(row["implementation"]))
        word = STATUS_WORDS[row["status"]]
        cells += [
            number(metrics.get("multiple"), ".2f"),
            number(metrics.get("budget"), ".2f"),
            number(metrics.get("gain"), "+.1e"),
            number(metrics.get("lse_err"), ".1e"),
            f"[{_COLOURS[row['status']]}]{word}[/]",
        ]
        table.add_row(*cells)
    return table


def print_report(report: Report, out: Console) -> None:
    """The table, what did not pass and why, and the summary as the last line."""
    out.print(results_table(report))
    random_passed = sum(
        r["case"].startswith(RANDOM) and r["status"] == PASSED for r in report.results
    )
    if random_passed:
        out.print(f"and {random_passed} random cases passed")
    for row in report.results:
        if row["status"] not in BAD:
            continue
        word = STATUS_WORDS[row["status"]]
        out.print()
        out.print(f"[bold red]{escape(row['case'])}[/] {word} on {escape(row['implementation'])}")
        out.print(f"  {escape(row['about'])}", soft_wrap=True)
        out.print(f"  {escape(row['detail'])}", soft_wrap=True)
    skipped: dict[tuple[str, str, str], list[str]] = {}
    for row in report.results:
        if row["status"] not in BAD and row["detail"]:
            key = (STATUS_WORDS[row["status"]], row["implementation"], row["detail"])
            skipped.setdefault(key, []).append(row["case"])
    for (word, name, why), cases in skipped.items():
        out.print()
        out.print(f"[yellow]{word}[/] by {escape(name)}: {escape(why)}", soft_wrap=True)
        out.print(f"  {escape(', '.join(cases))}", soft_wrap=True)
    for entry in report.diagnoses:
        out.print()
        text = f"{entry['implementation']}: {entry['text']}"
        out.print(f"[bold]diagnosis[/] of {escape(text)}", soft_wrap=True)
    out.print()
    out.print(report.summary, highlight=False)


def print_cases(cases: Sequence[Case], out: Console) -> None:
    """The catalogue: names, what they are and which faults they show."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("case", "about", "shows"):
        table.add_column(name, no_wrap=name == "case")
    for case in cases:
        table.add_row(escape(case.name), escape(case.about), ", ".join(case.shows))
    out.print(table)
    out.print(f"{len(cases)} cases", highlight=False)
