"""The lowest tier: a kernel's answers to calls that the model itself makes, against the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..accuracy.budgets import expect
from ..accuracy.case import Inputs, Output
from ..accuracy.diagnose import Call, Trial, diagnose, verdict
from ..accuracy.metrics import compare
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
        multiple, budget: error and what is allowed, in multiples of ideal rounding.
        gain: the part of the error along the answer.
        passed: whether every layer's call is within its budget.
        diagnosis: the fault that reproduces the wrong answers; "" if they are right.
        calls: layers that were judged.
    """

    multiple: float
    budget: float
    gain: float
    passed: bool
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
        passed=not failed,
        diagnosis=found,
        calls=len(judged),
    )
