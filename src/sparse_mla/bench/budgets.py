"""Figures of cycle budgets: what each group of warps does in one step of a kernel.

docs/figures/budgets.json holds them, by kernel:

    {"decode_few_heads": {
        "title": "Decode, up to 16 heads: cycles per 32 tokens",
        "floors": {"gather at 2.9 TB/s": 1200},
        "warps": {"consumers": {"QK": 256, "softmax": 300}, "loader": {"issue": 800}}}}

Each becomes budget_<kernel>.svg, drawn from that entry alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

FILE = "budgets.json"
# Okabe and Ito's colours; numbers are white on the dark ones.
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999",
)  # fmt: skip
DARK = {"#0072B2", "#009E73", "#D55E00"}
KEYS = {"title", "floors", "warps"}


def load(folder: Path) -> dict[str, Any]:
    """The budgets in a folder of figures, {} if it has none; ValueError says what is wrong."""
    path = folder / FILE
    if not path.exists():
        return {}
    budgets = json.loads(path.read_text())
    for name, budget in budgets.items():
        if set(budget) != KEYS:
            raise ValueError(f"{path}: {name} has {sorted(budget)}, a budget has {sorted(KEYS)}")
    return dict(budgets)


def digest(name: str, budget: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([name, budget]).encode()).hexdigest()[:16]


def draw(canvas: Any, budget: dict[str, Any]) -> None:
    """Horizontal bars, one per group of warps, their parts one after the other."""
    warps: dict[str, dict[str, float]] = budget["warps"]
    names = list(dict.fromkeys(part for parts in warps.values() for part in parts))
    canvas.set_size_inches(8, 1.5 + 0.5 * len(warps) + 0.2 * (len(names) // 4))
    axis = canvas.subplots()
    longest = max(sum(parts.values()) for parts in warps.values())
    widest = max([longest, *budget["floors"].values()])
    for row, parts in enumerate(warps.values()):
        left = 0.0
        for part, cycles in parts.items():
            colour = COLOURS[names.index(part) % len(COLOURS)]
            axis.barh(row, cycles, left=left, color=colour, edgecolor="white", height=0.7)
            if cycles > 0.045 * widest:
                shade = "white" if colour in DARK else "black"
                middle = left + cycles / 2
                axis.text(middle, row, f"{cycles:g}", ha="center", va="center", color=shade)
            left += cycles
    for number, (floor, cycles) in enumerate(budget["floors"].items()):
        style = ("--", ":", "-.")[number % 3]
        axis.axvline(cycles, color="#444444", linestyle=style, label=f"{floor}: {cycles:g}")
    for number, part in enumerate(names):
        axis.barh(0, 0, color=COLOURS[number % len(COLOURS)], label=part)
    axis.set_yticks(range(len(warps)), list(warps))
    axis.invert_yaxis()
    axis.set_xlim(0, 1.03 * widest)
    axis.set_xlabel("cycles")
    axis.set_title(budget["title"])
    axis.spines[["top", "right"]].set_visible(False)
    canvas.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
