"""Sparse prefill on CPU: the same blocked attention as decode, with max_logits returned."""

from __future__ import annotations

import torch

from ...kv_cache import KVCache
from ..sparse_decode.cpu import attend


def run(
    q: torch.Tensor,
    cache: KVCache,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prefill; see interface.prefill."""
    out, lse, max_logits = attend(q, [(cache, indices, topk_length)], attn_sink, scale)
    return out, max_logits, lse
