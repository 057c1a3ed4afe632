"""Decode on Hopper: who takes which layout.

v32_fp8 goes to sm90_fp8, layouts whose values are bf16 numbers once expanded to sm90_expand, with
or without an extra cache, and bf16 caches to the prefill kernels.

Over bf16 rows decode and prefill differ only in their splits: a list per query token either way.
"""

from __future__ import annotations

import torch

from ..sparse_prefill import sm90 as sm90_bf16
from . import sm90_expand, sm90_fp8
from .backends import SM90_EXPANDED
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
    if sources[0].cache.layout.name in SM90_EXPANDED:
        out, lse, _ = sm90_expand.attend(q, sources, attn_sink, scale, num_splits, batch_invariant)
        return out, lse
    (source,) = sources
    cache, options = source.cache, (attn_sink, scale, num_splits, batch_invariant)
    call = q, cache, source.indices, source.lengths, *options
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):
        if not cache.layout.quantised:
            return sm90_bf16.run_decode(*call)
        out, lse, _ = sm90_fp8.attend(*call, want_max=False)
        return out, lse
