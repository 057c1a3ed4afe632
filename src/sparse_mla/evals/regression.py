"""The regression that started this project, reproduced and repaired on a trained model.

Five ways to attend, three tiers that look: the gate on the model's own attention calls, KL of its
predictions, and its answers. docs/evaluation.md reads the result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .compare import compare
from .fidelity import Fidelity, Interval, bootstrap, fidelity, predictions
from .log import Answered, Log
from .model import CLEAN, attach, detach
from .operator_tier import OperatorError, operator_error, record
from .run import ask
from .tasks import ProblemSet

FORMAT = "sparse_mla.regression/2"

SIGNIFICANT = 0.05
MARGIN = 0.25
"""KL beyond the healthy FP8 cache's own counts as seen from this share of it on: two right kernels
that round their weights differently are apart by less."""


@dataclass(frozen=True)
class Variant:
    """One way to attend. `fault` is None for this library's kernels."""

    key: str
    label: str
    layout: str
    fault: str | None
    about: str


VARIANTS = (
    Variant("bf16", "bf16", "bf16", None, "this library's kernel over an unquantised cache"),
    Variant("fp8", "v32_fp8", "v32_fp8", None, "this library's kernel over the FP8 cache"),
    Variant(
        "fault_1", "v32_fp8, fault 1", "v32_fp8", "scale_pow2_down",
        "a kernel that rounds the cache's fp32 scales down to powers of two",
    ),
    Variant(
        "fault_2", "v32_fp8, fault 2", "v32_fp8", "scale_bf16",
        "a kernel that rounds the cache's fp32 scales to bf16",
    ),
    Variant(
        "repaired", "v32_fp8, repaired", "v32_fp8", CLEAN,
        "the same kernel without the conversion",
    ),
)  # fmt: skip
REFERENCE, HEALTHY = "bf16", "fp8"


@dataclass
class Measured:
    """A variant's results at the three tiers.

    Attributes:
        excess: mean KL beyond that of the healthy FP8 cache, problem by problem.
        only_reference, only_variant, p: answers against those of the healthy FP8 cache, McNemar.
        seen: tiers that tell it from the healthy one: "operator", "kl", "accuracy".
    """

    variant: Variant
    log: Log
    fidelity: Fidelity
    operator: OperatorError
    excess: Interval
    only_reference: int = 0
    only_variant: int = 0
    p: float = 1.0
    seen: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """The cheapest tier that sees it, in words."""
        return self.seen[0] if self.seen else "none"


@dataclass
class Regression:
    """The whole experiment."""

    about: dict[str, Any]
    measured: list[Measured]

    def save(self, path: Path) -> None:
        """Write a file of tens of KB: texts are kept of problems that some variant got wrong."""
        wrong = sorted({a.number for one in self.measured for a in one.log.answered if not a.right})
        rows = []
        for one in self.measured:
            answered = {a.number: a for a in one.log.answered}
            row = asdict(replace(one, log=Log({})))
            row["log"] = {
                "about": one.log.about,
                "count": len(answered),
                "shown": [asdict(answered[number]) for number in wrong],
            }
            row["first"] = one.first
            rows.append(row)
        made = {"format": FORMAT, "about": self.about, "variants": rows}
        path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def load_regression(path: Path) -> Regression:
    """Read what `Regression.save` wrote; ValueError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise ValueError(f"format is {data.get('format')!r}, expected {FORMAT!r}")
        measured = [_measured(row) for row in data["variants"]]
        return Regression(data["about"], measured)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what eval regression wrote: {error}") from error


def _measured(row: dict[str, Any]) -> Measured:
    shown = {one["number"]: Answered(**one) for one in row["log"]["shown"]}
    # Problems that every variant got right were kept without their texts.
    right = [Answered(i, "", "", None, True, "") for i in range(row["log"]["count"])]
    log = Log(row["log"]["about"], [shown.get(one.number, one) for one in right])
    kl = {**row["fidelity"], "kl": Interval(**row["fidelity"]["kl"])}
    return Measured(
        variant=Variant(**row["variant"]),
        log=log,
        fidelity=Fidelity(**kl),
        operator=OperatorError(**row["operator"]),
        excess=Interval(**row["excess"]),
        only_reference=row["only_reference"],
        only_variant=row["only_variant"],
        p=row["p"],
        seen=row["seen"],
        seconds=row["seconds"],
    )


class Progress:
    """What a run reports; every method may be overridden."""

    def variant(self, variant: Variant, problems: int) -> None: ...

    def answer(self, number: int, text: str, right: bool) -> None: ...

    def done(self, measured: Measured) -> None: ...


def run_regression(
    model: Any,
    tokenizer: Any,
    problems: ProblemSet,
    *,
    kl_problems: int = 32,
    batch: int = 64,
    progress: Progress | None = None,
    about: dict[str, Any] | None = None,
) -> Regression:
    """Measure every variant.

    Args:
        kl_problems: problems whose worked answers are used for KL.
        batch: problems answered at a time.
    """
    told = progress or Progress()
    begun = time.monotonic()
    calls = {
        layout: record(model, tokenizer, problems, layout)
        for layout in sorted({variant.layout for variant in VARIANTS})
    }
    expected: list[torch.Tensor] = []
    healthy: Measured | None = None
    measured: list[Measured] = []
    for variant in VARIANTS:
        told.variant(variant, len(problems.asked))
        seconds: dict[str, float] = {}

        operator = _timed(
            seconds, "operator", partial(operator_error, calls[variant.layout], variant.fault)
        )
        attach(model, variant.layout, variant.fault)
        try:
            predicted = _timed(
                seconds, "kl", partial(predictions, model, tokenizer, problems, kl_problems)
            )
            facts = {**(about or {}), "layout": variant.layout, "fault": variant.fault}
            asking = partial(ask, model, tokenizer, problems, batch=batch, about=facts)
            log = _timed(seconds, "accuracy", partial(asking, on_answer=told.answer))
        finally:
            detach(model, variant.layout)
        expected = expected or predicted
        apart = fidelity(expected, predicted)
        zero = Interval(0.0, 0.0, 0.0)
        one = Measured(variant, log, apart, operator, zero, seconds=seconds)
        if variant.key == HEALTHY:
            healthy = one
        if healthy is not None:
            _judge(one, healthy)
        measured.append(one)
        told.done(one)
    facts = {
        **(about or {}),
        "problems": len(problems.asked),
        "shots": len(problems.shots),
        "KL problems": min(kl_problems, len(problems.asked)),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "seconds": round(time.monotonic() - begun),
    }
    return Regression(facts, measured)


def _timed(seconds: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    begun = time.monotonic()
    result = work()
    seconds[name] = round(time.monotonic() - begun, 2)
    return result


def _judge(one: Measured, healthy: Measured) -> None:
    """Compare with the healthy FP8 cache, and say which tiers tell the two apart."""
    pairs = zip(one.fidelity.per_problem, healthy.fidelity.per_problem, strict=True)
    one.excess = bootstrap([mine - its for mine, its in pairs])
    answers = compare(healthy.log, one.log)
    one.only_reference, one.only_variant, one.p = answers.only_a, answers.only_b, answers.p
    if not one.operator.passed:
        one.seen.append("operator")
    if one.excess.low > MARGIN * healthy.fidelity.kl.mean:
        one.seen.append("kl")
    if one.p < SIGNIFICANT and one.only_reference > one.only_variant:
        one.seen.append("accuracy")
