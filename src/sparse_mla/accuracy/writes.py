"""What the cache writer must have written, and how an answer to op "kv_write" is judged.

The rule: an fp32 scale is amax/448 (within 2 ulp; exactly a power of two where that is asked for),
a ue8m0 scale the power of two above, an e4m3 scale the nearest to amax/6 over the outer scale, and
a token's outer scale amax/2688 (within 2 ulp). Values are the nearest e4m3 or e2m1 number to x over
the scales, saturated, ties to even where the scales are powers of two; a bf16 field is the nearest
bf16 number. NaN and Inf become NaN, in e2m1 with their whole tile. Bytes of every other slot, and
padding, stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..kv_cache import KVCache
from ..kv_layout import KVLayout
from ..kv_quantise import E2M1_MAX, E4M3_MAX, E4M3_TINY, FP32_MIN_NORMAL
from .case import WriteInputs
from .metrics import KEPT_ROWS, Metrics
from .token_bytes import parts, stored_scales, token_bytes, write_tokens

WHOLE_CACHE_BYTES = 64 * 2**20
"""Up to this size every byte that must not change is compared; above it, slots near the writes."""

SCALE_ULPS = 4 * 2.0**-24
SLACK = 1 + 2.0**-20


@dataclass(frozen=True)
class Written:
    """The cache before the call, as far as it is compared: bytes, or the tokens of some slots."""

    storage: torch.Tensor | None
    slots: torch.Tensor
    tokens: torch.Tensor


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
    return Written(storage, near, token_bytes(cache, near).clone())


def judge(inputs: WriteInputs, before: Written) -> Metrics:
    """Hold the cache, after the writer ran, to the rule."""
    cache, layout = inputs.cache, inputs.cache.layout
    slots = inputs.slots.to(torch.int64)
    keep = slots >= 0
    slots = slots[keep]
    tokens = token_bytes(cache, slots)
    rows, _ = parts(layout, tokens)
    counts: dict[str, Any] = {"tokens": int(slots.numel())}
    moved = _touched(inputs, before, slots)
    if moved is not None:
        return Metrics(moved, **counts)

    x = inputs.latent[keep].double()
    if not layout.quantised:
        problem = _same_bf16(layout.latent.read(rows), x, "latent")
        error, ideal, multiples = 0.0, 0.0, torch.zeros(0)
    else:
        problem, power, floor, total = _judge_latent(inputs, tokens, x)
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


def _judge_latent(
    inputs: WriteInputs, tokens: torch.Tensor, x: torch.Tensor
) -> tuple[str | None, torch.Tensor, torch.Tensor, float]:
    """Problem, squared error and its least possible value by token, and the tokens' power."""
    layout, given = inputs.cache.layout, inputs.cache.tensor_scale
    rows, _ = parts(layout, tokens)
    values = layout.latent.read(rows).double()
    outer = torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
    if given is not None:
        outer *= given.double()
    problem = None
    if layout.outer is not None:
        outer = layout.outer.read(rows).double()
        problem = _outer_problem(outer, x)
    stored = stored_scales(layout, tokens)
    scales = torch.ones_like(outer) if stored is None else stored.double()
    shape = (scales.shape[1], -1)
    tiles, values = x.unflatten(1, shape), values.unflatten(1, shape)
    lost = torch.zeros_like(scales, dtype=torch.bool)
    if layout.latent.dtype == "e2m1":
        # No code for NaN: the tile says so by its scale.
        lost = ~torch.isfinite(tiles).all(-1)
        if problem is None and bool((torch.isnan(scales) != lost).any()):
            problem = "scales must be NaN exactly where a tile holds NaN or Inf"
        scales = torch.where(lost, 1.0, scales)
        if problem is None:
            problem = _fp4_scale_problem(scales, tiles, outer, lost)
    elif stored is not None and layout.scales is not None:
        rounding = "pow2" if layout.scales.dtype == "ue8m0" else inputs.scale_rounding
        problem = _scale_problem(scales, tiles, rounding)
    unit = scales * outer
    if problem is None:
        problem = _value_problem(layout, values, unit, tiles, lost)
    finite = torch.isfinite(tiles) & ~lost[..., None]
    want = torch.where(finite, tiles, 0.0)
    diff = torch.where(finite, values * unit[..., None], 0.0) - want
    best = _nearest(layout, want, unit) * unit[..., None] - want
    total = float(want.square().sum()) or 1.0
    return problem, diff.square().sum((1, 2)), best.square().sum((1, 2)), total


