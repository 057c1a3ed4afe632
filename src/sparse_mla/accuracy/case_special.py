"""Cases that no `Draw` describes: large offsets, several calls, hand-made logits, real data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from ..kv_cache import KVCache
from ..kv_layout import get_layout
from .case import Case, Inputs
from .case_inputs import (
    Draw,
    NotRun,
    draw,
    fit_queries,
    made_tokens,
    normal,
    poisoned_cache,
    rng,
)
from .token_bytes import unpack, write_tokens

FREE_BYTES_NEEDED = 6 * 2**30


def _case(
    name: str,
    about: str,
    shows: tuple[str, ...],
    build: Callable[..., list[Inputs]],
    *,
    quick: bool = False,
    **fields: Any,
) -> Case:
    def with_name(seed: int, device: torch.device) -> list[Inputs]:
        return build(seed, name, device, **fields)

    return Case(name, fields.get("op", "decode"), about, shows, with_name, quick=quick)


def room_for_large_cache(device: torch.device) -> None:
    """NotRun if a cache of more than 4 GiB does not fit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if free < FREE_BYTES_NEEDED:
            raise NotRun(f"needs {FREE_BYTES_NEEDED >> 30} GiB free, {device} has {free >> 30}")


def boundary_slots(cache: KVCache) -> torch.Tensor:
    """Slots just below, across and above 2^31 and 2^32 bytes from the cache's start."""
    pages = []
    for limit in (2**31, 2**32):
        at = limit // cache.pages.stride(0)
        pages += [at - 2, at - 1, at, at + 1, at + 2]
    slots = [
        page * cache.page_size + offset
        for page in pages
        for offset in range(0, cache.page_size, max(1, cache.page_size // 4))
    ]
    within = [
        limit // cache.token_stride + step
        for limit in (2**31, 2**32)
        for step in range(-4, 5)
        if cache.page_size * cache.token_stride == cache.pages.stride(0)
    ]
    low = list(range(1, 9))
    return torch.tensor(sorted({s for s in slots + within + low if 0 <= s < cache.num_slots}))


def large_cache(
    layout: str, page_size: int, page_stride: int | None, device: torch.device
) -> KVCache:
    """A cache that ends a little past 2^32 bytes. Memory that is never touched stays virtual."""
    room_for_large_cache(device)
    stride = page_stride or get_layout(layout).page_bytes(page_size)
    pages = 2**32 // stride + 4
    return KVCache.empty(pages, page_size, layout, device=device, page_stride=stride)


def _overflow(
    seed: int,
    name: str,
    device: torch.device,
    *,
    op: str = "decode",
    layout: str = "v32_fp8",
    page_size: int = 64,
    page_stride: int | None = None,
) -> list[Inputs]:
    g = rng(seed, name)
    cache = large_cache(layout, page_size, page_stride, device)
    fields = get_layout(layout)
    slots = boundary_slots(cache)
    spec = Draw(op=op, layout=layout, b=3, s_q=1 if op == "decode" else 3, h=4, topk=len(slots))
    latent = normal(g, len(slots), fields.latent.count)
    tokens = made_tokens(fields, latent, normal(g, len(slots), 64), "log_uniform", g)
    write_tokens(cache, slots, tokens)
    q = normal(g, 3, spec.h, fields.d_qk)
    q = fit_queries(q, unpack(fields, tokens, None), spec, fields)
    indices = torch.stack([slots[torch.randperm(len(slots), generator=g)] for _ in range(3)])
    if op == "decode":
        q, indices = q.unsqueeze(1), indices.unsqueeze(1)
    return [Inputs(op, q.to(device), cache, indices.int().to(device), fields.d_qk**-0.5)]


def _stale(seed: int, name: str, device: torch.device, *, specs: tuple[Draw, ...]) -> list[Inputs]:
    return [draw(spec, seed, f"{name}/{i}", device) for i, spec in enumerate(specs)]


_STALE = Draw(b=4, topk=512, h=8)

TWO_LEVEL = 0.5 + 6 * 2.0**-12
"""A weight that bf16 rounds down by 0.29 %; fp16 holds it exactly."""


def _two_level(seed: int, name: str, device: torch.device, *, layout: str) -> list[Inputs]:
    """One token in 128 has weight 1, the others TWO_LEVEL: their roundings all agree."""
    g = rng(seed, name)
    fields = get_layout(layout)
    spec = Draw(layout=layout, b=4, h=8, topk=256)
    made = draw(replace(spec, logit_std=0.0), seed, name, device)
    count, pages = spec.topk, made.cache.num_pages
    cache = poisoned_cache(pages, spec.page_size, layout, 0, device)
    latent, rope = normal(g, count, 512), torch.zeros(count, 64)
    slots = 1 + torch.randperm(cache.num_slots - 1, generator=g)[:count]
    heavy = torch.arange(0, count, 128)
    rope[heavy, 0] = 1.0
    write_tokens(cache, slots, made_tokens(fields, latent, rope, "log_uniform", g))
    q = torch.zeros(spec.b, 1, spec.h, fields.d_qk, dtype=torch.bfloat16)
    q[..., 512] = 1.0
    rest = torch.tensor([i for i in range(count) if i % 128])
    lines = []
    for _ in range(spec.b):
        order = torch.empty(count, dtype=torch.int64)
        order[heavy] = heavy
        order[rest] = rest[torch.randperm(len(rest), generator=g)]
        lines.append(slots[order])
    indices = torch.stack(lines).unsqueeze(1).int()
    scale = -math.log(TWO_LEVEL)
    return [Inputs("decode", q.to(device), cache, indices.to(device), scale)]


def _very_negative(
    seed: int, name: str, device: torch.device, *, op: str = "decode", layout: str = "v32_fp8"
) -> list[Inputs]:
    """All logits near -6e4: below any finite number that stands for "masked"."""
    spec = Draw(
        op=op,
        layout=layout,
        b=2,
        s_q=2,
        h=4,
        topk=128,
        page_size=64 if op == "decode" else 1,
        logit_mean=6e4,
        holes="random",
    )
    inputs = draw(spec, seed, name, device)
    return [replace(inputs, q=-inputs.q)]


def _nan_query(seed: int, name: str, device: torch.device) -> list[Inputs]:
    """NaN in one query token and in a token that another selects; the others stay clean."""
    inputs = draw(Draw(b=6, h=4, topk=64), seed, name, device)
    inputs.q[1, 0, 2, 17] = float("nan")
    inputs.q[2, 0, 0, 575] = float("inf")
    indices = inputs.indices.clone()
    indices[4, 0, 5] = 0
    return [replace(inputs, indices=indices)]


@lru_cache(maxsize=1)
def _captures() -> list[Any]:
    from . import activations

    try:
        return activations.load()
    except (OSError, ImportError) as error:
        raise NotRun(f"activations cannot be loaded: {error}") from error


def _real(
    seed: int,
    name: str,
    device: torch.device,
    *,
    op: str = "decode",
    layout: str = "v32_fp8",
    scales: str = "amax",
    part: int = 0,
    topk: int = 128,
    queries: int = 8,
) -> list[Inputs]:
    """A language model's queries over its own keys and values, a random subset of the past."""
    from . import activations

    g = rng(seed, name)
    captures = _captures()
    capture = captures[part % len(captures)]
    fields = get_layout(layout)
    if fields.rope is None:
        q, latent = activations.to_mla_without_rope(capture)
        rope = torch.zeros(latent.shape[0], 64)
    else:
        q, latent, rope = activations.to_mla(capture)
    page_size = 64 if op == "decode" else 1
    tokens = latent.shape[0]
    cache = poisoned_cache(-(-(tokens + 2) // page_size) + 1, page_size, layout, 0, device)
    slots = 1 + torch.randperm(cache.num_slots - 1, generator=g)[:tokens]
    write_tokens(cache, slots, made_tokens(fields, latent.float(), rope.float(), scales, g))
    late = torch.argsort(capture.positions)[-max(queries, len(capture.positions) // 2) :]
    late = late[torch.randperm(len(late), generator=g)[:queries]]
    lines = torch.full((len(late), topk), -1, dtype=torch.int64)
    for i, position in enumerate(capture.positions[late].tolist()):
        past = torch.randperm(position + 1, generator=g)[:topk]
        lines[i, : len(past)] = slots[past]
    chosen, indices = q[late].contiguous(), lines.int()
    if op == "decode":
        chosen, indices = chosen.unsqueeze(1), indices.unsqueeze(1)
    return [Inputs(op, chosen.to(device), cache, indices.to(device), capture.scale)]


def _real_cases() -> list[Case]:
    shows = ("scale_pow2_down", "scale_bf16", "scale_neighbour_tile")
    cases = [
        _case(
            f"decode/real/amax/{part}",
            "activations of a language model, fp32 scales",
            shows,
            _real,
            part=part,
            quick=part == 0,
        )
        for part in range(3)
    ]
    cases += [
        _case(
            "decode/real/pow2",
            "the same with power-of-two scales, which hide scale rounding",
            ("scale_neighbour_tile",),
            _real,
            scales="pow2",
            quick=True,
        ),
        _case(
            "decode/real/bf16",
            "activations of a language model, bf16 cache",
            ("rope_not_read",),
            _real,
            layout="bf16",
        ),
        _case(
            "decode/real/bf16_nope",
            "the same as rows without a RoPE part",
            (),
            _real,
            layout="bf16_nope",
        ),
        _case(
            "prefill/real/bf16",
            "activations of a language model, bf16 rows",
            ("rope_not_read",),
            _real,
            op="prefill",
            layout="bf16",
            part=1,
            quick=True,
        ),
    ]
    return cases


_OVERFLOW = ("int32_overflow", "uint32_overflow")

SPECIAL_CASES: tuple[Case, ...] = (
    _case(
        "decode/offsets/packed",
        "tokens either side of 2^31 and 2^32 bytes",
        _OVERFLOW,
        _overflow,
        quick=True,
    ),
    _case(
        "decode/offsets/stride",
        "few pages with a stride of 64 MiB, past 2^32 bytes",
        _OVERFLOW,
        _overflow,
        page_stride=64 * 2**20,
    ),
    _case(
        "decode/offsets/bf16",
        "tokens either side of 2^31 and 2^32 bytes, bf16",
        _OVERFLOW,
        _overflow,
        layout="bf16",
        page_size=16,
    ),
    _case(
        "decode/offsets/v4_fp8",
        "tokens either side of 2^31 and 2^32 bytes, scales after each page's rows",
        _OVERFLOW,
        _overflow,
        layout="v4_fp8",
    ),
    _case(
        "prefill/offsets/bf16",
        "rows either side of 2^31 and 2^32 bytes",
        _OVERFLOW,
        _overflow,
        op="prefill",
        layout="bf16",
        page_size=1,
    ),
    _case(
        "decode/stale/longer",
        "short lengths, then long ones, one metadata object",
        ("stale_metadata", "stale_schedule"),
        _stale,
        quick=True,
        specs=(replace(_STALE, lengths=(3, 70)), replace(_STALE, lengths=(512, 300))),
    ),
    _case(
        "decode/stale/shorter",
        "long lengths, then short ones",
        ("stale_metadata", "topk_length_ignored"),
        _stale,
        specs=(replace(_STALE, lengths=(500, 512)), replace(_STALE, lengths=(64, 1, 0, 130))),
    ),
    _case(
        "decode/stale/valid_counts",
        "no lengths; other places are -1 each time",
        (),
        _stale,
        specs=(replace(_STALE, holes="front"), _STALE, replace(_STALE, holes="most")),
    ),
    _case(
        "decode/logits/two_level",
        "one token in 128 weighs 1, the others 0.50146: bf16 rounds them all down",
        ("sum_rounded", "softmax_scale_ignored"),
        _two_level,
        layout="v32_fp8",
    ),
    _case(
        "decode/logits/two_level/bf16",
        "the same over a bf16 cache",
        ("sum_rounded", "softmax_scale_ignored"),
        _two_level,
        layout="bf16",
    ),
    _case(
        "decode/logits/very_negative",
        "all logits near -6e4, 40 % of entries -1",
        ("finite_sentinel", "finite_maximum"),
        _very_negative,
        quick=True,
    ),
    _case(
        "prefill/logits/very_negative",
        "all logits near -6e4, 40 % of entries -1",
        ("finite_sentinel", "finite_maximum"),
        _very_negative,
        op="prefill",
        layout="bf16",
    ),
    _case(
        "decode/nan/contained",
        "NaN and Inf in two queries and in a selected token: other rows stay clean",
        ("nan_spreads",),
        _nan_query,
    ),
    *_real_cases(),
)
