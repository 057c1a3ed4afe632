"""FlashMLA as SGLang builds it: sgl_kernel.flash_mla.

Releases until early 2026 keep FlashMLA's interface of 2025: `get_mla_metadata` wants the call's
shape, decode has descale_q and descale_k before is_fp8_kvcache and ends with indices, and the
statistics of the sparse prefill are to base 2. Newer ones follow upstream. Which one it is, is
read off the signature.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from ..case import Implementation, Inputs, NotOffered, Output
from . import flash_mla
from .base import bf16_rows
from .module import ModuleProvider

TITLE = "FlashMLA (SGLang's build)"
PACKAGE = "sgl_kernel"
DISTRIBUTIONS = ("sgl-kernel", "sgl_kernel", "sglang-kernel")
ARCHITECTURES = ("sm_90", "sm_100")


class SGLangFlashMLA(ModuleProvider):
    """sgl_kernel.flash_mla with either interface."""

    def __init__(self, module_name: str = "sgl_kernel.flash_mla") -> None:
        super().__init__(module_name)
        self.old = "descale_q" in self._parameters("flash_mla_with_kvcache")

    def _parameters(self, name: str) -> tuple[str, ...]:
        function = getattr(self.module, name, None)
        return () if function is None else tuple(inspect.signature(function).parameters)

    def new_state(self) -> Any:
        if not self.old:
            return super().new_state()
        return _NoState()

    def _decode(self, inputs: Inputs, state: Any) -> Output:
        if not self.old:
            return super()._decode(inputs, state)
        for what in ("attn_sink", "topk_length", "extra_cache"):
            if getattr(inputs, what) is not None:
                raise NotOffered(f"{what} (FlashMLA's interface of 2025)")
        if inputs.cache.layout.name != "v32_fp8":
            raise NotOffered(f"sparse decode over {inputs.cache.layout.name}")
        b, s_q, heads, _ = inputs.q.shape
        topk = inputs.indices.shape[-1]
        lengths = torch.full((b,), topk, dtype=torch.int32, device=inputs.q.device)
        metadata, splits = self._function("get_mla_metadata")(
            lengths, s_q * heads, 1, heads, True, topk
        )
        out, lse = self._function("flash_mla_with_kvcache")(
            q=inputs.q,
            k_cache=inputs.cache.tensor().view(torch.float8_e4m3fn),
            block_table=None,
            cache_seqlens=lengths,
            head_dim_v=inputs.cache.layout.d_v,
            tile_scheduler_metadata=metadata,
            num_splits=splits,
            softmax_scale=inputs.scale,
            is_fp8_kvcache=True,
            indices=inputs.indices,
        )
        return Output(out, lse.transpose(1, 2), None, float("inf"))

    def _prefill(self, inputs: Inputs) -> Output:
        function = self._function("flash_mla_sparse_fwd")
        if "attn_sink" in self._parameters("flash_mla_sparse_fwd"):
            return super()._prefill(inputs)
        for what in ("attn_sink", "topk_length"):
            if getattr(inputs, what) is not None:
                raise NotOffered(f"{what} (FlashMLA's interface of 2025)")
        kv = bf16_rows(inputs)
        if kv is None:
            raise NotOffered(f"sparse prefill over a {inputs.cache.layout.name} cache")
        out, top, lse = function(
            inputs.q, kv, inputs.indices.unsqueeze(1), inputs.scale, inputs.cache.layout.d_v
        )
        if "2-based" in (function.__doc__ or ""):
            lse, top = lse * math.log(2), top * math.log(2)
        return Output(out, lse, top, float("inf"))


class _NoState:
    """FlashMLA's interface of 2025 has metadata of one call only."""

    plain = padded = None


def load(name: str) -> Implementation:
    provider = SGLangFlashMLA()
    provider.name = "sglang"
    return provider


supports = flash_mla.supports
