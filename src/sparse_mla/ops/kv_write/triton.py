"""Launcher of the cache writer's Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as memoise
from typing import Any

import torch
import triton

from ... import arch
from ...kv_cache import KVCache
from ...kv_layout import Field, KVLayout
from .triton_kernel import write_tokens

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Values of a layout without scales, which a program takes side by side.
PLAIN_TILE = 64


@dataclass(frozen=True)
class Launch:
    """How `write_tokens` is launched.

    Attributes:
        block_n: tokens per program.
        num_warps: warps per program.
    """

    block_n: int
    num_warps: int


# Chosen on an H200 among eight launches, us by v32_fp8 / v4_fp8 from bf16. 16384 tokens: 4 in 2
# warps 15.2 / 13.3; 2 in 2 15.4 / 14.4; 2 in 1 15.1 / 13.2; 8 in 4 15.4 / 13.4; 8 in 2 17.7 / 14.9.
# 131072: 4 in 2 73.5 / 64.8; 2 in 1 75.0 / 64.4; 2 in 2 80.6 / 74.7. A thread with 32 values spends
# the fewest instructions on addresses.
LAUNCH = Launch(4, 2)
# A few tokens take as long as one: 128 of v32_fp8 5.3, and 6.0 with the launch above.
FEW_TOKENS = 1024
LAUNCH_FEW = Launch(1, 1)


def run(
    cache: KVCache,
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    slots: torch.Tensor,
    scale_rounding: str,
    launch: Launch | None = None,
) -> None:
    """Write the tokens whose slots lie in [0, cache.num_slots); no sync."""
    n = slots.shape[0]
    if n == 0 or cache.num_slots == 0:
        return
    if launch is None:
        launch = LAUNCH_FEW if n <= FEW_TOKENS else LAUNCH
    latent = _rows(latent)
    rope = None if rope is None else _rows(rope)
    machine, size = arch.of(cache.device), cache.page_size
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(cache.pages):
        write_tokens[(triton.cdiv(n, launch.block_n),)](
            latent,
            rope,
            slots.contiguous(),
            cache.tensor_scale,
            cache.pages,
            n,
            latent.stride(0),
            0 if rope is None else rope.stride(0),
            cache.num_slots,
            size,
            cache.pages.stride(0),
            size * cache.layout.row_bytes,
            PAGE_SHIFT=size.bit_length() - 1 if size & (size - 1) == 0 else -1,
            FEW_SLOTS=cache.num_slots < 2**31,
            TOKEN_STRIDE=cache.token_stride,
            HARDWARE_FP8=machine.capability is not None and machine.capability >= (8, 9),
            BLOCK_N=launch.block_n,
            num_warps=launch.num_warps,
            **constants(cache.layout, scale_rounding),
        )


def _rows(part: torch.Tensor) -> torch.Tensor:
    """The part with a dtype and a last dim that the kernel reads."""
    if part.dtype not in FLOATS:
        part = part.to(torch.float32)
    return part if part.stride(-1) == 1 else part.contiguous()


@memoise
def constants(layout: KVLayout, scale_rounding: str) -> dict[str, Any]:
    """The layout as the kernel's constants."""
    tile = layout.tile if layout.scales is not None else PLAIN_TILE
    count = layout.latent.count // tile
    row_fields = [layout.latent, layout.rope, layout.outer]
    footer_fields = [layout.scales] if layout.planar else []
    if not layout.planar:
        row_fields.append(layout.scales)
    scale = "" if layout.scales is None else layout.scales.dtype
    return {
        "FOOTER_BYTES": layout.footer_bytes,
        "NUMBER": layout.latent.dtype,
        "SCALE": scale,
        "POW2": scale == "ue8m0" or scale_rounding == "pow2",
        "SCALES_AT": 0 if layout.scales is None else layout.scales.offset,
        "OUTER_AT": -1 if layout.outer is None else layout.outer.offset,
        "ROPE_AT": 0 if layout.rope is None else layout.rope.offset,
        "D_ROPE": 0 if layout.rope is None else layout.rope.count,
        "COUNT": count,
        "TILES": triton.next_power_of_2(count),
        "TILE": tile,
        "ROW_GAPS": gaps(row_fields, layout.row_bytes),
        "FOOTER_GAPS": gaps(footer_fields, layout.footer_bytes),
    }


def gaps(fields: list[Field | None], width: int) -> tuple[int, ...]:
    """Offsets of the bytes, out of `width`, that no field covers."""
    covered: set[int] = set()
    for field in fields:
        if field is not None:
            covered.update(range(field.offset, field.offset + field.nbytes))
    return tuple(sorted(set(range(width)) - covered))
