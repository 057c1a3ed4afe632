"""What the cache writer must have written, and how an answer to op "kv_write" is judged.

The rule: the scale is amax/448 in fp32 (within 2 ulp; exactly a power of two where that is asked
for), values are the nearest e4m3 number to x / scale, saturated at +-448; a bf16 field is the
nearest bf16 number. NaN and Inf become NaN. Bytes of every other slot, and padding, stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..kv_cache import KVCache
from ..kv_quantise import E4M3_MAX, FP32_MIN_NORMAL
from .case import WriteInputs
from .metrics import KEPT_ROWS, Metrics

WHOLE_CACHE_BYTES = 64 * 2**20
"""Up to this size every byte that must not change is compared; above it, slots near the writes."""

SCALE_ULPS = 4 * 2.0**-24
SLACK = 1 + 2.0**-20


@dataclass(frozen=True)
class Written:
    """The cache before the call, as far as it is compared: bytes, or the rows of some slots."""

    storage: torch.Tensor | None
    slots: torch.Tensor
    rows: torch.Tensor


def storage_bytes(cache: KVCache) -> torch.Tensor:
    """The cache's whole storage, padding included, uint8, a view."""
    storage = cache.pages.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=cache.device).set_(storage)


def snapshot(inputs: WriteInputs) -> Written:
    """Remember what the writer must leave alone."""
    cache = inputs.cache
    slots = inputs.slots.to(torch.int64)
    kept = slots[slots >= 0]
    wrapped = torch.cat(
        [(kept * cache.token_stride % 2**bits) // cache.token_stride for bits in (31, 32)]
    )
    near = torch.cat([kept + step for step in (-1, 1)] + [wrapped, wrapped + 1])
    near = torch.unique(near[(near >= 0) & (near < cache.num_slots)])
    near = near[~torch.isin(near, kept)]
    whole = storage_bytes(cache)
    storage = whole.clone() if whole.numel() <= WHOLE_CACHE_BYTES else None
    return Written(storage, near, _raw_rows(cache, near).clone())


def _raw_rows(cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
    return cache.rows_view()[slots // cache.page_size, slots % cache.page_size]


def judge(inputs: WriteInputs, before: Written) -> Metrics:
    """Hold the cache, after the writer ran, to the rule."""
    cache, layout = inputs.cache, inputs.cache.layout
    slots = inputs.slots.to(torch.int64)
    keep = slots >= 0
    slots = slots[keep]
    rows = _raw_rows(cache, slots)
    counts: dict[str, Any] = {"tokens": int(slots.numel())}
    moved = _touched(inputs, before, slots)
    if moved is not None:
        return Metrics(moved, **counts)

    x = inputs.latent[keep].double()
    if layout.scales is None:
        problem = _same_bf16(layout.latent.read(rows), x, "latent")
        error, ideal, multiples = 0.0, 0.0, torch.zeros(0)
    else:
        values = layout.latent.read(rows).double().view(-1, layout.scales.count, layout.tile)
        scales = layout.scales.read(rows).double()
        tiles = x.view(-1, layout.scales.count, layout.tile)
        problem = _scale_problem(scales, tiles, inputs.scale_rounding)
        if problem is None:
            problem = _value_problem(values, scales, tiles)
        finite = torch.isfinite(tiles)
        want = torch.where(finite, tiles, 0.0)
        diff = torch.where(finite, values * scales[..., None], 0.0) - want
        best = _nearest(want, scales) * scales[..., None] - want
        power = diff.square().sum((1, 2))
        floor = best.square().sum((1, 2))
        total = float(want.square().sum()) or 1.0
        error = math.sqrt(float(power.sum()) / total)
        ideal = math.sqrt(float(floor.sum()) / total)
        multiples = (power / floor.clamp_min(1e-300)).sqrt()[floor > 0]
    if problem is None and layout.rope is not None and inputs.rope is not None:
        problem = _same_bf16(layout.rope.read(rows), inputs.rope[keep].double(), "rope")
    multiple = error / ideal if ideal else 0.0
    return Metrics(
        problem,
        rel_l2=error,
        ideal=ideal,
        multiple=multiple,
        budget=1.0,
        row_multiples=multiples[:KEPT_ROWS].tolist(),
        **counts,
    )


def _touched(inputs: WriteInputs, before: Written, slots: torch.Tensor) -> str | None:
    cache = inputs.cache
    changed = (_raw_rows(cache, before.slots) != before.rows).any(1)
    if bool(changed.any()):
        return f"slot {int(before.slots[changed][0])} changed, nothing was written to it"
    if before.storage is None:
        return None
    now = KVCache(
        before.storage.clone().as_strided(
            cache.pages.shape, cache.pages.stride(), cache.pages.storage_offset()
        ),
        cache.page_size,
        cache.layout,
        cache.token_stride,
    )
    now.rows_view()[slots // cache.page_size, slots % cache.page_size] = _raw_rows(cache, slots)
    differs = storage_bytes(now) != storage_bytes(cache)
    if bool(differs.any()):
        where = int(differs.nonzero()[0])
        return (
            f"{int(differs.sum())} bytes changed outside the written slots, first at byte {where}"
        )
    return None


def _scale_problem(scales: torch.Tensor, tiles: torch.Tensor, rounding: str) -> str | None:
    amax = torch.where(torch.isfinite(tiles), tiles, 0.0).abs().amax(-1)
    bad = ~torch.isfinite(scales) | (scales <= 0)
    if bool(bad.any()):
        return (
            f"{int(bad.sum())} scales are not positive and finite, first {float(scales[bad][0]):g}"
        )
    want = (amax / E4M3_MAX).clamp_min(FP32_MIN_NORMAL)
    some = amax > 0  # the scale of an all-zero tile is the writer's choice
    if rounding == "pow2":
        mantissa, _ = torch.frexp(scales)
        ratio = scales / want
        off = some & ((mantissa != 0.5) | (ratio < 1 - SCALE_ULPS) | (ratio >= 2 + SCALE_ULPS))
    else:
        off = some & ((scales / want - 1).abs() > SCALE_ULPS)
    if bool(off.any()):
        return (
            f"{int(off.sum())} scales are not amax/448 ({rounding}), first "
            f"{float(scales[off][0]):g} for amax {float(amax[off][0]):g}"
        )
    return None


def _nearest(tiles: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The e4m3 values nearest to tiles / scales, float64."""
    exact = (tiles / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    _, exponent = torch.frexp(exact)
    step = torch.ldexp(torch.ones_like(exact), (exponent - 1).clamp_min(-6) - 3)
    return torch.round(exact / step) * step


def _value_problem(values: torch.Tensor, scales: torch.Tensor, tiles: torch.Tensor) -> str | None:
    finite = torch.isfinite(tiles)
    lost = finite & ~torch.isfinite(values)
    if bool(lost.any()):
        return f"{int(lost.sum())} finite values became NaN"
    kept = ~finite & torch.isfinite(values)
    if bool(kept.any()):
        return f"{int(kept.sum())} NaN or Inf became finite"
    exact = (tiles / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    best = (_nearest(torch.where(finite, tiles, 0.0), scales) - exact).abs()
    # A quotient rounded to fp32 may fall on the other side of a midpoint, no further.
    slack = exact.abs() * (SLACK - 1)
    off = finite & ((values - exact).abs() > best + slack)
    if bool(off.any()):
        at = off.nonzero()[0].tolist()
        token, tile, k = at
        return (
            f"{int(off.sum())} values are not the nearest e4m3 number, first token {token} tile "
            f"{tile}: {float(values[token, tile, k]):g} for {float(exact[token, tile, k]):g}"
        )
    return None


def _same_bf16(got: torch.Tensor, want: torch.Tensor, name: str) -> str | None:
    rounded = want.to(torch.bfloat16)
    same = (got == rounded) | (torch.isnan(got) & torch.isnan(rounded))
    if bool(same.all()):
        return None
    return f"{name}: {int((~same).sum())} values are not the nearest bf16 number"
