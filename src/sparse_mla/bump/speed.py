"""Times of both sides on the benchmark's workloads, taking turns, after their answers were checked.

Each side runs in its own process with its own CUDA graph; one sample of the base is followed by one
of the candidate, so that both see the same clocks. Only their ratio is meant to be quoted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..accuracy.case import Crashed, Hung, Inputs, NotOffered, Raised
from ..bench.registry import Data, make_cache, make_data
from ..bench.run import Oracle, WrongAnswer
from ..bench.timing import quantiles
from ..bench.workloads import CPU_WORKLOADS, GPU_WORKLOADS, HEADLINES, Workload, choose
from ..isolate.host import IsolatedProvider
from .paired import compare_pairs

SIDES = ("base", "candidate")


def workloads_on(device: torch.device, only: str = "") -> list[Workload]:
    """The workloads whose label has the words of `only`, by default those of README's table.

    Raises:
        ValueError: no label has them.
    """
    if device.type != "cuda":
        return choose(CPU_WORKLOADS, [only] if only else [])
    if only:
        # Providers are asked through the gate's inputs, which have no dense decode.
        without = ("kv_write", "dense_decode")
        return choose([w for w in GPU_WORKLOADS if w.op not in without], [only])
    return [workload for workload in HEADLINES if workload in GPU_WORKLOADS]


def compare_speed(
    base: IsolatedProvider,
    candidate: IsolatedProvider,
    workloads: Sequence[Workload],
    device: torch.device,
    samples: int,
    note: Callable[[str], None] = lambda label: None,
) -> list[dict[str, Any]]:
    """One row per workload: quantiles of both sides, their ratio, or why a side was not timed."""
    rows = []
    for layout in dict.fromkeys(w.layout for w in workloads):
        group = [w for w in workloads if w.layout == layout]
        cache = make_cache(layout, max(w.s_kv for w in group), device)
        for provider in (base, candidate):
            _forget(provider)
        for workload in group:
            note(workload.label)
            rows.append(_row(base, candidate, make_data(workload, cache), samples))
    return rows


def _forget(provider: IsolatedProvider) -> None:
    """Free the last layout's cache on the provider's side; one that cannot answer has none."""
    with contextlib.suppress(Crashed, Hung, Raised, NotOffered):
        provider.new_state()


def _row(
    base: IsolatedProvider, candidate: IsolatedProvider, data: Data, samples: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"workload": data.workload.label, "op": data.workload.op, "ratio": None}
    call = Inputs(data.workload.op, data.q, data.cache, data.indices, data.scale)
    ready = {}
    for side, provider in zip(SIDES, (base, candidate), strict=True):
        row[side] = None
        try:
            row[f"{side}_error"] = _error(provider, call, data)
            row[f"{side}_how"] = provider.prepare_timing(call)
            ready[side] = provider
        except (NotOffered, Crashed, Hung, Raised, WrongAnswer, torch.OutOfMemoryError) as error:
            row[f"{side}_why"] = f"not timed: {error}"
    times: dict[str, list[float]] = {side: [] for side in ready}
    for _ in range(samples):
        for side in list(ready):
            try:
                times[side].append(ready[side].sample())
            except (Crashed, Hung, Raised) as error:
                row[f"{side}_why"] = f"stopped while timed: {error}"
                del ready[side]
    for side in ready:
        row[side] = list(quantiles(times[side]))
    if len(ready) == len(SIDES):
        paired = compare_pairs(times["base"], times["candidate"], floor=1e-3)
        row["ratio"] = row["candidate"][1] / row["base"][1]
        row["p"] = None if paired is None else paired.p
    return row


def _error(provider: IsolatedProvider, call: Inputs, data: Data) -> float:
    """Error in multiples of ideal on a sample; WrongAnswer if it is not the right one."""
    output = provider.run(call, provider.new_state(keep=True))
    if output.lse is None:
        raise NotOffered("answers no lse to check")
    found = Oracle(data).check(provider.name, (output.out, output.lse))
    return found.rel_l2 / found.ideal
