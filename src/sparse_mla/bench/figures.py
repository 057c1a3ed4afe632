"""Figures made from rows: time against batch, roofline, accuracy against speed; and budgets.

Each is an SVG that names, in its metadata, a digest of the data it shows: whether a committed
figure is current is decided from data, not pixels, which differ between matplotlib's versions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import budgets
from .rows import Row
from .table import Line, lines
from .workloads import H200, Workload

# Bytes per second of random rows, FLOP per second of a bf16 matmul while the card is not limited
# by power; measured on an H200.
GATHER_RATE = 2.9e12
MATMUL_RATE = 787e12
# Microseconds that an H200 takes to read 2048 random 656-byte rows for so many query tokens.
GATHER_US = {1: 6.0, 4: 7.6, 32: 21.0, 128: 59.0, 512: 236.0}

# Okabe and Ito's colours, told apart by people who see red and green alike.
COLOURS = {"sm90": "#0072B2", "triton": "#009E73", "flash_mla": "#D55E00"}
NAMES = {"sm90": "sm90 (ours)", "triton": "triton (ours)", "flash_mla": "FlashMLA"}
MARKERS = {"sm90": "o", "triton": "s", "flash_mla": "^"}
FLOOR = "#888888"

Point = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure: what it shows, as JSON types, and how that is drawn."""

    name: str
    points: Callable[[Sequence[Line]], list[Point]]
    draw: Callable[[Any, list[Point]], None]

    def digest(self, found: Sequence[Line]) -> str:
        text = json.dumps([self.name, self.points(found)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _of_h200(rows: Iterable[Row]) -> list[Line]:
    return [line for line in lines(rows) if line.ours.gpu.startswith(H200)]


def _both_sides(found: Sequence[Line]) -> list[tuple[str, Row]]:
    """Every row once, with what it is called here; a peer's row beside our best backend's."""
    sides = [(str(line.ours.backend), line.ours) for line in found]
    peers: dict[Workload, Row] = {}
    for line in found:
        if line.peer is not None and (
            line.ours.backend == "sm90" or line.ours.workload not in peers
        ):
            peers[line.ours.workload] = line.peer
    return sides + [(row.provider, row) for row in peers.values() if row.provider in COLOURS]


def floor_us(workload: Workload) -> float:
    """Least time of a v32_fp8 decode with topk 2048: the gather or both products, the longer."""
    known = [math.log(tokens) for tokens in GATHER_US]
    gather = np.interp(math.log(workload.tokens), known, np.log(list(GATHER_US.values())))
    return max(math.exp(gather), 1e6 * workload.flops / MATMUL_RATE)


def _time_points(found: Sequence[Line]) -> list[Point]:
    points = []
    for who, row in _both_sides(found):
        w = row.workload
        if (w.op, w.layout, w.s_q, w.topk) == ("decode", "v32_fp8", 1, 2048):
            points.append(
                {"who": who, "h": w.h_q, "b": w.b, "us": row.p50_us, "p20": row.p20_us,
                 "p80": row.p80_us, "floor": round(floor_us(w), 2)}
            )  # fmt: skip
    return sorted(points, key=lambda p: (p["h"], p["who"], p["b"]))


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks at those values and nowhere else, written as plain numbers."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_time(figure: Any, points: list[Point]) -> None:
    heads = sorted({p["h"] for p in points})
    batches = sorted({p["b"] for p in points})
    columns = min(3, max(1, len(heads)))
    rows = -(-(len(heads) + 1) // columns)
    figure.set_size_inches(3.4 * columns, 2.9 * rows)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axis, h in zip(axes, heads, strict=False):
        mine = [p for p in points if p["h"] == h]
        for who in COLOURS:
            line = [p for p in mine if p["who"] == who]
            if line:
                axis.plot(
                    [p["b"] for p in line],
                    [p["us"] for p in line],
                    color=COLOURS[who],
                    marker=MARKERS[who],
                    markersize=4,
                    label=NAMES[who],
                )
        floor = sorted({(p["b"], p["floor"]) for p in mine})
        axis.plot(*zip(*floor, strict=True), color=FLOOR, linestyle=":", label="floor")
        axis.set_title(f"{h} heads")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        _plain_ticks(axis.xaxis, batches)
        _plain_ticks(axis.yaxis, (5, 10, 20, 50, 100, 200, 500, 1000))
        axis.grid(True, alpha=0.3)
        axis.set_ylabel("us")
        axis.set_xlabel("batch")
        axis.tick_params(labelbottom=True, labelleft=True)
    axes[0].set_ylim(0.8 * min(p["floor"] for p in points), 1.25 * max(p["us"] for p in points))
    for axis in axes[len(heads) :]:
        axis.axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    for axis in axes[1 : len(heads)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    axes[len(heads)].legend(handles, labels, loc="center", frameon=False)
    figure.suptitle("Decode, v32_fp8, topk 2048, s_q 1")


def _roofline_points(found: Sequence[Line]) -> list[Point]:
    points = []
    for who, row in _both_sides(found):
        w = row.workload
        if not w.flops:
            continue  # the cache's writer
        points.append(
            {"who": who, "op": w.op, "h": w.h_q, "label": w.label, "us": row.p50_us,
             "intensity": round(w.flops / w.bytes, 2),
             "tflops": round(w.flops / row.p50_us / 1e6, 2)}
        )  # fmt: skip
    return sorted(points, key=lambda p: (p["label"], p["who"]))


def _draw_roofline(figure: Any, points: list[Point]) -> None:
    figure.set_size_inches(8, 5)
    axis = figure.subplots()
    xs = [p["intensity"] for p in points]
    low, high = 0.7 * min(xs), 1.6 * max(xs)
    ridge = MATMUL_RATE / GATHER_RATE
    roof = [x for x in (low, ridge, high) if low <= x <= high]
    axis.plot(
        roof,
        [min(MATMUL_RATE, x * GATHER_RATE) / 1e12 for x in roof],
        color=FLOOR,
        label="2.9 TB/s random rows, 787 TFLOP/s",
    )
    for who in COLOURS:
        for op, filled in (("decode", True), ("prefill", False)):
            some = [p for p in points if (p["who"], p["op"]) == (who, op)]
            if some:
                axis.scatter(
                    [p["intensity"] for p in some],
                    [p["tflops"] for p in some],
                    s=28,
                    marker=MARKERS[who],
                    edgecolors=COLOURS[who],
                    facecolors=COLOURS[who] if filled else "none",
                    alpha=0.85,
                    label=f"{NAMES[who]}, {op}",
                )
    axis.set_xscale("log")
    axis.set_yscale("log")
    _plain_ticks(axis.xaxis, (10, 20, 50, 100, 200, 500, 1000, 2000))
    _plain_ticks(axis.yaxis, (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000))
    axis.set_ylim(0.8 * min(p["tflops"] for p in points), 1300)
    for h in sorted({p["h"] for p in points if p["op"] == "decode"}):
        x = max(p["intensity"] for p in points if (p["op"], p["h"]) == ("decode", h))
        y = min(MATMUL_RATE, x * GATHER_RATE) / 1e12
        axis.annotate(
            f"{h} heads", (x, y), (-4, 6), textcoords="offset points", ha="right", color="#444444"
        )
    axis.set_xlabel("FLOP per byte (distinct selected rows, queries, outputs)")
    axis.set_ylabel("TFLOP/s for the heads asked for")
    axis.set_title("Achieved rates against the two floors")
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(loc="lower right", fontsize="small")


def _accuracy_points(found: Sequence[Line]) -> list[Point]:
    points = []
    for line in found:
        if line.peer is None or line.ratio is None:
            continue
        w = line.ours.workload
        points.append(
            {"who": str(line.ours.backend), "op": w.op, "label": w.label,
             "ratio": round(line.ratio, 3), "multiple": round(line.ours.multiple, 3)}
        )  # fmt: skip
    for who, row in _both_sides(found):
        if who == "flash_mla":
            w = row.workload
            points.append(
                {"who": who, "op": w.op, "label": w.label, "ratio": 1.0,
                 "multiple": round(row.multiple, 3)}
            )  # fmt: skip
    return sorted(points, key=lambda p: (p["label"], p["who"]))


def _draw_accuracy(figure: Any, points: list[Point]) -> None:
    figure.set_size_inches(8, 4.6)
    axis = figure.subplots()
    for who in COLOURS:
        for op, filled in (("decode", True), ("prefill", False)):
            some = [p for p in points if (p["who"], p["op"]) == (who, op)]
            if some:
                axis.scatter(
                    [p["ratio"] for p in some],
                    [p["multiple"] for p in some],
                    s=28,
                    marker=MARKERS[who],
                    edgecolors=COLOURS[who],
                    facecolors=COLOURS[who] if filled else "none",
                    alpha=0.85,
                    label=f"{NAMES[who]}, {op}",
                )
    axis.axhline(1.0, color=FLOOR, linestyle=":", label="ideal rounding")
    axis.axvline(1.0, color=FLOOR, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    _plain_ticks(axis.xaxis, (0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4))
    _plain_ticks(axis.yaxis, (1, 1.2, 1.5, 2, 3, 4, 6))
    axis.set_xlabel("FlashMLA's time / ours (right is faster)")
    axis.set_ylabel("error in multiples of ideal rounding (down is better)")
    axis.set_title("Accuracy against speed, one point a workload")
    axis.grid(True, alpha=0.3)
    axis.legend(loc="upper right", fontsize="small")


FIGURES = (
    Figure("decode_time", _time_points, _draw_time),
    Figure("roofline", _roofline_points, _draw_roofline),
    Figure("accuracy", _accuracy_points, _draw_accuracy),
)


def _drawings(rows: Iterable[Row], folder: Path) -> dict[str, tuple[str, Callable[[Any], None]]]:
    """By file name: a digest of what a figure shows, and a function that draws it."""
    found = _of_h200(rows)
    made: dict[str, tuple[str, Callable[[Any], None]]] = {}
    for figure in FIGURES:
        points = figure.points(found)
        if points:
            made[figure.name] = figure.digest(found), partial(_draw, figure, points)
    for name, budget in budgets.load(folder).items():
        draw = partial(budgets.draw, budget=budget)
        made[f"budget_{name}"] = budgets.digest(name, budget), draw
    return made


def _draw(figure: Figure, points: list[Point], canvas: Any) -> None:
    figure.draw(canvas, points)


def write_all(rows: Iterable[Row], folder: Path, kind: str = "svg") -> None:
    """Draw every figure from the H200's newest rows: the same data, the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    folder.mkdir(parents=True, exist_ok=True)
    for name, (digest, draw) in _drawings(rows, folder).items():
        with matplotlib.rc_context({"svg.hashsalt": name, "font.size": 9}):
            canvas = Canvas(layout="constrained", dpi=120)
            FigureCanvasAgg(canvas)
            draw(canvas)
            metadata = {"Date": None, "Description": f"data {digest}"}
            canvas.savefig(folder / f"{name}.{kind}", metadata=metadata if kind == "svg" else None)


def current(rows: Iterable[Row], folder: Path) -> dict[str, bool]:
    """Whether each figure that there should be is there and shows the newest rows."""
    answers = {}
    for name, (digest, _) in _drawings(rows, folder).items():
        path = folder / f"{name}.svg"
        answers[name] = path.exists() and f"data {digest}" in path.read_text()
    return answers
