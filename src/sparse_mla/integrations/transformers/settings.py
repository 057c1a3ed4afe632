"""What `apply` decided for a model: one object that its layers and its caches share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ...kv_cache import KVCache
from ...kv_layout import KVLayout

# (q [b, s_q, h, d_qk] bf16, cache, indices [b, s_q, topk] int32 slots, scale)
# -> out [b, s_q, h, d_v] bf16
Attend = Callable[[torch.Tensor, KVCache, torch.Tensor, float], torch.Tensor]

# Where a patched attention module, and its decoder, keep their settings.
ATTRIBUTE = "_sparse_mla"


@dataclass
class Settings:
    """How a patched model attends.

    Attributes:
        layout: what the cache's bytes mean.
        page_size: tokens per page.
        attend: the sparse attention itself.
        active: False once `restore` was called; caches made before it say so.
    """

    layout: KVLayout
    page_size: int
    attend: Attend
    active: bool = True


def settings_of(module: nn.Module) -> Settings:
    """The settings that `apply` left on a decoder or an attention module."""
    settings = module.__dict__.get(ATTRIBUTE)
    if not isinstance(settings, Settings):
        raise ValueError(
            f"{type(module).__name__} is not patched: call sparse_mla.integrations.transformers."
            "apply(model) first"
        )
    return settings
