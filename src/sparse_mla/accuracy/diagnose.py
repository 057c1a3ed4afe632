"""Which known fault explains a wrong answer: every fault model runs on the same inputs.

A model answers in float32 and rounds neither weights nor output (`UNROUNDED`), so what is left
between it and the observed answer is the observed kernel's rounding, if that fault is the right
one, whatever chunk size, split or weight precision the kernel uses. Per row (query token and head)
the residual is the largest of

- |observed - model| over the rounding error that bf16 weights and outputs make (budgets.py);
- the part of it along the output, a gain, over the much smaller gain that rounding makes;
- the differences of lse and of max_logits over what fp32 arithmetic allows there;

and `CAP` where NaN or Inf are not in the same places. A call's residual is the root mean square
over rows, a hypothesis' residual its worst call's: it must predict the clean answers as well as
the wrong ones. 1 is a perfect match.

A fault fits if its residual is at most `FITS` and the oracle's is `CLEARLY` times that or more; or
if it is at most `NEARLY` and the oracle's is `FAR` times that, as where the kernel's own rounding
is larger than usual. It is named if every other fault's residual is `CLEARLY` times its own or
more; otherwise those that come closer are listed as not told apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..kv_cache import KVCache
from .budgets import BF16_RMS, Expected, expect
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
from .faults import FAULTS, CleanKernel
from .faults_fault import Fault
from .faults_kernel import UNROUNDED, EmulatedKernel, memory_bytes
from .token_bytes import token_bytes, write_tokens

GONE = (Crashed, Hung, Raised)
NOTHING_FITS = "no known fault reproduces this output"

CAP = 600.0
"""Residual of a row that is simply wrong: an error as large as the answer, over BF16_RMS."""

FITS = 3.0
CLEARLY = 2.0
NEARLY = 10.0
FAR = 20.0

TAIL_OVER_MEAN = 7.0
"""What a row's tail bound is over its mean power, where roundings are independent.

