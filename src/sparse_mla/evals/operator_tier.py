"""The lowest tier: a kernel's answers to calls that the model itself makes, against the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..accuracy.budgets import expect
from ..accuracy.case import Inputs, Output
from ..accuracy.diagnose import Call, Trial, diagnose, verdict
from ..accuracy.metrics import Metrics, compare
from ..integrations.transformers import apply, restore
from ..integrations.transformers.attention import attend
from ..kv_cache import KVCache
from ..ops.sparse_decode.interface import decode
from .fidelity import predictions
from .model import kernel_named
from .tasks import ProblemSet

QUERIES = 16
"""Query tokens of each layer that are kept: the last ones of a worked answer."""


@dataclass(frozen=True)
class OperatorError:
    """The worst layer's metrics (docs/accuracy.md).

    Attributes:
        multiple, budget: error and what is allowed, in multiples of ideal rounding, of the layer
            whose error is largest.
        gain: the part of the error along the answer, the largest of any layer.
        used: the largest share of any layer's budgets (error, worst row, gain, lse) that is used;
            above 1 the gate fails.
        passed: whether every layer's call is within its budget.
        problem: the gate's words for the first layer that is not; "" if all are.
        diagnosis: the fault that reproduces the wrong answers; "" if they are right.
        calls: layers that were judged.
    """

    multiple: float
    budget: float
    gain: float
    used: float
    passed: bool
    problem: str
    diagnosis: str
    calls: int


class Recorder:
    """An `attend` that keeps its arguments, the cache's bytes included."""

    def __init__(self) -> None:
        self.calls: list[Inputs] = []

    def __call__(
        self, q: torch.Tensor, cache: KVCache, indices: torch.Tensor, scale: float
    ) -> torch.Tensor:
        kept = replace(cache, pages=cache.pages.clone())
        self.calls.append(
            Inputs("decode", q[:, -QUERIES:].clone(), kept, indices[:, -QUERIES:].clone(), scale)
        )
        return attend(q, cache, indices, scale)


def record(model: Any, tokenizer: Any, problems: ProblemSet, layout: str) -> list[Inputs]:
    """One attention call per layer, over the first problem's prompt and worked answer."""
    recorder = Recorder()
    apply(model, layout=layout, attend=recorder)
    try:
        predictions(model, tokenizer, problems, 1)
    finally:
        restore(model)
    return recorder.calls


def operator_error(calls: list[Inputs], fault: str | None) -> OperatorError:
    """Hold this library's decode, or a kernel of the fault library, to its budget on the calls."""
    kernel = None if fault is None else kernel_named(fault)
    judged, failed = [], []
    for inputs in calls:
        if kernel is None:
            out, lse = decode(inputs.q, inputs.cache, inputs.indices, scale=inputs.scale)
            output = Output(out, lse)
        else:
            output = kernel.run(inputs, kernel.new_state())
        metrics = compare(output, expect(inputs))
        judged.append(metrics)
        if not metrics.passed:
            failed.append(Trial((Call(inputs, (output,)),)))
    worst = max(judged, key=lambda metrics: metrics.multiple)
    found = ""
    if failed:
        named = verdict(diagnose(failed[:2]))
        found = named.name or named.text
    return OperatorError(
        multiple=worst.multiple,
        budget=worst.budget,
        gain=max((m.gain for m in judged), key=abs),
        used=max(map(_used, judged)),
        passed=not failed,
        problem=next((m.problem for m in judged if m.problem), ""),
        diagnosis=found,
        calls=len(judged),
    )


def _used(metrics: Metrics) -> float:
    """The largest part of a call's budgets that is used."""
    shares = [
        metrics.multiple / metrics.budget,
        metrics.row_ratio,
        abs(metrics.gain) / metrics.gain_budget,
    ]
    if metrics.lse_budget > 0:
        shares.append(metrics.lse_err / metrics.lse_budget)
    return max(shares)
