"""How compare, verify and providers look in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..accuracy.check import STATUS_WORDS
from ..accuracy.providers.base import Description
from ..accuracy.terminal import number
from .compare import NOT_COMPARABLE, SAME, Comparison
from .verify import Finding

_COLOURS = {"better": "green", "same": "default", "worse": "bold red", "not comparable": "yellow"}


def print_comparison(comparison: Comparison, out: Console) -> None:
    """Cases that differ, ops, speed, diagnoses; the verdict is the last line."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, justify in (
        ("case", "left"), ("base", "left"), ("error / ideal", "right"), ("gain", "right"),
        ("lse err", "right"), ("candidate", "left"), ("error / ideal", "right"),
        ("gain", "right"), ("lse err", "right"), ("verdict", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    differ = [case for case in comparison.cases if case.verdict not in (SAME, NOT_COMPARABLE)]
    for case in differ:
        cells = [escape(case.case)]
        for row in (case.base, case.candidate):
            metrics = row["metrics"] or {}
            cells += [
                STATUS_WORDS[row["status"]],
                number(metrics.get("multiple"), ".2f"),
                number(metrics.get("gain"), "+.1e"),
                number(metrics.get("lse_err"), ".1e"),
            ]
        cells.append(f"[{_COLOURS[case.verdict]}]{case.verdict}[/]")
        table.add_row(*cells)
    if differ:
        out.print(table)
        out.print()
    for op in comparison.ops:
        counts = ", ".join(f"{n} {word}" for word, n in op.cases.items())
        text = f"{op.op}: [{_COLOURS[op.verdict]}]{op.verdict}[/] ({counts}); {escape(op.reason)}"
        out.print(text, soft_wrap=True, highlight=False)
    _print_speed(comparison.speed, out)
    for side, entry in comparison.diagnoses.items():
        out.print(f"[bold]diagnosis[/] of the {side}: {escape(entry['text'])}", soft_wrap=True)
    out.print()
    out.print(escape(comparison.summary), soft_wrap=True, highlight=False)


def _print_speed(rows: Sequence[dict[str, Any]], out: Console) -> None:
    for row in rows:
        sides = []
        for side in ("base", "candidate"):
            if row[side] is None:
                sides.append(f"{side} {row.get(f'{side}_why', 'not timed')}")
            else:
                sides.append(f"{side} {row[side][1]:.1f} us")
        ratio = "" if row["ratio"] is None else f", candidate / base {row['ratio']:.3f}"
        out.print(escape(f"{row['workload']}: {', '.join(sides)}{ratio}"), soft_wrap=True)


def print_providers(found: Sequence[Description], out: Console) -> None:
    """A table of providers, then what each offers."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("provider", "what", "version", "commit", "built for", "state"):
        table.add_column(name)
    for one in found:
        commit = one.origin.commit[:12] + (" + changes" if one.origin.dirty else "")
        table.add_row(
            escape(one.name),
            escape(one.title),
            escape(one.origin.version) or "-",
            commit or "-",
            ", ".join(one.architectures) or "-",
            escape(one.reason),
        )
    out.print(table)
    offers = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("provider", "op", "layout", "answer", "reason"):
        offers.add_column(name)
    for one in found:
        for offer in one.offers:
            word = "yes" if offer.ok else "no"
            offers.add_row(escape(one.name), offer.op, offer.layout, word, escape(offer.reason))
    if offers.row_count:
        out.print()
        out.print(offers)


def print_findings(found: Sequence[Finding], out: Console) -> None:
    """One line each; the last line says whether the lock holds."""
    for one in found:
        word = "[green]ok[/]" if one.ok else "[bold red]no[/]"
        out.print(f"{word:4} {escape(one.provider)}: {escape(one.text)}", soft_wrap=True)
    wrong = sum(not one.ok for one in found)
    text = "the lock holds" if not wrong else f"the lock does not hold: {wrong} difference(s)"
    out.print(text, highlight=False)