Where many weights are equal they are rounded alike: the bound knows of it, the mean does not.
"""

WRITE_UNIT = 0.01
"""Relative error of a written tile that counts as 1: a few e4m3 values rounded the other way."""

_SMALL_CACHE = 1 << 26


@dataclass(frozen=True)
class Call:
    """One call and what the implementation answered, once per run.

    For attention the answers are Outputs; for the writer they are the cache's rows after the call,
    float64, and `inputs.cache` holds the bytes from before it.
    """

    inputs: Inputs | WriteInputs
    answers: tuple[Any, ...]


@dataclass(frozen=True)
class Trial:
    """Calls that shared one implementation state, in order, and the case they come from."""

    calls: tuple[Call, ...]
    case: str = ""


@dataclass(frozen=True)
class Match:
    """How well one fault explains the evidence.

    Attributes:
        fault: the hypothesis.
        variant: which of the fault's variants fitted best.
        residual: 1 is a perfect match. A lower bound if the fault was ruled out early.
        oracle: the residual of the hypothesis that nothing is wrong.
    """

    fault: Fault
    variant: int
    residual: float
    oracle: float

    @property
    def settings(self) -> str:
        """The variant in words; "" for the usual one."""
        if self.variant == 0:
            return ""
        chosen = self.fault.variants[self.variant]
        return ", ".join(f"{key} {value}" for key, value in chosen.items())

    @property
    def fits(self) -> bool:
        if self.residual <= FITS:
            return self.oracle >= CLEARLY * max(self.residual, 1.0)
        return self.residual <= NEARLY and self.oracle >= FAR * self.residual


@dataclass(frozen=True)
class Verdict:
    """What the matches amount to.

    Attributes:
        name: the fault, if one is clear.
        tied: the matches that explain the evidence equally well, if several do.
        text: one line for a person.
    """

    name: str | None
    tied: tuple[Match, ...]
    text: str


def observe(
    implementation: Implementation, case: Case, seed: int, device: torch.device, runs: int = 3
) -> Trial:
    """Run a case and keep what was asked and answered; NotOffered passes through."""
    seen: list[tuple[Inputs | WriteInputs, list[Any]]] = []
    inputs: Sequence[Inputs | WriteInputs] = case.build(seed, device)
    for run in range(runs):
        if run and case.op == "kv_write":
            inputs = case.build(seed, device)
        state = implementation.new_state()
        for position, call in enumerate(inputs):
            if run == 0:
                # Attention leaves its inputs alone, a writer does not.
                kept = _own_cache(call) if isinstance(call, WriteInputs) else call
                seen.append((kept, []))
            if isinstance(call, WriteInputs):
                implementation.write(call)
                answer: Any = _rows(call)
            else:
                call.refill()
                answer = implementation.run(call, state)
            seen[position][1].append(answer)
    return Trial(tuple(Call(call, tuple(answers)) for call, answers in seen), case.name)


def diagnose(evidence: Sequence[Trial], faults: Iterable[Fault] = FAULTS) -> list[Match]:
    """Every fault held against the evidence, best first.

    Args:
        evidence: trials, at least one of which went wrong. Trials that went well help: a fault
            that would have shown in them is ruled out.
    """
    worst_first = sorted(
        (_Prepared(trial) for trial in evidence), key=lambda trial: -trial.oracle_residual
    )
    oracle = max((trial.oracle_residual for trial in worst_first), default=0.0)
    hypotheses = [
        (fault, variant) for fault in faults for variant in _distinct_variants(fault, worst_first)
    ]
    best: dict[str, Match] = {}
    residuals = [0.0] * len(hypotheses)
    for trial in worst_first:
        hope = CLEARLY * max(NEARLY, min(residuals, default=0.0))
        for k, (fault, variant) in enumerate(hypotheses):
            if residuals[k] <= hope:
                residuals[k] = max(residuals[k], trial.residual(fault, variant))
    for (fault, variant), residual in zip(hypotheses, residuals, strict=True):
        known = best.get(fault.name)
        if known is None or residual < 0.9 * known.residual:
            best[fault.name] = Match(fault, variant, residual, oracle)
    return sorted(best.values(), key=lambda match: match.residual)


def verdict(matches: Sequence[Match]) -> Verdict:
    """Name the fault if one is clear.

    Args:
        matches: from `diagnose`, best first. The rule is in the module's docstring.
    """
    if not matches or not matches[0].fits:
        return Verdict(None, (), NOTHING_FITS)
    first = matches[0]
    rival = CLEARLY * max(first.residual, 1.0)
    tied = tuple(match for match in matches if match.residual < rival)
    numbers = f"residual {first.residual:.2g}, without it {first.oracle:.3g}"
    if len(tied) == 1:
        settings = f" ({first.settings})" if first.settings else ""
        text = f"matches {first.fault.name}{settings}: {first.fault.about} ({numbers})"
        return Verdict(first.fault.name, (), text)
    names = ", ".join(match.fault.name for match in tied)
    text = f"cannot be told apart on these inputs: {names} ({numbers})"
    return Verdict(None, tied, text)


def investigate(
    implementation: Implementation,
    failing: Sequence[Case],
    catalogue: Sequence[Case],
    seed: int,
    device: torch.device,
    more: int = 4,
) -> tuple[Verdict, list[Trial]]:
    """Diagnose from the failing cases; while faults tie, try a case on which they would differ.

    Args:
        failing: cases that the implementation failed.
        catalogue: where to look for further cases.
        more: how many further cases to run at most.
    """
    evidence = []
    for wrong in failing:
        try:
            evidence.append(observe(implementation, wrong, seed, device))
        except GONE:
            continue
    if not evidence:
        return Verdict(None, (), "not possible: it crashed or hung each time"), []
    left = [case for case in catalogue if case.name not in {c.name for c in failing}]
    result = verdict(diagnose(evidence))
    for _ in range(more):
        if not result.tied:
            break
        case = _telling_case(result.tied, left, seed, device)
        if case is None:
            break
        left.remove(case)
        try:
            evidence.append(observe(implementation, case, seed, device))
        except (NotOffered, *GONE):
            continue
        result = verdict(diagnose(evidence, [match.fault for match in result.tied]))
    if result.name is None and not result.tied and len(evidence) > 1:
        result = _separately(evidence)
    return result, evidence


def _separately(evidence: Sequence[Trial]) -> Verdict:
    """No one fault explains everything; a kernel may have several."""
    found = [(trial.case, verdict(diagnose([trial]))) for trial in evidence]
    parts = [f"{case} {result.text}" for case, result in found if result.name]
    names = sorted({result.name for _, result in found if result.name})
    if not parts:
        return Verdict(None, (), NOTHING_FITS)
    if len(names) == 1:
        return Verdict(None, (), f"not all failures have one cause; {parts[0]}")
    return Verdict(None, (), f"several faults: {'; '.join(parts)}")


def _telling_case(
    tied: Sequence[Match], catalogue: Sequence[Case], seed: int, device: torch.device
) -> Case | None:
    """The first case on which the tied faults' models disagree; those made to show one first."""
    names = {match.fault.name for match in tied}
    ops = {"kv_write" if match.fault.op == "kv_write" else "attention" for match in tied}
    likely = sorted(catalogue, key=lambda case: not names & set(case.shows))
    for case in likely:
        if ("kv_write" if case.op == "kv_write" else "attention") not in ops:
            continue
        first, *others = tied
        try:
            trial = observe(
                first.fault.kernel(UNROUNDED, first.variant), case, seed, device, runs=1
            )
        except (NotOffered, NotRun):
            continue
        predicted = _Prepared(trial)
        if any(predicted.residual(m.fault, m.variant) > CLEARLY * FITS for m in others):
            return case
    return None


