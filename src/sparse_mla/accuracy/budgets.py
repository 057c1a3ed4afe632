"""How much error arithmetic allows, derived from the inputs of a call and nothing else.

The kernel that is allowed multiplies by the exact scale, keeps logits and sums in fp32, rounds
each softmax weight (or weight * scale) to bf16 before it multiplies the values, and rounds its
output to bf16. Everything below is the error of that kernel; docs/accuracy.md tells the same
story with its derivation in full.

- bf16 has 8 significant bits: rounding is off by at most 2^-8 relative, and by
  2^-8 / sqrt(3) * sqrt(E[1/m^2]) = 1.66e-3 rms for log-uniform mantissas m in [1, 2)
  (E[1/m^2] = 3 / (8 ln 2)). `BF16_RMS` below.
- Output: measured, by rounding the oracle's output ("ideal"), and never taken below BF16_RMS.
- Weights: err = sum_t p_t d_t v_t with independent d_t of rms BF16_RMS, so its expected power is
  BF16_RMS^2 * sum_t p_t^2 |v_t|^2 = (BF16_RMS * kappa * |out|)^2 (kappa: `condition`).
- Case budget: (limit / sqrt 2)^2 * (ideal^2 + weights). limit = 1.7 is a margin of 1.2 in
  amplitude; for kappa = 1 it is 1.7 times ideal.
- Where few weights matter, a power is not its mean. err^2 is a quadratic form d'Bd with
  B = (P'P) o (VV'); the Laurent-Massart bound tr B + 2 |B|_F sqrt(t) + 2 |B|_op t is exceeded with
  probability e^-t. The budget is never below it, nor is it ever above what 2^-8 for every weight
  allows: (2^-8 sum_t p_t |v_t|)^2, there with the output's own worst case (`_worst_together`).
- Weights that are equal round alike, as in a row of two levels. Nothing averages out there: such a
  head gets the worst case, 2^-8 sum over levels |sum of the level's p_t v_t|, and its gain too.
- fp32 logits: a dot of 576 products is off by LOGIT_ULPS * 2^-24 * (sqrt(sum (q k)^2) + sum over
  128-wide blocks of |block's dot|): random-walk and coherent partial sums. For ordinary logits
  this is 1e-5 and vanishes beside the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .. import reference
from .case import Inputs

BF16_MAX_ERROR = 2.0**-8
BF16_RMS = 2.0**-8 / math.sqrt(3) * math.sqrt(3 / (8 * math.log(2)))
FP32_ULP = 2.0**-24

UNDERFLOW = 2.0**-126
"""Below it bf16 and fp32 lose bits, and a GPU may take them for 0: outputs may be off by this."""

DEFAULT_LIMIT = 1.7
"""Case budget in multiples of ideal rounding for kappa = 1."""

LOGIT_ULPS = 16.0
"""Errors of a 576-term fp32 sum, in 2^-24 of its partial sums.