def _touched(inputs: WriteInputs, before: Written, slots: torch.Tensor) -> str | None:
    cache = inputs.cache
    changed = (token_bytes(cache, before.slots) != before.tokens).any(1)
    if bool(changed.any()):
        return f"slot {int(before.slots[changed][0])} changed, nothing was written to it"
    if before.storage is None:
        return None
    pages = before.storage.clone().as_strided(
        cache.pages.shape, cache.pages.stride(), cache.pages.storage_offset()
    )
    now = replace(cache, pages=pages)
    write_tokens(now, slots, token_bytes(cache, slots))
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


def _outer_problem(outer: torch.Tensor, x: torch.Tensor) -> str | None:
    amax = torch.where(torch.isfinite(x), x, 0.0).abs().amax(1, keepdim=True)
    bad = ~torch.isfinite(outer) | (outer <= 0)
    if bool(bad.any()):
        return f"{int(bad.sum())} outer scales are not positive and finite"
    want = amax / (E2M1_MAX * E4M3_MAX)
    # Where the smallest tile scale would be subnormal the writer may stay above.
    held = want <= FP32_MIN_NORMAL / E4M3_TINY
    off = (amax > 0) & ((outer / want - 1).abs() > SCALE_ULPS) & ~held
    if bool(off.any()):
        return (
            f"{int(off.sum())} outer scales are not amax/2688, first {float(outer[off][0]):g} for "
            f"amax {float(amax[off][0]):g}"
        )
    return None


def _fp4_scale_problem(
    scales: torch.Tensor, tiles: torch.Tensor, outer: torch.Tensor, lost: torch.Tensor
) -> str | None:
    amax = torch.where(torch.isfinite(tiles), tiles, 0.0).abs().amax(-1)
    want = (amax / E2M1_MAX / outer).clamp(E4M3_TINY, E4M3_MAX)
    best = (_nearest_float(want, 4, -6) - want).abs()
    off = (amax > 0) & ~lost & ((scales - want).abs() > best + want * (SLACK - 1))
    if bool(off.any()):
        return (
            f"{int(off.sum())} scales are not the nearest to amax/6 over the outer scale, first "
            f"{float(scales[off][0]):g} for {float(want[off][0]):g}"
        )
    return None


def _limit(layout: KVLayout) -> float:
    return E2M1_MAX if layout.latent.dtype == "e2m1" else E4M3_MAX


def _nearest(layout: KVLayout, tiles: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The stored values nearest to tiles / unit, float64."""
    exact = (tiles / unit[..., None]).clamp(-_limit(layout), _limit(layout))
    if layout.latent.dtype == "e2m1":
        return _nearest_float(exact, 2, 0)
    return _nearest_float(exact, 4, -6)


def _nearest_float(exact: torch.Tensor, bits: int, least: int) -> torch.Tensor:
    """The nearest float with `bits` significant bits and exponents from `least` on."""
    _, exponent = torch.frexp(exact)
    step = torch.ldexp(torch.ones_like(exact), (exponent - 1).clamp_min(least) - bits + 1)
    return torch.round(exact / step) * step


def _value_problem(
    layout: KVLayout,
    values: torch.Tensor,
    unit: torch.Tensor,
    tiles: torch.Tensor,
    hidden: torch.Tensor,
) -> str | None:
    finite = torch.isfinite(tiles) & ~hidden[..., None]
    lost = finite & ~torch.isfinite(values)
    if bool(lost.any()):
        return f"{int(lost.sum())} finite values became NaN"
    kept = ~torch.isfinite(tiles) & ~hidden[..., None] & torch.isfinite(values)
    if bool(kept.any()):
        return f"{int(kept.sum())} NaN or Inf became finite"
    limit, name = _limit(layout), layout.latent.dtype
    exact = (tiles / unit[..., None]).clamp(-limit, limit)
    nearest = _nearest(layout, torch.where(finite, tiles, 0.0), unit)
    # A quotient rounded to fp32 may fall on the other side of a midpoint, no further.
    slack = exact.abs() * (SLACK - 1)
    off = finite & ((values - exact).abs() > (nearest - exact).abs() + slack)
    # By a power of two it is exact, and midpoints go to the even neighbour.
    by_pow2 = torch.frexp(unit).mantissa == 0.5
    off |= finite & by_pow2[..., None] & (values != nearest)
    if bool(off.any()):
        at = off.nonzero()[0].tolist()
        token, tile, k = at
        return (
            f"{int(off.sum())} values are not the nearest {name} number, first token {token} tile "
            f"{tile}: {float(values[token, tile, k]):g} for {float(exact[token, tile, k]):g}"
        )
    return None


def _same_bf16(got: torch.Tensor, want: torch.Tensor, name: str) -> str | None:
    rounded = want.to(torch.bfloat16)
    same = (got == rounded) | (torch.isnan(got) & torch.isnan(rounded))
    if bool(same.all()):
        return None
    return f"{name}: {int((~same).sum())} values are not the nearest bf16 number"
