"""The gate: put an implementation on trial, case by case.

`prepare` makes a case's inputs and asks the oracle once; `run_case` tries one implementation on
them; `run_catalogue` does both for many. A case that an implementation does not offer, or that
cannot run on this machine, is reported as such and never as passed. What goes wrong has one of
three words: failed (a wrong answer, or an exception), crashed (the process or the CUDA context is
gone), hung (no answer within the time limit; only an isolated implementation can be stopped).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import writes
from .budgets import DEFAULT_LIMIT, Expected, expect
from .case import (
    Case,
    Crashed,
    Hung,
    Implementation,
    Inputs,
    NotOffered,
    Output,
    Raised,
    WriteInputs,
)
from .case_inputs import NotRun
from .metrics import Metrics, compare, same_bits

PASSED, FAILED, NOT_OFFERED, NOT_RUN = "passed", "failed", "not_offered", "not_run"
CRASHED, HUNG = "crashed", "hung"
BAD = (FAILED, CRASHED, HUNG)

# Where an adapter pads what the implementation refuses, cases about just that say nothing of it.
_HIDDEN_BY_PADDING = {
    "heads": {"heads_beyond_tail", "head_padding_nan"},
    "topk": {"last_block_unmasked"},
}

UNTOUCHED_BYTES = 16 * 2**20
"""Inputs up to this size are compared with a copy after the call."""

Call = Inputs | WriteInputs


@dataclass(frozen=True)
class Prepared:
    """A case made for one seed and device, shared by all implementations.

    Attributes:
        calls: the calls in order.
        expected: per call, None for writes.
        reason: why the case cannot run here, None if it can.
    """

    case: Case
    seed: int
    device: torch.device
    calls: list[Call]
    expected: list[Expected | None]
    reason: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """One implementation on one case.

    Attributes:
        status: PASSED, FAILED, CRASHED, HUNG, NOT_OFFERED or NOT_RUN.
        detail: why, one line; if passed, what the adapter had to pad, mostly nothing.
        metrics: of the call that came off worst; None if no call was judged.
        call: which call that is.
        seconds: time spent inside the implementation.
        outputs: what it answered, for the diagnosis; empty unless the case failed.
    """

    case: str
    op: str
    about: str
    implementation: str
    status: str
    detail: str = ""
    metrics: Metrics | None = None
    call: int = 0
    seconds: float = 0.0
    outputs: list[Output] = field(default_factory=list, repr=False)

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "op": self.op,
            "about": self.about,
            "implementation": self.implementation,
            "status": self.status,
            "detail": self.detail,
            "call": self.call,
            "seconds": self.seconds,
            "metrics": None if self.metrics is None else self.metrics.as_json(),
        }


@contextmanager
def one_thread() -> Iterator[None]:
    """The oracle's many small matmuls gain nothing from threads, and on a busy machine they wait
    for each other: the catalogue took 137 s on two shared cores with two threads, 12 s with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Prepared:
    """Build a case and ask the oracle; a case that does not fit the machine says why."""
    device = torch.device(device)
    try:
        with one_thread():
            calls: list[Call] = list(case.build(seed, device))
            expected = [_expected(c) for c in calls]
    except NotRun as error:
        return Prepared(case, seed, device, [], [], str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return Prepared(case, seed, device, [], [], f"out of memory: {_one_line(error)}")
    except RuntimeError as error:
        # What torch's CPU allocator raises is a plain RuntimeError.
        if "allocate memory" not in str(error):
            raise
        return Prepared(case, seed, device, [], [], f"out of memory: {_one_line(error)}")
    return Prepared(case, seed, device, calls, expected)


def _expected(call: Call) -> Expected | None:
    if not isinstance(call, Inputs):
        return None
    call.refill()
    return expect(call)


def run_case(
    implementation: Implementation,
    case: Case,
    seed: int = 0,
    device: torch.device | str = "cpu",
    limit: float = DEFAULT_LIMIT,
    prepared: Prepared | None = None,
) -> CaseResult:
    """Try one implementation on one case.

    Args:
        prepared: the case from `prepare`, to share inputs and oracle; made here otherwise.
    """
    ready = prepare(case, seed, device) if prepared is None else prepared
    known = (case.name, case.op, case.about, implementation.name)
    if ready.reason is not None:
        return CaseResult(*known, NOT_RUN, ready.reason)
    started = time.perf_counter()

    def result(status: str, detail: str = "", **more: Any) -> CaseResult:
        return CaseResult(*known, status, detail, seconds=time.perf_counter() - started, **more)

    try:
        if case.op == "kv_write":
            return _run_writes(implementation, ready, result)
        return _run_attention(implementation, ready, limit, result)
    except NotOffered as error:
        return result(NOT_OFFERED, _one_line(error))
    except NotImplementedError as error:
        return result(NOT_OFFERED, _one_line(error) or "NotImplementedError")
    except torch.OutOfMemoryError as error:
        return result(NOT_RUN, f"out of memory: {_one_line(error)}")
    except Crashed as error:
        return result(CRASHED, _one_line(error))
    except Hung as error:
        return result(HUNG, _one_line(error))
    except Exception as error:  # what goes wrong in what is on trial is its verdict, not ours
        name = "" if isinstance(error, Raised) else f"{type(error).__name__}: "
        gone = context_lost(ready.device)
        return result(CRASHED if gone else FAILED, f"{name}{_one_line(error)}")


def _run_attention(
    implementation: Implementation,
    ready: Prepared,
    limit: float,
    result: Callable[..., CaseResult],
) -> CaseResult:
    calls = [c for c in ready.calls if isinstance(c, Inputs)]
    wanted = [e for e in ready.expected if e is not None]
    before: list[dict[str, torch.Tensor]] = []
    first: list[Output] = []
    moved = 0
    changed: str | None = None
    for repeat in range(ready.case.repeats):
        state = implementation.new_state()
        for i, call in enumerate(calls):
            call.refill()
            if repeat == 0:
                before.append(fingerprint(call))
            output = implementation.run(call, state)
            if ready.device.type == "cuda":
                # A kernel's crash is reported by a later call; it belongs to this one.
                torch.cuda.synchronize(ready.device)
            touched: str | None = output.changed
            if repeat == ready.case.repeats - 1:
                touched = touched or changed_input(call, before[i])
            if touched:
                changed = changed or f"call {i + 1} changed its input {touched}"
            for what in output.padded:
                if _HIDDEN_BY_PADDING[what] & set(ready.case.shows):
                    return result(NOT_OFFERED, output.note)
            if repeat == 0:
                first.append(_own(output))
            elif not same_bits(output, first[i]):
                moved += 1
    with one_thread():
        judged = [compare(o, e, limit) for o, e in zip(first, wanted, strict=True)]
    worst = max(range(len(judged)), key=lambda i: _badness(judged[i]))
    metrics = judged[worst]
    problem = metrics.problem
    if len(judged) > 1 and problem is not None:
        problem = f"call {worst + 1} of {len(judged)}: {problem}"
    problem = problem or changed or _dtype_problem(first)
    if moved and problem is None:
        runs = (ready.case.repeats - 1) * len(calls)
        problem = f"{moved} of {runs} repeated calls gave other bits"
    if problem is None:
        return result(PASSED, first[worst].note, metrics=metrics, call=worst)
    return result(FAILED, problem, metrics=metrics, call=worst, outputs=first)


def _run_writes(
    implementation: Implementation, ready: Prepared, result: Callable[..., CaseResult]
) -> CaseResult:
    # Writers change the cache in place, so every trial gets a fresh one.
    with one_thread():
        made = ready.case.build(ready.seed, ready.device)
    judged = []
    for call in made:
        if not isinstance(call, WriteInputs):
            continue
        before = writes.snapshot(call)
        given = fingerprint(call)
        implementation.write(call)
        changed = changed_input(call, given)
        with one_thread():
            metrics = writes.judge(call, before)
        if changed is not None:
            metrics = replace(metrics, problem=f"changed its input {changed}")
        judged.append(metrics)
    worst = max(range(len(judged)), key=lambda i: _badness(judged[i]))
    metrics = judged[worst]
    status = PASSED if metrics.passed else FAILED
    return result(status, metrics.problem or "", metrics=metrics, call=worst)


def run_catalogue(
    implementations: Sequence[Implementation],
    cases: Iterable[Case],
    seed: int = 0,
    device: torch.device | str = "cpu",
    limit: float = DEFAULT_LIMIT,
    on_result: Callable[[CaseResult, Prepared], None] | None = None,
) -> list[CaseResult]:
    """Every implementation on every case; inputs and oracle are made once per case.

    Args:
        on_result: called after each trial, with the inputs while they are still at hand.
    """
    results: list[CaseResult] = []
    lost: str | None = None
    for case in cases:
        ready = prepare(case, seed, device) if lost is None else None
        for implementation in implementations:
            if ready is None or lost is not None:
                ready = Prepared(case, seed, torch.device(device), [], [], lost)
            one = run_case(implementation, case, seed, device, limit, ready)
            if one.status == CRASHED and context_lost(ready.device):
                lost = f"the CUDA context was lost in {case.name} on {implementation.name}"
            if on_result is not None:
                on_result(one, ready)
            results.append(one)
    return results


def context_lost(device: torch.device) -> bool:
    """Whether an earlier crash of a kernel makes every further use of the GPU fail."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _badness(metrics: Metrics) -> tuple[bool, float]:
    """Failed calls first, then by how much of its budget a call uses."""
    used = metrics.multiple / metrics.budget if metrics.budget else 0.0
    return (not metrics.passed, used)


def _own(output: Output) -> Output:
    """A copy: an implementation may answer twice in the same buffer."""
    top = None if output.max_logits is None else output.max_logits.clone()
    lse = None if output.lse is None else output.lse.clone()
    return replace(output, out=output.out.clone(), lse=lse, max_logits=top)


def _dtype_problem(answers: Sequence[Output]) -> str | None:
    """Outputs are bf16, statistics float32."""
    for answer in answers:
        for name, value, wanted in (
            ("out", answer.out, torch.bfloat16),
            ("lse", answer.lse, torch.float32),
            ("max_logits", answer.max_logits, torch.float32),
        ):
            if value is not None and value.dtype != wanted:
                return f"{name} is {value.dtype}, must be {wanted}"
    return None


def _tensors(call: Call) -> dict[str, torch.Tensor]:
    """What a call must leave as it is, by name; also what lies around a tensor that is a slice."""
    if isinstance(call, WriteInputs):
        named = {"latent": call.latent, "rope": call.rope, "slots": call.slots}
        return _compared(named)
    named = {
        "q": call.q,
        "indices": call.indices,
        "topk_length": call.topk_length,
        "attn_sink": call.attn_sink,
        "extra_indices": call.extra_indices,
        "extra_topk_length": call.extra_topk_length,
        "block_table": call.block_table,
        "cache_seqlens": call.cache_seqlens,
    }
    for name, cache in (("cache", call.cache), ("extra_cache", call.extra_cache)):
        if cache is not None:
            named[name] = writes.storage_bytes(cache)
            named[f"{name}.tensor_scale"] = cache.tensor_scale
    return _compared(named)


def _compared(named: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    found = {name: t for name, t in named.items() if t is not None}
    for name, t in list(found.items()):
        whole = t.untyped_storage()
        if whole.nbytes() != t.numel() * t.element_size():
            around = torch.empty(0, dtype=torch.uint8, device=t.device).set_(whole)
            found[f"{name} (memory beside it)"] = around
    return {name: t for name, t in found.items() if t.numel() * t.element_size() <= UNTOUCHED_BYTES}


def fingerprint(call: Call) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in _tensors(call).items()}


def changed_input(call: Call, before: dict[str, torch.Tensor]) -> str | None:
    """The first input whose bytes are no longer what they were."""
    for name, now in _tensors(call).items():
        a, b = now.contiguous().flatten(), before[name].contiguous().flatten()
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return name
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