Sequential rounding: sqrt(576 / 3) / sqrt(3) = 8 rms. Tensor cores add 36 blocks of 16 and may
truncate: 36 / 2 = 18 at worst, on a partial sum that grows to its final value, so 9 on average.
16 is 2 sigma of the first and covers the second.
"""

MAX_LOGIT_ULPS = 24.0
"""The same for max_logits: one logit and not a mean, so a truncated sum whose partial sums pass
its final value shows undamped (36 steps at no more than 2^-24 each on average, were they all at
their largest). A model of a truncating tensor core used 1.17 times what 16 allow.
"""

SAME_LOGIT = 2.0**-12
"""Logits this close give weights that bf16 rounds alike (its steps are 2^-8 of a weight)."""

CASE_TAIL = 12.0
"""t of the tail bound over a case: e^-12 = 6e-6."""

ROW_TAIL = 18.0
"""t of the tail bound of a row; a catalogue has about 1e5 of them: e^-18 = 1.5e-8 each."""

GAIN_FLOOR = 5e-5
GAIN_SIGMAS = 4.0
PART_SIGMAS = 6.0
"""The same for the gain of each head and of each query token: a catalogue has about 1e4 of them."""

BLOCK = 128


@dataclass(frozen=True)
class Expected:
    """What the answer to one call is, and how far from it arithmetic allows to be.

    Rows are query tokens times heads, [n, h]; a query token's rows are all excluded if `exempt`.

    Attributes:
        ref: the oracle's answer, flattened to [n, h, ...].
        exempt: [n], NaN or Inf in the token's own q or selected rows: its rows may be anything.
        empty: [n], nothing valid is selected.
        ideal_power: [n, h], |bf16(out) - out|^2, measured, at least (BF16_RMS |out|)^2.
        ideal_gain: <bf16(out) - out, out> / <out, out> over the case.
        weight_power: [n, h], expected power of the weights' rounding error.
        row_power: [n, h], tail bound of output and weights for that row alone.
        tail_power: tail bound of output and weights over the whole call.
        fp32_power: [n, h], power of what fp32 logits, sums and sinks cost.
        gain_sigma: standard deviation of the gain of the allowed kernel.
        gain_bound: what fp32 arithmetic and weights that round alike may add to the gain.
        head_gain: [h], allowed gain of a head over all query tokens.
        token_gain: [n], allowed gain of a query token over all heads.
        lse: [n, h], allowed error of lse.
        max_logits: [n, h], allowed error of max_logits.
        kappa: rms of `condition` over the call.
    """

    ref: reference.Reference
    exempt: torch.Tensor
    empty: torch.Tensor
    ideal_power: torch.Tensor
    ideal_gain: float
    weight_power: torch.Tensor
    row_power: torch.Tensor
    tail_power: float
    fp32_power: torch.Tensor
    gain_sigma: float
    gain_bound: float
    head_gain: torch.Tensor
    token_gain: torch.Tensor
    lse: torch.Tensor
    max_logits: torch.Tensor
    kappa: float


def answer(inputs: Inputs) -> reference.Reference:
    """The oracle's answer, flattened to query tokens: [n, h_q, ...]."""
    if inputs.op != "prefill":
        ref = reference.decode(
            inputs.q,
            inputs.cache,
            inputs.indices,
            scale=inputs.scale,
            topk_length=inputs.topk_length,
            attn_sink=inputs.attn_sink,
            extra_cache=inputs.extra_cache,
            extra_indices=inputs.extra_indices,
            extra_topk_length=inputs.extra_topk_length,
        )
        return reference.Reference(*(x.flatten(0, 1) for x in ref))
    return reference.prefill(
        inputs.q,
        inputs.cache,
        inputs.indices,
        scale=inputs.scale,
        topk_length=inputs.topk_length,
        attn_sink=inputs.attn_sink,
    )


