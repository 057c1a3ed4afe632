"""A token's bytes as one line, row then footer, for layouts that keep both together or apart."""

from __future__ import annotations

import torch

from ..kv_cache import KVCache
from ..kv_layout import KVLayout


def token_bytes(cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
    """Bytes [n, row + footer] uint8 of the tokens in `slots`."""
    slots = slots.to(device=cache.device, dtype=torch.int64)
    page, offset = slots // cache.page_size, slots % cache.page_size
    return joined(cache.rows_view()[page, offset], cache.footers_view()[page, offset])


def write_tokens(cache: KVCache, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """Store bytes [n, row + footer] at `slots`, byte for byte."""
    slots = slots.to(device=cache.device, dtype=torch.int64)
    page, offset = slots // cache.page_size, slots % cache.page_size
    rows, footers = parts(cache.layout, tokens.to(cache.device))
    cache.rows_view()[page, offset] = rows
    if cache.layout.planar:
        cache.footers_view()[page, offset] = footers


def joined(rows: torch.Tensor, footers: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, footers], dim=-1) if footers.shape[-1] else rows


def parts(layout: KVLayout, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and footers of tokens [..., row + footer]."""
    return tokens[..., : layout.row_bytes], tokens[..., layout.row_bytes :]


def unpack(
    layout: KVLayout, tokens: torch.Tensor, tensor_scale: torch.Tensor | None
) -> torch.Tensor:
    """Logical rows [n, d_qk] float64 of tokens [n, row + footer]."""
    return layout.unpack(*parts(layout, tokens), tensor_scale=tensor_scale)


def stored_scales(layout: KVLayout, tokens: torch.Tensor) -> torch.Tensor | None:
    """The tiles' scales [n, tiles] as stored, None in layouts without any."""
    if layout.scales is None:
        return None
    rows, footers = parts(layout, tokens)
    return layout.scales.read(footers if layout.planar else rows)
