"""The regression's report: one self-contained HTML file, plots included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..accuracy.report import BLUE, GREY, INK, ORANGE, RED, as_svg, new_figure, style_axes
from .compare import compare
from .regression import HEALTHY, Measured, Regression

SHOWN = 4
TIERS = {"operator": "the gate", "kl": "KL", "accuracy": "the answers"}


def write_report(regression: Regression, path: Path) -> None:
    path.write_text(render(regression), encoding="utf-8")


def render(regression: Regression) -> str:
    """The report as HTML; every text from the run is escaped."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("sparse_mla.evals"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    measured = regression.measured
    return environment.get_template("regression.html.j2").render(
        about=regression.about,
        measured=measured,
        tiers=TIERS,
        answers=as_svg(_answers(measured)),
        errors=as_svg(_errors(measured)),
        examples=_examples(measured),
        conclusions=conclusions(regression),
    )


def table(regression: Regression) -> list[str]:
    """The variants as lines for a terminal."""
    head = ("attention", "accuracy, 95 % interval", "lost/won", "KL to bf16", "gate")
    rows = [head, *map(_cells, regression.measured)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _cells(one: Measured) -> tuple[str, ...]:
    share = one.log.share
    return (
        one.variant.label,
        f"{share.value:.4f}  {share.low:.4f} to {share.high:.4f}",
        f"{one.only_reference}/{one.only_variant}",
        f"{one.fidelity.kl.mean:.1e}",
        "passed" if one.operator.passed else f"failed, names {one.operator.diagnosis}",
    )


def conclusions(regression: Regression) -> list[str]:
    """A sentence for every fault: which tiers see it, and what the answers say."""
    healthy = next(one for one in regression.measured if one.variant.key == HEALTHY)
    base = healthy.fidelity.kl.mean
    found = []
    for one in regression.measured:
        if one.variant.fault in (None, "clean"):
            continue
        tiers = [TIERS[tier] for tier in one.seen]
        seen = " and ".join(filter(None, [", ".join(tiers[:-1]), *tiers[-1:]])) or "no tier"
        kl = f"KL is {one.fidelity.kl.mean / base:.3g}x the healthy cache's, " if base > 0 else ""
        found.append(
            f"{one.variant.label} is seen by {seen}: {kl}and {one.only_reference} of "
            f"{one.log.share.count} answers are lost, {one.only_variant} won (p = {one.p:.2g})"
        )
    return found


def _colour(one: Measured) -> str:
    if one.variant.fault in (None, "clean"):
        return BLUE
    return RED if "accuracy" in one.seen else ORANGE


def _labels(measured: list[Measured], axes: Any) -> None:
    axes.set_yticks(range(len(measured)), [one.variant.label for one in measured])
    axes.set_ylim(len(measured) - 0.5, -0.5)
    style_axes(axes)


def _answers(measured: list[Measured]) -> Any:
    """Accuracy of every variant with its interval."""
    figure = new_figure(9.5, 2.6)
    axes = figure.add_subplot()
    for place, one in enumerate(measured):
        share = one.log.share
        axes.plot([share.low, share.high], [place, place], color=_colour(one), lw=2)
        axes.plot([share.value], [place], "o", color=_colour(one), ms=6)
    axes.set_xlabel("share of right answers, 95 % interval (Wilson)", fontsize=9, color=INK)
    least = min(one.log.share.low for one in measured)
    axes.set_xlim(max(0.0, least - 0.2 * (1 - least)), 1 + 0.05 * (1 - least))
    _labels(measured, axes)
    return figure


def _errors(measured: list[Measured]) -> Any:
    """Operator error against its budget, and KL with its interval; both logarithmic."""
    figure = new_figure(9.5, 2.8)
    left, right = figure.subplots(1, 2)
    for place, one in enumerate(measured):
        colour = _colour(one)
        left.plot([one.operator.multiple], [place], "o", color=colour, ms=6)
        left.plot([one.operator.budget], [place], "|", color=INK, ms=12)
        if one.fidelity.kl.mean > 0:
            interval = one.fidelity.kl
            right.plot(
                [max(interval.low, 1e-12), interval.high], [place, place], color=colour, lw=2
            )
            right.plot([interval.mean], [place], "o", color=colour, ms=6)
    left.axvline(1.0, color=GREY, lw=1)
    left.set_xscale("log")
    left.set_xlabel("operator error, multiples of ideal (bar: budget)", fontsize=9, color=INK)
    right.set_xscale("log")
    right.set_xlabel("KL to bf16, nats per token, 95 % interval", fontsize=9, color=INK)
    _labels(measured, left)
    _labels(measured, right)
    right.set_yticklabels([])
    return figure


def _examples(measured: list[Measured]) -> list[dict[str, Any]]:
    """Problems that a fault turned from right to wrong."""
    healthy = next(one for one in measured if one.variant.key == HEALTHY)
    found = []
    for one in measured:
        if one.variant.fault is None:
            continue
        pairs = compare(healthy.log, one.log).disagreements
        lost = [pair for pair in pairs if pair[0].right][:SHOWN]
        if lost:
            found.append({"label": one.variant.label, "pairs": lost})
    return found
