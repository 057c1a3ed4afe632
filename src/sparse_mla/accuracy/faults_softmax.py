"""Faults between logits and the merged result: masks, running maximum, weights, split merge."""

from __future__ import annotations

import math

import torch

from .case import Inputs
from .faults_fault import Fault, has_masked
from .faults_kernel import EmulatedKernel


class FirstChunkNan(EmulatedKernel):
    """Subtracts the maximum so far even while it is -inf: -inf - -inf is NaN."""

    def weights(
        self, logits: torch.Tensor, peak: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        return torch.exp(logits - peak[..., None])


class MaskedChunkCounts(EmulatedKernel):
    """In a wholly masked chunk the mask value is its own maximum, so that every weight is 1."""

    def weights(
        self, logits: torch.Tensor, peak: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        nothing = ~valid.any(-1, keepdim=True)
        return torch.where(nothing, 1.0, super().weights(logits, peak, valid))

    def running_max(self, logits: torch.Tensor) -> torch.Tensor:
        peak = super().running_max(logits)
        return torch.where(peak == float("-inf"), 0.0, peak)


class FiniteSentinel(EmulatedKernel):
    """The mask is a number instead of -inf, and real logits may lie below it."""

    value = -3e4

    def mask(self, logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return torch.where(valid, logits, self.value)


class FiniteMaximum(EmulatedKernel):
    """The running maximum starts at a number: logits far below it all get weight 0."""

    value = -3e4

    def running_max(self, logits: torch.Tensor) -> torch.Tensor:
        return super().running_max(logits).clamp_min(self.value)


class WeightsTruncated(EmulatedKernel):
    """Truncated weights are all too small; the sum that they are divided by is not."""

    def round_weights(self, p: torch.Tensor) -> torch.Tensor:
        return (p.float().view(torch.int32) & -(1 << 16)).view(torch.float32).to(p.dtype)


class WeightsFp8(EmulatedKernel):
    def round_weights(self, p: torch.Tensor) -> torch.Tensor:
        return p.to(torch.float8_e4m3fn).to(p.dtype)


class SumRounded(EmulatedKernel):
    """The sum, and lse with it, is that of rounded weights; the weights keep their bits."""

    def weights(
        self, logits: torch.Tensor, peak: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        self.kept = super().weights(logits, peak, valid)
        return self.kept.to(torch.bfloat16).to(self.kept.dtype)

    def round_weights(self, p: torch.Tensor) -> torch.Tensor:
        return self.kept


class RowSumBf16(EmulatedKernel):
    def row_sum(self, sums: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(sums[..., 0])
        for chunk in range(sums.shape[-1]):
            added = total + sums[..., chunk] * decay[..., chunk]
            total = added.to(torch.bfloat16).to(sums.dtype)
        return total


class LogitsBf16(EmulatedKernel):
    def logits(self, q: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        return super().logits(q, keys, scale).to(torch.bfloat16).to(q.dtype)


class QueriesFp8(EmulatedKernel):
    """One scale per query vector, amax/448."""

    def queries(self, inputs: Inputs) -> torch.Tensor:
        q = super().queries(inputs)
        narrow = q.float()
        scales = narrow.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
        values = (narrow / scales).to(torch.float8_e4m3fn)
        return values.to(q.dtype) * scales.to(q.dtype)


class SoftmaxBase2(EmulatedKernel):
    """2^logit: the factor log2(e) that belongs to exp2 is missing."""

    def logits(self, q: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        return super().logits(q, keys, scale) * math.log(2)


class ScaleIgnored(EmulatedKernel):
    def softmax_scale(self, inputs: Inputs) -> float:
        return float(inputs.q.shape[-1] ** -0.5)


class MergeWrongBase(EmulatedKernel):
    """One side of the merge has natural logarithms, the other takes them for base 2."""

    factor = math.log(2)

    def merge(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if lse.shape[2] == 1:
            return super().merge(out, lse)
        return super().merge(out, lse * self.factor)


class EmptySplitLseZero(EmulatedKernel):
    def merge(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if lse.shape[2] == 1:
            return super().merge(out, lse)
        return super().merge(out, torch.where(lse == float("-inf"), 0.0, lse))


class SplitsAveraged(EmulatedKernel):
    """Partial outputs are merged with equal shares, as if every split had the same lse."""

    def merge(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, whole = super().merge(out, lse)
        some = (lse > float("-inf")).to(out.dtype)
        share = some / some.sum(2, keepdim=True).clamp_min(1)
        return (share[..., None] * out).sum(2), whole


def _more_than_a_chunk(inputs: Inputs) -> bool:
    extra = inputs.extra_indices
    width = inputs.indices.shape[-1] + (0 if extra is None else extra.shape[-1])
    return width > 16


def _other_scale(inputs: Inputs) -> bool:
    return inputs.scale != float(inputs.q.shape[-1] ** -0.5)


_CHUNKS = tuple(
    {"chunk": chunk, "splits": splits} for splits in (1, 2, 3, 4) for chunk in (64, 32, 128)
)
_SPLITS = tuple(
    {"chunk": chunk, "splits": splits}
    for chunk in (64, 32, 128)
    for splits in (1 << 20, 2, 3, 4, 7, 8, 16)
)

SOFTMAX = (
    Fault(
        "first_chunk_nan",
        5,
        "subtracts a maximum of -inf while the chunks so far are wholly masked: NaN",
        FirstChunkNan,
        has_masked,
        variants=_CHUNKS,
    ),
    Fault(
        "masked_chunk_counts",
        6,
        "gives each entry of a wholly masked chunk the weight exp(0) = 1",
        MaskedChunkCounts,
        variants=_CHUNKS,
    ),
    Fault(
        "finite_sentinel",
        7,
        "masks with a finite logit of -3e4 to -5e4, which beats real logits below it",
        FiniteSentinel,
        variants=({}, {"value": -5e4}),
    ),
    Fault(
        "finite_maximum",
        7,
        "starts the running maximum at -3e4 to -5e4: rows whose logits lie below it vanish",
        FiniteMaximum,
        variants=({}, {"value": -5e4}),
    ),
    Fault(
        "merge_wrong_log_base",
        14,
        "merges split results with exp2 of natural logarithms",
        MergeWrongBase,
        _more_than_a_chunk,
        variants=_SPLITS,
    ),
    Fault(
        "merge_wrong_log_base_reverse",
        14,
        "merges split results with exp of base-2 logarithms",
        MergeWrongBase,
        _more_than_a_chunk,
        variants=tuple({**split, "factor": 1 / math.log(2)} for split in _SPLITS),
    ),
    Fault(
        "splits_averaged",
        14,
        "averages split results without regard to their lse",
        SplitsAveraged,
        _more_than_a_chunk,
        variants=_SPLITS,
    ),
    Fault(
        "empty_split_lse_zero",
        14,
        "gives a split with nothing valid the lse 0 instead of -inf",
        EmptySplitLseZero,
        _more_than_a_chunk,
        variants=_SPLITS,
    ),
    Fault(
        "p_rounded_before_sum",
        18,
        "truncates the weights to bf16 but not the sum they are divided by: every output shrinks",
        WeightsTruncated,
    ),
    Fault("p_fp8", 18, "rounds the weights to e4m3", WeightsFp8, variants=_CHUNKS),
    Fault(
        "sum_rounded",
        18,
        "sums weights rounded to bf16 but multiplies the values by unrounded ones",
        SumRounded,
        variants=_CHUNKS,
    ),
    Fault(
        "row_sum_bf16",
        18,
        "accumulates the sum of the weights in bf16",
        RowSumBf16,
        variants=_CHUNKS,
    ),
    Fault("logits_bf16", 18, "rounds the logits to bf16", LogitsBf16),
    Fault("q_fp8", 18, "quantises the queries to e4m3", QueriesFp8),
    Fault(
        "softmax_base2",
        19,
        "computes exp2 of natural logits, without the factor log2(e)",
        SoftmaxBase2,
    ),
    Fault(
        "softmax_scale_ignored",
        19,
        "uses 1/sqrt(d_qk) instead of the softmax scale it was given",
        ScaleIgnored,
        _other_scale,
    ),
)
