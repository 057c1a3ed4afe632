"""What the backends of sparse decode attend to: a cache, and which of its slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kv_cache import KVCache


@dataclass(frozen=True)
class Source:
    """One of the caches of a call. The tokens of all sources are attended together.

    Attributes:
        cache: the cache.
        indices: [b, s_q, topk] int32 slots of it.
        lengths: [b] int32; only so many entries of a sequence's lists count. None: all.
    """

    cache: KVCache
    indices: torch.Tensor
    lengths: torch.Tensor | None
