"""The report of a run: one self-contained HTML file, plots included."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .check import STATUS_WORDS, Report
from .gate import BAD, FAILED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1f2933"
BLUE, ORANGE, RED, GREY = "#2166ac", "#d97706", "#c0392b", "#9aa5b1"
WORST_SHOWN = 3


def write_html(report: Report, path: Path) -> None:
    """Draw the report into one file that needs no other."""
    path.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The report as HTML; every text from the run is escaped."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("sparse_mla.accuracy"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    names = sorted({row["implementation"] for row in report.results})
    return environment.get_template("report.html.j2").render(
        report=report,
        words=STATUS_WORDS,
        failures=[r for r in report.results if r["status"] in BAD],
        plots=[_plots(report, name) for name in names],
    )


def _number(value: Any, form: str) -> str:
    return "-" if not isinstance(value, (int, float)) else format(value, form)


def _plots(report: Report, implementation: str) -> dict[str, Any]:
    """The figures of one implementation, as data URIs."""
    rows = [
        r
        for r in report.results
        if r["implementation"] == implementation and _measured(r) and r["op"] != "kv_write"
    ]
    made: dict[str, Any] = {"implementation": implementation, "worst": []}
    if not rows:
        return made
    made["cases"] = as_svg(_case_figure(rows))
    made["histogram"] = as_svg(_histogram(rows))
    for row in sorted(rows, key=_used, reverse=True)[:WORST_SHOWN]:
        metrics = row["metrics"]
        if metrics.get("worst_out") and metrics.get("worst_ref"):
            made["worst"].append({"row": row, "plot": _png(_row_figure(row))})
    return made


def _measured(row: dict[str, Any]) -> bool:
    metrics = row["metrics"] or {}
    return all(isinstance(metrics.get(key), (int, float)) for key in ("multiple", "budget"))


def _used(row: dict[str, Any]) -> float:
    """How much of its budget a case uses; failed cases first."""
    budget = row["metrics"]["budget"]
    share = row["metrics"]["multiple"] / budget if budget else 0.0
    return float(share) + 1e6 * (row["status"] == FAILED)


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def style_axes(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)


def _case_figure(rows: list[dict[str, Any]]) -> Figure:
    """Error per case against ideal rounding and budget, logarithmic."""
    figure = new_figure(9.5, 0.6 + 0.155 * len(rows))
    axes = figure.add_subplot()
    floor = 0.1
    for place, row in enumerate(rows):
        metrics = row["metrics"]
        colour = RED if row["status"] == FAILED else BLUE
        value = max(metrics["multiple"], floor)
        axes.plot(
            [floor, metrics["budget"] or floor],
            [place, place],
            color="#e4e7eb",
            lw=3,
            solid_capstyle="butt",
            zorder=1,
        )
        axes.plot([metrics["budget"] or floor], [place], "|", color=ORANGE, ms=8, mew=1.6, zorder=2)
        axes.plot([value], [place], "o", color=colour, ms=4, zorder=3)
    axes.axvline(1.0, color=GREY, lw=1, zorder=0)
    axes.set_xscale("log")
    # Budgets beyond the axis (fp32 logits of 1e5) would squeeze all others; measured errors stay.
    axes.set_xlim(floor * 0.95, max(10.0, 1.3 * max(r["metrics"]["multiple"] for r in rows)))
    axes.set_ylim(len(rows) - 0.3, -0.7)
    axes.set_yticks(range(len(rows)), [r["case"] for r in rows], parse_math=False)
    axes.xaxis.set_ticks_position("both")
    axes.tick_params(axis="x", labeltop=True)
    axes.set_xlabel(
        "error in multiples of ideal rounding   (dot: measured, bar: budget, line: ideal)",
        fontsize=9,
        color=INK,
    )
    style_axes(axes)
    axes.tick_params(axis="y", labelsize=7)
    return figure


def _histogram(rows: list[dict[str, Any]]) -> Figure:
    """Errors of single rows over all cases, in multiples of ideal."""
    figure = new_figure(9.5, 2.8)
    axes = figure.add_subplot()
    values = [v for r in rows for v in r["metrics"].get("row_multiples", []) if v is not None]
    top = 4.0
    axes.hist([min(v, top) for v in values], bins=80, range=(0, top), color=BLUE)
    axes.axvline(1.0, color=GREY, lw=1)
    axes.set_yscale("log")
    axes.set_xlabel(
        f"error of a row (query token and head) in multiples of ideal; {top:g} and more "
        "in the last bin",
        fontsize=9,
        color=INK,
    )
    axes.set_ylabel("rows", fontsize=9, color=INK)
    style_axes(axes)
    return figure


def _row_figure(row: dict[str, Any]) -> Figure:
    """The worst row of a case: answer against oracle, and their difference."""
    metrics = row["metrics"]
    pairs = zip(metrics["worst_ref"], metrics["worst_out"], strict=False)
    kept = [(a, b) for a, b in pairs if a is not None and b is not None]
    ref, out = [a for a, _ in kept], [b for _, b in kept]
    size = max((abs(a) for a in ref), default=0.0) or 1.0
    figure = new_figure(9.5, 2.6)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.2))
    left.plot([a / size for a in ref], [b / size for b in out], ".", color=BLUE, ms=3)
    left.plot([-1, 1], [-1, 1], color=GREY, lw=0.8, zorder=0)
    left.set_xlabel(f"oracle / {size:.2g}", fontsize=8, color=INK)
    left.set_ylabel(f"answer / {size:.2g}", fontsize=8, color=INK)
    right.plot([(b - a) / size for a, b in kept], ".", color=BLUE, ms=3)
    right.axhline(0, color=GREY, lw=0.8)
    right.set_xlabel("output dim", fontsize=8, color=INK)
    right.set_ylabel("difference", fontsize=8, color=INK)
    for axes in (left, right):
        style_axes(axes)
    return figure


def as_svg(figure: Figure) -> str:
    return _uri(figure, "svg", "image/svg+xml")


def _png(figure: Figure) -> str:
    return _uri(figure, "png", "image/png")


def _uri(figure: Figure, kind: str, mime: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"
