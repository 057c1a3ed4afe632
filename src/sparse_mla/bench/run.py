"""Run the benchmark: check every answer, then time those that are right, together."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from .. import reference
from .registry import Answer, Data, make_cache, make_data, providers
from .rows import OURS, Machine, Row, this_machine
from .timing import Call, measure, quantiles, sm_clock
from .workloads import CPU_WORKLOADS, GPU_WORKLOADS, Workload, choose
from .writes import make_writes

# Query tokens whose answers are compared with the oracle before anything is timed, and how many
# rows (tokens times heads) they have at least where there are so many: rounding weights to bf16
# moves the gain of one row by about 2e-4, that of 1024 rows by 5e-6.
SAMPLE, SAMPLE_ROWS = 8, 1024
# Ours must be within the gate's budget for bf16 weights; a peer is timed as long as its answer is
# recognisably the right one, with its error in the row.
OUR_LIMIT, OUR_LSE_LIMIT = 1.7, 1e-3
PEER_LIMIT, PEER_LSE_LIMIT = 0.05, 0.05
# Prefill takes milliseconds and drives the card to its power limit, where clocks follow
# temperature and time: more rounds before the first sample, fewer samples.
PREFILL_WARM_UP, PREFILL_SHARE = 12, 2


class WrongAnswer(Exception):
    """An answer that is further from the oracle's than is allowed."""


@dataclass(frozen=True)
class Accuracy:
    """The error of an answer; see `rows.Row`."""

    rel_l2: float
    gain: float
    ideal: float
    lse_err: float
    checked: int


@dataclass(frozen=True)
class Missing:
    """A provider that was not timed.

    Attributes:
        wrong: its answer is wrong, or a kernel of ours failed; otherwise it refuses the workload.
    """

    workload: Workload
    provider: str
    reason: str
    wrong: bool


@dataclass
class Result:
    """What a run measured, on one machine."""

    machine: Machine
    rows: list[Row] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    @property
    def wrong(self) -> list[Missing]:
        return [m for m in self.missing if m.wrong]


def workloads_for(device: torch.device) -> Sequence[Workload]:
    return GPU_WORKLOADS if device.type == "cuda" else CPU_WORKLOADS


def run(
    device: torch.device,
    samples: int,
    note: Callable[[str], None],
    *,
    only: Sequence[str] = (),
    backends: Sequence[str] = (),
    peers: bool = True,
) -> Result:
    """Measure the workloads that match `only` on `device`, all if it is empty.

    A wrong answer is not timed; the right ones beside it are.

    Raises:
        ValueError: nothing matches, or there is no such backend.
    """
    chosen = choose(workloads_for(device), only)
    result = Result(this_machine(device))
    identity = uuid.uuid4().hex[:12]
    attention = [w for w in chosen if w.op != "kv_write"]
    for layout in dict.fromkeys(w.layout for w in attention):
        group = [w for w in attention if w.layout == layout]
        cache = make_cache(layout, max(w.s_kv for w in group), device)
        for workload in group:
            note(workload.label)
            data = make_data(workload, cache)
            _run_one(data, samples, identity, result, backends, peers)
    for workload in chosen:
        if workload.op == "kv_write":
            note(workload.label)
            _run_write(workload, device, samples, identity, result, backends, peers)
    return result


def _run_one(
    data: Data,
    samples: int,
    identity: str,
    result: Result,
    backends: Sequence[str],
    peers: bool,
) -> None:
    workload, device = data.workload, data.q.device
    found = providers(data, backends, peers)
    for name, reason in found.refused.items():
        result.missing.append(Missing(workload, name, reason, False))
    oracle = Oracle(data)
    calls: dict[str, Call] = {}
    accuracy: dict[str, Accuracy] = {}
    for name, call in found.calls.items():
        ours = name.startswith(OURS)
        try:
            accuracy[name] = oracle.check(name, call())
            calls[name] = call
        except WrongAnswer as error:
            result.missing.append(Missing(workload, name, str(error), True))
        except Exception as error:  # one kernel that does not compile must not cost the whole run
            if "CUDA error" in str(error):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            result.missing.append(Missing(workload, name, reason, ours))
    _time(workload, device, calls, accuracy, samples, identity, result)


