"""Launcher of the portable Triton kernels for prefill: no splits, one list per query token."""

from __future__ import annotations

import torch

from ... import arch
from ...kv_cache import KVCache
from ..sparse_decode.config import launch_for
from ..sparse_decode.source import Source
from ..sparse_decode.triton import launch_attend


def run(
    q: torch.Tensor,
    cache: KVCache,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prefill; see interface.prefill."""
    launch = launch_for(arch.of(q.device), q.shape[1], [cache.layout])
    out, lse, max_logits = launch_attend(
        # One "sequence" per query token, so that lengths are per token.
        q.unsqueeze(1),
        [Source(cache, indices.unsqueeze(1), topk_length)],
        attn_sink,
        scale,
        1,
        launch,
        True,
    )
    if max_logits is None:
        raise RuntimeError("the launcher returned no max_logits")
    return out.squeeze(1), max_logits.squeeze(1), lse.squeeze(1)
