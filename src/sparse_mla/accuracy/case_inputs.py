"""Input generators of the gate: one `Draw` describes a call, `draw` makes it from a seed.

Every cache starts as 0xFF bytes, which are NaN in e4m3, bf16 and fp32 alike; then only the tokens
that some query may select are written. So slot 0, unselected rows, page tails and padding poison
any implementation that reads what it must not.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..kv_cache import KVCache
from ..kv_layout import KVLayout, get_layout
from ..kv_quantise import E2M1_MAX, E4M3_MAX
from .case import Inputs
from .token_bytes import joined, unpack, write_tokens

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


class NotRun(Exception):
    """A case cannot run here (memory, missing data). Reported as such, never as passed."""


@dataclass(frozen=True)
class Extra:
    """The second cache of a call: as in `Draw`, which says the rest."""

    layout: str
    topk: int = 64
    page_size: int = 16
    holes: str = "none"
    lengths: tuple[int, ...] | None = None
    page_pad: int = 0


@dataclass(frozen=True)
class Draw:
    """What a call looks like.

    Attributes:
        values: distribution of the tokens, a key of `VALUES`.
        scales: layouts with fp32 scales only: "amax" and "pow2" are the writer's; the others, keys
            of `SCALES`, are written over the writer's own, so the bytes mean other values than
            were drawn.
        logit_std: queries are scaled so that a row's logits have this standard deviation; 0 gives
            q = 0.
        logit_mean: and this mean, by a direction that all keys share (0: none).
        rope_share: share of the logits' variance that comes from the RoPE part; None leaves it as
            drawn.
        holes: which index entries are invalid, a key of `HOLES`.
        lengths: topk_length, cycled over batch (decode) or query tokens (prefill); None for none.
        sink: attn_sink, cycled over heads; None for none.
        repeats_of: each index occurs about this many times.
        page_pad: bytes added to the packed page stride, a multiple of 16.
        row_pad: bytes between a token's row and the next, not in planar layouts.
        base: bytes of the cache's storage before its first page.
        full: every slot holds a token, nothing is poison: wrong reads give numbers, which tell
            more about themselves than NaN.
        extra: decode only: the second cache.
        strided: q is a slice of a larger tensor, indices are slices of longer rows; what lies
            beside them is NaN and valid-looking indices.
        permuted: q and indices are contiguous in another order of dims than their shapes say.
        scale_by: the softmax scale over 1/sqrt(d_qk).
    """

    op: str = "decode"
    layout: str = "v32_fp8"
    b: int = 4
    s_q: int = 1
    h: int = 16
    topk: int = 256
    page_size: int = 64
    values: str = "gaussian"
    scales: str = "amax"
    logit_std: float = 0.8
    logit_mean: float = 0.0
    rope_share: float | None = None
    holes: str = "none"
    lengths: tuple[int, ...] | None = None
    sink: tuple[float, ...] | None = None
    repeats_of: int = 1
    page_pad: int = 0
    row_pad: int = 0
    base: int = 0
    strided: bool = False
    permuted: bool = False
    full: bool = False
    scale_by: float = 1.0
    extra: Extra | None = None

    @property
    def tokens(self) -> int:
        """Query tokens of the call."""
        return self.b * self.s_q if self.op == "decode" else self.s_q


def rng(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for every (seed, name): the same bytes on every device."""
    # The CPU generator keeps 32 bits of its seed, so both must go through the hash.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def normal(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float32)


def uniform(g: torch.Generator, low: float, high: float, *shape: int) -> torch.Tensor:
    return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float32)


def _gaussian(g: torch.Generator, n: int, d: int) -> torch.Tensor:
    return normal(g, n, d)


def _heavy(g: torch.Generator, n: int, d: int) -> torch.Tensor:
    """Student t with 3 degrees of freedom."""
    chi = normal(g, n, d, 3).square().mean(-1).sqrt().clamp_min(1e-3)
    return normal(g, n, d) / chi


