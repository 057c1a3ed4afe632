"""The attention function that a patched layer calls, through transformers' AttentionInterface."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...kv_cache import KVCache
from ...ops.sparse_decode.interface import decode
from ...ops.sparse_prefill.interface import prefill
from .cache import PagedLayer
from .projections import absorb, expand, expansion
from .settings import settings_of

# From this many query tokens per sequence on, bf16 caches go to the prefill op: below it lists are
# worth splitting over the multiprocessors, which only decode does.
PREFILL_TOKENS = 64


def latents_as_they_are(
    kv_nope: torch.Tensor, k_rot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for the attention module's `expand_kv`: nothing is expanded.

    transformers 5.17 expands before it updates the cache, later versions after it; either way the
    cache now gets the latents, and this module's function whatever the cache answered.
    """
    return kv_nope, k_rot


def attend(q: torch.Tensor, cache: KVCache, indices: torch.Tensor, scale: float) -> torch.Tensor:
    """The library's attention of q [b, s_q, h, d_qk] over slots [b, s_q, topk]: [b, s_q, h, d_v].

    A long run over a bf16 cache is a prefill. A quantised cache is read by decode's kernels with
    s_q > 1, so that what is cached is what is attended from the first token on.
    """
    batch, length, heads, width = q.shape
    if not cache.layout.quantised and length >= PREFILL_TOKENS:
        flat = q.reshape(batch * length, heads, width)
        rows = indices.reshape(batch * length, indices.shape[-1])
        return prefill(flat, cache, rows, scale=scale)[0].view(batch, length, heads, -1)
    return decode(q, cache, indices, scale=scale)[0]


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: PagedLayer | torch.Tensor,
    value: PagedLayer | torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Sparse attention of one layer, in transformers' terms.

    Args:
        module: the attention module, patched by `apply`.
        query: [b, heads, s, nope + rope].
        key, value: the layer's cache; or, without one, the latents [b, 1, t, rank] and the rotated
            keys [b, 1, t, rope] of all tokens.
        attention_mask: [b, 1, s, t], True or 0 where a token may be seen. Anything else hides it.
        scaling: of the logits.
        indices: [b, s, topk] int32, the selected tokens' positions.

    Returns:
        [b, s, heads, v] in the query's dtype, and no weights: they are never formed.
    """
    settings = settings_of(module)
    if indices is None:
        raise ValueError("indices is None, the layer must select tokens")
    if dropout:
        raise ValueError(
            f"attention_dropout is {dropout}, must be 0: the weights that it would drop are never "
            "formed (model.eval() turns it off)"
        )
    if not isinstance(key, PagedLayer):
        latents, rope = key, value
        key = PagedLayer(settings)
        key.update(latents, rope)
    if key.pool is None:
        raise ValueError("the cache is empty, it must be updated first")
    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    slots = key.slots(indices, visible)
    matrices = expansion(module, settings.layout.latent.count, query.dtype)
    out = settings.attend(absorb(query, matrices), key.pool, slots, scaling)
    return expand(out, matrices, query.dtype), None
