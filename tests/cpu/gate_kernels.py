"""Correct kernels to try the gate with: none of them may ever raise an alarm."""

from __future__ import annotations

from typing import Any

import torch

from sparse_mla.accuracy import budgets
from sparse_mla.accuracy.case import Inputs, Output, WriteInputs


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
        s_q = inputs.q.shape[1] if inputs.op == "decode" else 1
        indices = inputs.indices.flatten(0, -2)
        out = torch.zeros(n, h, inputs.cache.layout.d_v)
        lse = torch.full((n, h), float("-inf"))
        top = lse.clone()
        for i in range(n):
            line = indices[i]
            if inputs.topk_length is not None:
                line = line[: max(0, int(inputs.topk_length[i // s_q]))]
            line = torch.where((line >= 0) & (line < inputs.cache.num_slots), line, -1)
            out[i], lse[i], top[i] = self.row(q[i], inputs, line.long())
        if inputs.attn_sink is not None:
            sink = inputs.attn_sink
            factor = torch.where(sink == float("-inf"), 1.0, torch.sigmoid(lse - sink))
            out = out * torch.where(lse == float("-inf"), 0.0, factor)[..., None]
        return Output(
            out.to(torch.bfloat16).view(*shape, h, -1)
            if n
            else out.to(torch.bfloat16).view(*shape, h, out.shape[-1]),
            lse.view(*shape, h),
            top.view(*shape, h),
        )

    def row(
        self, q: torch.Tensor, inputs: Inputs, line: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cache, layout = inputs.cache, inputs.cache.layout
        h = q.shape[0]
        peak = torch.full((h,), float("-inf"))
        total, acc = torch.zeros(h), torch.zeros(h, layout.d_v)
        tiles = layout.scales.count if layout.scales else 1
        width = layout.latent.count // tiles
        for start in range(0, len(line), self.chunk):
            slots = line[start : start + self.chunk]
            slots = slots[slots >= 0]
            if not len(slots):
                continue
            raw = cache.rows_view()[slots // cache.page_size, slots % cache.page_size]
            values = layout.latent.read(raw).float().view(-1, tiles, width)
            scales = layout.scales.read(raw) if layout.scales else torch.ones(len(slots), 1)
            dots = torch.einsum("htd,ntd->hnt", q[:, : tiles * width].view(h, tiles, width), values)
            logits = (dots * scales).sum(-1)
            if layout.rope is not None:
                logits = logits + q[:, tiles * width :] @ layout.rope.read(raw).float().T
            logits = logits * inputs.scale
            new = torch.maximum(peak, logits.amax(1))
            decay = torch.exp(peak - new)
            p = torch.exp(logits - new[:, None])
            folded = (p[..., None] * scales).to(torch.bfloat16).float()
            part = torch.einsum("hnt,ntd->htd", folded, values).reshape(h, -1)
            total = total * decay + p.sum(1)
            acc = acc * decay[:, None] + part
            peak = new
        if not bool((total > 0).any()):
            return torch.zeros(h, layout.d_v), peak, peak
        return acc / total[:, None], peak + torch.log(total), peak
