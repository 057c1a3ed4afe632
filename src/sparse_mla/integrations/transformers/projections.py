"""The absorbed form of MLA: keys and values are never expanded, queries and outputs are.

kv_b_proj expands a latent c into a head's key W_UK c and value W_UV c. Then

    <q, W_UK c> = <W_UK^T q, c>    and    sum_t p_t W_UV c_t = W_UV sum_t p_t c_t,

so attention runs over the latents themselves, one KV head for all query heads, and both matrices
act on one vector per query token and head instead of one per cached token and head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def expansion_weight(kv_b_proj: Any, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix that `kv_b_proj` multiplies latents by, [heads * (nope + v), rank].

    A plain linear layer's own weight. Anything else (an adapter, merged or not, a quantised
    weight, a parametrisation, an overridden forward) is asked what it does to the unit vectors, at
    every call: there is no copy that could go stale. That costs as much as `rank` tokens through
    the layer, and the answer is rounded as the layer rounds a token's.
    """
    hooks = kv_b_proj._forward_hooks or kv_b_proj._forward_pre_hooks
    if type(kv_b_proj) is nn.Linear and not hooks and "forward" not in kv_b_proj.__dict__:
        return kv_b_proj.weight
    device = next(kv_b_proj.parameters()).device
    return kv_b_proj(torch.eye(rank, dtype=dtype, device=device)).T


def split_weight(
    attention: Any, rank: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(W_UK [heads, nope, rank], W_UV [heads, v, rank]) of an attention module, views."""
    nope, width = attention.qk_nope_head_dim, attention.v_head_dim
    weight = expansion_weight(attention.kv_b_proj, rank, dtype)
    per_head = weight.unflatten(0, (-1, nope + width))
    return per_head[:, :nope], per_head[:, nope:]


def absorb(query: torch.Tensor, w_uk: torch.Tensor) -> torch.Tensor:
    """Queries [b, heads, s, nope + rope] as [b, s, heads, rank + rope] over latents, bf16."""
    batch, heads, length, _ = query.shape
    nope = w_uk.shape[1]
    # Heads first: a broadcast matmul would copy the weight once per sequence.
    plain = query[..., :nope].transpose(0, 1).reshape(heads, batch * length, nope)
    latent = torch.bmm(plain, w_uk.to(query.dtype))
    latent = latent.view(heads, batch, length, -1).permute(1, 2, 0, 3)
    rope = query[..., nope:].transpose(1, 2)
    return torch.cat([latent, rope], dim=-1).to(torch.bfloat16)


def expand(out: torch.Tensor, w_uv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sums of latents [b, s, heads, rank] as head outputs [b, s, heads, v]."""
    batch, length, heads, rank = out.shape
    rows = out.to(dtype).permute(2, 0, 1, 3).reshape(heads, batch * length, rank)
    values = torch.bmm(rows, w_uv.to(dtype).transpose(1, 2))
    return values.view(heads, batch, length, -1).permute(1, 2, 0, 3)
