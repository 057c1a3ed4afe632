"""FlashInfer's MLA wrapper over bf16 rows: every query token is a request of one-token pages.

That is how engines without a sparse kernel attend to a selection. Its kernels for packed FP8
caches are for sm_100 and sm_120 and take other layouts; they are not offered here.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import torch

from ...arch import Arch
from ..case import Implementation, Inputs, NotOffered, Output, WriteInputs
from .base import built_for

TITLE = "FlashInfer, BatchMLAPagedAttentionWrapper"
PACKAGE = "flashinfer"
DISTRIBUTIONS = ("flashinfer-python", "flashinfer")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
WORKSPACE = 128 * 2**20


class FlashInferMLA:
    """Masked and invalid entries are left out of the page lists, as an engine does."""

    name = "flashinfer"

    def __init__(self) -> None:
        self.module: ModuleType = importlib.import_module("flashinfer")
        self.mla: Any = importlib.import_module("flashinfer.mla").BatchMLAPagedAttentionWrapper
        self.wrapper: Any = None

    def new_state(self) -> None:
        return None

    def run(self, inputs: Inputs, state: Any) -> Output:
        cache = inputs.cache
        if cache.layout.name != "bf16":
            raise NotOffered(f"{inputs.op} over {cache.layout.name}")
        if inputs.attn_sink is not None or inputs.extra_cache is not None:
            raise NotOffered("attn_sink" if inputs.attn_sink is not None else "a second cache")
        rows = cache.rows_view()
        if cache.num_pages > 1 and rows.stride(0) != cache.page_size * rows.stride(1):
            raise NotOffered("pages with bytes between them")
        slots = rows.as_strided(
            (cache.num_slots, 1, rows.shape[-1]), (rows.stride(1), rows.stride(1), 1)
        ).view(torch.bfloat16)
        shape, heads = inputs.q.shape[:-2], inputs.q.shape[-2]
        q = inputs.q.reshape(-1, heads, inputs.q.shape[-1])
        pages, counts = _selected(inputs)
        if self.wrapper is None:
            workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=q.device)
            self.wrapper = self.mla(workspace)
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        each = torch.arange(len(counts) + 1, dtype=torch.int32, device=q.device)
        self.wrapper.plan(
            each, starts, pages, counts.int(), heads, 512, 64, 1, False, inputs.scale, q.dtype,
            q.dtype,
        )  # fmt: skip
        out, lse = self.wrapper.run(
            q[..., :512].contiguous(),
            q[..., 512:].contiguous(),
            slots[..., :512],
            slots[..., 512:],
            return_lse=True,
        )
        # Its lse is to base 2; what it says for a row with nothing valid is the gate's to judge.
        lse = (lse * math.log(2)).view(*shape, heads)
        return Output(out.view(*shape, heads, 512), lse)

    def write(self, inputs: WriteInputs) -> None:
        raise NotOffered("no writer of these layouts")


def _selected(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Valid slots of all query tokens in one list, and how many each has."""
    indices = inputs.indices.flatten(0, -2)
    valid = (indices >= 0) & (indices < inputs.cache.num_slots)
    if inputs.topk_length is not None:
        lengths = inputs.topk_length.repeat_interleave(inputs.queries)
        valid &= torch.arange(indices.shape[1], device=indices.device) < lengths[:, None]
    return indices[valid], valid.sum(1)


def load(name: str) -> Implementation:
    return FlashInferMLA()


def supports(
    provider: FlashInferMLA | None, op: str, layout: str, machine: Arch
) -> tuple[bool, str]:
    if op == "kv_write":
        return False, "no writer of these layouts"
    if layout != "bf16":
        return False, "the wrapper takes 512 + 64 bf16 values"
    ok, why = built_for(ARCHITECTURES, machine)
    return ok, f"BatchMLAPagedAttentionWrapper, {why}" if ok else why
