"""The report's two plots, without words: captions stand in the report, in its language."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..accuracy.gate import BAD
from ..accuracy.report import BLUE, GREY, INK, RED, as_svg, new_figure, style_axes
from .compare import BETTER, WORSE, CaseVerdict, error_of

SHOWN = 30
FLOOR = 0.1


def errors(cases: Sequence[CaseVerdict]) -> str | None:
    """Error of each case before and after, as a data URI; None if nothing was measured."""
    shown = [case for case in cases if _finite(case.base) or _finite(case.candidate)]
    if not shown:
        return None
    made = new_figure(9.0, 0.55 + 0.17 * len(shown))
    axes = made.add_subplot()
    colours = {BETTER: BLUE, WORSE: RED}
    for place, case in enumerate(shown):
        before, after = _finite(case.base), _finite(case.candidate)
        if before and after:
            colour = colours.get(case.verdict, GREY)
            axes.plot([before, after], [place, place], color=colour, lw=1.2, alpha=0.45, zorder=1)
        for value, row, colour in ((before, case.base, GREY), (after, case.candidate, BLUE)):
            if value:
                mark = "X" if row["status"] in BAD else "o"
                axes.plot([value], [place], mark, color=colour, ms=6, mew=0, zorder=2)
    axes.axvline(1.0, color=INK, lw=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_ylim(len(shown) - 0.3, -0.7)
    axes.set_yticks(range(len(shown)), [case.case for case in shown], parse_math=False)
    left, right = axes.get_xlim()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    # Ticks between powers of ten have room only if there are few.
    wide = right / left > 30
    axes.xaxis.set_minor_formatter(lambda value, _: "" if wide else f"{value:g}x")
    axes.tick_params(axis="x", which="minor", labelsize=8)
    style_axes(axes)
    axes.tick_params(axis="y", labelsize=7.5)
    return as_svg(made)


def speed(rows: Sequence[dict[str, Any]]) -> str | None:
    """Time after over time before per workload, as a data URI; None if nothing was timed."""
    timed = [row for row in rows if row["ratio"]]
    if not timed:
        return None
    made = new_figure(9.0, 0.55 + 0.26 * len(timed))
    axes = made.add_subplot()
    for place, row in enumerate(timed):
        slower = row["ratio"] > 1
        axes.barh(place, row["ratio"] - 1, left=1, color=RED if slower else BLUE, height=0.55)
        low, high = (row["candidate"][k] / row["base"][2 - k] for k in (0, 2))
        axes.plot([low, high], [place, place], color=INK, lw=1)
    axes.axvline(1.0, color=INK, lw=0.8)
    axes.set_ylim(len(timed) - 0.3, -0.7)
    axes.set_yticks(range(len(timed)), [row["workload"] for row in timed], parse_math=False)
    style_axes(axes)
    return as_svg(made)


def _finite(row: dict[str, Any]) -> float | None:
    value = error_of(row)
    return max(value, FLOOR) if value is not None and math.isfinite(value) else None