def _outlier_channels(g: torch.Generator, n: int, d: int) -> torch.Tensor:
    """A few channels 100 times the others, as residual streams have."""
    x = normal(g, n, d)
    x[:, torch.randperm(d, generator=g)[: max(1, d // 64)]] *= 100
    return x


def _shifted(g: torch.Generator, n: int, d: int) -> torch.Tensor:
    """All tokens share a large mean: errors of single weights cancel, a gain does not."""
    return normal(g, n, d) + 4 * normal(g, 1, d)


def _token_magnitudes(g: torch.Generator, n: int, d: int) -> torch.Tensor:
    return normal(g, n, d) * 10 ** uniform(g, -2, 2, n, 1)


def _tiles(d: int) -> int:
    return -(-d // 128)


def _by_tile(x: torch.Tensor, d: int) -> torch.Tensor:
    """A number for every 128 channels, [n, tiles], repeated to [n, d]."""
    return x.repeat_interleave(min(d, 128), 1)[:, :d]


def _tile_magnitudes(g: torch.Generator, n: int, d: int) -> torch.Tensor:
    """Every 128 channels of every token, or all of fewer, have a magnitude of their own."""
    return normal(g, n, d) * _by_tile(10 ** uniform(g, -2, 2, n, _tiles(d)), d)


def _sparse(g: torch.Generator, n: int, d: int) -> torch.Tensor:
    """A third of the tiles of the tokens are all zero: their scale is arbitrary."""
    x = normal(g, n, d)
    kept = uniform(g, 0, 1, n, _tiles(d)) > 1 / 3
    return x * _by_tile(kept.float(), d)


def _narrow(g: torch.Generator, n: int, d: int) -> torch.Tensor:
    """From 0.4 to 1, of either sign by token: bytes that are numbers in every format."""
    sign = torch.where(uniform(g, 0, 1, n, 1) < 0.5, -1.0, 1.0)
    return sign * uniform(g, 0.4, 1, n, d)


VALUES = {
    "gaussian": _gaussian,
    "heavy_tailed": _heavy,
    "outlier_channels": _outlier_channels,
    "shifted": _shifted,
    "token_magnitudes": _token_magnitudes,
    "tile_magnitudes": _tile_magnitudes,
    "sparse_tiles": _sparse,
    "narrow": _narrow,
    "tiny": lambda g, n, d: 1e-30 * _gaussian(g, n, d),
    "huge": lambda g, n, d: 1e30 * _gaussian(g, n, d),
}


def _log_uniform(g: torch.Generator, n: int, tiles: int) -> torch.Tensor:
    return torch.exp2(uniform(g, -2, 2, n, tiles))


def _wide(g: torch.Generator, n: int, tiles: int) -> torch.Tensor:
    """Scales from 1e-30 to 1e30, alike within a token up to a factor of 4."""
    token = 10.0 ** uniform(g, -30, 30, 1, 1)
    return token * torch.exp2(uniform(g, -2, 2, n, tiles))


def _some_zero(g: torch.Generator, n: int, tiles: int) -> torch.Tensor:
    return torch.where(uniform(g, 0, 1, n, tiles) < 1 / 3, 0.0, _log_uniform(g, n, tiles))


def _bf16_midpoint(side: float, g: torch.Generator, n: int, tiles: int) -> torch.Tensor:
    """Mantissas next to 1 + (k + 1/2) 2^-7, k = 0..3: all round the same way, by up to 2^-8.

    Their magnitudes stay close, so that no row hangs on one token of weight 1: a kernel that
    rounds weight * scale would then round that product as if it were the scale.
    """
    k = torch.randint(0, 4, (n, tiles), generator=g)
    mantissa = 1 + (k + 0.5 + side * 0.02) * 2.0**-7
    exponent = torch.randint(-1, 2, (n, tiles), generator=g)
    return torch.ldexp(mantissa.float(), exponent)


def _pow2_edge(side: float, g: torch.Generator, n: int, tiles: int) -> torch.Tensor:
    """Just below a power of two, or just above one: rounded up or down it doubles or halves."""
    mantissa = uniform(g, 1.98, 1.999, n, tiles) if side < 0 else uniform(g, 1.001, 1.02, n, tiles)
    exponent = torch.randint(-3, 3, (n, tiles), generator=g)
    return torch.ldexp(mantissa, exponent)


SCALES = {
    "log_uniform": _log_uniform,
    "wide": _wide,
    "some_zero": _some_zero,
    "below_bf16_midpoint": lambda g, n, t: _bf16_midpoint(-1, g, n, t),
    "above_bf16_midpoint": lambda g, n, t: _bf16_midpoint(+1, g, n, t),
    "below_pow2": lambda g, n, t: _pow2_edge(-1, g, n, t),
    "above_pow2": lambda g, n, t: _pow2_edge(+1, g, n, t),
}
WRITER_SCALES = ("amax", "pow2")


def poisoned_cache(
    pages: int,
    page_size: int,
    layout: str | KVLayout,
    page_pad: int,
    device: torch.device,
    tensor_scale: torch.Tensor | None = None,
    row_pad: int = 0,
    base: int = 0,
) -> KVCache:
    """A cache whose every byte, padding included, is 0xFF; the rest is as in `Draw`."""
    layout = get_layout(layout)
    row = layout.row_bytes if layout.planar else layout.row_bytes + row_pad
    packed = layout.page_bytes(page_size) if layout.planar else page_size * row
    # Packed pages of some planar layouts are no multiple of 16.
    stride = -(-(packed + page_pad) // 16) * 16
    scale = None if tensor_scale is None else tensor_scale.to(device)
    storage = torch.full((base + pages * stride,), 0xFF, dtype=torch.uint8, device=device)
    view = storage.as_strided((pages, packed), (stride, 1), base)
    return KVCache(view, page_size, layout, row, scale)


def scale_for(layout: KVLayout, latent: torch.Tensor) -> torch.Tensor | None:
    """The scale of a whole tensor that suits these tokens, None where the layout has none."""
    if not layout.tensor_scale:
        return None
    top = E4M3_MAX if layout.latent.dtype == "e4m3" else E2M1_MAX * E4M3_MAX
    amax = latent.abs().amax() if latent.numel() else latent.new_ones(())
    return (amax / top).clamp_min(1e-35).view(1)


def made_tokens(
    layout: KVLayout,
    latent: torch.Tensor,
    rope: torch.Tensor,
    scales: str,
    g: torch.Generator,
    tensor_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bytes of tokens [n, row + footer], with the writer's scales or scales drawn over them."""
    rounding = scales if scales in WRITER_SCALES else "amax"
    packed = layout.pack(latent, rope if layout.rope else None, rounding, tensor_scale)
    if scales not in WRITER_SCALES and layout.scales is not None and layout.quantised:
        # The e4m3 values then fill their range whatever was drawn; unit rms needs 1/150 or so.
        made = SCALES[scales](g, latent.shape[0], layout.scales.count)
        layout.scales.write(packed[layout.planar], made / 128)
    return joined(*packed)


@dataclass(frozen=True)
class _Values:
    """Tokens before they are stored: where they and all others will lie, and their numbers."""

    pages: int
    live: torch.Tensor
    dead: torch.Tensor
    latent: torch.Tensor
    rope: torch.Tensor


@dataclass(frozen=True)
class _Tokens:
    """A cache with tokens in it: their slots, all other slots, and what the tokens mean."""

    cache: KVCache
    live: torch.Tensor
    dead: torch.Tensor
    keys: torch.Tensor


def _drawn(spec: Draw, g: torch.Generator) -> _Values:
    """Half again as many tokens as a list of `spec` has."""
    layout = get_layout(spec.layout)
    distinct = -(-spec.topk // spec.repeats_of)
    live_count = distinct + distinct // 2 + 4
    pages = -(-(2 * live_count + 2) // spec.page_size) + 1
    slots = pages * spec.page_size
    # The last slot is always live: the largest valid index is a boundary too.
    order = 1 + torch.randperm(slots - 2, generator=g)
    live = torch.cat([torch.tensor([slots - 1]), order[: live_count - 1]])
    latent = VALUES[spec.values](g, live_count, layout.latent.count)
    rope = VALUES[spec.values](g, live_count, 64)
    return _Values(pages, live, order[live_count - 1 :], latent, rope)


def _stored(
    spec: Draw,
    values: _Values,
    shared: torch.Tensor | None,
    g: torch.Generator,
    device: torch.device,
) -> _Tokens:
    """A cache that holds the tokens; `shared` [d_qk] is added to all of them."""
    layout = get_layout(spec.layout)
    latent, rope = values.latent, values.rope
    if shared is not None:
        latent = latent + shared[: latent.shape[1]]
        rope = rope + shared[layout.d_qk - 64 :]
    scale = scale_for(layout, latent)
    cache = poisoned_cache(
        values.pages,
        spec.page_size,
        layout,
        spec.page_pad,
        device,
        scale,
        spec.row_pad,
        spec.base,
    )
    tokens = made_tokens(layout, latent, rope, spec.scales, g, scale)
    write_tokens(cache, values.live, tokens)
    if spec.full:
        rest = torch.cat([torch.zeros(1, dtype=torch.int64), values.dead])
        again = torch.randint(0, len(tokens), (len(rest),), generator=g)
        write_tokens(cache, rest, tokens[again])
    return _Tokens(cache, values.live, values.dead, unpack(layout, tokens, scale))


def _lists(
    spec: Draw, made: _Tokens, lengths: torch.Tensor | None, g: torch.Generator
) -> torch.Tensor:
    """Index lists [tokens, topk] int32 of the tokens in a cache."""
    distinct = -(-spec.topk // spec.repeats_of)
    picks = torch.rand(spec.tokens, len(made.live), generator=g).argsort(1)[:, :distinct]
    if spec.repeats_of > 1:
        again = torch.randint(0, max(distinct, 1), (spec.tokens, spec.topk), generator=g)
        picks = picks.gather(1, again)
    indices = made.live[picks][:, : spec.topk]
    indices = HOLES[spec.holes](g, indices, made.cache.num_slots).to(torch.int32)
    if lengths is not None:
        # Entries past the length look valid and point at poison.
        per_token = lengths.repeat_interleave(spec.s_q if spec.op == "decode" else 1)
        beyond = torch.arange(spec.topk) >= per_token[:, None]
        poison = made.dead[torch.arange(spec.topk) % made.dead.numel()].to(torch.int32)
        indices = torch.where(beyond, poison, indices)
    return indices


def draw(spec: Draw, seed: int, name: str, device: torch.device) -> Inputs:
    """Make the call that `spec` describes; the same bytes for the same (spec, seed, name)."""
    g = rng(seed, name)
    layout = get_layout(spec.layout)
    rows_of_lengths = spec.b if spec.op == "decode" else spec.s_q
    values = _drawn(spec, g)
    q = normal(g, spec.tokens, spec.h, layout.d_qk)
    shared = None
    if spec.logit_mean:
        shared = normal(g, layout.d_qk)
        q = 0.2 * q + shared
    made = _stored(spec, values, shared, g, device)
    lengths = cycle(spec.lengths, rows_of_lengths, torch.int32)
    indices = _lists(spec, made, lengths, g)
    keys = made.keys
    extras: dict[str, Any] = {}
    if spec.extra is not None:
        beside = spec.extra
        other = replace(
            spec,
            layout=beside.layout,
            topk=beside.topk,
            page_size=beside.page_size,
            holes=beside.holes,
            page_pad=beside.page_pad,
            repeats_of=1,
        )
        extra = _stored(other, _drawn(other, g), shared, g, device)
        keys = torch.cat([keys, extra.keys])
        extra_lengths = cycle(beside.lengths, spec.b, torch.int32)
        lists = _lists(other, extra, extra_lengths, g).view(spec.b, spec.s_q, beside.topk)
        if spec.strided:
            lists = _wide_lists(lists, int(extra.live[0]))
        if spec.permuted:
            lists = permuted(lists)
        extras = {
            "extra_cache": extra.cache,
            "extra_indices": move(lists, device),
            "extra_topk_length": None if extra_lengths is None else extra_lengths.to(device),
        }
    q = fit_queries(q, keys, spec, layout)
    shape = (spec.b, spec.s_q) if spec.op == "decode" else (spec.s_q,)
    q = q.view(*shape, spec.h, layout.d_qk)
    indices = indices.view(*shape, spec.topk)
    if spec.strided:
        q, indices = _wide_queries(q), _wide_lists(indices, int(made.live[0]))
    if spec.permuted:
        q, indices = permuted(q), permuted(indices)
    sink = cycle(spec.sink, spec.h, torch.float32)
    return Inputs(
        op=spec.op,
        q=move(q, device),
        cache=made.cache,
        indices=move(indices, device),
        scale=layout.d_qk**-0.5 * spec.scale_by,
        topk_length=None if lengths is None else lengths.to(device),
        attn_sink=None if sink is None else sink.to(device),
        **extras,
    )


def fit_queries(q: torch.Tensor, keys: torch.Tensor, spec: Draw, layout: KVLayout) -> torch.Tensor:
    """bf16 queries [n, h, d] scaled so that the logits over `keys` are as `spec` asks."""
    if spec.logit_std == 0:
        return torch.zeros_like(q, dtype=torch.bfloat16)
    q = q.double()
    scale = layout.d_qk**-0.5
    if spec.rope_share is not None and layout.rope is not None:
        split = layout.latent.count
        for part, share in ((slice(0, split), 1 - spec.rope_share), (slice(split, None), 1.0)):
            spread = _spread(q[..., part] @ keys[:, part].T * scale)
            target = share if part.start == 0 else spec.rope_share
            q[..., part] *= math.sqrt(target) / spread
    logits = q @ keys.T * scale
    spread = _spread(logits)
    if spec.logit_mean:
        q *= spec.logit_mean / logits.mean(-1, keepdim=True).abs().clamp_min(1e-300)
    else:
        q *= spec.logit_std / spread
    return q.to(torch.bfloat16)


def _spread(logits: torch.Tensor) -> torch.Tensor:
    """Standard deviation over all heads and tokens, 1 where there is none."""
    std = logits.std(correction=0) if logits.numel() else logits.new_zeros(())
    return torch.where(std > 0, std, 1.0)


def cycle(values: tuple[float, ...] | None, count: int, dtype: torch.dtype) -> torch.Tensor | None:
    """`values` repeated to `count` entries."""
    if values is None:
        return None
    return torch.tensor([values[i % len(values)] for i in range(count)], dtype=dtype)


def move(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device, keeping strides: `.to` would make a slice contiguous."""
    if x.device == device or x.is_contiguous():
        return x.to(device)
    span = 1 + sum((s - 1) * stride for s, stride in zip(x.shape, x.stride(), strict=True))
    flat = x.as_strided((span,), (1,)).to(device)
    return flat.as_strided(x.shape, x.stride())


def _wide_queries(q: torch.Tensor) -> torch.Tensor:
    """The same queries as a slice of a larger tensor whose other entries are NaN."""
    *lead, h, d = q.shape
    wide = torch.full((*lead, h + 3, d + 64), float("nan"), dtype=q.dtype)
    wide[..., :h, :d] = q
    return wide[..., :h, :d]


def _wide_lists(indices: torch.Tensor, valid: int) -> torch.Tensor:
    """The same lists as slices of longer ones that go on with a valid index."""
    width = indices.shape[-1]
    wide = torch.full((*indices.shape[:-1], width + 37), valid, dtype=torch.int32)
    wide[..., :width] = indices
    return wide[..., :width]


def permuted(x: torch.Tensor) -> torch.Tensor:
    """The same tensor with its dims but the last in memory the other way round."""
    order = (*range(x.dim() - 2, -1, -1), x.dim() - 1)
    return x.permute(order).contiguous().permute(order)


def _none(g: torch.Generator, x: torch.Tensor, slots: int) -> torch.Tensor:
    return x


def _front(g: torch.Generator, x: torch.Tensor, slots: int) -> torch.Tensor:
    x[:, : max(1, x.shape[1] * 3 // 8)] = -1
    return x


def _middle(g: torch.Generator, x: torch.Tensor, slots: int) -> torch.Tensor:
    x[:, x.shape[1] // 4 : x.shape[1] * 3 // 4] = -1
    return x


def _random(g: torch.Generator, x: torch.Tensor, slots: int) -> torch.Tensor:
    return torch.where(torch.rand(x.shape, generator=g) < 0.4, -1, x)


def _chunk(g: torch.Generator, x: torch.Tensor, slots: int) -> torch.Tensor:
    """The second 64 entries are -1; every other row loses its first 64 instead."""
    x[0::2, 64:128] = -1
    x[1::2, 0:64] = -1
    return x


def _most(g: torch.Generator, x: torch.Tensor, slots: int) -> torch.Tensor:
    """Only one entry in 50 is left, none of the first 64, and the last one."""
    keep = torch.rand(x.shape, generator=g) < 0.02
    keep[:, :64] = False
    keep[:, -1:] = True
    return torch.where(keep, x, -1)


def _large(g: torch.Generator, x: torch.Tensor, slots: int) -> torch.Tensor:
    bad = torch.tensor([INT_MAX, slots, slots + 1, slots + 64, 2**30])
    return _sprinkle(g, x, bad)


def _negative(g: torch.Generator, x: torch.Tensor, slots: int) -> torch.Tensor:
    return _sprinkle(g, x, torch.tensor([INT_MIN, -2, -64, -slots, -(2**30)]))


def _sprinkle(g: torch.Generator, x: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
    pick = bad[torch.randint(0, bad.numel(), x.shape, generator=g)]
    return torch.where(torch.rand(x.shape, generator=g) < 0.3, pick, x)


def _some_rows_empty(g: torch.Generator, x: torch.Tensor, slots: int) -> torch.Tensor:
    x[1::2] = -1
    return x


def _all_rows_empty(g: torch.Generator, x: torch.Tensor, slots: int) -> torch.Tensor:
    return torch.full_like(x, -1)


HOLES = {
    "none": _none,
    "front": _front,
    "middle": _middle,
    "random": _random,
    "chunk": _chunk,
    "most": _most,
    "large": _large,
    "negative": _negative,
    "some_rows_empty": _some_rows_empty,
    "all_rows_empty": _all_rows_empty,
}
