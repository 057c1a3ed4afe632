"""The definition: sparse MLA attention in plain torch and float64, over the cache bytes.

Slow and simple on purpose. What every argument means is stated once, in docs/semantics.md; where
a kernel and this file disagree, the kernel is wrong. Values follow the bytes exactly: e4m3, e2m1
and bf16 numbers and scales of every kind are exact in float64, and so are their products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .kv_cache import KVCache


class Reference(NamedTuple):
    """What attention should have answered, float64.

    Attributes:
        out: [..., h_q, d_v].
        lse: [..., h_q], natural logarithm; -inf where nothing is valid.
        max_logits: [..., h_q], natural; -inf where nothing is valid.
        condition: [..., h_q], sqrt(sum_t p_t^2 |v_t|^2) / |out|: how much independent relative
            errors of the weights grow in the output. 0 where nothing is valid.
        weight_power: [..., h_q], sum_t p_t^2: one over the number of tokens that matter.
    """

    out: torch.Tensor
    lse: torch.Tensor
    max_logits: torch.Tensor
    condition: torch.Tensor
    weight_power: torch.Tensor


def valid_indices(
    indices: torch.Tensor, num_slots: int, lengths: torch.Tensor | None
) -> torch.Tensor:
    """Which entries of indices [n, topk] count: inside the cache and before the row's length."""
    # Compared as int32: a larger bound would wrap around.
    valid = (indices >= 0) & (indices <= min(num_slots - 1, 2**31 - 1))
    if lengths is not None:
        column = torch.arange(indices.shape[1], device=indices.device)
        valid &= column < lengths[:, None]
    return valid


def attend(
    q: torch.Tensor,
    sources: list[tuple[KVCache, torch.Tensor, torch.Tensor | None]],
    scale: float,
    attn_sink: torch.Tensor | None = None,
) -> Reference:
    """Attention of n query tokens, each over its own list of cache slots.

    Args:
        q: [n, h_q, d_qk].
        sources: (cache, indices [n, topk], lengths [n] or None); the tokens of all sources are
            attended together, each as often as it occurs.
        scale: logits are scale * <q, k>.
        attn_sink: [h_q] or None; scales `out` by 1 / (1 + exp(sink - lse)) and nothing else.
    """
    n, heads, _ = q.shape
    d_v = sources[0][0].layout.d_v
    out = torch.zeros(n, heads, d_v, dtype=torch.float64, device=q.device)
    condition = out.new_zeros(n, heads)
    weight_power = out.new_zeros(n, heads)
    lse = out.new_full((n, heads), float("-inf"))
    max_logits = lse.clone()
    for i in range(n):
        rows = []
        for cache, indices, lengths in sources:
            line = indices[i : i + 1]
            length = None if lengths is None else lengths[i : i + 1]
            valid = valid_indices(line, cache.num_slots, length)
            rows.append(cache.read(line[valid]))
        keys = torch.cat(rows)
        if keys.shape[0] == 0:
            continue
        values = keys[:, :d_v]
        logits = (q[i].double() @ keys.T) * scale
        lse[i] = torch.logsumexp(logits, dim=1)
        max_logits[i] = logits.amax(1)
        p = torch.exp(logits - lse[i][:, None])
        out[i] = p @ values
        norm = out[i].norm(dim=1)
        spread = (p.square() @ values.square().sum(1)).sqrt()
        condition[i] = torch.where(norm > 0, spread / norm, torch.zeros_like(norm))
        weight_power[i] = p.square().sum(1)
    if attn_sink is not None:
        out *= sink_factor(lse, attn_sink.double())[..., None]
    return Reference(out, lse, max_logits, condition, weight_power)


def sink_factor(lse: torch.Tensor, attn_sink: torch.Tensor) -> torch.Tensor:
    """exp(lse) / (exp(lse) + exp(sink)): 1 for sink = -inf, 0 for sink = +inf or an empty row."""
    factor = torch.sigmoid(lse - attn_sink)
    factor = torch.where(attn_sink == float("-inf"), torch.ones_like(factor), factor)
    return torch.where(lse == float("-inf"), torch.zeros_like(factor), factor)


def decode(
    q: torch.Tensor,
    cache: KVCache,
    indices: torch.Tensor,
    *,
    scale: float | None = None,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_cache: KVCache | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> Reference:
    """The answer to `sparse_mla.decode` with the same arguments, shapes [b, s_q, h_q, ...]."""
    b, s_q, heads, d_qk = q.shape

    def source(
        kv: KVCache, index: torch.Tensor, length: torch.Tensor | None
    ) -> tuple[KVCache, torch.Tensor, torch.Tensor | None]:
        per_token = None if length is None else length.repeat_interleave(s_q)
        return kv, index.reshape(b * s_q, index.shape[-1]), per_token

    sources = [source(cache, indices, topk_length)]
    if extra_cache is not None and extra_indices is not None:
        sources.append(source(extra_cache, extra_indices, extra_topk_length))
    scale = d_qk**-0.5 if scale is None else scale
    flat = attend(q.reshape(b * s_q, heads, d_qk), sources, scale, attn_sink)
    return Reference(*(x.view(b, s_q, *x.shape[1:]) for x in flat))


def prefill(
    q: torch.Tensor,
    kv: KVCache,
    indices: torch.Tensor,
    *,
    scale: float | None = None,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
) -> Reference:
    """The answer to `sparse_mla.prefill` with the same arguments, shapes [s_q, h_q, ...]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    flat_indices = indices.reshape(q.shape[0], indices.shape[-1])
    return attend(q, [(kv, flat_indices, topk_length)], scale, attn_sink)


def dense_decode(
    q: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Reference:
    """The answer to `sparse_mla.dense_decode` with the same arguments, shapes [b, s_q, h_q, ...].

    Each query token is sparse attention over the list of its sequence's first tokens.
    """
    b, s_q, _, d_qk = q.shape
    scale = d_qk**-0.5 if scale is None else scale
    if not b:
        nothing = block_table.new_empty(b, s_q, 0)
        return decode(q, cache, nothing, scale=scale)
    sequences = []
    for i in range(b):
        length = min(max(int(cache_seqlens[i]), 0), block_table.shape[1] * cache.page_size)
        token = torch.arange(length, device=q.device)
        pages = block_table[i].long()[token // cache.page_size]
        slots = pages * cache.page_size + token % cache.page_size
        slots = torch.where((pages >= 0) & (pages < cache.num_pages), slots, -1)
        last = torch.arange(s_q, device=q.device) + (length - s_q + 1) if causal else None
        sequences.append(attend(q[i], [(cache, slots.expand(s_q, -1), last)], scale))
    parts = zip(*sequences, strict=True)
    return Reference(*(torch.stack(part) for part in parts))
