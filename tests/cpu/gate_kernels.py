"""Correct kernels to try the gate with: none of them may ever raise an alarm."""

from __future__ import annotations

from typing import Any

import torch

from sparse_mla.accuracy import budgets
from sparse_mla.accuracy.case import Inputs, Output, WriteInputs
from sparse_mla.accuracy.token_bytes import parts, stored_scales, token_bytes
from sparse_mla.kv_cache import KVCache
from sparse_mla.kv_layout import KVLayout


class Ideal:
    """The oracle, rounded to bf16 once."""

    name = "ideal"

    def new_state(self) -> Any:
        return None

    def run(self, inputs: Inputs, state: Any) -> Output:
        ref = budgets.answer(inputs)
        shape = inputs.q.shape[:-1]
        return Output(
            ref.out.to(torch.bfloat16).view(*shape, ref.out.shape[-1]),
            ref.lse.float().view(shape),
            ref.max_logits.float().view(shape),
        )

    def write(self, inputs: WriteInputs) -> None:
        inputs.cache.append(
            inputs.latent, inputs.rope, inputs.slots, scale_rounding=inputs.scale_rounding
        )


class Folding(Ideal):
    """What a good tensor-core kernel does: K stays e4m3, scales multiply fp32 logits and weights.

    fp32 logits, online softmax over chunks of `chunk`, weight * scale rounded to bf16 for every
    tile, fp32 sums and accumulators, bf16 output.
    """

    name = "folding"

    def __init__(self, chunk: int = 64) -> None:
        self.chunk = chunk

    def run(self, inputs: Inputs, state: Any) -> Output:
        *shape, h, d = inputs.q.shape
        q = inputs.q.reshape(-1, h, d).float()
        n = q.shape[0]
        out = torch.zeros(n, h, inputs.cache.layout.d_v)
        lse = torch.full((n, h), float("-inf"))
        top = lse.clone()
        for i in range(n):
            lists = [(cache, line(*lists, i)) for cache, *lists in sources(inputs)]
            out[i], lse[i], top[i] = self.row(q[i], lists, inputs.scale)
        if inputs.attn_sink is not None:
            sink = inputs.attn_sink
            factor = torch.where(sink == float("-inf"), 1.0, torch.sigmoid(lse - sink))
            out = out * torch.where(lse == float("-inf"), 0.0, factor)[..., None]
        return Output(
            out.to(torch.bfloat16).view(*shape, h, out.shape[-1]),
            lse.view(*shape, h),
            top.view(*shape, h),
        )

    def row(
        self, q: torch.Tensor, lists: list[tuple[KVCache, torch.Tensor]], scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One query token [h, d] over the listed slots of each cache."""
        h, d_v = q.shape[0], lists[0][0].layout.d_v
        peak = torch.full((h,), float("-inf"))
        total, acc = torch.zeros(h), torch.zeros(h, d_v)
        for cache, slots in lists:
            for part in slots.split(self.chunk) if len(slots) else ():
                values, factors = stored(cache, part)
                logits = torch.zeros(h, len(part))
                for tile, (first, end) in enumerate(tiles_of(cache.layout)):
                    dots = q[:, first:end] @ values[:, first:end].T
                    logits += dots * factors[:, tile]
                logits = logits * scale
                new = torch.maximum(peak, logits.amax(1))
                decay = torch.exp(peak - new)
                p = torch.exp(logits - new[:, None])
                total = total * decay + p.sum(1)
                acc = acc * decay[:, None]
                for tile, (first, end) in enumerate(tiles_of(cache.layout)):
                    folded = (p * factors[:, tile]).to(torch.bfloat16).float()
                    acc[:, first : min(end, d_v)] += folded @ values[:, first : min(end, d_v)]
                peak = new
        if not bool((total > 0).any()):
            return acc, peak, peak
        return acc / total[:, None], peak + torch.log(total), peak


def sources(inputs: Inputs) -> list[tuple[Any, ...]]:
    """Caches with indices [n, topk] and lengths [n], one line per query token."""
    s_q = inputs.queries

    def flat(
        cache: KVCache, indices: torch.Tensor, lengths: torch.Tensor | None
    ) -> tuple[Any, ...]:
        per_token = None if lengths is None else lengths.repeat_interleave(s_q)
        return cache, indices.flatten(0, -2), per_token

    made = [flat(inputs.cache, inputs.indices, inputs.topk_length)]
    if inputs.extra_cache is not None and inputs.extra_indices is not None:
        made.append(flat(inputs.extra_cache, inputs.extra_indices, inputs.extra_topk_length))
    # The number of slots goes along, for the bounds.
    return [(cache, indices, lengths, cache.num_slots) for cache, indices, lengths in made]


def line(
    indices: torch.Tensor, lengths: torch.Tensor | None, slots: int, token: int
) -> torch.Tensor:
    """The slots that count in one query token's list."""
    mine = indices[token]
    if lengths is not None:
        mine = mine[: max(0, int(lengths[token]))]
    return mine[(mine >= 0) & (mine < slots)].long()


def tiles_of(layout: KVLayout) -> list[tuple[int, int]]:
    """Dims that share a factor: the tiles of the latent part, then the RoPE part."""
    count = layout.latent.count
    width = layout.tile if layout.scales is not None else count
    found = [(first, first + width) for first in range(0, count, width)]
    return found if layout.rope is None else [*found, (count, layout.d_qk)]


def stored(cache: KVCache, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [n, d_qk] but for the factors of the tiles [n, `tiles_of`], both float32."""
    layout = cache.layout
    tokens = token_bytes(cache, slots)
    rows, _ = parts(layout, tokens)
    values = layout.latent.read(rows).float()
    scales = stored_scales(layout, tokens)
    factors = torch.ones(len(slots), 1) if scales is None else scales.float()
    if layout.outer is not None:
        factors = factors * layout.outer.read(rows)
    if cache.tensor_scale is not None:
        # One factor for all tokens: with the weights it would round them all alike.
        values = values * cache.tensor_scale
    if layout.rope is not None:
        values = torch.cat([values, layout.rope.read(rows).float()], 1)
        factors = torch.cat([factors, torch.ones(len(slots), 1)], 1)
    return values, factors
