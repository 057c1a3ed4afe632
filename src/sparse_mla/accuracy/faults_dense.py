"""Faults of dense decode: block tables, sequences' lengths and the causal mask."""

from __future__ import annotations

import torch

from ..kv_cache import KVCache
from .case import Inputs
from .faults_fault import Fault, causal_queries, dense
from .faults_kernel import EmulatedKernel


class CausalIgnored(EmulatedKernel):
    def dense_ends(self, inputs: Inputs, lengths: torch.Tensor) -> torch.Tensor:
        return lengths[:, None].expand(-1, inputs.q.shape[1])


class CausalFromStart(EmulatedKernel):
    """The mask of a square matrix: query i sees i + 1 tokens, however many came before."""

    def dense_ends(self, inputs: Inputs, lengths: torch.Tensor) -> torch.Tensor:
        ends = super().dense_ends(inputs, lengths)
        if not inputs.causal:
            return ends
        own = torch.arange(1, inputs.q.shape[1] + 1, device=lengths.device)
        return torch.minimum(lengths[:, None], own)


class CausalOffByOne(EmulatedKernel):
    """A query token does not see itself, or sees the one after it."""

    by = -1

    def dense_ends(self, inputs: Inputs, lengths: torch.Tensor) -> torch.Tensor:
        ends = super().dense_ends(inputs, lengths)
        return torch.minimum(ends + self.by, lengths[:, None]) if inputs.causal else ends


class LastPageUnmasked(EmulatedKernel):
    """All tokens of a sequence's last page count."""

    def dense_ends(self, inputs: Inputs, lengths: torch.Tensor) -> torch.Tensor:
        size = inputs.cache.page_size
        whole = -(-lengths // size) * size
        ends = super().dense_ends(inputs, lengths)
        return torch.where(ends == lengths[:, None], whole[:, None], ends)


class SequenceOneShort(EmulatedKernel):
    def dense_lengths(self, inputs: Inputs) -> torch.Tensor:
        return super().dense_lengths(inputs) - 1


class FirstSequenceLength(EmulatedKernel):
    """One length for the whole batch: the first, or the longest."""

    longest = False

    def dense_lengths(self, inputs: Inputs) -> torch.Tensor:
        lengths = super().dense_lengths(inputs)
        if not len(lengths):
            return lengths
        return (lengths.max() if self.longest else lengths[0]).expand_as(lengths)


class FirstSequenceTable(EmulatedKernel):
    def dense_table(self, inputs: Inputs) -> torch.Tensor:
        table = super().dense_table(inputs)
        return table[:1].expand_as(table)


class TableStrideOfPages(EmulatedKernel):
    """Rows of the table are taken to lie as far apart as the longest sequence has pages."""

    def dense_table(self, inputs: Inputs) -> torch.Tensor:
        table = super().dense_table(inputs)
        used = int((-(-inputs_lengths(inputs) // inputs.cache.page_size)).max())
        if not 0 < used < table.shape[1]:
            return table
        flat = table.flatten()
        rows = used * torch.arange(len(table), device=table.device)
        at = rows[:, None] + torch.arange(table.shape[1], device=table.device)
        return flat[at.clamp_max(len(flat) - 1)]


class PagesContiguous(EmulatedKernel):
    """Only a sequence's first page is looked up; the others are taken to follow it in memory."""

    def dense_table(self, inputs: Inputs) -> torch.Tensor:
        table = super().dense_table(inputs)
        return table[:, :1] + torch.arange(table.shape[1], device=table.device)


class AbsentPageLoaded(EmulatedKernel):
    """A page that the cache does not have is clamped to one that it has."""

    def dense_slots(
        self, cache: KVCache, pages: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        last = max(cache.num_pages - 1, 0)
        return super().dense_slots(cache, pages.clamp(0, last), offsets)


def inputs_lengths(inputs: Inputs) -> torch.Tensor:
    """The sequences' lengths, 0 where there are none, [b or 1]."""
    assert inputs.cache_seqlens is not None
    lengths = inputs.cache_seqlens.clamp_min(0)
    return lengths if len(lengths) else lengths.new_zeros(1)


def _table_is_wider(inputs: Inputs) -> bool:
    if not dense(inputs) or inputs.block_table is None or len(inputs.block_table) < 2:
        return False
    used = -(-inputs_lengths(inputs) // inputs.cache.page_size)
    return 0 < int(used.max()) < inputs.block_table.shape[1]


def _many(inputs: Inputs) -> bool:
    return dense(inputs) and inputs.q.shape[0] > 1


DENSE_FAULTS = (
    Fault(
        "causal_ignored",
        27,
        "lets every query token of a causal call see the whole sequence",
        CausalIgnored,
        causal_queries,
    ),
    Fault(
        "causal_from_start",
        27,
        "aligns the causal mask with the sequence's start instead of its end",
        CausalFromStart,
        causal_queries,
    ),
    Fault(
        "causal_off_by_one",
        27,
        "hides a query's own token from it, or shows it the next",
        CausalOffByOne,
        causal_queries,
        variants=({}, {"by": 1}),
    ),
    Fault(
        "last_page_unmasked",
        27,
        "counts all tokens of a sequence's last page",
        LastPageUnmasked,
        dense,
    ),
    Fault("sequence_one_short", 27, "leaves out a sequence's last token", SequenceOneShort, dense),
    Fault(
        "first_sequence_length",
        27,
        "uses one length for all sequences: the first one's or the longest",
        FirstSequenceLength,
        _many,
        variants=({}, {"longest": True}),
    ),
    Fault(
        "first_sequence_table",
        27,
        "reads the first sequence's pages for all",
        FirstSequenceTable,
        _many,
    ),
    Fault(
        "table_stride_of_pages",
        27,
        "takes the rows of a wider block table to be as long as the longest sequence",
        TableStrideOfPages,
        _table_is_wider,
    ),
    Fault(
        "pages_contiguous",
        27,
        "looks up a sequence's first page only and reads on from there",
        PagesContiguous,
        dense,
    ),
    Fault(
        "absent_page_loaded",
        27,
        "clamps page numbers that the cache does not have and reads what is there",
        AbsentPageLoaded,
        dense,
    ),
)
