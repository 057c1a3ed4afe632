"""What documents say of the trained model and of evaluations, written from committed results.

    python tools/evaluation_tables.py

A generated part stands between two marks; only it is replaced. The learning curve goes beside the
model.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_mla.accuracy.report import BLUE, GREY, INK, ORANGE, new_figure, style_axes
from sparse_mla.evals.layouts import load_found, tables
from sparse_mla.evals.regression import load_regression
from sparse_mla.evals.regression_report import TIERS

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("models/tiny-glm5")
REGRESSION = Path("docs/reports/regression-h200.json")
LAYOUTS = Path("docs/reports/smollm2-layouts.json")
CURVE = MODEL / "training.svg"


def training(root: Path) -> str:
    """What training did, from the file it left."""
    made = json.loads((root / MODEL / "training.json").read_text())
    rows = made["rows"]
    ends = {row["phase"]: row for row in rows}
    lines = [
        f"From [training.json]({MODEL / 'training.json'}): seed {made['seed']}, {made['steps']} "
        f"steps in {rows[-1]['seconds']:.0f} s on one H200, torch {made['torch']}.",
        "",
        "| phase | to step | loss | indexer's KL | tokens/s |",
        "|---|---|---|---|---|",
    ]
    names = {"dense": "dense", "warm_up": "warm-up", "sparse": "sparse"}
    for phase, name in names.items():
        row = ends[phase]
        loss = "-" if phase == "warm_up" else f"{row['loss']:.4f}"
        kl = "-" if phase == "dense" else f"{row['kl']:.3f}"
        speeds = sorted(r["tokens_per_second"] for r in rows if r["phase"] == phase)
        # A step of the warm-up uses a few sequences of its batch only.
        speed = "-" if phase == "warm_up" else f"{speeds[len(speeds) // 2] / 1e6:.2f} M"
        lines.append(f"| {name} | {row['step']} | {loss} | {kl} | {speed} |")
    found = made["accuracy"]
    lines += [
        "",
        f"Accuracy with bf16 weights, in the training's own decoder: **{found['sparse']:.4f}** on "
        f"the 1,319 held-out problems with the sparse selection, {found['dense']:.4f} on the first "
        "256 of them with dense attention.",
    ]
    return "\n".join(lines)


def checksums(root: Path) -> str:
    """The model's files with sizes and SHA-256."""
    names = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
             "tokenizer_config.json", "training.json")  # fmt: skip
    lines = ["| file | bytes | sha256 |", "|---|---|---|"]
    for name in names:
        data = (root / MODEL / name).read_bytes()
        lines.append(f"| {name} | {len(data)} | `{hashlib.sha256(data).hexdigest()}` |")
    return "\n".join(lines)


def regression(root: Path) -> str:
    """The three tiers over the trained model, from the committed run."""
    made = load_regression(root / REGRESSION)
    lines = [
        f"{made.about['device']}, torch {made.about['torch']}, commit {made.about['commit']}, "
        f"{made.about['problems']} problems, KL over {made.measured[0].fidelity.tokens} tokens; "
        f"[report]({REGRESSION.with_suffix('.html')}):",
        "",
        "| attention | accuracy, 95 % interval | lost / won | McNemar p | KL to bf16 | operator "
        "error / ideal | gate | seen by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in made.measured:
        share, operator = one.log.share, one.operator
        gate = "passed" if operator.passed else f"names `{operator.diagnosis}`"
        lines.append(
            f"| {one.variant.label} | {share.value:.4f} ({share.low:.4f} to {share.high:.4f}) | "
            f"{one.only_reference} / {one.only_variant} | {one.p:.2g} | "
            f"{one.fidelity.kl.mean:.1e} | {operator.multiple:.3g} | {gate} | "
            f"{', '.join(TIERS[tier] for tier in one.seen) or '-'} |"
        )
    return "\n".join(lines)


def layouts(root: Path) -> str:
    """SmolLM2 through every layout."""
    made = load_found(root / LAYOUTS)
    about = made.about
    return "\n".join(
        [
            f"{about['model']}, {about['texts']} texts with {about['tokens']} predicted tokens, "
            f"torch {about['torch']}; intervals at 95 %, texts drawn again:",
            "",
            *tables(made)[0],
        ]
    )


def faults(root: Path) -> str:
    """The fault library ranked by KL."""
    made = load_found(root / LAYOUTS)
    silent = ", ".join(f"`{name}`" for name in made.silent)
    return "\n".join([*tables(made)[1], "", f"Without effect on these texts: {silent}."])


# Document, mark, and what stands there.
PARTS: tuple[tuple[str, str, Callable[[Path], str]], ...] = (
    ("docs/tiny-model.md", "training", training),
    ("docs/evaluation.md", "regression", regression),
    ("docs/evaluation.md", "layouts", layouts),
    ("docs/evaluation.md", "faults", faults),
    ("models/tiny-glm5/README.md", "training", training),
    ("models/tiny-glm5/README.md", "checksums", checksums),
)


def documents(root: Path) -> dict[Path, str]:
    """Every document with its generated parts as they should be."""
    texts: dict[Path, str] = {}
    for name, mark, make in PARTS:
        path = root / name
        text = texts.get(path) or path.read_text(encoding="utf-8")
        texts[path] = replaced(text, mark, linked(make(root), path.relative_to(root)), name)
    return texts


def linked(text: str, document: Path) -> str:
    """Links, written from the root, as they are from the document's folder."""
    up = "../" * (len(document.parts) - 1)
    near = f"]({document.parent}/"
    return re.sub(r"\]\((?!https?:|#)", "](" + up, text.replace(near, "](#near/")).replace(
        "](#near/", "]("
    )


def replaced(text: str, mark: str, part: str, name: str) -> str:
    begin = f"<!-- {mark}: tools/evaluation_tables.py -->"
    end = f"<!-- end of {mark} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{name} must hold {begin!r} and {end!r} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{part}\n{end}{rest.split(end)[1]}"


def curve(root: Path) -> Any:
    """Loss and the indexer's KL over the steps."""
    rows = json.loads((root / MODEL / "training.json").read_text())["rows"]
    figure = new_figure(8.0, 3.0)
    axes = figure.add_subplot()
    trained = [row for row in rows if row["phase"] != "warm_up"]
    selecting = [row for row in rows if row["phase"] != "dense"]
    axes.plot([r["step"] for r in trained], [r["loss"] for r in trained], color=BLUE, lw=1.3,
              label="loss")  # fmt: skip
    axes.plot([r["step"] for r in selecting], [r["kl"] for r in selecting], color=ORANGE, lw=1.3,
              label="indexer's KL")  # fmt: skip
    axes.set_yscale("log")
    for phase, name in (("warm_up", "warm-up"), ("sparse", "sparse")):
        first = min(row["step"] for row in rows if row["phase"] == phase)
        axes.axvline(first, color=GREY, lw=0.8)
        side = "right" if name == "warm-up" else "left"
        axes.text(first, 1.02, f" {name} ", transform=axes.get_xaxis_transform(), fontsize=8,
                  color=INK, ha=side)  # fmt: skip
    axes.set_xlabel("step of 64 sequences, 49,152 tokens", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=9)
    style_axes(axes)
    return figure


def main() -> int:
    for path, text in documents(ROOT).items():
        path.write_text(text, encoding="utf-8")
    figure = curve(ROOT)
    figure.savefig(ROOT / CURVE, format="svg", bbox_inches="tight", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
