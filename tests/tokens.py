"""Tokens for the cache's writer: what overflows, underflows, ties or is no number."""

from __future__ import annotations

import torch

from sparse_mla import KVCache, KVLayout

POISON = 0xAB


def hostile(n: int, width: int) -> torch.Tensor:
    """[n, width] float32, n >= 40; rows 4 to 6 and 12 hold NaN and Inf."""
    x = torch.randn(n, width)
    x[0] = 0.0
    x[1] *= 1e-30
    x[2] *= 1e30
    x[3] = 1e-42
    x[4, 5], x[5, 7], x[6, 9] = float("nan"), float("inf"), -float("inf")
    x[7] = 448 * torch.sign(x[7])
    # Halves of small integers: ties of either number format.
    x[8] = torch.randint(-900, 900, (width,)) / 2
    x[9] = torch.randint(-127, 128, (width,)) * 2.0**-8
    x[9, ::16] = 448
    x[10] = 3.4e38
    x[11] = -0.0
    x[12] = float("nan")
    x[13:20] *= torch.exp(8 * torch.randn(7, width))
    x[20:] *= 2.0 ** torch.randint(-140, 100, (n - 20, 1))
    x[-10:] = torch.randint(-448, 449, (10, width)) * 2.0 ** torch.randint(-130, 110, (10, 1))
    return x


def make_cache(
    layout: KVLayout, slots: int, page_size: int = 64, gap: int = 0, device: str = "cpu"
) -> KVCache:
    """A cache of at least that many slots, all bytes POISON, `gap` bytes between its pages."""
    scale = torch.tensor([0.037], device=device) if layout.tensor_scale else None
    stride = -(-layout.page_bytes(page_size) // 16) * 16 + gap
    pages = -(-slots // page_size)
    cache = KVCache.empty(
        pages, page_size, layout, device=device, page_stride=stride, tensor_scale=scale
    )
    storage = cache.pages.untyped_storage()
    torch.empty(0, dtype=torch.uint8, device=device).set_(storage).fill_(POISON)
    return cache


def draw(layout: KVLayout, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hostile latents and RoPE parts; the latter with NaN and Inf only where they are copied."""
    latent = hostile(n, layout.latent.count)
    if not layout.quantised and dtype != torch.bfloat16:
        # Which of its NaNs torch rounds a NaN to depends on the place in the tensor.
        latent = latent.nan_to_num(0.0)
    if layout.rope is None:
        return latent.to(dtype), None
    rope = torch.randn(n, layout.rope.count)
    if dtype == torch.bfloat16:
        rope[2, 3], rope[3, 4] = float("nan"), float("inf")
    return latent.to(dtype), rope.to(dtype)
