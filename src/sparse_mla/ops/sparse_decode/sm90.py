"""Decode on Hopper: FP8 caches go to sm90_fp8, bf16 caches to the prefill kernels.

Over bf16 rows decode and prefill differ only in their splits: a list per query token either way.
"""

from __future__ import annotations

import torch

from ..sparse_prefill import sm90 as sm90_bf16
from . import sm90_fp8
from .source import Source


def run(
    q: torch.Tensor,
    sources: list[Source],
    attn_sink: torch.Tensor | None,
    scale: float,
    num_splits: int,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode; see interface.decode. num_splits 0 chooses by shape."""
    (source,) = sources
    cache, options = source.cache, (attn_sink, scale, num_splits, batch_invariant)
    call = q, cache, source.indices, source.lengths, *options
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):
        if not cache.layout.quantised:
            return sm90_bf16.run_decode(*call)
        out, lse, _ = sm90_fp8.attend(*call, want_max=False)
        return out, lse