def _run_write(
    workload: Workload,
    device: torch.device,
    samples: int,
    identity: str,
    result: Result,
    backends: Sequence[str],
    peers: bool,
) -> None:
    """Writers whose bytes are those of `KVLayout.pack`, beside a copy of as many bytes."""
    data = make_writes(workload, device)
    calls: dict[str, Call] = {}
    accuracy: dict[str, Accuracy] = {}
    for name in backends or ("triton" if device.type == "cuda" else "cpu",):
        label = OURS + name
        try:
            wrong = data.check(name)
        except NotImplementedError as error:
            result.missing.append(Missing(workload, label, str(error), False))
            continue
        if wrong:
            reason = f"{wrong} bytes differ from the layout's own: not timed"
            result.missing.append(Missing(workload, label, reason, True))
            continue
        calls[label], accuracy[label] = data.call(name), Accuracy(*data.error(), 0.0, workload.b)
    if peers and device.type == "cuda":
        calls["torch:copy"] = data.copy()
        accuracy["torch:copy"] = Accuracy(0.0, 0.0, data.error()[2], 0.0, workload.b)
    _time(workload, device, calls, accuracy, samples, identity, result)


def _time(
    workload: Workload,
    device: torch.device,
    calls: dict[str, Call],
    accuracy: dict[str, Accuracy],
    samples: int,
    identity: str,
    result: Result,
) -> None:
    """Time the calls together, into rows."""
    if not calls:
        return
    prefill = workload.op == "prefill" and device.type == "cuda"
    number = max(3, samples // PREFILL_SHARE) if prefill else samples
    times = measure(calls, device, number, PREFILL_WARM_UP if prefill else 3)
    clock = sm_clock(device)
    for name in calls:
        p20, p50, p80 = quantiles(times[name])
        result.rows.append(
            Row(
                run=identity,
                **asdict(workload),
                provider=name,
                p20_us=p20,
                p50_us=p50,
                p80_us=p80,
                **asdict(accuracy[name]),
                sm_clock_mhz=clock,
                **asdict(result.machine),
            )
        )


class Oracle:
    """The right answer for a sample of the query tokens, spread over all of them."""

    def __init__(self, data: Data) -> None:
        self.workload = data.workload
        q = data.q.reshape(-1, *data.q.shape[-2:])
        number = min(max(SAMPLE, -(-SAMPLE_ROWS // q.shape[1])), q.shape[0])
        self.tokens = torch.linspace(0, q.shape[0] - 1, number).round().long().to(q.device)
        sources = [(data.cache, data.lists(self.tokens), None), *data.extra_lists(self.tokens)]
        self.want = reference.attend(q[self.tokens], sources, data.scale, data.sink)

    def check(self, name: str, answer: Answer) -> Accuracy:
        """Compare an answer; WrongAnswer if it is wrong."""
        out, lse = answer
        ref = self.want.out
        got = out.reshape(-1, *ref.shape[1:])[self.tokens].double()
        got_lse = lse.reshape(-1, ref.shape[1])[self.tokens].double()
        norm = ref.norm()
        rel_l2 = float((got - ref).norm() / norm)
        ideal = float((ref.to(torch.bfloat16).double() - ref).norm() / norm)
        gain = float((got * ref).sum() / ref.square().sum()) - 1
        ours = name.startswith(OURS)
        limit = OUR_LIMIT * ideal if ours else PEER_LIMIT
        lse_limit = OUR_LSE_LIMIT if ours else PEER_LSE_LIMIT
        lse_error = float((got_lse - self.want.lse).abs().max())
        if not rel_l2 <= limit or not lse_error <= lse_limit:
            raise WrongAnswer(
                f"{name} answers {self.workload.label} with relative L2 {rel_l2:.2e} (limit "
                f"{limit:.2e}) and lse error {lse_error:.1e} (limit {lse_limit:.1e}): not timed"
            )
        return Accuracy(rel_l2, gain, ideal, lse_error, len(self.tokens))
