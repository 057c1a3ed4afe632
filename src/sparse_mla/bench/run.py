"""Run the benchmark: check every answer, then time those that are right, together."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from .. import reference
from .registry import CPU_WORKLOADS, GPU_WORKLOADS, Data, Workload, make_cache, make_data, providers
from .rows import Machine, Row, this_machine
from .timing import measure, quantiles, sm_clock

# Query tokens whose answers are compared with the oracle before anything is timed.
SAMPLE = 4
# Ours must be within the gate's budget for bf16 weights; a peer is timed as long as its answer is
# recognisably the right one, with its error in the row.
OUR_LIMIT, OUR_LSE_LIMIT = 1.7, 1e-3
PEER_LIMIT, PEER_LSE_LIMIT = 0.05, 0.05


@dataclass(frozen=True)
class Accuracy:
    rel_l2: float
    gain: float
    ideal: float


def run(
    device: torch.device, samples: int, note: Callable[[str], None], only: str = ""
) -> list[Row]:
    """Measure every workload whose label holds `only`, on `device`.

    Raises:
        ValueError: an implementation's answer is wrong; nothing is timed after that.
    """
    workloads = GPU_WORKLOADS if device.type == "cuda" else CPU_WORKLOADS
    chosen = [w for w in workloads if only in w.label]
    if not chosen:
        raise ValueError(f"no workload's label holds {only!r}")
    machine = this_machine(device)
    identity = uuid.uuid4().hex[:12]
    rows: list[Row] = []
    for layout in dict.fromkeys(w.layout for w in chosen):
        group = [w for w in chosen if w.layout == layout]
        cache = make_cache(layout, max(w.s_kv for w in group), device)
        for workload in group:
            note(workload.label)
            rows += _run_one(workload, make_data(workload, cache), samples, identity, machine)
    return rows


def _run_one(
    workload: Workload, data: Data, samples: int, identity: str, machine: Machine
) -> list[Row]:
    calls = providers(data)
    accuracy = {name: check(name, call(), data) for name, call in calls.items()}
    times = measure(calls, data.q.device, samples)
    clock = sm_clock(data.q.device)
    rows = []
    for name in calls:
        p20, p50, p80 = quantiles(times[name])
        rows.append(
            Row(
                run=identity,
                **asdict(workload),
                provider=name,
                p20_us=p20,
                p50_us=p50,
                p80_us=p80,
                **asdict(accuracy[name]),
                sm_clock_mhz=clock,
                **asdict(machine),
            )
        )
    return rows


def check(name: str, answer: tuple[torch.Tensor, torch.Tensor], data: Data) -> Accuracy:
    """Compare a sample of query tokens with the oracle; ValueError if the answer is wrong."""
    out, lse = answer
    if data.workload.op == "decode":
        want = reference.decode(
            data.q[:SAMPLE, :1], data.cache, data.indices[:SAMPLE, :1], scale=data.scale
        )
        out, lse = out[:SAMPLE, :1], lse[:SAMPLE, :1]
    else:
        want = reference.prefill(
            data.q[:SAMPLE], data.cache, data.indices[:SAMPLE], scale=data.scale
        )
        out, lse = out[:SAMPLE], lse[:SAMPLE]
    got = out.double()
    norm = want.out.norm()
    rel_l2 = float((got - want.out).norm() / norm)
    ideal = float((want.out.to(torch.bfloat16).double() - want.out).norm() / norm)
    gain = float((got * want.out).sum() / want.out.square().sum()) - 1
    ours = name.startswith("sparse_mla:")
    limit = OUR_LIMIT * ideal if ours else PEER_LIMIT
    lse_limit = OUR_LSE_LIMIT if ours else PEER_LSE_LIMIT
    lse_error = float((lse.double() - want.lse).abs().max())
    if not rel_l2 <= limit or not lse_error <= lse_limit:
        raise ValueError(
            f"{name} answers {data.workload.label} with relative L2 {rel_l2:.2e} (limit "
            f"{limit:.2e}) and lse error {lse_error:.1e} (limit {lse_limit:.1e}): not timed"
        )
    return Accuracy(rel_l2, gain, ideal)