def _distinct_variants(fault: Fault, trials: Sequence[_Prepared]) -> list[int]:
    """Variants that differ on this evidence: at most one split per chunk of the longest list."""
    widest = max((trial.width for trial in trials), default=0)
    seen, kept = [], []
    for k, settings in enumerate(fault.variants):
        chunks = max(1, -(-widest // settings.get("chunk", UNROUNDED.chunk)))
        effective = dict(settings)
        if "splits" in settings:
            effective["splits"] = min(settings["splits"], chunks)
        if effective not in seen:
            seen.append(effective)
            kept.append(k)
    return kept


class _Prepared:
    """A trial with what every hypothesis needs: the oracle's answer and the clean model's."""

    def __init__(self, trial: Trial) -> None:
        self.calls = trial.calls
        self.expected = [_expected(call.inputs) for call in trial.calls]
        self.keys: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.steady = [_steady(call) for call in trial.calls]
        self.clean = self._answers(CleanKernel(UNROUNDED))
        self.clean_residuals = [self._compare(k, answer) for k, answer in enumerate(self.clean)]
        self.oracle_residual = max(self.clean_residuals, default=0.0)
        self.width = max(
            (
                call.inputs.indices.shape[-1]
                + (0 if call.inputs.extra_indices is None else call.inputs.extra_indices.shape[-1])
                for call in trial.calls
                if isinstance(call.inputs, Inputs)
            ),
            default=0,
        )

    def residual(self, fault: Fault, variant: int) -> float:
        """The worst call's residual under this hypothesis."""
        shows = [fault.can_show(call.inputs) for call in self.calls]
        if not any(shows):
            return self.oracle_residual
        if fault.random:
            return self._residual_of_random(shows)
        answers = self._answers(fault.kernel(UNROUNDED, variant))
        return max(
            self._compare(k, answer) if show else self.clean_residuals[k]
            for k, (answer, show) in enumerate(zip(answers, shows, strict=True))
        )

    def _residual_of_random(self, shows: Sequence[bool]) -> float:
        """A race predicts that wrong rows move between runs and that steady rows are right."""
        return max(
            self._compare(k, self.clean[k], only=self.steady[k]) if show else clean
            for k, (show, clean) in enumerate(zip(shows, self.clean_residuals, strict=True))
        )

    def _answers(self, kernel: EmulatedKernel) -> list[Any]:
        kernel.share_keys(self.keys)
        state = kernel.new_state()
        answers: list[Any] = []
        for call in self.calls:
            if isinstance(call.inputs, Inputs):
                call.inputs.refill()
                answers.append(kernel.run(call.inputs, state))
            else:
                copy = _own_cache(call.inputs)
                kernel.write(copy)
                answers.append(_rows(copy))
        return answers

    def _compare(self, k: int, answer: Any, only: torch.Tensor | None = None) -> float:
        """Root mean square of the rows' residuals, over the rows in `only` if given."""
        expected = self.expected[k]
        observed = self.calls[k].answers[0]
        if expected is None:
            rows = _write_residuals(observed, answer)
        else:
            rows = _row_residuals(observed, answer, expected)
            if only is not None:
                rows = rows[only & ~expected.exempt[:, None]]
            else:
                rows = rows[~expected.exempt]
        return float(rows.square().mean().sqrt()) if rows.numel() else 0.0


def _expected(call: Inputs | WriteInputs) -> Expected | None:
    if not isinstance(call, Inputs):
        return None
    call.refill()
    return expect(call)


def _row_residuals(observed: Output, model: Output, expected: Expected) -> torch.Tensor:
    """Residuals [n, h] of an attention answer."""
    shape = expected.ref.out.shape
    if observed.out.numel() != expected.ref.out.numel():
        return torch.full(shape[:2], CAP, device=expected.ref.out.device)
    got = observed.out.reshape(shape).double()
    want = model.out.reshape(shape).double()
    same_mask = (_kind(got) == _kind(want)).all(-1)
    got, want = torch.nan_to_num(got, 0.0, 0.0, 0.0), torch.nan_to_num(want, 0.0, 0.0, 0.0)
    error = got - want
    norms = want.square().sum(-1)
    grown = norms / expected.ref.out.square().sum(-1).nan_to_num(0.0).clamp_min(1e-300)
    noise = expected.ideal_power + expected.weight_power
    noise = torch.maximum(noise, expected.row_power / TAIL_OVER_MEAN) + expected.fp32_power
    noise = noise.nan_to_num(0.0) * grown.clamp(1.0, 1e6) + 2 * BF16_RMS**2 * norms * (grown > 1.5)
    residual = _over(error.square().sum(-1).sqrt(), noise.sqrt())

    # Rounding of 512 outputs and of 1/sum(p^2) weights averages out along the output; where a few
    # outlier channels are most of it, only over those.
    few = want.pow(4).sum(-1) / norms.square().clamp_min(1e-300)
    steadiness = few.clamp_min(2 / shape[-1]) + 4 * expected.ref.weight_power.nan_to_num(1.0)
    along = (error * want).sum(-1).abs()
    gain_noise = (BF16_RMS * steadiness.sqrt()).clamp_min(expected.gain_sigma)
    gain = _over(along, gain_noise * norms)
    residual = torch.maximum(residual, torch.minimum(gain, 10 * residual))

    heads = shape[:2]
    statistics = []
    if observed.lse is not None:
        statistics.append((_lse(observed).reshape(heads), _lse(model).reshape(heads), expected.lse))
    if observed.max_logits is not None and model.max_logits is not None:
        pair = (observed.max_logits.reshape(heads), model.max_logits.reshape(heads))
        statistics.append((*pair, expected.max_logits))
    for seen, said, allowed in statistics:
        seen, said = seen.double(), said.double()
        same_mask &= _kind(seen) == _kind(said)
        off = (seen - said).nan_to_num(0.0, 0.0, 0.0).abs()
        unit = allowed.nan_to_num(0.0) + 1e-6 * (1 + said.nan_to_num(0.0, 0.0, 0.0).abs())
        residual = torch.maximum(residual, _over(off, unit))
    return torch.where(same_mask, residual.clamp_max(CAP), CAP)


def _over(error: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return torch.where(error > 0, error / unit.clamp_min(1e-300), 0.0)


def _kind(x: torch.Tensor) -> torch.Tensor:
    """0 finite, 1 NaN, 2 +inf, 3 -inf."""
    kind = torch.isnan(x).to(torch.int8)
    return kind + 2 * torch.isposinf(x).to(torch.int8) + 3 * torch.isneginf(x).to(torch.int8)


def _lse(output: Output) -> torch.Tensor:
    """lse in our convention: where an implementation says +inf for an empty row, signs swap."""
    assert output.lse is not None
    if output.empty_lse == float("inf"):
        return torch.where(output.lse.isinf(), -output.lse, output.lse)
    return output.lse


def _write_residuals(observed: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Residuals of 64-wide pieces of the cache's rows."""
    got, want = observed.reshape(-1, 64), model.reshape(-1, 64)
    same_mask = (_kind(got) == _kind(want)).all(-1)
    got, want = got.nan_to_num(0.0, 0.0, 0.0), want.nan_to_num(0.0, 0.0, 0.0)
    error = (got - want).norm(dim=1)
    residual = _over(error, WRITE_UNIT * torch.maximum(got.norm(dim=1), want.norm(dim=1)))
    return torch.where(same_mask, residual.clamp_max(CAP), CAP)


def _steady(call: Call) -> torch.Tensor | None:
    """Rows [n, h] whose bits are the same in every run."""
    if not isinstance(call.inputs, Inputs):
        return None
    first = call.answers[0]
    heads = call.inputs.q.shape[-2]
    rows = first.out[..., 0].numel() // max(heads, 1)
    steady = torch.ones(rows, heads, dtype=torch.bool, device=first.out.device)
    for other in call.answers[1:]:
        pairs = [(first.out.reshape(-1, heads, first.out.shape[-1]), other.out)]
        if first.lse is not None:
            pairs.append((first.lse.reshape(-1, heads, 1), other.lse))
        for mine, theirs in pairs:
            theirs = theirs.reshape(mine.shape)
            same = (mine == theirs) | (mine.isnan() & theirs.isnan())
            steady &= same.all(-1)
    return steady


def _own_cache(inputs: WriteInputs) -> WriteInputs:
    """The call on a copy of its cache; of a large cache only the rows to be written are copied."""
    cache = inputs.cache
    start = int(cache.pages.storage_offset())
    end = start + _span(cache)
    storage = torch.empty(end, dtype=torch.uint8, device=cache.device)
    pages = storage.as_strided(cache.pages.shape, cache.pages.stride(), start)
    copy = replace(cache, pages=pages)
    if end <= _SMALL_CACHE:
        storage.copy_(cache.pages.as_strided((end,), (1,), 0))
    else:
        slots = _written(inputs)
        write_tokens(copy, slots, token_bytes(cache, slots))
    return WriteInputs(
        copy, inputs.latent, inputs.rope, inputs.slots, inputs.scale_rounding, inputs.op
    )


def _span(cache: KVCache) -> int:
    """Bytes from the first page to the end of the last one."""
    if not cache.num_pages:
        return 0
    packed = (cache.num_pages - 1) * cache.pages.stride(0) + cache.pages.shape[1]
    return max(memory_bytes(cache), packed)


def _written(inputs: WriteInputs) -> torch.Tensor:
    return inputs.slots[inputs.slots >= 0].to(torch.int64)


def _rows(inputs: WriteInputs) -> torch.Tensor:
    """The cache's rows, float64: all of them, or those written if the cache is large."""
    cache = inputs.cache
    if _span(cache) <= _SMALL_CACHE:
        return cache.read(torch.arange(cache.num_slots, device=cache.device))
    return cache.read(_written(inputs))
