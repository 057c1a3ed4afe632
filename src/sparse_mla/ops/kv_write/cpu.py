"""The cache's writer in plain torch, on any device: pack all tokens, scatter the bytes."""

from __future__ import annotations

import torch

from ...kv_cache import KVCache


def run(
    cache: KVCache,
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    slots: torch.Tensor,
    scale_rounding: str,
) -> None:
    """Write the tokens whose slots lie in [0, cache.num_slots)."""
    keep = (slots >= 0) & (slots < cache.num_slots)
    slots, latent = slots[keep].to(torch.int64), latent[keep]
    rope = None if rope is None else rope[keep]
    rows, footers = cache.layout.pack(latent, rope, scale_rounding, cache.tensor_scale)
    page, offset = slots // cache.page_size, slots % cache.page_size
    cache.rows_view()[page, offset] = rows
    if cache.layout.planar:
        cache.footers_view()[page, offset] = footers
