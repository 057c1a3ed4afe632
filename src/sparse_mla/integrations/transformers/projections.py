"""The absorbed form of MLA: keys and values are never expanded, queries and outputs are.

kv_b_proj expands a latent c into a head's key W_UK c and value W_UV c. Then

    <q, W_UK c> = <W_UK^T q, c>    and    sum_t p_t W_UV c_t = W_UV sum_t p_t c_t,

so attention runs over the latents themselves, one KV head for all query heads, and both matrices
act on one vector per query token and head instead of one per cached token and head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn


class Expansion(NamedTuple):
    """What `kv_b_proj` does to a latent, head by head; views of its weight where that is possible.

    Attributes:
        w_uk: [heads, nope, rank].
        w_uv: [heads, v, rank].
        value_bias: [heads, v] or None. A bias of the keys would add the same to all of a query's
            logits, which a softmax does not see.
    """

    w_uk: torch.Tensor
    w_uv: torch.Tensor
    value_bias: torch.Tensor | None


def expansion(attention: Any, rank: int, dtype: torch.dtype) -> Expansion:
    """The expansion of an attention module as it is now: there is no copy that could go stale.

    A plain linear layer's own weight. Anything else (an adapter, merged or not, a quantised
    weight, a parametrisation, an overridden forward) is asked what it does to the unit vectors and
    to 0, at every call. That costs as much as `rank` tokens through the layer, and the answer is
    rounded as the layer rounds a token's.
    """
    layer = attention.kv_b_proj
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    bias: torch.Tensor | None
    if type(layer) is nn.Linear and not hooks and "forward" not in layer.__dict__:
        weight, bias = layer.weight, layer.bias
    else:
        device = next(layer.parameters()).device
        answers = layer(torch.eye(rank + 1, rank, dtype=dtype, device=device))
        bias = answers[rank]
        weight = (answers[:rank] - bias).T
    nope, width = attention.qk_nope_head_dim, attention.v_head_dim
    per_head = weight.unflatten(0, (-1, nope + width))
    if bias is not None:
        bias = bias.view(-1, nope + width)[:, nope:]
    return Expansion(per_head[:, :nope], per_head[:, nope:], bias)


def absorb(query: torch.Tensor, expansion: Expansion) -> torch.Tensor:
    """Queries [b, heads, s, nope + rope] as [b, s, heads, rank + rope] over latents, bf16."""
    batch, heads, length, _ = query.shape
    nope = expansion.w_uk.shape[1]
    # Heads first: a broadcast matmul would copy the weight once per sequence.
    plain = query[..., :nope].transpose(0, 1).reshape(heads, batch * length, nope)
    latent = torch.bmm(plain, expansion.w_uk.to(query.dtype))
    latent = latent.view(heads, batch, length, -1).permute(1, 2, 0, 3)
    rope = query[..., nope:].transpose(1, 2)
    return torch.cat([latent, rope], dim=-1).to(torch.bfloat16)


def expand(out: torch.Tensor, expansion: Expansion, dtype: torch.dtype) -> torch.Tensor:
    """Weighted sums of latents [b, s, heads, rank] as head outputs [b, s, heads, v]."""
    batch, length, heads, rank = out.shape
    rows = out.to(dtype).permute(2, 0, 1, 3).reshape(heads, batch * length, rank)
    values = torch.bmm(rows, expansion.w_uv.to(dtype).transpose(1, 2))
    values = values.view(heads, batch, length, -1).permute(1, 2, 0, 3)
    return values if expansion.value_bias is None else values + expansion.value_bias
