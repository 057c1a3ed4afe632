"""Attention over FP8 caches on Hopper: which of the two Gluon kernels takes a call.

Few heads and many heads have different bottlenecks and so different kernels: up to 16 heads the
gather and the latency of a tile (sm90_few_heads, 16 heads a program), above 32 the tensor cores and
shared memory (sm90_many_heads, 64). With few query tokens the first leads with many heads too, with
many the second from 17 heads on.
"""

from __future__ import annotations

import torch

from ...kv_cache import KVCache
from . import sm90_few_heads, sm90_many_heads

FEW_HEADS = 32
# From that many query tokens sm90_many_heads leads with 17 to 32 heads, half its rows empty; us by
# few / by many: b=128 139 / 125, b=256 267 / 231; b=32 45 / 57.
MANY_TOKENS = 96
# Above that many blocks of 64 heads and query token sm90_many_heads leads. H200, topk 2048, us by
# few / by many: 64 heads b=1 16 / 25, b=4 22 / 29, b=8 29 / 36, b=12 44 / 41, b=16 45 / 43; 128
# heads b=4 29 / 36, b=6 44 / 39, b=8 45 / 41. Up to 11 blocks are 44 programs, cut into three.
FEW_BLOCKS = 11


def takes_few_heads(tokens: int, heads: int, batch_invariant: bool) -> bool:
    """Whether sm90_few_heads takes a call of `tokens` query tokens."""
    if batch_invariant:
        return heads <= FEW_HEADS
    if 16 < heads <= FEW_HEADS:
        return tokens < MANY_TOKENS
    return heads <= 16 or tokens * -(-heads // 64) <= FEW_BLOCKS


def attend(
    q: torch.Tensor,
    cache: KVCache,
    indices: torch.Tensor,
    lengths: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
    num_splits: int,
    batch_invariant: bool,
    want_max: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attend q [b, s_q, h, 576] to the slots in indices [b, s_q, topk].

    Args:
        num_splits: pieces that each list is cut into; 0 chooses by shape.
        want_max: also return max_logits; num_splits must be 1 then.

    Returns:
        out [b, s_q, h, 512] bf16, lse [b, s_q, h] float32 natural, and max_logits like lse.
    """
    few = takes_few_heads(q.shape[0] * q.shape[1], q.shape[2], batch_invariant)
    kernel = sm90_few_heads if few else sm90_many_heads
    return kernel.attend(
        q,
        cache,
        indices,
        lengths,
        attn_sink,
        scale,
        num_splits,
        batch_invariant,
        want_max,
    )
