"""Faults of the whole call: kept state, batch, query tokens, heads, the extra cache, sink, lse."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from .case import Inputs
from .faults_fault import Fault, has_masked, has_sink, many_queries
from .faults_kernel import Attended, EmulatedKernel, Source


class StaleMetadata(EmulatedKernel):
    """The first call's lengths are kept with the scheduling object and used from then on."""

    masks_too = True

    def sources(self, inputs: Inputs, state: Any) -> list[Source]:
        made = super().sources(inputs, state)
        now = [_lengths_of(source) for source in made]
        first = state.setdefault("lengths", now)
        return [
            Source(source.cache, source.indices, self.stale(new, old))
            for source, new, old in zip(made, now, first, strict=False)
        ]

    def stale(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """The first call's lengths, for as many rows as it had."""
        kept = new.clone()
        rows = min(len(new), len(old))
        kept[:rows] = old[:rows]
        return kept if self.masks_too else torch.minimum(kept, new)


class FirstQueryIndices(EmulatedKernel):
    def sources(self, inputs: Inputs, state: Any) -> list[Source]:
        made = super().sources(inputs, state)
        if inputs.op == "prefill":
            return made
        s_q = inputs.q.shape[1]
        first = torch.arange(inputs.q.shape[0], device=inputs.q.device).repeat_interleave(s_q)
        return [replace(source, indices=source.indices[first * s_q]) for source in made]


class FirstQueryMask(EmulatedKernel):
    """Each query token loads its own entries, but which of them count is the first token's mask."""

    def sources(self, inputs: Inputs, state: Any) -> list[Source]:
        made = super().sources(inputs, state)
        if inputs.op == "prefill":
            return made
        s_q = inputs.q.shape[1]
        first = torch.arange(inputs.q.shape[0], device=inputs.q.device).repeat_interleave(s_q)
        masked = []
        for source in made:
            counts = self.in_cache(source)
            own = torch.where(counts, source.indices, 0 if source.cache.num_slots else -1)
            masked.append(replace(source, indices=torch.where(counts[first * s_q], own, -1)))
        return masked


class EmptyRowNan(EmulatedKernel):
    lse_too = False

    def finish(self, done: Attended, inputs: Inputs) -> Attended:
        done = super().finish(done, inputs)
        empty = done.empty[:, None]
        return done._replace(
            out=torch.where(empty[..., None], float("nan"), done.out),
            lse=torch.where(empty, float("nan"), done.lse) if self.lse_too else done.lse,
        )


class EmptyRowPoisons(EmulatedKernel):
    """One row with nothing valid, and the rows that share its work are NaN."""

    reach = "all"

    def finish(self, done: Attended, inputs: Inputs) -> Attended:
        done = super().finish(done, inputs)
        hit = done.empty.any().expand_as(done.empty)
        if self.reach == "later":
            hit = done.empty.to(torch.int8).cummax(0).values.bool()
        return done._replace(
            out=torch.where(hit[:, None, None], float("nan"), done.out),
            lse=torch.where(hit[:, None], float("nan"), done.lse),
        )


class EmptyRowLse(EmulatedKernel):
    value = 0.0

    def finish(self, done: Attended, inputs: Inputs) -> Attended:
        done = super().finish(done, inputs)
        return done._replace(lse=torch.where(done.empty[:, None], self.value, done.lse))


class NanSpreads(EmulatedKernel):
    """A NaN in one query token's result reaches the next token, which shares its tile."""

    def finish(self, done: Attended, inputs: Inputs) -> Attended:
        done = super().finish(done, inputs)
        hit = done.out.isnan().any(-1).any(-1) | done.lse.isnan().any(-1)
        hit = hit | torch.cat([hit.new_zeros(1), hit[:-1]])[: len(hit)]
        return done._replace(out=torch.where(hit[:, None, None], float("nan"), done.out))


class HeadsBeyondTail(EmulatedKernel):
    """Only whole tiles of heads are stored; the rest of the output keeps what memory held."""

    tile = 8
    found = "zeros"

    def finish(self, done: Attended, inputs: Inputs) -> Attended:
        done = super().finish(done, inputs)
        heads = done.lse.shape[1]
        whole = heads // self.tile * self.tile
        out, lse = done.out.clone(), done.lse.clone()
        if self.found == "zeros":
            out[:, whole:], lse[:, whole:] = 0.0, 0.0
        elif whole:
            other = torch.arange(whole, heads, device=out.device) % whole
            out[:, whole:], lse[:, whole:] = out[:, other], lse[:, other]
        return done._replace(out=out, lse=lse)


class HeadPaddingNan(EmulatedKernel):
    """Padded heads hold NaN, and one maximum is shared by all heads of a tile."""

    tile = 16

    def finish(self, done: Attended, inputs: Inputs) -> Attended:
        done = super().finish(done, inputs)
        heads = done.lse.shape[1]
        whole = heads // self.tile * self.tile
        out, lse = done.out.clone(), done.lse.clone()
        filled = ~done.empty
        out[filled, whole:], lse[filled, whole:] = float("nan"), float("nan")
        return done._replace(out=out, lse=lse)


class SinkInLse(EmulatedKernel):
    def finish(self, done: Attended, inputs: Inputs) -> Attended:
        done = super().finish(done, inputs)
        if inputs.attn_sink is None:
            return done
        lse = torch.logaddexp(done.lse, inputs.attn_sink.to(done.lse.dtype).expand_as(done.lse))
        return done._replace(lse=torch.where(done.empty[:, None], done.lse, lse))


class SinkBase2(EmulatedKernel):
    factor = math.log(2)

    def sink_factor(self, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(lse - sink * self.factor)


class SinkIgnored(EmulatedKernel):
    def sink_factor(self, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(lse)


class LseBase2(EmulatedKernel):
    def lse_unit(self, lse: torch.Tensor) -> torch.Tensor:
        return lse / math.log(2)


class MaxLogitsBase2(EmulatedKernel):
    def max_logits_unit(self, max_logits: torch.Tensor) -> torch.Tensor:
        return max_logits / math.log(2)


def _lengths_of(source: Source) -> torch.Tensor:
    """Lengths [n], the list's width where none are given."""
    if source.lengths is not None:
        return source.lengths.to(torch.int64)
    n, width = source.indices.shape
    return torch.full((n,), width, device=source.indices.device)


def _uneven_heads(inputs: Inputs) -> bool:
    return bool(inputs.q.shape[-2] % 64)


WHOLE = (
    Fault(
        "stale_metadata",
        12,
        "keeps the first call's lengths with the scheduling object and uses them again",
        StaleMetadata,
    ),
    Fault(
        "stale_schedule",
        12,
        "divides the work by the first call's lengths: longer rows of later calls are cut short",
        StaleMetadata,
        variants=({"masks_too": False},),
    ),
    Fault(
        "empty_row_nan",
        13,
        "divides 0 by 0 in a row with nothing valid",
        EmptyRowNan,
        has_masked,
        variants=({}, {"lse_too": True}),
    ),
    Fault(
        "empty_row_poisons_batch",
        13,
        "lets one row with nothing valid turn others of the batch into NaN",
        EmptyRowPoisons,
        has_masked,
        variants=({}, {"reach": "later"}),
    ),
    Fault(
        "empty_row_lse",
        13,
        "gives a row with nothing valid the lse 0, or infinity of the wrong sign",
        EmptyRowLse,
        has_masked,
        variants=({}, {"value": float("inf")}, {"value": -1e30}),
    ),
    Fault(
        "nan_spreads",
        13,
        "lets a NaN that one query token selected reach the token beside it",
        NanSpreads,
    ),
    Fault(
        "first_query_indices",
        15,
        "uses the first query token's indices for all tokens of the sequence",
        FirstQueryIndices,
        many_queries,
    ),
    Fault(
        "first_query_mask",
        15,
        "uses the first query token's mask for all tokens of the sequence",
        FirstQueryMask,
        many_queries,
    ),
    Fault(
        "heads_beyond_tail",
        17,
        "stores whole tiles of 8 to 64 heads only",
        HeadsBeyondTail,
        _uneven_heads,
        variants=tuple({"tile": tile} for tile in (8, 16, 32, 64)),
    ),
    Fault(
        "heads_leak",
        17,
        "answers the heads past a whole tile with the first heads' results",
        HeadsBeyondTail,
        _uneven_heads,
        variants=tuple({"tile": tile, "found": "other heads"} for tile in (8, 16, 32, 64)),
    ),
    Fault(
        "head_padding_nan",
        17,
        "lets NaN in padded heads reach the real heads of their tile",
        HeadPaddingNan,
        _uneven_heads,
        variants=tuple({"tile": tile} for tile in (16, 8, 32, 64)),
    ),
    Fault("sink_in_lse", 19, "adds the sink to the lse it returns", SinkInLse, has_sink),
    Fault(
        "sink_base2",
        19,
        "takes the sink for a base-2 logarithm, or its exp2 counterpart",
        SinkBase2,
        has_sink,
        variants=({}, {"factor": 1 / math.log(2)}),
    ),
    Fault("sink_ignored", 19, "does not apply the sink", SinkIgnored, has_sink),
    Fault("lse_base2", 14, "returns lse as a base-2 logarithm", LseBase2),
    Fault("max_logits_base2", 14, "returns max_logits in base-2 units", MaxLogitsBase2),
)
