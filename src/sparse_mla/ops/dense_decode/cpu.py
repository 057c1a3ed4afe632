"""Dense decode on CPU: a sequence's tokens as one list of slots for sparse decode's code.

One sequence at a time, so that its bits depend on nothing else in the batch.
"""

from __future__ import annotations

import torch

from ...kv_cache import KVCache
from ..sparse_decode.cpu import attend


def run(
    q: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    scale: float,
    causal: bool,
    num_splits: int,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense decode; see interface.dense_decode. Splits mean nothing here."""
    b, s_q, heads, d_qk = q.shape
    d_v = cache.layout.d_v
    out = torch.empty(b, s_q, heads, d_v, dtype=torch.bfloat16)
    lse = torch.empty(b, s_q, heads, dtype=torch.float32)
    if s_q == 0:
        return out, lse
    reach = block_table.shape[1] * cache.page_size
    for i, length in enumerate(cache_seqlens.tolist()):
        length = min(max(length, 0), reach)
        slots = sequence_slots(block_table[i], length, cache)[None]
        if causal and s_q > 1:
            # Query i of s_q: a list of its own length.
            seen = torch.arange(length - s_q + 1, length + 1)
            values, sums, _ = attend(q[i], [(cache, slots.expand(s_q, -1), seen)], None, scale)
        else:
            # All queries see the same: their heads are heads of one.
            rows = q[i].reshape(1, s_q * heads, d_qk)
            values, sums, _ = attend(rows, [(cache, slots, None)], None, scale)
        out[i] = values.view(s_q, heads, d_v)
        lse[i] = sums.view(s_q, heads)
    return out, lse


def sequence_slots(pages: torch.Tensor, length: int, cache: KVCache) -> torch.Tensor:
    """Slots [length] int64 of a sequence's tokens, -1 where the cache has no such page."""
    pages = pages[: -(-length // cache.page_size)].long()
    known = (pages >= 0) & (pages < cache.num_pages)
    token = torch.arange(length)
    page = token // cache.page_size
    slots = pages[page] * cache.page_size + token % cache.page_size
    return torch.where(known[page], slots, -1)