def selected_rows(inputs: Inputs, token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct valid rows [u, d_qk] of one query token, float64, and how often each counts."""
    s_q = inputs.queries
    rows, counts = [], []
    for cache, indices, lengths in (
        (inputs.cache, inputs.indices, inputs.topk_length),
        (inputs.extra_cache, inputs.extra_indices, inputs.extra_topk_length),
    ):
        if cache is None or indices is None:
            continue
        line = indices.flatten(0, -2)[token : token + 1]
        length = None if lengths is None else lengths[token // s_q : token // s_q + 1]
        valid = reference.valid_indices(line, cache.num_slots, length)
        slots, often = torch.unique(line[valid].to(torch.int64), return_counts=True)
        rows.append(cache.read(slots))
        counts.append(often.double())
    return torch.cat(rows), torch.cat(counts)


def expect(inputs: Inputs) -> Expected:
    """The oracle's answer to a call, with its error budget."""
    ref = answer(inputs)
    n, h = ref.lse.shape
    q = inputs.q.reshape(n, h, inputs.q.shape[-1]).double()
    exempt = torch.zeros(n, dtype=torch.bool, device=q.device)
    empty = torch.isneginf(ref.lse).all(1) if h else exempt.clone()
    weight_power = torch.zeros_like(ref.lse)
    row_power, fp32_power = weight_power.clone(), weight_power.clone()
    lse_budget, max_budget = weight_power.clone(), weight_power.clone()
    kappa_square = tail_trace = tail_square = tail_largest = tail_cap = alike_power = 0.0
    few = torch.zeros_like(ref.lse, dtype=torch.bool)
    head_variance, head_bound, head_cap = (torch.zeros_like(ref.lse) for _ in range(3))
    token_variance = head_variance.new_zeros(n)
    for i in range(n):
        rows, counts = selected_rows(inputs, i)
        if not bool(torch.isfinite(q[i]).all()) or not bool(torch.isfinite(rows).all()):
            exempt[i] = True
            continue
        if rows.shape[0] == 0:
            continue
        sink = None if inputs.attn_sink is None else inputs.attn_sink.double()
        noise = _token_noise(q[i], rows, counts, ref, i, inputs.scale, sink)
        weight_power[i] = BF16_RMS**2 * noise.trace
        bound = noise.trace + 2 * noise.frobenius * (math.sqrt(ROW_TAIL) + ROW_TAIL)
        worst = BF16_MAX_ERROR**2 * noise.cap
        row_power[i] = torch.where(noise.alike, worst, torch.minimum(BF16_RMS**2 * bound, worst))
        few[i] = ~noise.alike & (worst <= BF16_RMS**2 * bound)
        fp32_power[i] = noise.fp32_power
        lse_budget[i], max_budget[i] = noise.lse, noise.max_logits
        kappa_square += float(noise.trace.sum())
        tail_trace += float(noise.trace[~noise.alike].sum())
        tail_square += noise.joint**2
        tail_largest = max(tail_largest, noise.largest)
        tail_cap += float(noise.cap[~noise.alike].sum())
        alike_power += BF16_MAX_ERROR**2 * float(noise.cap[noise.alike].sum())
        token_variance[i] = noise.gain_variance
        head_variance[i], head_bound[i] = noise.head_variance, noise.gain_bound
        head_cap[i] = noise.head_cap
    out = torch.where(exempt[:, None, None], 0.0, ref.out)
    diff = out.to(torch.bfloat16).double() - out
    norms = out.square().sum(-1)
    fourth = out.pow(4).sum(-1)
    ideal_power = torch.maximum(diff.square().sum(-1), BF16_RMS**2 * norms)
    together = _worst_together(row_power, norms)
    row_power += torch.maximum(ideal_power, _output_tail(norms, fourth, ROW_TAIL))
    row_power = torch.where(few, together, row_power)
    total = norms.sum()
    tail = tail_trace + 2 * math.sqrt(tail_square * CASE_TAIL) + 2 * tail_largest * CASE_TAIL
    tail_power = min(BF16_RMS**2 * tail, BF16_MAX_ERROR**2 * tail_cap)
    if BF16_MAX_ERROR**2 * tail_cap <= BF16_RMS**2 * tail:
        tail_power = float(_worst_together(total.new_tensor(tail_power), total))
    else:
        output = float(_output_tail(total, fourth.sum(), CASE_TAIL))
        tail_power += max(float(ideal_power.sum()), output)
    tail_power += alike_power
    safe = float(total) or 1.0
    along = (diff * out).sum(-1)

    def part_gain(dim: int, variance: torch.Tensor) -> torch.Tensor:
        """Allowed gain of the rows summed over `dim`; variance is that of their weights."""
        power = norms.sum(dim)
        sigmas = PART_SIGMAS * BF16_RMS * (variance + fourth.sum(dim)).sqrt()
        sigmas = torch.minimum(sigmas, BF16_MAX_ERROR * (head_cap.sum(dim) + power))
        allowed = along.sum(dim).abs() + sigmas + head_bound.sum(dim)
        return GAIN_FLOOR + allowed / torch.where(power > 0, power, 1.0)

    return Expected(
        ref=ref,
        exempt=exempt,
        empty=empty,
        ideal_power=ideal_power,
        ideal_gain=float(along.sum()) / safe,
        weight_power=weight_power,
        row_power=row_power,
        tail_power=tail_power,
        fp32_power=fp32_power,
        gain_sigma=BF16_RMS * math.sqrt(float(token_variance.sum() + fourth.sum())) / safe,
        gain_bound=float(head_bound.sum()) / safe,
        head_gain=part_gain(0, head_variance.sum(0)),
        token_gain=part_gain(1, token_variance),
        lse=lse_budget,
        max_logits=max_budget,
        kappa=math.sqrt(kappa_square / safe),
    )


def _output_tail(square: torch.Tensor, fourth: torch.Tensor, t: float) -> torch.Tensor:
    """Tail bound of the output's own rounding: few large entries make it more than its mean."""
    dominance = torch.where(square > 0, fourth / square.square().clamp_min(1e-300), 0.0)
    grown = BF16_RMS**2 * (1 + 2 * (t * dominance).sqrt() + 2 * t * dominance)
    return square * grown.clamp_max(BF16_MAX_ERROR**2)


def _worst_together(weights: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """The worst case of weights and output where few weights carry it: errors add, powers do not.

    Values of bf16, or of e4m3 times a power of two, lie on the output's grid. A single weight that
    is off by a little more than half a step then moves all of a row by a whole step.
    """
    return (weights.sqrt() + BF16_MAX_ERROR * square.sqrt()).square()


def _shared_roundings(logits: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Heads where many weights are equal, and round alike: (head, group of each token).

    Logits [h, u] closer than SAME_LOGIT count as equal. The largest are among them: where the
    maximum is subtracted they are exactly 1, but a kernel may round weights after the division.
    """
    found = []
    steps = torch.round((logits - logits.amax(1, keepdim=True)) / SAME_LOGIT)
    ordered = steps.sort(1).values
    groups = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
    for head in (steps.shape[1] > 2 * groups).nonzero().flatten().tolist():
        _, group = torch.unique(steps[head], return_inverse=True)
        found.append((head, group))
    return found


def _largest_eigenvalue(matrix: torch.Tensor) -> float:
    """Of a symmetric positive semidefinite matrix, by power iteration from its diagonal.

    Twelve steps come within a few percent from below; 1.1 covers that.
    """
    vector = matrix.diagonal().clone()
    value = 0.0
    for _ in range(12):
        norm = float(vector.norm())
        if norm == 0:
            break
        vector = matrix @ (vector / norm)
        value = float(vector.norm())
    return min(1.1 * value, float(torch.linalg.matrix_norm(matrix)))


@dataclass(frozen=True)
class _TokenNoise:
    trace: torch.Tensor  # [h] sum_t w_t^2 |v_t|^2
    frobenius: torch.Tensor  # [h] |B_h|_F
    joint: float  # |sum_h B_h|_F
    largest: float  # its largest eigenvalue
    cap: torch.Tensor  # [h] (sum_t w_t |v_t|)^2
    fp32_power: torch.Tensor  # [h]
    gain_variance: float  # of the heads not in `alike`, together
    head_variance: torch.Tensor  # [h] the same of each; 0 in `alike`
    head_cap: torch.Tensor  # [h] sum_t |w_t <v_t, out>|
    gain_bound: torch.Tensor  # [h] of the heads in `alike`, and of fp32 arithmetic
    alike: torch.Tensor  # [h] many weights are equal: their bound is the worst case
    lse: torch.Tensor  # [h]
    max_logits: torch.Tensor  # [h]


def _token_noise(
    q: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    ref: reference.Reference,
    token: int,
    scale: float,
    sink: torch.Tensor | None,
) -> _TokenNoise:
    """The budget's ingredients for one query token: q [h, d], rows [u, d], counts [u]."""
    lse, out = ref.lse[token], ref.out[token]
    dots = [
        scale * (q[:, k : k + BLOCK] @ rows[:, k : k + BLOCK].T)
        for k in range(0, rows.shape[1], BLOCK)
    ]
    logits = torch.stack(dots).sum(0)
    partial = torch.stack(dots).abs().sum(0) + abs(scale) * (q.square() @ rows.square().T).sqrt()
    logit_error = LOGIT_ULPS * FP32_ULP * partial
    p = torch.exp(logits - lse[:, None]) * counts
    factor = torch.ones_like(lse) if sink is None else reference.sink_factor(lse, sink)
    w = p * factor[:, None]
    values = rows[:, : out.shape[-1]]

    # fp32 for the Gram matrices, so normalised: values reach 1e33 and their squares must not.
    unit = float(values.abs().max()) or 1.0
    small = (values / unit).float()
    # Weights before the sink: it may shrink them to 1e-26, whose squares float32 does not have.
    p32, shrunk = p.float(), (unit * factor).square()
    size = small.square().sum(1)
    gram = small @ small.T
    trace = (p32.square() @ size).double() * shrunk
    frobenius = (p32.square() @ gram.square() * p32.square()).sum(1).sqrt().double() * shrunk
    cap = (p32 @ size.sqrt()).square().double() * shrunk
    along = w * (out @ values.T)
    gain_bound = torch.zeros_like(lse)
    alike = torch.zeros(w.shape[0], dtype=torch.bool, device=w.device)
    for head, group in _shared_roundings(logits):
        count = int(group.max()) + 1
        parts = small.new_zeros(count, small.shape[1])
        lengths = parts.index_add_(0, group, small * p32[head, :, None]).norm(dim=1).double()
        sums = along.new_zeros(count).index_add_(0, group, along[head])
        alike[head] = True
        trace[head] = lengths.square().sum() * shrunk[head]
        cap[head] = lengths.sum().square() * shrunk[head]
        gain_bound[head] = BF16_MAX_ERROR * sums.abs().sum()
    # Heads that give a token the same weight also round it alike; as if all of them did.
    free = w.float() * ~alike[:, None]
    joint = (free.T @ free) * gram

    mean_error = (p * logit_error).sum(1)
    lse_error = mean_error + FP32_ULP * (8 + 2 * lse.abs() + 4 * math.sqrt(float(counts.sum())))
    norms = out.norm(dim=1)
    fp32 = 16 * ((w * logit_error).square() @ values.square().sum(1))
    fp32 = fp32 + (2.0**-20) ** 2 * (trace + norms.square()) + out.shape[-1] * UNDERFLOW**2
    if sink is not None:
        offset = torch.where(torch.isfinite(sink), (lse - sink).abs(), 0.0)
        fp32 = fp32 + (norms * (lse_error + FP32_ULP * offset)).square()
        # The factor itself may be so small, and the values so large that it counts.
        fp32 = fp32 + (UNDERFLOW * unit * (p32 @ size.sqrt()).double()).square()
    return _TokenNoise(
        trace=trace,
        frobenius=frobenius,
        joint=float(torch.linalg.matrix_norm(joint)) * unit**2,
        largest=_largest_eigenvalue(joint) * unit**2,
        cap=cap,
        fp32_power=fp32,
        gain_variance=float(along[~alike].sum(0).square().sum()),
        head_variance=torch.where(alike, 0.0, along.square().sum(1)),
        head_cap=along.abs().sum(1),
        gain_bound=gain_bound + fp32.sqrt() * norms,
        alike=alike,
        lse=lse_error,
        max_logits=MAX_LOGIT_ULPS / LOGIT_ULPS * logit_error.amax(1)
        + 4 * FP32_ULP * logits.abs().amax(1),
    )
