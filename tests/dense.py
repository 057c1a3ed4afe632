"""Random calls of dense decode with hostile surroundings, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from drawn import INT_MAX, INT_MIN, drawn_tokens, scale_of
from sparse_mla import KVCache, reference
from sparse_mla.kv_layout import get_layout
from sparse_mla.reference import Reference


@dataclass
class DenseCall:
    """One call of dense decode."""

    q: torch.Tensor
    cache: KVCache
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[torch.Tensor, KVCache, torch.Tensor, torch.Tensor]:
        return self.q, self.cache, self.block_table, self.cache_seqlens

    def oracle(self) -> Reference:
        return reference.dense_decode(*self.arguments, **self.options)


def dense_call(
    layout: str = "bf16",
    *,
    lengths: Sequence[int] = (100, 64),
    s_q: int = 1,
    heads: int = 16,
    page_size: int = 64,
    padding: int = 0,
    missing: float = 0.0,
    spare: int = 3,
    causal: bool | None = None,
    scale: float | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> DenseCall:
    """A call; every byte that it may not read is 0xFF, and the rest of the table is garbage.

    Args:
        lengths: of the sequences.
        padding: bytes between pages, a multiple of 16.
        missing: share of the pages that the cache does not have.
        spare: pages of nobody in the cache, and entries of the table past the longest sequence.
    """
    made = torch.Generator().manual_seed(seed)
    b = len(lengths)
    counts = [-(-max(length, 0) // page_size) for length in lengths]
    pages = sum(counts) + spare
    kind = get_layout(layout)
    scale_of_all = scale_of(kind)
    stride = kind.page_bytes(page_size) + padding if padding else None
    cache = KVCache.empty(
        pages,
        page_size,
        kind,
        device=device,
        page_stride=stride,
        tensor_scale=None if scale_of_all is None else scale_of_all.to(device),
    )
    rows = torch.full(cache.rows_view().shape, 0xFF, dtype=torch.uint8)
    order = torch.randperm(pages, generator=made)
    garbage = torch.tensor([INT_MAX, INT_MIN, -1, pages, max(0, pages - 1)], dtype=torch.int32)
    width = max([*counts, 0]) + spare
    table = garbage[torch.randint(0, len(garbage), (b, width), generator=made)]
    filled = KVCache.empty(pages, page_size, kind, tensor_scale=scale_of_all)
    n = filled.num_slots
    filled.append(*drawn_tokens(kind, n, made, 0.5), torch.arange(n))
    start = 0
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own = order[start : start + count]
        start += count
        table[i, :count] = own.to(torch.int32)
        slots = torch.arange(max(length, 0))
        page, offset = own[slots // page_size], slots % page_size
        rows[page, offset] = filled.rows_view()[page, offset]
        gone = torch.rand(count, generator=made) < missing
        wrong = torch.tensor([-1, pages, INT_MAX, INT_MIN], dtype=torch.int32)
        pick = wrong[torch.randint(0, 4, (count,), generator=made)]
        table[i, :count] = torch.where(gone, pick, table[i, :count])
    cache.pages.fill_(0xFF)
    cache.rows_view().copy_(rows)
    q = 0.4 * torch.randn(b, s_q, heads, cache.layout.d_qk, generator=made)
    options: dict[str, Any] = {}
    if causal is not None:
        options["causal"] = causal
    if scale is not None:
        options["scale"] = scale
    return DenseCall(
        q.to(torch.bfloat16).to(device),
        cache,
        table.to(device),
        torch.tensor(list(lengths), dtype=torch.int32, device=device),
        options,
    )
