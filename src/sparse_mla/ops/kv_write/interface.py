"""The cache's writer: tokens are quantised and stored at their slots.

Reading path: `write` (this file; `KVCache.append` to users) checks and dispatches; backends.py says
who can run; cpu.py packs with torch and scatters, triton.py launches the kernel that does both.
What the bytes must be is said by `KVLayout.pack` alone: every backend writes the same.
"""

from __future__ import annotations

import torch

from ... import arch, dispatch
from ...kv_cache import KVCache, check_slots_tensor, describe
from ...kv_layout import LAYOUTS, get_layout
from ...kv_quantise import check_scale_rounding
from ..checks import check_backend


def write(
    cache: KVCache,
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    slots: torch.Tensor,
    *,
    scale_rounding: str = "amax",
    check_slots: bool | None = None,
    backend: str | None = None,
) -> None:
    """Quantise tokens and write them to their slots; see `KVCache.append`."""
    layout = cache.layout
    check_scale_rounding(scale_rounding)
    check_slots_tensor(slots, cache.device)
    _check_part("latent", latent, layout.latent.count, slots, cache.device)
    if layout.rope is not None:
        _check_part("rope", rope, layout.rope.count, slots, cache.device)
    elif rope is not None:
        raise ValueError(f"rope is given, layout {layout.name} stores no RoPE part")
    if check_slots is not None and not isinstance(check_slots, bool):
        raise ValueError(f"check_slots is {check_slots!r}, must be True, False or None")
    check = cache.device.type == "cpu" if check_slots is None else check_slots
    name = check_backend("kv_write", backend)
    if LAYOUTS.get(layout.name) is not layout:
        # A layout of the caller's own has no name that the op could look up.
        _run(cache, latent, rope, slots, scale_rounding, check, name)
        return
    torch.ops.sparse_mla.kv_write(
        cache.pages,
        layout.name,
        cache.page_size,
        cache.token_stride,
        cache.tensor_scale,
        latent,
        rope,
        slots,
        scale_rounding,
        check,
        name,
    )


def _check_part(
    name: str, part: torch.Tensor | None, width: int, slots: torch.Tensor, device: torch.device
) -> None:
    if part is None:
        raise ValueError(f"{name} is None, the layout stores {width} values per token")
    if not isinstance(part, torch.Tensor):
        raise ValueError(f"{name} is {describe(part)}, must be a tensor [n, {width}]")
    if part.shape != (slots.shape[0], width):
        raise ValueError(
            f"{name} has shape {tuple(part.shape)}, must be ({slots.shape[0]}, {width})"
        )
    if not part.is_floating_point():
        raise ValueError(f"{name} has dtype {part.dtype}, must be floating point")
    if part.device != device:
        raise ValueError(f"{name} is on {part.device}, the cache is on {device}")


@torch.library.custom_op("sparse_mla::kv_write", mutates_args=("pages",))
def _kv_write(
    pages: torch.Tensor,
    layout: str,
    page_size: int,
    token_stride: int,
    tensor_scale: torch.Tensor | None,
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    slots: torch.Tensor,
    scale_rounding: str,
    check_slots: bool,
    backend: str,
) -> None:
    cache = KVCache(pages, page_size, get_layout(layout), token_stride, tensor_scale)
    _run(cache, latent, rope, slots, scale_rounding, check_slots, backend)


def _run(
    cache: KVCache,
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    slots: torch.Tensor,
    scale_rounding: str,
    check_slots: bool,
    backend: str,
) -> None:
    if check_slots:
        bad = (slots < -1) | (slots >= cache.num_slots)
        if bool(bad.any()):
            raise ValueError(
                f"slots holds {int(slots[bad][0])}, allowed: -1 (skip) or 0..{cache.num_slots - 1}"
            )
    request = dispatch.Request(
        op="kv_write",
        layout=cache.layout.name,
        heads=1,
        tokens=slots.shape[0],
        topk=0,
        alignment=cache.alignment,
    )
    run = dispatch.choose(request, arch.of(cache.device), backend or None).load()
    run(cache, latent, rope, slots, scale_rounding)


@_kv_write.register_fake
def _(
    pages: torch.Tensor,
    layout: str,
    page_size: int,
    token_stride: int,
    tensor_scale: torch.Tensor | None,
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    slots: torch.Tensor,
    scale_rounding: str,
    check_slots: bool,
    backend: str,
) -> None:
    return None
